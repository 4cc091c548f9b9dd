"""Losses of the depth probe, over pixels with valid depth.

g = log(prediction + eps) - log(target + eps). `SigLoss` is sqrt(var(g) + 0.15 mean(g)^2), var with n - 1 in the
denominator; during its warm-up only the mean's term is used. The public gradient loss slices the batch instead of the
image and is zero for two images a device; the one here has the same formula along the image's axes: on every first,
second, fourth and sixth pixel, |g(x) - g(x + 2)| summed over both axes, over the number of valid pixels; scales added.

Losses are taken over groups of images (two, as the public code has two per device), so that their values do not depend
on how many devices share a batch. Each returns the sum over groups and the number of groups that had valid pixels.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EPSILON = 1e-3
"""Metres; keeps the logarithm finite."""
MEAN_WEIGHT = 0.15
"""Weight of the mean's square; 1 would be the plain mean square."""
GRADIENT_STRIDES = (1, 2, 4, 6)
"""Every how many pixels each scale of the gradient loss reads."""
GRADIENT_STEP = 2
"""Pixels of a scale between the two that are compared."""


@dataclass(frozen=True)
class LossSum:
    """A loss before it is normalised over all processes."""

    total: Float[Tensor, ""]
    """Sum over what is counted, with gradient."""
    count: Float[Tensor, ""]
    """How much was counted."""


def compute_sig_loss(
    predictions: Float[Tensor, "batch height width"],
    targets: Float[Tensor, "batch height width"],
    valid: Bool[Tensor, "batch height width"],
    *,
    images_per_group: int,
    is_warming_up: bool,
) -> LossSum:
    """Scale-invariant loss in log depth, summed over groups of images."""
    total, count = predictions.sum() * 0.0, 0
    for group in range(0, len(predictions), images_per_group):
        part = slice(group, group + images_per_group)
        mask = valid[part]
        if int(mask.sum()) < 2:
            continue
        logs = torch.log(predictions[part][mask] + EPSILON) - torch.log(targets[part][mask] + EPSILON)
        squared_mean = MEAN_WEIGHT * logs.mean().square()
        inside = squared_mean if is_warming_up else logs.var() + squared_mean
        # At a perfect fit the root has no gradient; the floor keeps it finite.
        total = total + inside.clamp_min(1e-12).sqrt()
        count += 1
    return LossSum(total, predictions.new_tensor(float(count)))


def compute_gradient_loss(
    predictions: Float[Tensor, "batch height width"],
    targets: Float[Tensor, "batch height width"],
    valid: Bool[Tensor, "batch height width"],
    *,
    images_per_group: int,
) -> LossSum:
    """Absolute differences of g between pixels two steps apart, along both image axes, summed over scales."""
    total, count = predictions.sum() * 0.0, 0
    logs = torch.where(valid, torch.log(predictions + EPSILON) - torch.log(targets.clamp_min(0.0) + EPSILON), 0.0)
    for group in range(0, len(predictions), images_per_group):
        part = slice(group, group + images_per_group)
        if not valid[part].any():
            continue
        for stride in GRADIENT_STRIDES:
            coarse, mask = logs[part, ::stride, ::stride], valid[part, ::stride, ::stride]
            differences = predictions.new_zeros(())
            for dim in (1, 2):
                size = max(coarse.shape[dim] - GRADIENT_STEP, 0)
                start = coarse.shape[dim] - size
                both = mask.narrow(dim, 0, size) & mask.narrow(dim, start, size)
                steps = coarse.narrow(dim, start, size) - coarse.narrow(dim, 0, size)
                differences = differences + torch.where(both, steps.abs(), 0.0).sum()
            total = total + differences / mask.sum().clamp_min(1)
        count += 1
    return LossSum(total, predictions.new_tensor(float(count)))
