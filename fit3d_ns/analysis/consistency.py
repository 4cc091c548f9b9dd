"""Multi-view consistency: do the tokens of one view agree with those of another about the same surface?

At each co-visible token centre of a view its token is compared with the other view's token map, read bilinearly where
that view shows the same point. All means are over points, pooled over all pairs: pairs with more overlap count more.

- `mean_cosine`: cosine of the two tokens. It also rises when all tokens become alike.
- `centred_cosine`: the same after the mean token of all given views is subtracted: collapse does not raise it.
- `l1`: mean absolute difference of the tokens, in their own unit.
- `recall_Npx`: see `correspondence.py`.
- `effective_rank`: of all tokens of all views.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.consistency_report import ConsistencyFigures, ConsistencyReport
from fit3d_ns.analysis.correspondence import (
    AngleKind,
    CovisiblePoints,
    DepthView,
    create_grid_points,
    draw_points,
    find_covisible,
    measure_matching_errors,
    sample_tokens,
)
from fit3d_ns.analysis.pca import compute_effective_rank
from fit3d_ns.utils.seeds import create_generator


@dataclass(frozen=True)
class ConsistencyConfig:
    """What is compared, and how figures are binned."""

    depth_tolerance: float = 0.05
    """Largest relative difference of depth for two views to see the same point."""
    angle_kind: AngleKind = "rotation"
    """Angle that bins pairs: `rotation` between the cameras (probe3d), or `parallax` at each point."""
    angle_edges: tuple[float, ...] = (0.0, 15.0, 30.0, 60.0, 180.0)
    """Bin edges in degrees, ascending (probe3d's for ScanNet); the last bin includes its upper edge."""
    recall_pixels: tuple[float, ...] = (5.0, 10.0, 20.0)
    """Distances in pixels within which a match counts as found."""
    grid_scale: float = 0.25
    """Matching reads features at this share of the image's resolution (probe3d: 0.25); 0 reads them at the tokens."""
    max_points: int = 1000
    """Points matched per pair (probe3d: 1000), drawn at random from those that both views see."""
    seed: int = 0
    """Seed of those draws."""


def create_pairs(
    num_views: int, gaps: Sequence[int] | None = None, max_pairs: int | None = None, seed: int = 0
) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of views to compare.

    Args:
        num_views: Number of views, in the order of capture where `gaps` are given.
        gaps: Distances j - i to take; all by default.
        max_pairs: At most so many, drawn at random; the order stays.
        seed: Seed of the draw.
    """
    wanted = range(1, num_views) if gaps is None else sorted(set(gaps))
    pairs = [(first, first + gap) for gap in wanted for first in range(num_views - gap)]
    if max_pairs is not None and len(pairs) > max_pairs:
        chosen = torch.randperm(len(pairs), generator=create_generator(seed, "view pairs"))[:max_pairs]
        pairs = [pairs[index] for index in chosen.sort().values.tolist()]
    return pairs


@torch.no_grad()
def compute_consistency(
    token_maps: Sequence[Float[Tensor, "..."]],
    views: Sequence[DepthView],
    pairs: Sequence[tuple[int, int]] | None = None,
    config: ConsistencyConfig | None = None,
) -> ConsistencyReport:
    """Compares the tokens of pairs of views, both ways.

    Args:
        token_maps: [h, w, E] of each view.
        views: Depth and camera of each view, in the same order.
        pairs: Which views to compare; all pairs by default.
        config: Tolerances, bins and thresholds.

    Raises:
        ValueError: There are not as many token maps as views.
    """
    config = config or ConsistencyConfig()
    if len(token_maps) != len(views) or not views:
        raise ValueError(f"{len(token_maps)} token maps for {len(views)} views; give one each, at least one.")
    pairs = create_pairs(len(views)) if pairs is None else pairs
    mean = torch.cat([tokens.flatten(0, 1) for tokens in token_maps]).double().mean(dim=0).to(token_maps[0])
    samples = _Samples(config)
    num_pairs = 0
    for first, second in pairs:
        found = 0
        for index, other in ((first, second), (second, first)):
            maps = token_maps[index], token_maps[other]
            found += samples.compare(maps, (views[index], views[other]), mean, (index, other))
        num_pairs += found > 0
    overall, by_angle = samples.summarise()
    return ConsistencyReport(overall, by_angle, compute_effective_rank(token_maps), num_pairs)


class _Samples:
    """Figures of single points, gathered over pairs."""

    def __init__(self, config: ConsistencyConfig):
        self.config = config
        # Rows of (angle, cosine, centred cosine, l1) and of (angle, error in pixels).
        self.agreements: list[Tensor] = []
        self.errors: list[Tensor] = []

    def compare(
        self,
        maps: tuple[Tensor, Tensor],
        views: tuple[DepthView, DepthView],
        mean: Float[Tensor, " embed"],
        pair: tuple[int, int],
    ) -> int:
        """Adds what the first view's tokens and the second view's have to say about each other; returns the points."""
        tokens, other_tokens = maps
        sizes = [(view.depth.shape[1], view.depth.shape[0]) for view in views]
        token_grid = (tokens.shape[0], tokens.shape[1])
        covisible = self._find(views, sizes[0], token_grid)
        if len(covisible) > 0:
            own = sample_tokens(tokens, covisible.points, *sizes[0])
            seen = sample_tokens(other_tokens, covisible.other_points, *sizes[1])
            figures = [
                covisible.angles,
                F.cosine_similarity(own, seen, dim=1),
                F.cosine_similarity(own - mean, seen - mean, dim=1),
                (own - seen).abs().mean(dim=1),
            ]
            self.agreements.append(torch.stack([figure.double() for figure in figures], dim=1).cpu())
        grids: list[tuple[int, int] | None] = [token_grid, None]
        matched = covisible
        if self.config.grid_scale > 0:
            grids = [_scale(size, self.config.grid_scale) for size in sizes]
            matched = self._find(views, sizes[0], grids[0] or token_grid)
        matched = draw_points(matched, self.config.max_points, self.config.seed, *pair)
        if len(matched) > 0:
            errors = measure_matching_errors(tokens, other_tokens, matched, sizes[0], sizes[1], grids[1])
            self.errors.append(torch.stack([matched.angles.double(), errors.double()], dim=1).cpu())
        return len(covisible)

    def summarise(self) -> tuple[ConsistencyFigures, dict[str, ConsistencyFigures]]:
        """Figures of everything, and of each bin of angles."""
        agreements = torch.cat(self.agreements) if self.agreements else torch.zeros(0, 4, dtype=torch.float64)
        errors = torch.cat(self.errors) if self.errors else torch.zeros(0, 2, dtype=torch.float64)
        edges = self.config.angle_edges
        by_angle = {}
        for low, high in zip(edges, edges[1:], strict=False):
            is_last = high == edges[-1]
            by_angle[f"{low:g}-{high:g}"] = self._average(
                *(rows[(rows[:, 0] >= low) & ((rows[:, 0] < high) | is_last)] for rows in (agreements, errors))
            )
        return self._average(agreements, errors), by_angle

    def _average(self, agreements: Tensor, errors: Tensor) -> ConsistencyFigures:
        # The mean of nothing is NaN, which JSON readers get as null.
        means = agreements.mean(dim=0).tolist()
        recall = {
            f"recall_{pixels:g}px": float((errors[:, 1] <= pixels).double().mean())
            for pixels in self.config.recall_pixels
        }
        return ConsistencyFigures(means[1], means[2], means[3], recall, agreements.shape[0], errors.shape[0])

    def _find(
        self, views: tuple[DepthView, DepthView], size: tuple[int, int], grid: tuple[int, int]
    ) -> CovisiblePoints:
        points = create_grid_points(*size, grid).to(views[0].depth)
        return find_covisible(*views, points, self.config.depth_tolerance, self.config.angle_kind)


def _scale(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(width, height) of an image to (h, w) of the grid at a share of its resolution."""
    return max(round(size[1] * scale), 1), max(round(size[0] * scale), 1)
