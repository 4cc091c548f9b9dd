"""Losses, anchors and weight mixtures against loops and closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fit3d_ns.features import create_token_model
from fit3d_ns.finetuning.config import PAPER
from fit3d_ns.finetuning.losses import (
    StepTotals,
    compute_l1_sum,
    compute_l2_sp,
    compute_token_anchors,
    invert_norm,
)
from fit3d_ns.finetuning.optimization import (
    AnchorConfig,
    OptimizationConfig,
    TokenOutputs,
    TrainableConfig,
    TrainedBackbone,
    interpolate_weights,
)
from tests.finetuning.finetuning_scene import BACKBONE

B, P, E = 2, 5, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_l1__matches_loops():
    tokens, targets, weights = draw(B, P, E), draw(B, P, E, seed=1), torch.rand(B, P)
    l1 = np.zeros(B)
    for b in range(B):
        for p in range(P):
            one, other = tokens[b, p].numpy(), targets[b, p].numpy()
            l1[b] += float(weights[b, p]) * sum(abs(one[e] - other[e]) for e in range(E)) / E
    np.testing.assert_allclose(compute_l1_sum(tokens, targets, weights).numpy(), l1, rtol=1e-5)


def test_l1__tokens_without_weight_do_not_count_whatever_they_are():
    tokens, targets, weights = draw(1, 3, E).requires_grad_(), draw(1, 3, E, seed=1), torch.tensor([[1.0, 0.0, 0.5]])
    targets[0, 1] = float("nan")
    total = compute_l1_sum(tokens, targets, weights).sum()
    total.backward()
    assert bool(torch.isfinite(total)) and float(tokens.grad[0, 0].abs().sum()) > 0
    assert torch.equal(tokens.grad[0, 1], torch.zeros(E))


def test_l1__is_taken_in_float32_for_half_precision_tokens():
    tokens = torch.full((1, 1, E), 300.0, dtype=torch.bfloat16)
    targets = torch.full((1, 1, E), 300.5)
    assert compute_l1_sum(tokens, targets, torch.ones(1, 1)).item() == pytest.approx(0.5)


@pytest.mark.parametrize("affine", [True, False])
def test_invert_norm__norm_undoes_it(affine):
    norm = nn.LayerNorm(8, elementwise_affine=affine).double()
    if affine:
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias)
    unnormed = draw(3, 8).double() * 4 + 2
    # The norm's own output leads back to where it came from.
    torch.testing.assert_close(invert_norm(norm(unnormed).detach(), unnormed, norm), unnormed.float())
    # Any normed token that the norm can give is reached, with the given token's mean and deviation.
    reachable = norm(draw(3, 8, seed=5).double()).detach()
    moved = invert_norm(reachable, unnormed, norm)
    torch.testing.assert_close(norm(moved.double()).float(), reachable.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved.mean(dim=-1), unnormed.mean(dim=-1).float(), rtol=1e-4, atol=1e-4)


def test_invert_norm__silenced_channels_keep_the_original():
    norm = nn.LayerNorm(4)
    with torch.no_grad():
        norm.weight[2] = 0.0
    unnormed = draw(2, 4)
    moved = invert_norm(norm(unnormed).detach(), unnormed, norm)
    torch.testing.assert_close(moved, unnormed)


def test_anchors__are_the_written_means():
    outputs = TokenOutputs(draw(B, P, E), draw(B, P, E, seed=1), draw(B, 2, E, seed=2), draw(B, 2, E, seed=3))
    original = TokenOutputs(*(draw(*value.shape, seed=10 + index) for index, value in enumerate(outputs[:4])))
    targets, weights, norm = draw(B, P, E, seed=20), torch.rand(B, P), nn.LayerNorm(E)
    totals = StepTotals(weight=2 * float(weights.sum()), num_tokens=2.0 * B * P, num_images=2.0 * B)

    def compute(**strengths):
        config = AnchorConfig(**strengths)
        return float(compute_token_anchors(outputs, original, targets, weights, config, totals, norm))

    # Totals say that another process holds as much again, so this one's share is half of the mean.
    feature = float((outputs.patch_tokens - original.patch_tokens).abs().mean()) / 2
    prefix = float((outputs.prefix_tokens - original.prefix_tokens).abs().mean()) / 2
    prefix += float((outputs.unnormed_prefix_tokens - original.unnormed_prefix_tokens).abs().mean()) / 2
    moved = invert_norm(targets, original.unnormed_patch_tokens, norm)
    distance = (outputs.unnormed_patch_tokens - moved).abs().mean(dim=-1)
    pre_norm = float((distance * weights).sum() / totals.weight)
    assert compute(feature_anchor=2.0) == pytest.approx(2 * feature, rel=1e-5)
    assert compute(prefix_anchor=1.0) == pytest.approx(prefix, rel=1e-5)
    assert compute(pre_norm=0.5) == pytest.approx(0.5 * pre_norm, rel=1e-5)
    assert compute() == 0.0


def test_l2_sp__pulls_trained_parameters_back():
    layer = nn.Linear(3, 2)
    original = {name: value.detach().clone() + 0.5 for name, value in layer.named_parameters()}
    layer.bias.requires_grad_(False)
    compute_l2_sp(layer, original, 4.0).backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((2, 3), -2.0))
    assert layer.bias.grad is None


def test_interpolate_weights__is_exact_at_both_ends():
    one, other = {"a": draw(5), "count": torch.tensor(3)}, {"a": draw(5, seed=1), "count": torch.tensor(3)}
    assert torch.equal(interpolate_weights(one, other, 0.0)["a"], one["a"])
    assert torch.equal(interpolate_weights(one, other, 1.0)["a"], other["a"])
    torch.testing.assert_close(interpolate_weights(one, other, 0.25)["a"], 0.75 * one["a"] + 0.25 * other["a"])


def test_learning_rate__warms_up_and_falls_as_written():
    config = OptimizationConfig(learning_rate=2.0, schedule="cosine", warmup_fraction=0.1)
    rates = [config.compute_learning_rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0)
    for step in range(10, 100):
        assert rates[step] == pytest.approx(1.0 + math.cos(math.pi * (step - 10) / 90))
    constant = OptimizationConfig(learning_rate=2.0)
    assert {constant.compute_learning_rate(step, 100) for step in range(100)} == {2.0}


def test_learning_rate__of_the_public_code_drops_after_the_first_epoch():
    """torch's own MultiStepLR, stepped once an epoch as the public code steps it (Table 8)."""
    paper = replace(PAPER.optimization, epochs=3.0)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=paper.learning_rate)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])
    for epoch in range(3):
        for step in range(5):
            found = paper.compute_learning_rate(5 * epoch + step, 15, steps_per_epoch=5)
            assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()
    # A run of one epoch is recorded as it always was, so that it goes on where it stopped.
    assert PAPER.decisive["optimization"]["schedule"] == "constant"
    longer = replace(PAPER.optimization, max_steps=1000)
    for optimization in (paper, longer, replace(PAPER.optimization, epochs=None)):
        assert replace(PAPER, optimization=optimization).decisive["optimization"]["schedule"] == "step"


def test_count_steps__counts_whole_steps_of_all_processes():
    config = OptimizationConfig(batch_size=2, accumulation_steps=3, epochs=2.0)
    assert config.count_steps(num_images=25, num_processes=2) == 50 // 12
    assert OptimizationConfig(max_steps=7, epochs=3.0).count_steps(25, 1) == 7
    # The paper's run: 140,451 images in batches of 2.
    assert OptimizationConfig(epochs=1.0).count_steps(140451, 1) == 70225
    assert OptimizationConfig(min_steps=400).count_steps(140451, 1) == 70225
    assert OptimizationConfig(min_steps=400).count_steps(56, 1) == 400
    with pytest.raises(ValueError, match="make no step"):
        config.count_steps(num_images=2, num_processes=1)


def test_averages__are_the_weighted_sums_of_all_weights():
    optimization = OptimizationConfig(ema_decay=0.9)
    backbone = TrainedBackbone(create_token_model(BACKBONE), None, TrainableConfig(), AnchorConfig(), optimization)
    name, weight = next((name, value) for name, value in backbone.bare.named_parameters() if value.requires_grad)
    expected = 0.9**3 * weight.detach() + 0.1 * (0.81 * 1.0 + 0.9 * 2.0 + 4.0)
    for value in (1.0, 2.0, 4.0):
        nn.init.constant_(weight, value)
        backbone.update_averages()
    torch.testing.assert_close(backbone.averages[name], expected)
    backbone.swap_averages()
    torch.testing.assert_close(weight.detach(), expected)
    backbone.swap_averages()
    assert bool((weight == 4.0).all())
