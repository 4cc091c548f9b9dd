"""Losses of the depth probe against closed forms."""

import math

import pytest
import torch

from fit3d_ns.probing.depth import EPSILON, compute_gradient_loss, compute_sig_loss
from fit3d_ns.probing.heads import DepthBins


def draw_depth(seed: int, count: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predictions, targets = 0.5 + 3 * torch.rand(2, count, 5, 6, generator=generator, dtype=torch.float64)
    return predictions, targets, torch.rand(count, 5, 6, generator=generator) < 0.7


def test_sig_loss__equals_its_formula_in_groups() -> None:
    predictions, targets, valid = draw_depth(0)
    loss = compute_sig_loss(predictions, targets, valid, images_per_group=2, is_warming_up=False)
    expected = 0.0
    for start in (0, 2):
        logs = [
            math.log(float(p) + EPSILON) - math.log(float(d) + EPSILON)
            for p, d, v in zip(
                predictions[start : start + 2].flatten(),
                targets[start : start + 2].flatten(),
                valid[start : start + 2].flatten(),
                strict=True,
            )
            if v
        ]
        mean = sum(logs) / len(logs)
        variance = sum((value - mean) ** 2 for value in logs) / (len(logs) - 1)
        expected += math.sqrt(variance + 0.15 * mean**2)
    assert float(loss.total) == pytest.approx(expected, rel=1e-9) and float(loss.count) == 2


def test_sig_loss__warm_up_sees_the_mean_alone() -> None:
    _, targets, valid = draw_depth(1)
    # A common factor k gives g = log k everywhere, as long as epsilon is small beside the depth.
    loss = compute_sig_loss(targets * 1.5, targets, valid, images_per_group=4, is_warming_up=True)
    assert float(loss.total) == pytest.approx(math.sqrt(0.15) * math.log(1.5), rel=2e-3)  # epsilon's share


def test_sig_loss__invalid_pixels_and_empty_groups_do_not_count() -> None:
    predictions, targets, valid = draw_depth(2)
    valid[2:] = False
    loss = compute_sig_loss(predictions, targets, valid, images_per_group=2, is_warming_up=False)
    assert float(loss.count) == 1
    other = compute_sig_loss(
        torch.where(valid, predictions, 7.0),
        torch.where(valid, targets, 0.0),
        valid,
        images_per_group=2,
        is_warming_up=False,
    )
    torch.testing.assert_close(loss.total, other.total)
    nothing = compute_sig_loss(
        predictions.requires_grad_(), targets, torch.zeros_like(valid), images_per_group=2, is_warming_up=False
    )
    nothing.total.backward()
    assert float(nothing.count) == 0 and bool((predictions.grad == 0).all())


def test_sig_loss__gradient_is_finite_at_a_perfect_fit() -> None:
    _, targets, valid = draw_depth(3)
    predictions = targets.clone().requires_grad_()
    compute_sig_loss(predictions, targets, valid, images_per_group=2, is_warming_up=False).total.backward()
    assert predictions.grad is not None and bool(predictions.grad.isfinite().all())


def test_losses__gradcheck() -> None:
    predictions, targets, valid = draw_depth(4, count=2)
    predictions.requires_grad_()

    def total(values: torch.Tensor) -> torch.Tensor:
        sig = compute_sig_loss(values, targets, valid, images_per_group=2, is_warming_up=False)
        return sig.total + compute_gradient_loss(values, targets, valid, images_per_group=2).total

    assert torch.autograd.gradcheck(total, (predictions,))


def test_gradient_loss__equals_the_public_formula_along_the_images_axes() -> None:
    predictions, targets, valid = draw_depth(6)
    loss = compute_gradient_loss(predictions, targets, valid, images_per_group=2)
    expected = 0.0
    for start in (0, 2):
        for stride in (1, 2, 4, 6):
            total, count = 0.0, 0
            for image in (start, start + 1):
                mask = valid[image, ::stride, ::stride].numpy()
                logs = (torch.log(predictions[image] + EPSILON) - torch.log(targets[image] + EPSILON)).numpy()
                logs = logs[::stride, ::stride]
                count += int(mask.sum())
                for row in range(mask.shape[0]):
                    for column in range(mask.shape[1]):
                        for other in ((row + 2, column), (row, column + 2)):
                            inside = other[0] < mask.shape[0] and other[1] < mask.shape[1]
                            if inside and mask[row, column] and mask[other]:
                                total += abs(logs[row, column] - logs[other])
            expected += total / max(count, 1)
    assert float(loss.total) == pytest.approx(expected, rel=1e-9) and float(loss.count) == 2


@pytest.mark.parametrize("along_rows", [True, False])
def test_gradient_loss__of_an_exponential_ramp(along_rows: bool) -> None:
    """log p rises by s per pixel along one axis: every second, fourth ... neighbour differs by 2 s times the stride."""
    slope, batch, side = 0.05, 2, 32
    ramp = torch.exp(slope * torch.arange(side, dtype=torch.float64)) * 100
    flat = torch.full((batch, side, side), 100.0, dtype=torch.float64)
    predictions = ramp[:, None].expand(side, side) if along_rows else ramp[None, :].expand(side, side)
    loss = compute_gradient_loss(
        predictions.expand(batch, side, side), flat, torch.ones(batch, side, side, dtype=torch.bool), images_per_group=2
    )
    # All but the last two of the n places along the axis have a partner.
    counts = {stride: -(-side // stride) for stride in (1, 2, 4, 6)}
    expected = sum(2 * slope * stride * (count - 2) / count for stride, count in counts.items())
    assert float(loss.total) == pytest.approx(expected, rel=1e-4)  # epsilon beside 100 m


def test_gradient_loss__is_not_zero_for_two_images_as_the_public_one_is() -> None:
    predictions, targets, valid = draw_depth(5, count=2)
    assert float(compute_gradient_loss(predictions, targets, valid, images_per_group=2).total) > 0.1


def test_depth_bins__linear_normalisation_by_hand() -> None:
    bins = DepthBins(1.0, 4.0, num_bins=4)
    logits = torch.tensor([-5.0, 0.0, 2.0, -1.0])[None, :, None, None]
    # Shares: 0.1, 0.1, 2.1, 0.1 over 2.4; bins at 1, 2, 3, 4 m.
    expected = (0.1 * 1 + 0.1 * 2 + 2.1 * 3 + 0.1 * 4) / 2.4
    assert float(bins(logits)) == pytest.approx(expected, rel=1e-6)
    assert len(DepthBins(0.001, 10.0).centers) == 256
