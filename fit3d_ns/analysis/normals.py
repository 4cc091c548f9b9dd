"""Surface normals of a view with known depth, and how far predicted ones are off.

Normals are unit vectors in OpenCV's camera axes (x right, y down, z forwards), towards the camera. They are the cross
product of the differences between a pixel's surface points at a step to the left and right, above and below; the step
is a few pixels, because measured depth is noisy. Along a plane 1 / z is linear in the image, so where its second
difference is not small an edge lies between, and the pixel has no normal.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.correspondence import DepthView

STEPS_PER_WIDTH = 80
"""The step is this part of the width: 4 pixels of 320."""
LARGEST_BEND = 0.1
"""Largest second difference of 1 / z, as a multiple of 1 / z."""
THRESHOLDS = (11.25, 22.5, 30.0)
"""Degrees within which normals count as right (Fouhey et al. 2013, probe3d)."""


def compute_normals(view: DepthView) -> tuple[Float[Tensor, "height width 3"], Bool[Tensor, "height width"]]:
    """Unit normals at pixel centres, and where they are known; zeros elsewhere."""
    depth = view.usable_depth.double()
    height, width = depth.shape
    step = max(round(width / STEPS_PER_WIDTH), 1)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1).double() @ torch.linalg.inv(view.K.double()).T
    points = depth[..., None] * rays
    normals, known = torch.zeros_like(points), torch.zeros_like(depth, dtype=torch.bool)
    if min(height, width) <= 2 * step:
        return normals.float(), known
    rows, columns = slice(step, height - step), slice(step, width - step)
    before, after = slice(None, -2 * step), slice(2 * step, None)
    across = points[rows, after] - points[rows, before]
    down = points[after, columns] - points[before, columns]
    inverse = torch.where(depth > 0, 1.0 / depth.clamp(min=1e-12), torch.inf)
    middle = inverse[rows, columns]
    bend = (inverse[rows, before] + inverse[rows, after] - 2.0 * middle).abs()
    bend = torch.maximum(bend, (inverse[before, columns] + inverse[after, columns] - 2.0 * middle).abs())
    # inf - inf is NaN, which is not smaller either.
    known[rows, columns] = (bend <= LARGEST_BEND * middle) & middle.isfinite()
    normals[rows, columns] = F.normalize(torch.linalg.cross(down, across), dim=-1)
    normals *= -torch.sign((normals * rays).sum(dim=-1, keepdim=True)) * known[..., None]
    return normals.float(), known


def measure_angles(
    predicted: Float[Tensor, "*pixels 3"], normals: Float[Tensor, "*pixels 3"]
) -> Float[Tensor, "*pixels"]:
    """Degrees between vectors, of which the predicted ones may have any length."""
    cosine = F.cosine_similarity(predicted.double(), normals.double(), dim=-1)
    return torch.rad2deg(torch.acos(cosine.clamp(-1.0, 1.0))).float()


def summarise_angles(angles: Float[Tensor, " pixels"]) -> dict[str, float]:
    """`mean`, `median` and `rmse` in degrees, and the share of pixels within each of `THRESHOLDS`: `within_11.25`."""
    values = angles.double()
    shares = {f"within_{threshold:g}": float((values < threshold).double().mean()) for threshold in THRESHOLDS}
    return {
        "mean": float(values.mean()),
        "median": float(values.median()),
        "rmse": float(values.square().mean().sqrt()),
        **shares,
        "num_pixels": len(values),
    }
