"""Multi-view consistency: do the tokens of one view agree with those of another about the same surface?

At each co-visible token centre of a view its token is compared with the other view's token map, read bilinearly where
that view shows the same point. All means are over points, pooled over all pairs: pairs with more overlap count more.

- `mean_cosine`: cosine of the two tokens. It also rises when all tokens become alike.
- `centred_cosine`: the same after the mean token of all given views is subtracted: collapse does not raise it.
- `l1`: mean absolute difference of the tokens, in their own unit.
- `recall_Npx`: share of the points that both views see whose match is within N pixels; see `find_matches`.
- `recall_Ncm`: within N centimetres of the true surface point, where the unit of the poses is known; a match at a place
  without depth counts as missed.
- `ratio_recall_Npx`, `ratio_recall_Ncm`: of the most distinct matches, as probe3d takes them; see `find_ratio_matches`.
- `num_points`, `num_matches`, `num_ratio_matches`: over how many points these are means; without any they are NaN.
- `effective_rank`: of all tokens of all views.
- `num_pairs`: pairs of views with at least one common point.
- `by_angle`: all but the last two again for each bin of angles, such as `15-30`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis import correspondence
from fit3d_ns.analysis.correspondence import DepthView, Maps, measure_match_errors, sample_tokens
from fit3d_ns.analysis.pca import compute_effective_rank
from fit3d_ns.utils.limits import Limited, Limits
from fit3d_ns.utils.selection import draw_some

_Views = tuple[DepthView, DepthView]


@dataclass(frozen=True)
class ConsistencyConfig(Limited):
    """What is compared, and how metrics are binned."""

    depth_tolerance: float = 0.05
    """Largest relative difference of depth for two views to see the same point."""
    angle_edges: tuple[float, ...] = (0.0, 15.0, 30.0, 60.0, 180.0)
    """Bin edges of the rotation between two cameras, degrees, ascending: probe3d's for ScanNet (NAVI: 0 30 60 90 120);
    the last bin includes its upper edge."""
    recall_pixels: tuple[float, ...] = (5.0, 10.0, 20.0)
    """Distances in pixels of the full-size image within which a match counts as found."""
    recall_centimetres: tuple[float, ...] = (1.0, 2.0, 5.0)
    """Distances in space within which a match counts (probe3d's for NAVI); they need the unit of the poses."""
    grid_scale: float = 0.25
    """Matching reads features at this share of the image's resolution (probe3d: 0.25); 0 reads them at the tokens."""
    max_points: int = 1000
    """Points matched per pair (probe3d: 1000), drawn at random from those that both views see."""
    ratio_matches: Annotated[int, Limits(at_least=0)] = 0
    """Most distinct matches per pair that recall is measured on as well (probe3d: 1000); 0 leaves them out. Every grid
    point is matched to find them, which takes some ten times as long as the rest."""
    ratio_pixels: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0, 80.0)
    """Distances for those, in pixels of the full-size image; probe3d's for ScanNet are the last three, because it
    counts 5, 10 and 20 pixels at a quarter of the size."""
    seed: int = 0
    """Seed of those draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.angle_edges) < 2 or list(self.angle_edges) != sorted(set(self.angle_edges)):
            raise ValueError(f"Angle edges {self.angle_edges} must be at least two ascending numbers of degrees.")


def create_pairs(num_views: int, max_pairs: int | None = None, seed: int = 0) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of views to compare; `max_pairs` of them are drawn at random, and the order stays."""
    pairs = [(first, first + gap) for gap in range(1, num_views) for first in range(num_views - gap)]
    return [pairs[index] for index in draw_some(len(pairs), max_pairs, seed, "view pairs").tolist()]


def create_pairs_within(
    views: Sequence[DepthView], max_angle: float, max_pairs: int | None = None, seed: int = 0
) -> list[tuple[int, int]]:
    """Pairs (i, j) of each view with one other, drawn among those at most `max_angle` degrees away (probe3d, NAVI)."""
    poses, pairs = [view.camera_to_world for view in views], []
    for first, pose in enumerate(poses):
        angles = [float(correspondence.measure_rotation(pose, other)) for other in poses]
        near = [second for second, angle in enumerate(angles) if second != first and angle <= max_angle]
        pairs += [(first, near[index]) for index in draw_some(len(near), 1, seed, "near view", first).tolist()]
    return [pairs[index] for index in draw_some(len(pairs), max_pairs, seed, "view pairs").tolist()]


@torch.no_grad()
def compute_consistency(
    token_maps: Sequence[Float[Tensor, "..."]],
    views: Sequence[DepthView],
    pairs: Sequence[tuple[int, int]] | None = None,
    config: ConsistencyConfig | None = None,
    units_per_metre: float | None = None,
) -> dict[str, Any]:
    """Compares the tokens [h, w, E] of pairs of views, both ways, and returns the metrics listed above, for JSON.

    Ratio matches go from the first view of a pair to the second. Without `pairs`, all are compared; without the length
    of a metre in the unit of the poses, metrics in centimetres are left out.
    """
    config = config or ConsistencyConfig()
    pairs = create_pairs(len(views)) if pairs is None else pairs
    mean = torch.cat([tokens.flatten(0, 1) for tokens in token_maps]).double().mean(dim=0).to(token_maps[0])
    samples = _Samples(config, units_per_metre)
    num_pairs = 0
    for first, second in pairs:
        num_points = 0
        for one, two in ((first, second), (second, first)):
            maps, both = (token_maps[one], token_maps[two]), (views[one], views[two])
            num_points += samples.compare(maps, both, mean)
            samples.match(maps, both, (one, two))
        num_pairs += num_points > 0
        if config.ratio_matches > 0:
            samples.match_by_ratio((token_maps[first], token_maps[second]), (views[first], views[second]))
    overall, by_angle = samples.summarise()
    rank = compute_effective_rank(token_maps)
    return {**overall, "effective_rank": rank, "num_pairs": num_pairs, "by_angle": by_angle}


def pool_consistency(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `compute_consistency` found in several scenes, with the same bins of angles, as one; nothing for no scene.

    Cosines and L1 are weighted by compared points and recalls by their matches, the effective rank is a plain mean, and
    counts are added. Metrics in centimetres are those of the scenes that have them.
    """
    if not reports:
        return {}
    pooled = _pool_flat(reports)
    pooled["effective_rank"] = sum(report["effective_rank"] for report in reports) / len(reports)
    pooled["num_pairs"] = sum(report["num_pairs"] for report in reports)
    bins = reports[0]["by_angle"]
    pooled["by_angle"] = {name: _pool_flat([report["by_angle"][name] for report in reports]) for name in bins}
    return pooled


class _Samples:
    """Measurements at single points, gathered over pairs of views."""

    def __init__(self, config: ConsistencyConfig, units_per_metre: float | None):
        self.config, self.units_per_metre = config, units_per_metre
        # Rows of (angle, cosine, centred cosine, l1).
        self.agreements: list[Tensor] = [torch.zeros(0, 4, dtype=torch.float64)]
        # Rows of (angle, error in pixels, error in the unit of the poses).
        self.errors: list[Tensor] = [torch.zeros(0, 3, dtype=torch.float64)]
        self.ratio_errors: list[Tensor] = [torch.zeros(0, 3, dtype=torch.float64)]

    def compare(self, maps: Maps, views: _Views, mean: Float[Tensor, " embed"]) -> int:
        """Compares the first view's tokens with what the second shows of their places; returns how many it shows."""
        points, other_points = self._find_covisible(views, (maps[0].shape[0], maps[0].shape[1]))
        if len(points) > 0:
            own = sample_tokens(maps[0], points, *views[0].size)
            seen = sample_tokens(maps[1], other_points, *views[1].size)
            cosine = F.cosine_similarity(own, seen, dim=1)
            centred = F.cosine_similarity(own - mean, seen - mean, dim=1)
            self.agreements.append(_stack(views, cosine, centred, (own - seen).abs().mean(dim=1)))
        return len(points)

    def match(self, maps: Maps, views: _Views, pair: tuple[int, int]) -> None:
        """Matches points of the first view in the second; the numbers of the `pair` seed which points those are."""
        seen = self._find_covisible(views, self._choose_grid(maps[0], views[0]))
        drawn = draw_some(len(seen[0]), self.config.max_points, self.config.seed, "covisible points", *pair)
        if len(drawn) > 0:
            points, other_points = (both[drawn] for both in seen)
            sizes = views[0].size, views[1].size
            matched = correspondence.find_matches(maps, sizes, points, self._choose_grid(maps[1], views[1]))
            _, distances = measure_match_errors(*views, points, matched)
            pixels = (matched - other_points).norm(dim=1)
            self.errors.append(_stack(views, pixels, distances))

    def match_by_ratio(self, maps: Maps, views: _Views) -> None:
        """Adds the most distinct matches of the first view in the second."""
        grids = self._choose_grid(maps[0], views[0]), self._choose_grid(maps[1], views[1])
        points, matched, _ = correspondence.find_ratio_matches(maps, views, grids, self.config.ratio_matches)
        if len(points) > 0:
            self.ratio_errors.append(_stack(views, *measure_match_errors(*views, points, matched)))

    def summarise(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Metrics of everything, and of each bin of angles."""
        tables = [torch.cat(rows) for rows in (self.agreements, self.errors, self.ratio_errors)]
        edges = self.config.angle_edges
        by_angle = {}
        for low, high in zip(edges, edges[1:], strict=False):
            # The last bin includes its upper edge, which half a turn may miss by rounding.
            end = high + 1e-3 if high == edges[-1] else high
            parts = [rows[(rows[:, 0] >= low) & (rows[:, 0] < end)] for rows in tables]
            by_angle[f"{low:g}-{high:g}"] = self._average(*parts)
        return self._average(*tables), by_angle

    def _average(self, agreements: Tensor, errors: Tensor, ratio_errors: Tensor) -> dict[str, Any]:
        # The mean of nothing is NaN, which JSON readers get as null.
        metrics: dict[str, Any] = self._measure_recall("recall", errors, self.config.recall_pixels)
        if self.config.ratio_matches > 0:
            metrics |= self._measure_recall("ratio_recall", ratio_errors, self.config.ratio_pixels)
        _, metrics["mean_cosine"], metrics["centred_cosine"], metrics["l1"] = agreements.mean(dim=0).tolist()
        metrics |= {"num_points": agreements.shape[0], "num_matches": errors.shape[0]}
        if self.config.ratio_matches > 0:
            metrics["num_ratio_matches"] = ratio_errors.shape[0]
        return metrics

    def _measure_recall(self, name: str, errors: Tensor, pixels: tuple[float, ...]) -> dict[str, float]:
        # NaN, where an error is unknown, is within no distance.
        recall = {f"{name}_{limit:g}px": float((errors[:, 1] <= limit).double().mean()) for limit in pixels}
        if self.units_per_metre is not None:
            centimetres = errors[:, 2] * (100.0 / self.units_per_metre)
            for limit in self.config.recall_centimetres:
                recall[f"{name}_{limit:g}cm"] = float((centimetres <= limit).double().mean())
        return recall

    def _choose_grid(self, tokens: Float[Tensor, "h w embed"], view: DepthView) -> tuple[int, int]:
        """(h, w) of the points that are matched in an image."""
        if self.config.grid_scale <= 0:
            return tokens.shape[0], tokens.shape[1]
        height, width = (max(round(side * self.config.grid_scale), 1) for side in view.depth.shape)
        return height, width

    def _find_covisible(self, views: _Views, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        points = correspondence.create_grid_points(*views[0].size, grid).to(views[0].depth)
        return correspondence.find_covisible(*views, points, self.config.depth_tolerance)


def _stack(views: _Views, *columns: Float[Tensor, " points"]) -> Float[Tensor, "points columns"]:
    """Rows of the degrees between two cameras and some values of each point."""
    angle = correspondence.measure_rotation(views[0].camera_to_world, views[1].camera_to_world)
    return torch.stack([column.double() for column in (angle.expand_as(columns[0]), *columns)], dim=1).cpu()


def _pool_flat(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pooled: dict[str, Any] = {}
    for name in dict.fromkeys(name for item in items for name in item):
        if name in ("by_angle", "effective_rank", "num_pairs"):
            continue
        having = [item for item in items if name in item]
        if name.startswith("num_"):
            pooled[name] = sum(item[name] for item in having)
            continue
        # The number of points that the metric is a mean over.
        count = "num_points"
        if name.startswith(("recall_", "ratio_recall_")):
            count = "num_matches" if name.startswith("recall_") else "num_ratio_matches"
        weights = [item[count] for item in having]
        # Where there are no points the metric is NaN, which must not enter the sum.
        total = sum(item[name] * weight for item, weight in zip(having, weights, strict=True) if weight)
        pooled[name] = total / sum(weights) if any(weights) else float("nan")
    return pooled
