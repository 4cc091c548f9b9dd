from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fit3d_ns.lifting import LiftConfig, solve_features
from tests.lifting.lifting_scene import create_gaussians, create_views

# A firm ridge: nearly collinear taps would amplify the rounding of sums that are made in another order.
CONFIG = LiftConfig(
    feature_dim=3, max_passes=4, tolerance=1e-7, decoder_ridge=0.1, samples_per_patch=2, seconds_per_checkpoint=0.0
)


class Interrupt(Exception):
    pass


def lift_as_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    group = dist.group.WORLD
    gaussians, views = create_gaussians(), create_views(5)
    result = solve_features(gaussians, views, CONFIG, group=group)
    torch.save((result.features, result.decoder.matrix, result.num_views), f"{folder}/whole_{rank}.pt")

    def interrupt(name: str, done: int, total: int) -> None:
        if name == "solve 3" and done == 1:
            raise Interrupt

    state_path = Path(folder) / "lift.state"
    try:
        solve_features(gaussians, views, CONFIG, group=group, state_path=state_path, progress=interrupt)
    except Interrupt:
        dist.barrier()
    assert state_path.exists()
    resumed = solve_features(gaussians, views, CONFIG, group=group, state_path=state_path)
    torch.save((resumed.features, resumed.decoder.matrix, resumed.num_views), f"{folder}/resumed_{rank}.pt")
    dist.destroy_process_group()


def test_solve_features__two_processes_equal_one(tmp_path):
    mp.spawn(lift_as_one_of_two, args=(str(tmp_path),), nprocs=2)
    alone = solve_features(create_gaussians(), create_views(5), CONFIG)
    first = torch.load(tmp_path / "whole_0.pt")
    for name in ("whole_1", "resumed_0", "resumed_1"):
        for mine, theirs in zip(first, torch.load(tmp_path / f"{name}.pt"), strict=True):
            assert torch.equal(mine, theirs), name
    # Sums over views are rounded in another order, and four steps of the solver carry that on.
    torch.testing.assert_close(first[0], alone.features, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first[1], alone.decoder.matrix, rtol=1e-3, atol=1e-4)
    assert torch.equal(first[2], alone.num_views)
