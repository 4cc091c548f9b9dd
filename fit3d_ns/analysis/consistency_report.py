"""What a comparison of views says: figures, a report of one scene, and one table for several scenes.

Figures are means over points; those of several scenes are pooled by points, so that a table says what a random
co-visible token, or a random match, sees. What a figure means stands in `consistency.py`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConsistencyFigures:
    """Figures over a set of points; NaN where there are none."""

    mean_cosine: float
    """In [-1, 1]."""
    centred_cosine: float
    """In [-1, 1]; 0 for unrelated tokens."""
    l1: float
    """At least 0."""
    recall: dict[str, float]
    """`recall_5px` and so on, in [0, 1]; `recall_2cm` and so on where the unit of the poses is known."""
    num_points: int
    """Token centres that were compared."""
    num_matches: int
    """Points that were matched for recall."""
    ratio_recall: dict[str, float] = field(default_factory=dict)
    """`ratio_recall_20px` and so on likewise, of the most distinct matches; empty where they were not asked for."""
    num_ratio_matches: int = 0
    """Most distinct matches that were measured."""


@dataclass(frozen=True)
class ConsistencyReport:
    """Figures of one backbone on one set of views."""

    overall: ConsistencyFigures
    """Over all points of all pairs."""
    by_angle: dict[str, ConsistencyFigures]
    """By bin, such as `15-30`."""
    effective_rank: float
    """Of all tokens; `embed` at most."""
    num_pairs: int
    """Pairs with at least one common point."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; recalls stand beside the other figures."""
        return {
            **_flatten(self.overall),
            "effective_rank": self.effective_rank,
            "num_pairs": self.num_pairs,
            "by_angle": {name: _flatten(figures) for name, figures in self.by_angle.items()},
        }


def pool_consistency(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One table for several scenes; nothing for no scene.

    Cosines and L1 are weighted by compared points and recalls by their matches, the effective rank is a plain mean, and
    counts are added. Figures in centimetres are those of the scenes that have them.

    Args:
        reports: As `ConsistencyReport.to_dict` gives them, all with the same bins of angles.
    """
    if not reports:
        return {}
    pooled = _pool_flat(reports)
    pooled["effective_rank"] = sum(report["effective_rank"] for report in reports) / len(reports)
    pooled["num_pairs"] = sum(report["num_pairs"] for report in reports)
    bins = reports[0]["by_angle"]
    pooled["by_angle"] = {name: _pool_flat([report["by_angle"][name] for report in reports]) for name in bins}
    return pooled


def _pool_flat(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pooled: dict[str, Any] = {}
    for name in dict.fromkeys(name for item in items for name in item):
        if name in ("by_angle", "effective_rank", "num_pairs"):
            continue
        having = [item for item in items if name in item]
        if name.startswith("num_"):
            pooled[name] = sum(item[name] for item in having)
            continue
        weights = [item[_find_count(name)] for item in having]
        # Where there are no points the figure is NaN, which must not enter the sum.
        total = sum(item[name] * weight for item, weight in zip(having, weights, strict=True) if weight)
        pooled[name] = total / sum(weights) if any(weights) else float("nan")
    return pooled


def _find_count(name: str) -> str:
    """The number of points that a figure is a mean over."""
    if name.startswith("ratio_recall_"):
        return "num_ratio_matches"
    return "num_matches" if name.startswith("recall_") else "num_points"


def _flatten(figures: ConsistencyFigures) -> dict[str, Any]:
    content = asdict(figures)
    recalls = {**content.pop("recall"), **content.pop("ratio_recall")}
    if not figures.ratio_recall:
        del content["num_ratio_matches"]
    return {**recalls, **content}
