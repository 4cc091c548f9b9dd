"""Multi-view consistency: do the tokens of one view agree with those of another about the same surface?

At each co-visible token centre of a view its token is compared with the other view's token map, read bilinearly where
that view shows the same point. All means are over points, pooled over all pairs: pairs with more overlap count more.

- `mean_cosine`: cosine of the two tokens. It also rises when all tokens become alike.
- `centred_cosine`: the same after the mean token of all given views is subtracted: collapse does not raise it.
- `l1`: mean absolute difference of the tokens, in their own unit.
- `recall_Npx`: share of the points that both views see whose match lies within N pixels; see `correspondence.py`.
- `recall_Ncm`: within N centimetres of the true surface point, where the unit of the poses is known; a match at a place
  without depth counts as missed.
- `ratio_recall_Npx`, `ratio_recall_Ncm`: of the most distinct matches, as probe3d takes them; see `ratio_matches.py`.
- `effective_rank`: of all tokens of all views.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    find_matches,
    measure_angles,
    measure_match_errors,
    sample_tokens,
)
from fit3d_ns.analysis.pca import compute_effective_rank
from fit3d_ns.analysis.ratio_matches import find_ratio_matches
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
    """Distances in pixels of the full-size image within which a match counts as found."""
    recall_centimetres: tuple[float, ...] = (1.0, 2.0, 5.0)
    """Distances in space likewise (probe3d's for NAVI); reported where the unit of the poses is known."""
    grid_scale: float = 0.25
    """Matching reads features at this share of the image's resolution (probe3d: 0.25); 0 reads them at the tokens."""
    max_points: int = 1000
    """Points matched per pair (probe3d: 1000), drawn at random from those that both views see."""
    ratio_matches: int = 0
    """Most distinct matches per pair that recall is measured on as well (probe3d: 1000); 0 leaves them out. Every grid
    point is matched to find them, which takes some ten times as long as the rest."""
    ratio_pixels: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0, 80.0)
    """Distances for those, in pixels of the full-size image; probe3d's for ScanNet are the last three, because it
    counts 5, 10 and 20 pixels at a quarter of the size."""
    seed: int = 0
    """Seed of those draws."""

    def __post_init__(self) -> None:
        if self.ratio_matches < 0:
            raise ValueError(f"{self.ratio_matches} ratio matches are asked for, expected 0 or more.")
        if len(self.angle_edges) < 2 or list(self.angle_edges) != sorted(set(self.angle_edges)):
            raise ValueError(f"Angle edges {self.angle_edges} must be at least two ascending numbers of degrees.")


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
    units_per_metre: float | None = None,
) -> ConsistencyReport:
    """Compares the tokens of pairs of views, both ways; ratio matches go from the first view of a pair to the second.

    Args:
        token_maps: [h, w, E] of each view.
        views: Depth and camera of each view, in the same order.
        pairs: Which views to compare; all pairs by default.
        config: Tolerances, bins and thresholds.
        units_per_metre: Length of a metre in the unit of the poses; None leaves out figures in centimetres.

    Raises:
        ValueError: There are not as many token maps as views.
    """
    config = config or ConsistencyConfig()
    if len(token_maps) != len(views) or not views:
        raise ValueError(f"{len(token_maps)} token maps for {len(views)} views; give one each, at least one.")
    pairs = create_pairs(len(views)) if pairs is None else pairs
    mean = torch.cat([tokens.flatten(0, 1) for tokens in token_maps]).double().mean(dim=0).to(token_maps[0])
    samples = _Samples(config, units_per_metre)
    num_pairs = 0
    for first, second in pairs:
        found = 0
        for index, other in ((first, second), (second, first)):
            maps = token_maps[index], token_maps[other]
            found += samples.compare(maps, (views[index], views[other]), mean, (index, other))
        num_pairs += found > 0
        if config.ratio_matches > 0:
            samples.match_by_ratio((token_maps[first], token_maps[second]), (views[first], views[second]))
    overall, by_angle = samples.summarise()
    return ConsistencyReport(overall, by_angle, compute_effective_rank(token_maps), num_pairs)


class _Samples:
    """Figures of single points, gathered over pairs."""

    def __init__(self, config: ConsistencyConfig, units_per_metre: float | None):
        self.config = config
        self.units_per_metre = units_per_metre
        # Rows of (angle, cosine, centred cosine, l1).
        self.agreements: list[Tensor] = []
        # Rows of (angle, error in pixels, error in centimetres), the last NaN where there are no metres.
        self.errors: list[Tensor] = []
        self.ratio_errors: list[Tensor] = []

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
        grids = self._choose_grids(maps, views)
        matched = covisible if grids[0] == token_grid else self._find(views, sizes[0], grids[0])
        matched = draw_points(matched, self.config.max_points, self.config.seed, *pair)
        if len(matched) > 0:
            places = find_matches(tokens, other_tokens, matched.points, sizes[0], sizes[1], grids[1])
            distances = measure_match_errors(*views, matched.points, places).distances
            pixels = (places - matched.other_points).norm(dim=1)
            self.errors.append(self._stack(matched.angles, pixels, distances))
        return len(covisible)

    def match_by_ratio(self, maps: tuple[Tensor, Tensor], views: tuple[DepthView, DepthView]) -> None:
        """Adds the most distinct matches of the first view in the second."""
        found = find_ratio_matches(maps, views, self._choose_grids(maps, views), self.config.ratio_matches)
        if len(found) > 0:
            errors = measure_match_errors(*views, found.points, found.other_points)
            angles = measure_angles(*views, found.points, self.config.angle_kind)
            self.ratio_errors.append(self._stack(angles, errors.pixels, errors.distances))

    def summarise(self) -> tuple[ConsistencyFigures, dict[str, ConsistencyFigures]]:
        """Figures of everything, and of each bin of angles."""
        tables = [_join(self.agreements, 4), _join(self.errors, 3), _join(self.ratio_errors, 3)]
        edges = self.config.angle_edges
        by_angle = {}
        for low, high in zip(edges, edges[1:], strict=False):
            is_last = high == edges[-1]
            # The last bin includes its upper edge, which half a turn may miss by rounding.
            end = high + 1e-3 if is_last else high
            parts = [rows[(rows[:, 0] >= low) & (rows[:, 0] < end)] for rows in tables]
            by_angle[f"{low:g}-{high:g}"] = self._average(*parts)
        return self._average(*tables), by_angle

    def _average(self, agreements: Tensor, errors: Tensor, ratio_errors: Tensor) -> ConsistencyFigures:
        # The mean of nothing is NaN, which JSON readers get as null.
        means = agreements.mean(dim=0).tolist()
        recall = self._measure_recall("recall", errors, self.config.recall_pixels)
        figures = ConsistencyFigures(means[1], means[2], means[3], recall, agreements.shape[0], errors.shape[0])
        if self.config.ratio_matches == 0:
            return figures
        ratio_recall = self._measure_recall("ratio_recall", ratio_errors, self.config.ratio_pixels)
        return replace(figures, ratio_recall=ratio_recall, num_ratio_matches=ratio_errors.shape[0])

    def _measure_recall(self, name: str, errors: Tensor, pixels: tuple[float, ...]) -> dict[str, float]:
        # NaN, where an error is unknown, is within no distance.
        recall = {f"{name}_{limit:g}px": float((errors[:, 1] <= limit).double().mean()) for limit in pixels}
        if self.units_per_metre is not None:
            for limit in self.config.recall_centimetres:
                recall[f"{name}_{limit:g}cm"] = float((errors[:, 2] <= limit).double().mean())
        return recall

    def _stack(self, angles: Tensor, pixels: Tensor, distances: Tensor) -> Tensor:
        scale = float("nan") if self.units_per_metre is None else 100.0 / self.units_per_metre
        return torch.stack([angles.double(), pixels.double(), distances.double() * scale], dim=1).cpu()

    def _choose_grids(
        self, maps: tuple[Tensor, Tensor], views: tuple[DepthView, DepthView]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """(h, w) of the points that are matched, in either image."""
        first, second = (
            _scale(view.depth, self.config.grid_scale)
            if self.config.grid_scale > 0
            else (tokens.shape[0], tokens.shape[1])
            for tokens, view in zip(maps, views, strict=True)
        )
        return first, second

    def _find(
        self, views: tuple[DepthView, DepthView], size: tuple[int, int], grid: tuple[int, int]
    ) -> CovisiblePoints:
        points = create_grid_points(*size, grid).to(views[0].depth)
        return find_covisible(*views, points, self.config.depth_tolerance, self.config.angle_kind)


def _scale(depth: Float[Tensor, "height width"], scale: float) -> tuple[int, int]:
    """(h, w) of the grid at a share of an image's resolution."""
    return max(round(depth.shape[0] * scale), 1), max(round(depth.shape[1] * scale), 1)


def _join(rows: Sequence[Tensor], num_columns: int) -> Tensor:
    return torch.cat(list(rows)) if rows else torch.zeros(0, num_columns, dtype=torch.float64)
