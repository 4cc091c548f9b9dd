"""A camera that looks at one value per square block of pixels: the same splats, seen at the blocks' centres.

Shrinking the intrinsics moves pixel centres onto the centres of the blocks, and shrinking the blur with them keeps
every projected covariance what it was: the picture is the large one's, sampled, but for where tiles cut splats off.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SampledCamera:
    """Intrinsics, size and blur of the sampled picture."""

    K: Float[Tensor, "3 3"]
    """In pixels of the sampled picture."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    eps2d: float
    """Blur in square pixels."""


def compute_stride(width: int, height: int, grid: tuple[int, int], samples_per_patch: int) -> int:
    """Side of the blocks of pixels of which one value is looked at, at least 1.

    Args:
        width: Of the picture in pixels.
        height: Of the picture in pixels.
        grid: Token grid (h, w).
        samples_per_patch: Blocks along a patch's side, at least; 0 for single pixels.
    """
    if samples_per_patch == 0:
        return 1
    return max(int(min(width / grid[1], height / grid[0]) / samples_per_patch), 1)


def sample_camera(K: Float[Tensor, "3 3"], width: int, height: int, eps2d: float, stride: int) -> SampledCamera:
    """The camera for blocks of `stride` x `stride` pixels; sizes that do not divide are stretched by under a block."""
    if stride == 1:
        return SampledCamera(K, width, height, eps2d)
    small_width, small_height = max(round(width / stride), 1), max(round(height / stride), 1)
    shrinkage = torch.tensor([small_width / width, small_height / height, 1.0])
    return SampledCamera(K * shrinkage[:, None].to(K), small_width, small_height, eps2d * float(shrinkage.prod()))
