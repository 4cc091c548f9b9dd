"""Consistency on scenes where the answer is known: shifted, rotated, collapsed and unrelated tokens."""

import json
import math

import pytest
import torch

from fit3d_ns.analysis.consistency import ConsistencyConfig, compute_consistency, create_pairs, pool_consistency
from fit3d_ns.analysis.correspondence import DepthView

K = torch.tensor([[32.0, 0.0, 32.0], [0.0, 32.0, 32.0], [0.0, 0.0, 1.0]])
SIZE = 64


def make_view(x=0.0, rotation=None):
    """A wall at depth 2 before a camera that looks along -z: 1 unit is 16 pixels."""
    rotation = torch.eye(3) if rotation is None else rotation
    position = torch.tensor([[x], [0.0], [2.0]])
    return DepthView(torch.full((SIZE, SIZE), 2.0), K, torch.cat([rotation, position], dim=1))


def make_tokens(seed=0, embed=16):
    return torch.randn(8, 8, embed, generator=torch.Generator().manual_seed(seed))


def shift(tokens, count, seed=9):
    """What a camera moved right by `count` tokens sees: everything further left, new things at the right."""
    return torch.cat([tokens[:, count:], make_tokens(seed)[:, :count]], dim=1)


def test_consistency__tokens_that_stick_to_the_surface():
    tokens = make_tokens()
    # Moving by 0.5 shifts the picture by 8 pixels, one token.
    report = compute_consistency([tokens, shift(tokens, 1)], [make_view(0.0), make_view(0.5)])
    assert report["mean_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert report["centred_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert report["l1"] == pytest.approx(0.0, abs=1e-5)
    # 7 of 8 columns are common, seen from both sides.
    assert report["num_points"] == 2 * 7 * 8
    assert report["recall_5px"] > 0.99
    assert report["num_pairs"] == 1


def test_consistency__recall_at_the_tokens_is_exact():
    tokens = make_tokens()
    config = ConsistencyConfig(grid_scale=0.0, recall_pixels=(0.001, 7.9))
    report = compute_consistency([tokens, shift(tokens, 2)], [make_view(0.0), make_view(1.0)], config=config)
    assert report["recall_0.001px"] == report["recall_7.9px"] == 1.0
    # Tokens that stay on the image instead of the surface are found two tokens (16 pixels) away.
    config = ConsistencyConfig(grid_scale=0.0, recall_pixels=(15.9, 16.1))
    report = compute_consistency([tokens, tokens], [make_view(0.0), make_view(1.0)], config=config)
    assert [report["recall_15.9px"], report["recall_16.1px"]] == [0.0, 1.0]


def test_consistency__a_quarter_turn_falls_into_its_bin():
    tokens = make_tokens()
    # Turning the camera counter-clockwise turns the picture clockwise.
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    turned = torch.rot90(tokens, k=-1, dims=(0, 1))
    report = compute_consistency([tokens, turned], [make_view(), make_view(rotation=quarter)])
    assert report["by_angle"]["60-180"]["mean_cosine"] == pytest.approx(1.0, abs=1e-4)
    assert report["by_angle"]["60-180"]["num_points"] == report["num_points"] == 2 * 64
    assert report["by_angle"]["15-30"]["num_points"] == 0
    assert report["by_angle"]["15-30"]["mean_cosine"] != report["by_angle"]["15-30"]["mean_cosine"]


def test_consistency__collapse_raises_the_raw_cosine_only():
    views = [make_view(), make_view()]
    unrelated = [make_tokens(0), make_tokens(1)]
    collapsed = [tokens * 0.1 + 5.0 for tokens in unrelated]
    plain, fallen = compute_consistency(unrelated, views), compute_consistency(collapsed, views)
    assert abs(plain["mean_cosine"]) < 0.1
    assert fallen["mean_cosine"] > 0.99
    assert fallen["centred_cosine"] == pytest.approx(plain["centred_cosine"], abs=1e-3)
    # Scaling by 0.1 scales differences; the common shift drops out.
    assert fallen["l1"] == pytest.approx(0.1 * plain["l1"], rel=1e-3)
    expected = (unrelated[0] - unrelated[1]).abs().mean().item()
    assert plain["l1"] == pytest.approx(expected, rel=1e-4)
    assert plain["recall_5px"] < 0.2


def test_consistency__means_are_pooled_over_points():
    tokens = make_tokens()
    views = [make_view(0.0), make_view(0.5), make_view(1.0)]
    maps = [tokens, shift(tokens, 1), make_tokens(5)]
    pairs = [(0, 1), (0, 2)]
    together = compute_consistency(maps, views, pairs)
    single = [compute_consistency(maps, views, [pair]) for pair in pairs]
    counts = [metrics["num_points"] for metrics in single]
    expected = sum(metrics["mean_cosine"] * count for metrics, count in zip(single, counts, strict=True)) / sum(counts)
    assert together["num_points"] == sum(counts)
    assert together["mean_cosine"] == pytest.approx(expected, rel=1e-6)


def test_consistency__views_without_anything_in_common():
    report = compute_consistency([make_tokens(), make_tokens(1)], [make_view(0.0), make_view(50.0)])
    assert report["num_points"] == 0 and report["num_pairs"] == 0
    assert report["mean_cosine"] != report["mean_cosine"]
    assert list(report["by_angle"]) == ["0-15", "15-30", "30-60", "60-180"]


def test_report__is_plain_json():
    tokens = make_tokens()
    report = compute_consistency([tokens, tokens], [make_view(), make_view()])
    keys = set(json.loads(json.dumps(report)))
    assert {"mean_cosine", "centred_cosine", "l1", "recall_10px", "by_angle", "effective_rank", "num_points"} <= keys
    assert report["recall_10px"] == 1.0


@pytest.mark.parametrize(
    ("units_per_metre", "expected"), [(49.0, [0.0, 0.0, 1.0]), (51.0, [0.0, 1.0, 1.0]), (101.0, [1.0, 1.0, 1.0])]
)
def test_consistency__centimetres_follow_the_unit_of_the_poses(units_per_metre, expected):
    """Tokens that stay on the image are found two tokens away, which is one unit on the wall."""
    tokens, views = make_tokens(), [make_view(0.0), make_view(1.0)]
    config = ConsistencyConfig(grid_scale=0.0, ratio_matches=1000)
    report = compute_consistency([tokens, tokens], views, config=config, units_per_metre=units_per_metre)
    assert [report[f"recall_{limit}cm"] for limit in (1, 2, 5)] == expected
    assert [report[f"ratio_recall_{limit}cm"] for limit in (1, 2, 5)] == expected
    assert report["by_angle"]["0-15"]["recall_2cm"] == expected[1]
    unknown = compute_consistency([tokens, tokens], views, config=config)
    assert not any("cm" in name for name in unknown)
    # All other metrics are the same whether there are metres or not.
    assert {name: value for name, value in report.items() if "cm" not in name and name != "by_angle"} == {
        name: value for name, value in unknown.items() if name != "by_angle"
    }


def test_consistency__a_match_without_depth_is_missed():
    tokens = make_tokens()
    views = [make_view(0.0), make_view(0.0)]
    config = ConsistencyConfig(grid_scale=0.0, recall_pixels=(16.0,))
    # The second picture shows everything one token further left than it is, at the left edge where depth is missing.
    hole = views[1].depth.clone()
    hole[:, :32] = 0.0
    holed = [views[0], DepthView(hole, K, views[1].camera_to_world)]
    content = compute_consistency([tokens, shift(tokens, 1)], holed, config=config, units_per_metre=1e-3)
    # Columns 4 to 7 are seen by both, each from both sides. From the first view, column 4 is found at column 3,
    # which has no depth; from the second, column 7 shows something else.
    assert content["num_matches"] == 2 * 4 * 8
    metres = compute_consistency([tokens, shift(tokens, 1)], views, config=config, units_per_metre=1e-3)
    assert metres["recall_5cm"] == 0.0 and content["recall_5cm"] == 0.0
    near = compute_consistency([tokens, shift(tokens, 1)], views, config=config, units_per_metre=20.0)
    cut = compute_consistency([tokens, shift(tokens, 1)], holed, config=config, units_per_metre=20.0)
    # One token is half a unit, 2.5 cm.
    assert near["recall_2cm"] == cut["recall_2cm"] == 0.0 and 0.0 < cut["recall_5cm"] < near["recall_5cm"]


def test_consistency__ratio_matches_are_counted_whether_they_are_seen_or_not():
    tokens = make_tokens()
    views = [make_view(0.0), make_view(1.0)]
    maps = [tokens, shift(tokens, 2)]
    metrics = {}
    for number in (48, 64, 1000):
        config = ConsistencyConfig(grid_scale=0.0, ratio_matches=number)
        metrics[number] = compute_consistency(maps, views, config=config)
    # Six of eight columns of the first view are in the second, and these are matched exactly.
    assert metrics[48]["ratio_recall_5px"] == 1.0 and metrics[48]["num_ratio_matches"] == 48
    # The other two lie 4 and 12 pixels beyond its edge, 8 at least from the first token centre.
    assert metrics[64]["ratio_recall_5px"] == 48 / 64 and metrics[64]["num_ratio_matches"] == 64
    assert metrics[64]["by_angle"]["0-15"]["ratio_recall_5px"] == 48 / 64
    # One way only, from the first view of a pair to the second, so there are no more.
    assert metrics[1000]["ratio_recall_5px"] == 48 / 64 and metrics[1000]["num_ratio_matches"] == 64
    assert metrics[64]["num_matches"] == 2 * 48 and metrics[64]["recall_5px"] == 1.0
    plain = compute_consistency(maps, views, config=ConsistencyConfig(grid_scale=0.0))
    assert not any("ratio" in name for name in plain)
    assert plain["recall_10px"] == metrics[64]["recall_10px"] and plain["num_matches"] == metrics[64]["num_matches"]


def test_consistency__turns_beyond_the_last_edge_are_in_no_bin():
    tokens = make_tokens()
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    turned = torch.rot90(tokens, k=2, dims=(0, 1))
    views = [make_view(), make_view(rotation=half_turn)]
    config = ConsistencyConfig(angle_edges=(0.0, 30.0, 60.0, 90.0, 120.0), ratio_matches=5)
    report = compute_consistency([tokens, turned], views, config=config)
    assert report["num_points"] == 128 and all(metrics["num_points"] == 0 for metrics in report["by_angle"].values())
    assert compute_consistency([tokens, turned], views)["by_angle"]["60-180"]["num_points"] == 128
    with pytest.raises(ValueError, match="two ascending numbers of degrees"):
        ConsistencyConfig(angle_edges=(0.0, 60.0, 30.0))
    with pytest.raises(ValueError, match="ratio_matches is -1; it must be at least 0"):
        ConsistencyConfig(ratio_matches=-1)


def test_create_pairs__order_and_bounds():
    assert create_pairs(4) == [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (0, 3)]
    drawn = create_pairs(30, max_pairs=10, seed=1)
    assert len(set(drawn)) == 10 and drawn == create_pairs(30, max_pairs=10, seed=1)
    assert drawn != create_pairs(30, max_pairs=10, seed=2)


def test_pool_consistency__weights_are_points_and_matches() -> None:
    def report(points: int, matches: int, value: float) -> dict[str, object]:
        flat = {"mean_cosine": value, "centred_cosine": value, "l1": value, "recall_10px": value}
        flat |= {"num_points": points, "num_matches": matches}
        return {**flat, "effective_rank": value, "num_pairs": 2, "by_angle": {"0-15": dict(flat)}}

    pooled = pool_consistency([report(10, 7, 1.0), report(30, 1, 5.0), report(0, 0, float("nan"))])
    for metrics in (pooled, pooled["by_angle"]["0-15"]):
        assert metrics["mean_cosine"] == metrics["centred_cosine"] == metrics["l1"] == (10 * 1.0 + 30 * 5.0) / 40
        assert metrics["recall_10px"] == (7 * 1.0 + 1 * 5.0) / 8
        assert metrics["num_points"] == 40 and metrics["num_matches"] == 8
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
