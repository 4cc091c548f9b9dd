import pytest
import torch

from fit3d_ns.data.images import load_depth, save_depth
from fit3d_ns.probing.head_probe import choose_depth_units


@pytest.mark.parametrize(("max_depth", "step"), [(10.0, 1e-3), (80.0, 1 / 256)])
def test_depth_map__keeps_depths_up_to_the_largest(tmp_path, max_depth: float, step: float) -> None:
    depth = torch.tensor([[0.0, 1.234], [max_depth / 2, max_depth]])
    units = choose_depth_units(max_depth)
    save_depth(depth, tmp_path / "depth.png", units)
    torch.testing.assert_close(load_depth(tmp_path / "depth.png", units), depth, rtol=0.0, atol=0.51 * step)
