"""Exact intersections of rays with boxes, upright elliptic cylinders and ellipsoids, in vectorised numpy.

Every solid is convex and has a *unit space*: moved to its centre, turned by its yaw and divided by its half sizes, so
that a box is [-1, 1]^3, a cylinder is the unit disc times [-1, 1], an ellipsoid the unit ball. Distances along a ray
are the same in both spaces. A point of the surface is named by its direction in unit space (`unit_points`), and the
direction by the face of the cube it leaves through: 2 * axis, plus 1 on the positive side.
World: metres, z up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from fit3d_ns.synthetic.materials import Material

Shape = Literal["box", "cylinder", "ellipsoid"]

_NEAREST_HIT = 1e-4
_RAYS_PER_CHUNK = 1 << 14


@dataclass(frozen=True)
class Solid:
    """One convex piece of a room."""

    shape: Shape
    """Its shape in unit space."""
    centre: tuple[float, float, float]
    """Its centre in the world, in metres."""
    half_sizes: tuple[float, float, float]
    """Half of its extent along its own axes, in metres, positive."""
    material: Material
    """Its colours."""
    label: str
    """Its class name."""
    yaw: float = 0.0
    """Turn about z in radians, counter-clockwise."""

    @cached_property
    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Rows are the solid's own axes in the world."""
        cosine, sine = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]], dtype=np.float32)

    @cached_property
    def to_unit_space(self) -> Float[np.ndarray, "3 3"]:
        """Turns row vectors of the world into those of unit space."""
        return (self.axes / np.asarray(self.half_sizes, dtype=np.float32)[:, None]).T

    @property
    def radius(self) -> float:
        """Radius in metres of a sphere around `centre` that holds the solid."""
        return float(np.linalg.norm(self.half_sizes))


@dataclass(frozen=True)
class Hits:
    """The first solid along each ray."""

    distances: Float[np.ndarray, " rays"]
    """Distance in units of the ray's direction; infinite where nothing is hit."""
    indices: Int[np.ndarray, " rays"]
    """Index of the solid, -1 where nothing is hit."""


def intersect_solid(
    solid: Solid, origins: Float[np.ndarray, "#rays 3"], directions: Float[np.ndarray, "rays 3"]
) -> Float[np.ndarray, " rays"]:
    """Distances at which rays from outside enter the solid, infinite for those that do not."""
    origin = (origins - np.asarray(solid.centre, dtype=np.float32)) @ solid.to_unit_space
    direction = directions @ solid.to_unit_space
    near, far = _cross_quadric(origin, direction, solid.shape)
    flat = {"box": slice(0, 3), "cylinder": slice(2, 3), "ellipsoid": slice(0, 0)}[solid.shape]
    if flat.stop:
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1.0 / direction[:, flat]
            first, second = (-1.0 - origin[:, flat]) * inverse, (1.0 - origin[:, flat]) * inverse
        # A ray within a face's plane gives NaN; fmax and fmin take the infinite other bound, and it misses.
        enter, leave = np.fmin(first, second), np.fmax(first, second)
        for axis in range(enter.shape[1]):
            near, far = np.fmax(near, enter[:, axis]), np.fmin(far, leave[:, axis])
    return np.where((near <= far) & (near > _NEAREST_HIT), near, np.float32(np.inf))


def trace_rays(
    solids: Sequence[Solid],
    origins: Float[np.ndarray, "rays 3"],
    directions: Float[np.ndarray, "rays 3"],
) -> Hits:
    """The nearest solid along each ray, by trying all of them on chunks that stay in the processor's cache."""
    distances = np.full(len(directions), np.inf, dtype=np.float32)
    indices = np.full(len(directions), -1, dtype=np.int32)
    for start in range(0, len(directions), _RAYS_PER_CHUNK):
        part = slice(start, start + _RAYS_PER_CHUNK)
        best, which = distances[part], indices[part]
        for index, solid in enumerate(solids):
            found = intersect_solid(solid, origins[part], directions[part])
            closer = found < best
            best[closer], which[closer] = found[closer], index
    return Hits(distances, indices)


def trace_camera_rays(
    solids: Sequence[Solid],
    origin: Float[np.ndarray, " 3"],
    directions: Float[np.ndarray, "pixels samples 3"],
) -> Hits:
    """The nearest solid along the rays of one camera, several for each pixel; only pixels that may see a solid try it.

    Args:
        origin: The camera's centre.
        directions: Rays of any length; those of one pixel close together.

    Returns:
        Hits of all pixels and samples in one row.
    """
    num_pixels, num_samples, _ = directions.shape
    units = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    axes = units.mean(axis=1)
    axes /= np.linalg.norm(axes, axis=-1, keepdims=True)
    # Half the angle between a pixel's axis and its farthest sample.
    spread = float(np.arccos(np.clip((units * axes[:, None]).sum(axis=-1).min(), -1.0, 1.0))) + 1e-3
    distances = np.full((num_pixels, num_samples), np.inf, dtype=np.float32)
    indices = np.full((num_pixels, num_samples), -1, dtype=np.int32)
    for index, solid in enumerate(solids):
        pixels = np.nonzero(_may_see(solid, origin, axes, spread))[0]
        if not len(pixels):
            continue
        rays = directions[pixels].reshape(-1, 3)
        found = intersect_solid(solid, origin[None], rays).reshape(-1, num_samples)
        best = distances[pixels]
        closer = found < best
        distances[pixels] = np.where(closer, found, best)
        indices[pixels] = np.where(closer, index, indices[pixels])
    return Hits(distances.ravel(), indices.ravel())


def find_unit_points(solid: Solid, points: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "points 3"]:
    """World points in the solid's unit space."""
    centre, half_sizes = np.asarray(solid.centre, dtype=np.float32), np.asarray(solid.half_sizes, dtype=np.float32)
    return ((points - centre) @ solid.axes.T / half_sizes).astype(np.float32)


def place_on_surface(
    solid: Solid, unit_directions: Float[np.ndarray, "points 3"]
) -> tuple[Float[np.ndarray, "points 3"], Float[np.ndarray, "points 3"]]:
    """World points and outward unit normals where directions from the centre, given in unit space, leave the solid."""
    x, y, z = np.abs(unit_directions).T
    if solid.shape == "box":
        reach = np.maximum(np.maximum(x, y), z)
    elif solid.shape == "cylinder":
        reach = np.maximum(np.hypot(x, y), z)
    else:
        reach = np.linalg.norm(unit_directions, axis=-1)
    unit_points = unit_directions / reach[:, None]
    flat = np.abs(unit_points) > 1.0 - 1e-4
    if solid.shape == "box":
        # On an edge the first axis wins: a normal must be one.
        axis = np.argmax(flat, axis=-1)
        unit_normals = np.eye(3)[axis] * np.sign(unit_points)
    elif solid.shape == "cylinder":
        on_cap = flat[:, 2:]
        unit_normals = np.where(on_cap, unit_points * [0.0, 0.0, 1.0], unit_points * [1.0, 1.0, 0.0])
    else:
        unit_normals = unit_points
    half_sizes = np.asarray(solid.half_sizes)
    normals = (unit_normals / half_sizes) @ solid.axes
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    points = unit_points * half_sizes @ solid.axes + np.asarray(solid.centre)
    return points.astype(np.float32), normals.astype(np.float32)


def _cross_quadric(
    origin: Float[np.ndarray, "#rays 3"], direction: Float[np.ndarray, "rays 3"], shape: Shape
) -> tuple[Float[np.ndarray, " rays"], Float[np.ndarray, " rays"]]:
    """Where rays enter and leave the unit ball, or the unit disc's tube; everywhere inside for a box."""
    if shape == "box":
        everywhere = np.full(len(direction), np.inf, dtype=np.float32)
        return -everywhere, everywhere
    used = slice(0, 3 if shape == "ellipsoid" else 2)
    # Double precision: the discriminant is a small difference of large numbers for distant small solids.
    o, d = origin[:, used].astype(np.float64), direction[:, used].astype(np.float64)
    a, b, c = (d * d).sum(axis=-1), (o * d).sum(axis=-1), (o * o).sum(axis=-1) - 1.0
    discriminant = b * b - a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(discriminant)
        near, far = (-b - root) / a, (-b + root) / a
    # Parallel to the tube (a = 0): inside for ever, or never. Missing it: never.
    is_parallel = a == 0.0
    near = np.where(is_parallel, np.where(c <= 0.0, -np.inf, np.inf), np.where(discriminant < 0.0, np.inf, near))
    far = np.where(is_parallel, np.where(c <= 0.0, np.inf, -np.inf), np.where(discriminant < 0.0, -np.inf, far))
    return near.astype(np.float32), far.astype(np.float32)


def _may_see(
    solid: Solid, origin: Float[np.ndarray, " 3"], axes: Float[np.ndarray, "pixels 3"], spread: float
) -> Bool[np.ndarray, " pixels"]:
    """True for pixels whose cone touches the sphere around the solid."""
    offset = np.asarray(solid.centre, dtype=np.float32) - origin
    distance = float(np.linalg.norm(offset))
    if distance <= solid.radius * 1.001:
        return np.ones(len(axes), dtype=bool)
    angle = np.arcsin(min(solid.radius / distance, 1.0)) + spread
    if angle >= np.pi:
        return np.ones(len(axes), dtype=bool)
    return axes @ (offset / distance) >= np.cos(angle)
