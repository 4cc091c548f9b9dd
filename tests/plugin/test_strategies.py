"""Relocation of dead Gaussians: equation 9 of the MCMC paper against its double sum."""

import math

import pytest
import torch
from gsplat.strategy import DefaultStrategy

from fit3d_ns.plugin.model_config import FeatureSplatfactoModelConfig
from fit3d_ns.plugin.strategies import InriaStrategy, compute_covariances, compute_relocation, create_strategy


def _binomials(n_max):
    return torch.tensor([[float(math.comb(n, k)) for k in range(n_max)] for n in range(n_max)])


def test_compute_relocation__agrees_with_the_double_sum():
    opacities = torch.tensor([0.05, 0.4, 0.9, 0.6])
    scales = torch.rand(4, 3) + 0.1
    ratios = torch.tensor([1, 2, 5, 12])
    new_opacities, new_scales = compute_relocation(opacities, scales, ratios, _binomials(51))
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


def test_compute_relocation__takes_ratios_as_gsplat_does_between_one_and_the_table():
    new_opacities, _ = compute_relocation(
        torch.tensor([0.5, 0.5]), torch.ones(2, 3), torch.tensor([0, 99]), _binomials(10)
    )
    torch.testing.assert_close(new_opacities, torch.tensor([0.5, 1 - 0.5**0.1]))


def test_compute_covariances__are_those_of_turned_axes():
    # A quarter turn about z, by a quaternion of any length, exchanges the variances along x and y.
    covariances, _ = compute_covariances(torch.tensor([[3.0, 0.0, 0.0, 3.0]]), torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(covariances, torch.diag(torch.tensor([4.0, 1.0, 9.0]))[None])


def test_create_strategy__of_the_public_code_neither_resets_at_the_start_nor_pauses(monkeypatch):
    config = FeatureSplatfactoModelConfig(pause_after_reset=False)
    config.resolve_steps(30_000)
    strategy = create_strategy(config, num_views=64)
    assert isinstance(strategy, InriaStrategy) and strategy.pause_refine_after_reset == 0
    steps = []
    monkeypatch.setattr(DefaultStrategy, "step_post_backward", lambda self, p, o, s, step, *rest: steps.append(step))
    for step in range(3):
        strategy.step_post_backward({}, {}, {}, step, {})
    assert steps == [1, 2]
    config.pause_after_reset = True
    usual = create_strategy(config, num_views=64)
    assert type(usual) is DefaultStrategy and usual.pause_refine_after_reset == 64 + config.refine_every
