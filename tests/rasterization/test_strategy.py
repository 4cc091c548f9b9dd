"""Densification on the CPU: gsplat's strategies on our `info`."""

import pytest
import torch

from fit3d_ns.rasterization import rasterization
from tests.rasterization.rasterization_scenes import make_scene


def _parameters(scene):
    params = torch.nn.ParameterDict({
        "means": scene.means.clone(),
        "quats": scene.quats.clone(),
        "scales": scene.scales.log(),
        "opacities": torch.logit(scene.opacities),
        "colors": torch.rand(len(scene.means), 3, generator=torch.Generator().manual_seed(0)),
        "features": scene.features.clone(),
    })  # fmt: skip
    optimizers = {name: torch.optim.Adam([value], lr=1e-3) for name, value in params.items()}
    return params, optimizers


@pytest.mark.parametrize("absgrad", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_default_strategy__densifies_on_cpu(backend, absgrad):
    strategy_module = pytest.importorskip("gsplat.strategy")
    scene = make_scene(num_gaussians=60, num_cameras=2)
    params, optimizers = _parameters(scene)
    strategy = strategy_module.DefaultStrategy(
        refine_start_iter=0, refine_every=2, pause_refine_after_reset=0, grow_grad2d=1e-7, absgrad=absgrad,
        reset_every=100, refine_scale2d_stop_iter=50,
    )  # fmt: skip
    strategy.check_sanity(params, optimizers)
    state = strategy.initialize_state(scene_scale=1.0)
    torch.manual_seed(0)
    for step in range(1, 3):
        image, _, info = rasterization(
            params["means"], params["quats"], params["scales"].exp(), params["opacities"].sigmoid(), params["colors"],
            scene.viewmats, scene.Ks, scene.width, scene.height, absgrad=absgrad, backend=backend,
        )  # fmt: skip
        strategy.step_pre_backward(params, optimizers, state, step, info)
        (image - 0.5).square().sum().backward()
        # What the strategy adds up, from the definition: gradients in units of half the image, visible cameras alone.
        if step == 1:
            gradient = info["means2d"].absgrad if absgrad else info["means2d"].grad
            size = torch.tensor([scene.width, scene.height]) / 2 * 2
            # gsplat 1.5 wants a radius for each image axis.
            is_seen = (info["radii"] > 0).reshape(*gradient.shape[:2], -1).all(dim=-1)
            norms = ((gradient * size).norm(dim=-1) * is_seen).sum(dim=0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        strategy.step_post_backward(params, optimizers, state, step, info)
        if step == 1:
            torch.testing.assert_close(state["grad2d"], norms)
    assert len(params["means"]) > 60
    assert {len(value) for value in params.values()} == {len(params["means"])}
