"""Normals of planes and balls in closed form, edges, and errors against loops."""

import math

import pytest
import torch

from fit3d_ns.analysis.correspondence import DepthView
from fit3d_ns.probing.normals import compute_normals, measure_angles, summarise_angles

K = torch.tensor([[90.0, 0.0, 41.0], [0.0, 110.0, 28.5], [0.0, 0.0, 1.0]])
POSE = torch.eye(4)[:3]


def create_rays(height: int = 60, width: int = 80) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], dim=-1)


@pytest.mark.parametrize("normal", [(0.0, 0.0, -1.0), (0.6, 0.0, -0.8), (-0.3, 0.7, -0.65), (0.0, -0.95, -0.31)])
def test_normals__of_a_plane_are_the_planes(normal):
    normal = torch.nn.functional.normalize(torch.tensor(normal), dim=0)
    cosine = create_rays() @ normal
    # n . (z ray) = -2: two units from the camera; seen where the ray meets it in front.
    depth = torch.where(cosine < -0.05, -2.0 / cosine, 0.0)
    normals, known = compute_normals(DepthView(depth, K, POSE))
    assert known.sum() > 800
    assert measure_angles(normals[known], normal.expand(int(known.sum()), 3)).max() < 0.05
    assert not normals[~known].any()
    torch.testing.assert_close(normals[known].norm(dim=-1), torch.ones(int(known.sum())))


def test_normals__of_a_ball_point_from_its_middle():
    rays, middle = create_rays(), torch.tensor([0.1, -0.1, 3.0])
    along, squared = rays @ middle, rays.square().sum(dim=-1)
    inside = along.square() - squared * (middle @ middle - 1.0)
    depth = torch.where(inside > 0, (along - inside.clamp(min=0).sqrt()) / squared, 0.0)
    normals, known = compute_normals(DepthView(depth, K, POSE))
    errors = measure_angles(normals[known], (depth[..., None] * rays - middle)[known])
    assert known.sum() > 1500 and errors.median() < 0.2 and errors.max() < 8.0


def test_normals__edges_holes_and_masks_have_none():
    depth = torch.full((60, 80), 2.0)
    depth[:, 40:] = 3.0
    depth[10, 10] = 0.0
    depth[11, 20] = math.nan
    mask = torch.ones(60, 80, dtype=torch.bool)
    mask[50, 20] = False
    _, known = compute_normals(DepthView(depth, K, POSE, mask))
    # The step is one pixel here: a pixel is lost where it, or one beside it, is missing or behind an edge.
    expected = torch.zeros(60, 80, dtype=torch.bool)
    expected[1:-1, 1:-1] = True
    expected[:, 39:41] = False
    for row, column in ((10, 10), (11, 20), (50, 20)):
        for dy, dx in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
            expected[row + dy, column + dx] = False
    assert torch.equal(known, expected)
    assert not compute_normals(DepthView(torch.ones(2, 2), K, POSE))[1].any()


def test_angles__are_summarised_as_by_hand():
    first = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    second = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.2, 1.0], [1.0, 0.0, 0.0]])
    angles = measure_angles(first, second)
    expected = [0.0, 90.0, math.degrees(math.atan(0.2)), 45.0]
    torch.testing.assert_close(angles, torch.tensor(expected), atol=1e-3, rtol=0)
    figures = summarise_angles(angles)
    assert figures["mean"] == pytest.approx(sum(expected) / 4, abs=1e-3)
    assert figures["rmse"] == pytest.approx(math.sqrt(sum(angle**2 for angle in expected) / 4), abs=1e-3)
    assert (figures["within_11.25"], figures["within_22.5"], figures["within_30"]) == (0.25, 0.5, 0.5)
    assert figures["num_pixels"] == 4
