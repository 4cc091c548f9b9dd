"""Where a splat lies by its looks: worlds that are likely, and one of them moved until renderings fit photographs.

A motion has seven numbers: rotation (3, radians), translation (3, in shares of the depth) and logarithm of the scale,
all about the middle of the cameras. Least squares (scipy's) of differences between renderings and photographs, averaged
over squares of pixels: coarse ones first, from which a scale that is a fifth off still finds back. Derivatives are
differences too, so that any rasterizer serves.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.geometry.cameras import transform_points
from fit3d_ns.lifting.worlds import WorldChange

_NUDGES = np.array([0.01] * 6 + [0.02])
"""Differences for derivatives on squares of 4 pixels; on others in proportion."""


def refine_world(
    change: WorldChange,
    compute_residuals: Callable[[WorldChange, int], Float[Tensor, " residuals"]],
    pivot: Float[Tensor, " 3"],
    depth: float,
    levels: Sequence[tuple[int, int]],
) -> WorldChange:
    """The world nearby whose residuals (of a world, and squares with a side in pixels) have the least sum of squares.

    It turns and grows about `pivot`; what is seen is at the distance `depth`, both in the world that `change` leads to.
    `levels` are sides of squares with the most steps for each.
    """
    for side, num_steps in levels:

        def compare(places: np.ndarray, side: int = side, start: WorldChange = change) -> np.ndarray:
            # scipy's steps are shares of the variables, which therefore begin at 1.
            motion = torch.from_numpy(places - 1.0)
            return compute_residuals(_move(motion, pivot, depth).after(start), side).numpy()

        nudges = _NUDGES * side / 4
        found = least_squares(compare, np.ones(7), diff_step=nudges, x_scale=nudges, xtol=1e-4, max_nfev=num_steps + 1)
        change = _move(torch.from_numpy(found.x - 1.0), pivot, depth).after(change)
    return change


def list_likely(
    change: WorldChange, points: Float[Tensor, "points 3"] | None, means: Float[Tensor, "num_gaussians 3"]
) -> list[WorldChange]:
    """The world with its axes exchanged in all 24 ways, as it is and, by the seed points, as large as the splat."""
    turns = torch.from_numpy(Rotation.create_group("O").as_matrix()).float()
    likely = [WorldChange(F.pad(turn, (0, 1)), 1.0) for turn in turns]
    if points is not None:
        middle, reach = _measure(transform_points(points.float(), change.transform, change.scale))
        end, end_reach = _measure(means)
        scale = end_reach / max(reach, 1e-12)
        likely += [WorldChange(torch.cat([turn, (end / scale - turn @ middle)[:, None]], 1), scale) for turn in turns]
    return [other.after(change) for other in likely]


def _measure(points: Float[Tensor, "points 3"]) -> tuple[Float[Tensor, " 3"], float]:
    """Middle and reach, by medians: splats have outliers."""
    middle = torch.from_numpy(np.median(points.numpy(), axis=0))
    return middle, float((points - middle).norm(dim=1).median())


def _move(motion: Float[Tensor, " 7"], pivot: Float[Tensor, " 3"], depth: float) -> WorldChange:
    rotation = torch.from_numpy(Rotation.from_rotvec(motion[:3].numpy()).as_matrix())
    scale = math.exp(float(motion[6]))
    # x -> scale R (x - pivot) + pivot + t
    translation = (pivot.double() + depth * motion[3:6]) / scale - rotation @ pivot.double()
    return WorldChange(torch.cat([rotation, translation[:, None]], dim=1).float(), scale)
