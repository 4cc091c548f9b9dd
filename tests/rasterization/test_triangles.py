"""Triangles on pixels: equal to asking every triangle for every ray, behind the camera and across it too."""

import numpy as np
import pytest

from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.geometry.undistortion import find_rays
from fit3d_ns.rasterization.cpu.triangles import LensPixels

NEAR = 0.05
LENSES = {
    "pinhole": Lens(31.0, 33.0, 20.3, 14.6, 40, 30),
    "opencv": Lens(31.0, 33.0, 20.3, 14.6, 40, 30, "opencv", (-0.1, 0.02, 0.003, -0.002)),
    "fisheye": Lens(16.0, 16.5, 20.3, 14.6, 40, 30, "fisheye", (-0.03, -0.004, -0.002, 0.0005)),
}


def cast_rays(points: np.ndarray, faces: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest hit by Cramer's rule: t ray = A + u (B - A) + v (C - A), for all rays and triangles."""
    depth, hit = np.full(len(rays), np.inf), np.full(len(rays), -1)
    rays = np.insert(rays, 2, 1.0, axis=1)
    for number, (a, b, c) in enumerate(points[faces]):
        sides = np.broadcast_to(np.stack([a - b, a - c], axis=1), (len(rays), 3, 2))
        t, u, v = np.linalg.solve(np.concatenate([rays[..., None], sides], axis=2), a[:, None])[..., 0].T
        nearer = (np.minimum(np.minimum(u, v), 1.0 - u - v) >= 0) & (t >= NEAR) & (t < depth)
        depth[nearer], hit[nearer] = t[nearer], number
    return np.where(hit >= 0, depth, 0.0), hit


@pytest.mark.parametrize("model", LENSES)
def test_rasterize__finds_what_casting_every_ray_finds(model: str) -> None:
    lens, numbers = LENSES[model], np.random.default_rng(3)
    points = np.repeat(numbers.normal(size=(30, 3)) * 0.5 + [0.0, 0.0, 2.0], 3, axis=0)
    points += numbers.normal(size=(90, 3)) * 0.3
    # These are large, most of them across the camera's plane; a thousand times smaller than a pixel is the last.
    points[:12] = numbers.normal(size=(12, 3)) * 2.0 + [0.0, 0.0, 1.0]
    points[87:] = points[87] + numbers.normal(size=(3, 3)) * 1e-4
    faces = np.arange(90).reshape(30, 3)
    depth, hit = LensPixels(lens).rasterize(points, faces, NEAR)
    columns, rows = np.meshgrid(np.arange(lens.width) + 0.5, np.arange(lens.height) + 0.5)
    rays = find_rays(lens, np.stack([columns.ravel(), rows.ravel()], axis=1))
    expected_depth, expected_hit = cast_rays(points, faces, rays)
    is_behind = points[faces][..., 2] < NEAR
    assert (is_behind.any(axis=1) & ~is_behind.all(axis=1))[np.unique(hit)[1:]].any() and len(np.unique(hit)) > 9
    np.testing.assert_array_equal(hit.ravel(), expected_hit)
    np.testing.assert_allclose(depth.ravel(), expected_depth, rtol=1e-9)


def test_rasterize__a_fine_mesh_has_no_cracks() -> None:
    """A plane at 2 m whose corners lie on pixel centres' rays: each pixel is on sides of triangles."""
    lens = Lens(20.0, 20.0, 16.5, 12.5, 33, 25)
    columns, rows = np.meshgrid(np.arange(-20, 21) * 0.1, np.arange(-16, 17) * 0.1)
    points = np.stack([columns, rows, np.full_like(rows, 2.0)], axis=-1).reshape(-1, 3)
    corner = np.arange(33 * 41).reshape(33, 41)[:-1, :-1].reshape(-1, 1)
    faces = np.concatenate([corner + [0, 1, 42], corner + [0, 42, 41]])
    depth, hit = LensPixels(lens).rasterize(points, faces, NEAR)
    assert (hit >= 0).all()
    np.testing.assert_allclose(depth, 2.0, rtol=1e-12)
