"""The most distinct matches between two views, by Lowe's ratio test, as probe3d takes them (ScanNet pairs and NAVI).

Every grid point of the first image with depth looks for its two nearest neighbours among the grid points of the second
image with depth, by the cosine distance 1 - cos. The ratio of the two distances, nearest over second, is near 0 where a
match is distinct and 1 where it is not. The `max_matches` lowest ratios are kept, whether the second view sees those
points or not: a backbone that finds nothing in common also fails here. Matching goes one way, from first to second.

probe3d's pixels: for ScanNet its 5, 10 and 20 px count in the image of a quarter of the size that features are read at,
so they are 20, 40 and 80 px of the full-size image, in which all pixels count here. Its distances for NAVI are 1, 2 and
5 cm. Differences: features beyond the outermost token centres stay constant (there: fade to zero), and depth is read
at the middle of each grid cell (there: at its upper left pixel).

Source: probe3d (El Banani et al., CVPR 2024), `evaluate_scannet_correspondence.py`, `evaluate_navi_correspondence.py`,
`evals/utils/correspondence.py`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.correspondence import DepthView, create_grid_points, look_up, sample_tokens

SMALLEST_DISTANCE = 1e-9
"""Distances below it count as this much (probe3d), so that equal features have the ratio 1."""


@dataclass(frozen=True)
class RatioMatches:
    """Matches in the order of their ratios, the most distinct first."""

    points: Float[Tensor, "matches 2"]
    """(x, y) in the first image."""
    other_points: Float[Tensor, "matches 2"]
    """(x, y) in the second image, where features find them."""
    ratios: Float[Tensor, " matches"]
    """In [0, 1]."""

    def __len__(self) -> int:
        return self.points.shape[0]


def find_ratio_matches(
    maps: tuple[Float[Tensor, "h w embed"], Float[Tensor, "h_other w_other embed"]],
    views: tuple[DepthView, DepthView],
    grids: tuple[tuple[int, int], tuple[int, int]],
    max_matches: int = 1000,
    chunk_size: int = 2048,
) -> RatioMatches:
    """Matches of the first view's grid in the second's; none where the second has fewer than two points with depth.

    Args:
        maps: Token maps of the two views.
        views: Their depth and cameras.
        grids: (h, w) of the points that features are read at, in either image.
        max_matches: Matches that are kept, at least 1 (probe3d: 1000).
        chunk_size: Rows of cosines in memory at a time.
    """
    points, places = (_list_measured(view, grid) for view, grid in zip(views, grids, strict=True))
    if len(points) == 0 or len(places) < 2:
        return RatioMatches(points[:0], places[:0], points.new_zeros(0))
    sizes = [(view.depth.shape[1], view.depth.shape[0]) for view in views]
    queries = F.normalize(sample_tokens(maps[0], points, *sizes[0]), dim=1)
    candidates = F.normalize(sample_tokens(maps[1], places, *sizes[1]), dim=1)
    ratios, nearest = [], []
    for rows in queries.split(chunk_size):
        cosines = rows @ candidates.T
        best = cosines.max(dim=1)
        # Faster than a top-2: the maximum is struck out, and what is then the maximum is the second.
        second = cosines.scatter_(1, best.indices[:, None], -2.0).amax(dim=1)
        distances = [(1 - values).clamp_min(SMALLEST_DISTANCE) for values in (best.values, second)]
        ratios.append(distances[0] / distances[1])
        nearest.append(best.indices)
    # A stable order, so that equal ratios are chosen alike on every machine.
    ordered = torch.cat(ratios).sort(stable=True)
    chosen = ordered.indices[:max_matches]
    return RatioMatches(points[chosen], places[torch.cat(nearest)[chosen]], ordered.values[:max_matches])


def _list_measured(view: DepthView, grid: tuple[int, int]) -> Float[Tensor, "points 2"]:
    """Points of a grid whose pixel has usable depth."""
    height, width = view.depth.shape
    points = create_grid_points(width, height, grid).to(view.depth)
    return points[look_up(view.usable_depth, points) > 0]
