"""`LensPixels`: the nearest triangle along the ray of every pixel of a photograph, whatever its lens.

With the corners A, B, C of a triangle in camera coordinates, the ray (x, y, 1) of a pixel has

    e_A = ray . (B x C),  e_B = ray . (C x A),  e_C = ray . (A x B),  z = A . (B x C) / (e_A + e_B + e_C)

and hits it, at depth z, where no two of the e differ in sign: exact at pixel centres, distorted or not. Lines are
lines in (x, y), so bounds there say which pixels to ask. Pixels are sorted into cells, row by row, and a triangle asks
one stretch of each row. Cells are squares of (x / (1 + |x|), y / (1 + |y|)), which all lenses fill evenly enough.
"""

import numpy as np
from jaxtyping import Float, Int

from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.geometry.undistortion import find_rays
from fit3d_ns.rasterization.cpu.runtime import compiled

_WIDEST = 20.0
"""Rays farther from the axis, 87 degrees, see nothing."""
_EDGE = 1e-9
"""Share of a triangle by which pixels may lie outside, so that rounding leaves no crack between two."""


class LensPixels:
    """The pixels of a lens, one to a cell on average; made once for all photographs of the lens."""

    def __init__(self, lens: Lens):
        columns, rows = np.meshgrid(np.arange(lens.width) + 0.5, np.arange(lens.height) + 0.5)
        rays = find_rays(lens, np.stack([columns.ravel(), rows.ravel()], axis=1))
        self.shape = (lens.height, lens.width)
        self.pixels = np.flatnonzero((np.abs(rays) < _WIDEST).all(axis=1))
        squeezed = rays[self.pixels] / (1.0 + np.abs(rays[self.pixels]))
        low = squeezed.min(axis=0)
        extent = np.maximum(squeezed.max(axis=0) - low, 1e-6)
        side = float(np.sqrt(extent.prod() / len(squeezed)))
        width, height = (extent // side).astype(np.int64) + 1
        cells = ((squeezed - low) // side).astype(np.int64) @ np.array([1, width])
        order = np.argsort(cells, kind="stable")
        self.pixels, self.rays = self.pixels[order], rays[self.pixels[order]]
        self.starts = np.searchsorted(cells[order], np.arange(width * height + 1))
        self.grid = (float(low[0]), float(low[1]), side, int(width), int(height))

    def rasterize(
        self, in_camera: Float[np.ndarray, "vertices 3"], faces: Int[np.ndarray, "faces 3"], near: float
    ) -> tuple[Float[np.ndarray, "height width"], Int[np.ndarray, "height width"]]:
        """Depth z, 0 where nothing is hit, and number of the triangle, -1 there; from `near` on, both sides are seen.

        Vertices are in camera coordinates (OpenCV: x right, y down, z into the scene).
        """
        nearest, numbers = np.full(len(self.pixels), np.inf), np.full(len(self.pixels), -1)
        _rasterize(in_camera, faces, self.rays, self.starts, self.grid, near, nearest, numbers)
        depth, hit = np.zeros(self.shape), np.full(self.shape, -1)
        depth.ravel()[self.pixels] = np.where(numbers >= 0, nearest, 0.0)
        hit.ravel()[self.pixels] = numbers
        return depth, hit


@compiled
def _rasterize(points, faces, rays, starts, grid, near, nearest, numbers):
    """Fills, for the pixels in their order, the smallest depth, infinity before, and its triangle."""
    low_x, low_y, side, columns, rows = grid
    for face in range(len(faces)):
        x_min = y_min = np.inf
        x_max = y_max = -np.inf
        for corner in range(3):
            p, q = points[faces[face, corner]], points[faces[face, (corner + 1) % 3]]
            if p[2] >= near:
                x, y = p[0] / p[2], p[1] / p[2]
                x_min, x_max, y_min, y_max = min(x_min, x), max(x_max, x), min(y_min, y), max(y_max, y)
            if (p[2] >= near) != (q[2] >= near):
                t = (near - p[2]) / (q[2] - p[2])
                x, y = (p[0] + t * (q[0] - p[0])) / near, (p[1] + t * (q[1] - p[1])) / near
                x_min, x_max, y_min, y_max = min(x_min, x), max(x_max, x), min(y_min, y), max(y_max, y)
        if x_min > x_max:
            continue
        # A little more than the bounds, for rounding.
        left = max((x_min / (1.0 + abs(x_min)) - low_x) / side - 1e-6, 0.0)
        right = min((x_max / (1.0 + abs(x_max)) - low_x) / side + 1e-6, columns - 1.0)
        top = max((y_min / (1.0 + abs(y_min)) - low_y) / side - 1e-6, 0.0)
        bottom = min((y_max / (1.0 + abs(y_max)) - low_y) / side + 1e-6, rows - 1.0)
        if left > right or top > bottom:
            continue
        a, b, c = points[faces[face, 0]], points[faces[face, 1]], points[faces[face, 2]]
        ax, ay, az = b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0]
        bx, by, bz = c[1] * a[2] - c[2] * a[1], c[2] * a[0] - c[0] * a[2], c[0] * a[1] - c[1] * a[0]
        cx, cy, cz = a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]
        volume = a[0] * ax + a[1] * ay + a[2] * az
        sign = -1.0 if volume < 0.0 else 1.0
        for row in range(int(top), int(bottom) + 1):
            for i in range(starts[row * columns + int(left)], starts[row * columns + int(right) + 1]):
                x, y = sign * rays[i, 0], sign * rays[i, 1]
                e_a, e_b, e_c = x * ax + y * ay + sign * az, x * bx + y * by + sign * bz, x * cx + y * cy + sign * cz
                total = e_a + e_b + e_c
                if total > 0.0 and min(e_a, e_b, e_c) >= -_EDGE * total:
                    z = sign * volume / total
                    if near <= z < nearest[i]:
                        nearest[i], numbers[i] = z, face
