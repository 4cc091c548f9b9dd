"""Consistency on scenes where the answer is known: shifted, rotated, collapsed and unrelated tokens."""

import json

import pytest
import torch

from fit3d_ns.analysis.consistency import ConsistencyConfig, compute_consistency, create_pairs
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
    overall = report.overall
    assert overall.mean_cosine == pytest.approx(1.0, abs=1e-5)
    assert overall.centred_cosine == pytest.approx(1.0, abs=1e-5)
    assert overall.l1 == pytest.approx(0.0, abs=1e-5)
    # 7 of 8 columns are common, seen from both sides.
    assert overall.num_points == 2 * 7 * 8
    assert overall.recall["recall_5px"] > 0.99
    assert report.num_pairs == 1


def test_consistency__recall_at_the_tokens_is_exact():
    tokens = make_tokens()
    config = ConsistencyConfig(grid_scale=0.0, recall_pixels=(0.001, 7.9))
    report = compute_consistency([tokens, shift(tokens, 2)], [make_view(0.0), make_view(1.0)], config=config)
    assert report.overall.recall == {"recall_0.001px": 1.0, "recall_7.9px": 1.0}
    # Tokens that stay on the image instead of the surface are found two tokens (16 pixels) away.
    config = ConsistencyConfig(grid_scale=0.0, recall_pixels=(15.9, 16.1))
    report = compute_consistency([tokens, tokens], [make_view(0.0), make_view(1.0)], config=config)
    assert list(report.overall.recall.values()) == [0.0, 1.0]


def test_consistency__a_quarter_turn_falls_into_its_bin():
    tokens = make_tokens()
    # Turning the camera counter-clockwise turns the picture clockwise.
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    turned = torch.rot90(tokens, k=-1, dims=(0, 1))
    report = compute_consistency([tokens, turned], [make_view(), make_view(rotation=quarter)])
    assert report.by_angle["60-180"].mean_cosine == pytest.approx(1.0, abs=1e-4)
    assert report.by_angle["60-180"].num_points == report.overall.num_points == 2 * 64
    assert report.by_angle["15-30"].num_points == 0
    assert report.by_angle["15-30"].mean_cosine != report.by_angle["15-30"].mean_cosine


def test_consistency__collapse_raises_the_raw_cosine_only():
    views = [make_view(), make_view()]
    unrelated = [make_tokens(0), make_tokens(1)]
    collapsed = [tokens * 0.1 + 5.0 for tokens in unrelated]
    plain, fallen = compute_consistency(unrelated, views), compute_consistency(collapsed, views)
    assert abs(plain.overall.mean_cosine) < 0.1
    assert fallen.overall.mean_cosine > 0.99
    assert fallen.overall.centred_cosine == pytest.approx(plain.overall.centred_cosine, abs=1e-3)
    # Scaling by 0.1 scales differences; the common shift drops out.
    assert fallen.overall.l1 == pytest.approx(0.1 * plain.overall.l1, rel=1e-3)
    expected = (unrelated[0] - unrelated[1]).abs().mean().item()
    assert plain.overall.l1 == pytest.approx(expected, rel=1e-4)
    assert plain.overall.recall["recall_5px"] < 0.2


def test_consistency__means_are_pooled_over_points():
    tokens = make_tokens()
    views = [make_view(0.0), make_view(0.5), make_view(1.0)]
    maps = [tokens, shift(tokens, 1), make_tokens(5)]
    pairs = [(0, 1), (0, 2)]
    together = compute_consistency(maps, views, pairs).overall
    single = [compute_consistency(maps, views, [pair]).overall for pair in pairs]
    counts = [figures.num_points for figures in single]
    expected = sum(figures.mean_cosine * count for figures, count in zip(single, counts, strict=True)) / sum(counts)
    assert together.num_points == sum(counts)
    assert together.mean_cosine == pytest.approx(expected, rel=1e-6)


def test_consistency__views_without_anything_in_common():
    report = compute_consistency([make_tokens(), make_tokens(1)], [make_view(0.0), make_view(50.0)])
    assert report.overall.num_points == 0 and report.num_pairs == 0
    content = report.to_dict()
    assert content["mean_cosine"] != content["mean_cosine"]
    assert list(content["by_angle"]) == ["0-15", "15-30", "30-60", "60-180"]


def test_report__is_plain_json():
    tokens = make_tokens()
    content = compute_consistency([tokens, tokens], [make_view(), make_view()]).to_dict()
    keys = set(json.loads(json.dumps(content)))
    assert {"mean_cosine", "centred_cosine", "l1", "recall_10px", "by_angle", "effective_rank", "num_points"} <= keys
    assert content["recall_10px"] == 1.0


def test_create_pairs__gaps_and_bounds():
    assert create_pairs(4) == [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (0, 3)]
    assert create_pairs(5, gaps=[2]) == [(0, 2), (1, 3), (2, 4)]
    drawn = create_pairs(30, max_pairs=10, seed=1)
    assert len(set(drawn)) == 10 and drawn == create_pairs(30, max_pairs=10, seed=1)
    assert drawn != create_pairs(30, max_pairs=10, seed=2)


def test_errors__maps_and_views_must_match():
    with pytest.raises(ValueError, match="1 token maps for 2 views"):
        compute_consistency([make_tokens()], [make_view(), make_view()])
