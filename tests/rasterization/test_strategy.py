"""Densification on the CPU: gsplat's strategies on our `info`, and our relocation."""

import math

import pytest
import torch

from fit3d_ns.rasterization import compute_covariances, compute_relocation, rasterization
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
            norms = ((gradient * size).norm(dim=-1) * (info["radii"] > 0)).sum(dim=0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        strategy.step_post_backward(params, optimizers, state, step, info)
        if step == 1:
            torch.testing.assert_close(state["grad2d"], norms)
    assert len(params["means"]) > 60
    assert {len(value) for value in params.values()} == {len(params["means"])}


def _binomials(n_max):
    return torch.tensor([[float(math.comb(n, k)) for k in range(n_max)] for n in range(n_max)])


def test_compute_relocation__agrees_with_the_double_sum():
    opacities = torch.tensor([0.05, 0.4, 0.9, 0.6])
    scales = torch.rand(4, 3) + 0.1
    ratios = torch.tensor([1, 2, 5, 12])
    new_opacities, new_scales = compute_relocation(opacities, scales, ratios.clone(), _binomials(51))
    for o, n, new_o, factor in zip(
        opacities.tolist(), ratios.tolist(), new_opacities.tolist(), (new_scales / scales).tolist(), strict=True
    ):
        o_new = 1 - (1 - o) ** (1 / n)
        total = sum(
            math.comb(i - 1, k) * (-1) ** k * o_new ** (k + 1) / math.sqrt(k + 1)
            for i in range(1, n + 1)
            for k in range(i)
        )
        assert new_o == pytest.approx(o_new, rel=1e-5)
        assert factor == pytest.approx([o / total] * 3, rel=1e-5)


def test_compute_relocation__keeps_a_single_gaussian_and_the_light_through_copies():
    opacities, scales = torch.rand(20) * 0.9 + 0.05, torch.rand(20, 3)
    same_opacities, same_scales = compute_relocation(
        opacities, scales, torch.ones(20, dtype=torch.int64), _binomials(51)
    )
    torch.testing.assert_close(same_opacities, opacities)
    torch.testing.assert_close(same_scales, scales)
    # What n copies let through at their centre is what one Gaussian let through.
    split, _ = compute_relocation(opacities, scales, torch.full((20,), 7), _binomials(51))
    torch.testing.assert_close((1 - split) ** 7, 1 - opacities)


def test_compute_relocation__clamps_ratios_in_place_as_gsplat_does():
    ratios = torch.tensor([0, 99])
    new_opacities, _ = compute_relocation(torch.tensor([0.5, 0.5]), torch.ones(2, 3), ratios, _binomials(10))
    assert ratios.tolist() == [1, 10]
    torch.testing.assert_close(new_opacities, torch.tensor([0.5, 1 - 0.5**0.1]))


def test_compute_covariances__agree_with_sampled_points():
    quats, scales = torch.tensor([[0.9, 0.1, -0.3, 0.2]]), torch.tensor([[0.5, 1.0, 2.0]])
    covariance = compute_covariances(quats, scales)[0]
    eigenvalues = torch.linalg.eigvalsh(covariance)
    torch.testing.assert_close(eigenvalues, scales[0].square())
    # A quarter turn around z carries the first axis onto the second.
    turn = torch.tensor([[math.cos(math.pi / 4), 0, 0, math.sin(math.pi / 4)]])
    torch.testing.assert_close(compute_covariances(turn, scales)[0], torch.diag(torch.tensor([1.0, 0.25, 4.0])))
