"""Losses of the depth probe, over pixels with valid depth.

g = log(prediction + eps) - log(target + eps). `SigLoss` is sqrt(var(g) + 0.15 mean(g)^2), var with n - 1 in the
denominator; during its warm-up only the mean's term is used. The public gradient loss slices the batch instead of the
image and is zero for two images a device; the one here compares neighbouring pixels, at four scales.

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
NUM_SCALES = 4
"""Steps of 1, 2, 4 and 8 pixels between compared neighbours."""


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
    """Mean absolute difference of log-depth steps between neighbours, along both image axes, averaged over scales."""
    total, count = predictions.sum() * 0.0, 0
    logs = torch.where(valid, torch.log(predictions + EPSILON) - torch.log(targets.clamp_min(0.0) + EPSILON), 0.0)
    for group in range(0, len(predictions), images_per_group):
        part = slice(group, group + images_per_group)
        terms = []
        for scale in range(NUM_SCALES):
            step = 2**scale
            coarse, mask = logs[part, ::step, ::step], valid[part, ::step, ::step]
            for dim in (1, 2):
                size = coarse.shape[dim] - 1
                both = mask.narrow(dim, 0, size) & mask.narrow(dim, 1, size)
                if both.any():
                    difference = coarse.narrow(dim, 1, size) - coarse.narrow(dim, 0, size)
                    terms.append(difference[both].abs().mean())
        if terms:
            total = total + torch.stack(terms).mean()
            count += 1
    return LossSum(total, predictions.new_tensor(float(count)))
