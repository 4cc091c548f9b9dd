"""Pooling over scenes, against sums written out."""

import math

from fit3d_ns.analysis.consistency_report import pool_consistency


def test_pool_consistency__weights_are_points_and_matches() -> None:
    def report(points: int, matches: int, value: float) -> dict[str, object]:
        flat = {"mean_cosine": value, "centred_cosine": value, "l1": value, "recall_10px": value}
        flat |= {"num_points": points, "num_matches": matches}
        return {**flat, "effective_rank": value, "num_pairs": 2, "by_angle": {"0-15": dict(flat)}}

    pooled = pool_consistency([report(10, 7, 1.0), report(30, 1, 5.0), report(0, 0, float("nan"))])
    for figures in (pooled, pooled["by_angle"]["0-15"]):
        assert figures["mean_cosine"] == figures["centred_cosine"] == figures["l1"] == (10 * 1.0 + 30 * 5.0) / 40
        assert figures["recall_10px"] == (7 * 1.0 + 1 * 5.0) / 8
        assert figures["num_points"] == 40 and figures["num_matches"] == 8
    assert pooled["num_pairs"] == 6
    ratio = {"ratio_recall_20px": 0.5, "num_ratio_matches": 4}, {"ratio_recall_20px": 1.0, "num_ratio_matches": 12}
    metric, other = report(10, 6, 1.0), report(30, 2, 5.0)
    both = pool_consistency([{**metric, **ratio[0], "recall_2cm": 0.25}, {**other, **ratio[1]}])
    assert both["ratio_recall_20px"] == (4 * 0.5 + 12 * 1.0) / 16 and both["num_ratio_matches"] == 16
    # Only the first scene has metres, and only it counts; the order of the scenes does not matter.
    assert both["recall_2cm"] == 0.25 and both["recall_10px"] == (6 * 1.0 + 2 * 5.0) / 8
    assert pool_consistency([{**other, **ratio[1]}, {**metric, **ratio[0], "recall_2cm": 0.25}])["recall_2cm"] == 0.25
    empty = pool_consistency([report(0, 0, float("nan"))])
    assert math.isnan(empty["centred_cosine"]) and empty["num_matches"] == 0
    assert pool_consistency([]) == {}
