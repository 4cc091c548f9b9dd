"""Lowe's ratio test against a loop, and what it prefers."""

import numpy as np
import pytest
import torch

from fit3d_ns.analysis.correspondence import DepthView, create_grid_points
from fit3d_ns.analysis.ratio_matches import find_ratio_matches

K = torch.tensor([[32.0, 0.0, 32.0], [0.0, 32.0, 32.0], [0.0, 0.0, 1.0]])
GRID = (8, 8)


def make_view(mask=None):
    """A wall at depth 2, at 64x64 pixels, without depth where `mask` (8x8 cells) is 0."""
    depth = torch.full((64, 64), 2.0)
    if mask is not None:
        depth = depth * mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    return DepthView(depth, K, torch.eye(4)[:3])


def make_tokens(seed, embed=6):
    return torch.randn(8, 8, embed, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("max_matches", [10, 1000])
def test_ratio_matches__equal_a_loop_over_measured_points(max_matches):
    masks = [(torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) > 0.3).float() for seed in (2, 3)]
    maps, views = (make_tokens(0), make_tokens(1)), (make_view(masks[0]), make_view(masks[1]))
    found = find_ratio_matches(maps, views, (GRID, GRID), max_matches, chunk_size=7)
    centres = create_grid_points(64, 64, GRID).numpy()
    sides = []
    for tokens, mask in zip(maps, masks, strict=True):
        kept = mask.flatten().bool().numpy()
        sides.append((centres[kept], tokens.flatten(0, 1).double().numpy()[kept]))
    expected = []
    for place, query in zip(*sides[0], strict=True):
        distances = []
        for other, candidate in zip(*sides[1], strict=True):
            cosine = query @ candidate / np.linalg.norm(query) / np.linalg.norm(candidate)
            distances.append((1 - cosine, tuple(other)))
        first, second = sorted(distances)[:2]
        expected.append((first[0] / second[0], tuple(place), first[1]))
    expected = sorted(expected)[:max_matches]
    assert len(found) == len(expected) == min(max_matches, int(masks[0].sum()))
    np.testing.assert_allclose(found.ratios, [ratio for ratio, _, _ in expected], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.points, [place for _, place, _ in expected])
    np.testing.assert_allclose(found.other_points, [other for _, _, other in expected])


def test_ratio_matches__what_stands_there_once_comes_first():
    tokens = torch.eye(64).reshape(8, 8, 64)
    other = tokens.clone()
    # Rows 4 and 5 stand there twice, rows 6 and 7 not at all: both have the ratio 1 (0 / 0 and 1 / 1).
    other[6:] = other[4:6]
    found = find_ratio_matches((tokens, other), (make_view(), make_view()), (GRID, GRID), max_matches=64)
    torch.testing.assert_close(found.ratios, torch.tensor([0.0, 1.0]).repeat_interleave(32))
    assert (found.points[:32, 1] < 32).all() and torch.equal(found.points[:32], found.other_points[:32])
    best = find_ratio_matches((tokens, other), (make_view(), make_view()), (GRID, GRID), max_matches=32)
    assert torch.equal(best.points, found.points[:32])


def test_ratio_matches__nothing_to_compare_with():
    one = torch.zeros(8, 8)
    one[3, 3] = 1.0
    maps = make_tokens(0), make_tokens(1)
    assert len(find_ratio_matches(maps, (make_view(), make_view(one)), (GRID, GRID))) == 0
    assert len(find_ratio_matches(maps, (make_view(torch.zeros(8, 8)), make_view()), (GRID, GRID))) == 0
    assert len(find_ratio_matches(maps, (make_view(one), make_view()), (GRID, GRID))) == 1
