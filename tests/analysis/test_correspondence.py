"""Co-visible points against homographies and other closed forms."""

import math

import numpy as np
import pytest
import torch

from fit3d_ns.analysis import correspondence
from fit3d_ns.analysis.correspondence import (
    DepthView,
    create_grid_points,
    find_covisible,
    find_matches,
    find_ratio_matches,
    measure_match_errors,
    measure_rotation,
    sample_tokens,
)

K = torch.tensor([[50.0, 0.0, 30.0], [0.0, 48.0, 21.0], [0.0, 0.0, 1.0]])
WIDTH, HEIGHT = 64, 48


def turn(axis, degrees):
    angle = math.radians(degrees)
    c, s = math.cos(angle), math.sin(angle)
    matrices = {
        "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
        "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
        "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    }
    return torch.tensor(matrices[axis], dtype=torch.float32)


def look_at_floor(rotation, position):
    """A view of the plane z = 0; OpenGL cameras look along their own -z. Depth is by intersecting each pixel's ray."""
    camera_to_world = torch.cat([rotation, torch.tensor(position)[:, None]], dim=1)
    depth = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            ray = np.array([(column + 0.5 - 30.0) / 50.0, -(row + 0.5 - 21.0) / 48.0, -1.0])
            direction = rotation.numpy() @ ray
            depth[row, column] = -position[2] / direction[2]
    return DepthView(torch.from_numpy(depth), K, camera_to_world)


def compute_homography(view, other):
    """Maps pixels of one view of z = 0 to the other: H = P_other P_view^-1 with P = K [r1 r2 t]."""

    def project(v):
        flip = np.diag([1.0, -1.0, -1.0])
        rotation = flip @ v.camera_to_world[:, :3].double().numpy().T
        translation = -rotation @ v.camera_to_world[:, 3].double().numpy()
        return K.double().numpy() @ np.stack([rotation[:, 0], rotation[:, 1], translation], axis=1)

    return project(other) @ np.linalg.inv(project(view))


def test_find_covisible__follows_the_homography_of_a_plane():
    view = look_at_floor(turn("x", 12) @ turn("z", 20), [0.3, -0.2, 3.0])
    other = look_at_floor(turn("y", -14), [0.5, 0.1, 2.5])
    points = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([64.0, 48.0])
    # At pixel centres the depth map is exact.
    points = points.floor() + 0.5
    seen, other_points = find_covisible(view, other, points, depth_tolerance=0.05)
    homography = compute_homography(view, other)
    mapped = np.concatenate([points.numpy(), np.ones((300, 1))], axis=1) @ homography.T
    mapped = mapped[:, :2] / mapped[:, 2:]
    inside = (mapped >= 0).all(axis=1) & (mapped < [64, 48]).all(axis=1)
    assert 50 < inside.sum() < 290
    np.testing.assert_array_equal(seen, points[inside])
    np.testing.assert_allclose(other_points, mapped[inside], atol=1e-3)


def test_find_covisible__leaves_out_what_is_hidden_unknown_or_masked():
    view = look_at_floor(torch.eye(3), [0.0, 0.0, 3.0])
    points = create_grid_points(WIDTH, HEIGHT, (48, 64))
    assert len(find_covisible(view, view, points)[0]) == 64 * 48
    blocked = view.depth.clone()
    blocked[:10] = 2.0
    blocked[10:15] = 0.0
    blocked[15:20] = 3.1
    other = DepthView(blocked, K, view.camera_to_world)
    seen, _ = find_covisible(view, other, points, depth_tolerance=0.05)
    # A closer surface hides rows 0-9, rows 10-14 are unknown, 15-19 agree within 5 %.
    assert sorted(set(seen[:, 1].tolist())) == [row + 0.5 for row in range(15, 48)]
    assert set(find_covisible(view, other, points, 0.02)[0][:, 1].tolist()) == {r + 0.5 for r in range(20, 48)}
    mask = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    mask[:, 40:] = False
    masked = DepthView(view.depth, K, view.camera_to_world, mask)
    assert find_covisible(masked, view, points)[0][:, 0].max() == 39.5
    assert find_covisible(view, masked, points)[1][:, 0].max() < 40.0


def test_find_covisible__nothing_behind_the_camera():
    view = look_at_floor(torch.eye(3), [0.0, 0.0, 3.0])
    behind = DepthView(view.depth, K, torch.cat([turn("y", 180), torch.tensor([[0.0], [0.0], [3.0]])], dim=1))
    assert len(find_covisible(view, behind, create_grid_points(WIDTH, HEIGHT, (6, 8)))[0]) == 0


def test_measure_rotation__is_exact_also_near_zero():
    for degrees in (0.01, 14.0, 90.0, 170.0):
        first = torch.cat([turn("x", 33), torch.zeros(3, 1)], dim=1)
        second = torch.cat([turn("x", 33) @ turn("z", degrees), torch.ones(3, 1)], dim=1)
        assert measure_rotation(first, second).item() == pytest.approx(degrees, rel=1e-2)


def test_sample_tokens__returns_tokens_at_their_centres_and_means_between():
    tokens = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    centres = create_grid_points(64, 48, (3, 4))
    torch.testing.assert_close(sample_tokens(tokens, centres, 64, 48), tokens.reshape(12, 5), rtol=1e-4, atol=1e-5)
    between = sample_tokens(tokens, torch.tensor([[16.0, 8.0], [8.0, 16.0], [0.5, 0.5]]), 64, 48)
    torch.testing.assert_close(between[0], (tokens[0, 0] + tokens[0, 1]) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(between[1], (tokens[0, 0] + tokens[1, 0]) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(between[2], tokens[0, 0], rtol=1e-4, atol=1e-5)


def test_find_matches__one_hot_tokens_find_their_shifted_place():
    tokens = torch.eye(12).reshape(3, 4, 12)
    # In the other image everything lies one token (16 pixels) further left.
    shifted = tokens.roll(-1, dims=1)
    points = create_grid_points(64, 48, (3, 4)).reshape(3, 4, 2)[:, 1:].reshape(-1, 2)
    truth = points - torch.tensor([16.0, 0.0])
    views = (look_at_floor(torch.eye(3), [0.0, 0.0, 3.0]),) * 2
    torch.testing.assert_close(find_matches((tokens, shifted), (views[0].size, views[1].size), points, (3, 4)), truth)
    # On a finer grid the candidates stand 4 pixels apart, none nearer than this to a token's centre. At the border
    # features are constant for half a token, so only inner tokens (truth in row 1, columns 1 and 2) are that exact.
    fine = (find_matches((tokens, shifted), (views[0].size, views[1].size), points, (12, 16)) - truth).norm(dim=1)
    torch.testing.assert_close(fine[4:6], torch.full((2,), math.hypot(2, 2)))
    assert (fine <= math.hypot(6, 6) + 1e-4).all()


def test_match_errors__pixels_of_a_homography_and_distances_on_the_plane():
    view = look_at_floor(turn("x", 12) @ turn("z", 20), [0.3, -0.2, 3.0])
    other = look_at_floor(turn("y", -14), [0.5, 0.1, 2.5])
    points = create_grid_points(WIDTH, HEIGHT, (48, 64))
    seen, other_points = find_covisible(view, other, points)
    # Matches at the pixel that the true place falls into are wrong by less than a pixel, and by what it spans.
    matched = other_points.floor() + 0.5
    pixels, distances = measure_match_errors(view, other, seen, matched)
    homography = compute_homography(view, other)
    mapped = np.concatenate([seen.numpy(), np.ones((len(seen), 1))], axis=1) @ homography.T
    offsets = matched.numpy() - mapped[:, :2] / mapped[:, 2:]
    np.testing.assert_allclose(pixels, np.linalg.norm(offsets, axis=1), atol=1e-3)

    def hit_floor(v, pixels):
        rays = torch.stack([(pixels[:, 0] - 30) / 50, -(pixels[:, 1] - 21) / 48, -torch.ones(len(pixels))], dim=1)
        directions = rays @ v.camera_to_world[:, :3].T
        position = v.camera_to_world[:, 3]
        return position - directions * (position[2] / directions[:, 2])[:, None]

    expected = (hit_floor(view, seen) - hit_floor(other, matched)).norm(dim=1)
    assert expected.max() > 0.02
    torch.testing.assert_close(distances, expected, rtol=1e-3, atol=1e-4)  # depth maps are float32


def test_match_errors__unknown_where_depth_is_missing_or_behind_the_camera():
    view = look_at_floor(torch.eye(3), [0.0, 0.0, 3.0])
    depth = view.depth.clone()
    depth[:24] = 0.0
    holed = DepthView(depth, K, view.camera_to_world)
    points = torch.tensor([[10.5, 10.5], [10.5, 40.5]])
    pixels, distances = measure_match_errors(holed, view, points, points)
    assert pixels.isnan().tolist() == distances.isnan().tolist() == [True, False]
    # Where the match has no depth, its place in the picture is known all the same.
    pixels, distances = measure_match_errors(view, holed, points, points + 3.0)
    torch.testing.assert_close(pixels, torch.full((2,), math.hypot(3, 3)))
    assert distances.isnan().tolist() == [True, False]
    behind = DepthView(view.depth, K, torch.cat([turn("y", 180), torch.tensor([[0.0], [0.0], [3.0]])], dim=1))
    assert measure_match_errors(view, behind, points, points)[0].isnan().all()


GRIDS = ((8, 8), (8, 8))


def look_at_wall(mask=None):
    """A wall at depth 2, at 64x64 pixels, without depth where `mask` (8x8 cells) is 0."""
    depth = torch.full((64, 64), 2.0)
    if mask is not None:
        depth = depth * mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    return DepthView(depth, torch.tensor([[32.0, 0.0, 32.0], [0.0, 32.0, 32.0], [0.0, 0.0, 1.0]]), torch.eye(4)[:3])


def make_tokens(seed):
    return torch.randn(8, 8, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("max_matches", [10, 1000])
def test_ratio_matches__equal_a_loop_over_measured_points(max_matches, monkeypatch):
    masks = [(torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) > 0.3).float() for seed in (2, 3)]
    maps, views = (make_tokens(0), make_tokens(1)), (look_at_wall(masks[0]), look_at_wall(masks[1]))
    monkeypatch.setattr(correspondence, "ROWS_AT_ONCE", 7)
    points, other_points, ratios = find_ratio_matches(maps, views, GRIDS, max_matches)
    centres = create_grid_points(64, 64, GRIDS[0]).numpy()
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
    assert len(points) == len(expected) == min(max_matches, int(masks[0].sum()))
    np.testing.assert_allclose(ratios, [ratio for ratio, _, _ in expected], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(points, [place for _, place, _ in expected])
    np.testing.assert_allclose(other_points, [other for _, _, other in expected])


def test_ratio_matches__what_stands_there_once_comes_first():
    tokens = torch.eye(64).reshape(8, 8, 64)
    other = tokens.clone()
    # Rows 4 and 5 stand there twice, rows 6 and 7 not at all: both have the ratio 1 (0 / 0 and 1 / 1).
    other[6:] = other[4:6]
    views = (look_at_wall(), look_at_wall())
    points, other_points, ratios = find_ratio_matches((tokens, other), views, GRIDS, max_matches=64)
    torch.testing.assert_close(ratios, torch.tensor([0.0, 1.0]).repeat_interleave(32))
    assert (points[:32, 1] < 32).all() and torch.equal(points[:32], other_points[:32])
    assert torch.equal(find_ratio_matches((tokens, other), views, GRIDS, max_matches=32)[0], points[:32])


def test_ratio_matches__nothing_to_compare_with():
    one = torch.zeros(8, 8)
    one[3, 3] = 1.0
    maps = make_tokens(0), make_tokens(1)
    assert len(find_ratio_matches(maps, (look_at_wall(), look_at_wall(one)), GRIDS)[0]) == 0
    assert len(find_ratio_matches(maps, (look_at_wall(torch.zeros(8, 8)), look_at_wall()), GRIDS)[0]) == 0
    assert len(find_ratio_matches(maps, (look_at_wall(one), look_at_wall()), GRIDS)[0]) == 1
