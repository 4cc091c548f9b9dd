import math

import numpy as np
import pytest

from fit3d_ns.synthetic.materials import Material
from fit3d_ns.synthetic.ray_tracing import (
    Shape,
    Solid,
    find_unit_points,
    intersect_solid,
    place_on_surface,
    trace_camera_rays,
    trace_rays,
)

GREY = Material("plain", ((0.5, 0.5, 0.5),) * 3)


def make_solid(shape: Shape, yaw: float = 0.0) -> Solid:
    return Solid(shape, (1.0, -0.5, 0.7), (0.6, 0.3, 0.4), GREY, "table", yaw)


def is_inside(solid: Solid, points: np.ndarray) -> np.ndarray:
    """Membership written out: turn back by the yaw, then the textbook inequality of each shape."""
    dx, dy, dz = (points - np.asarray(solid.centre)).T
    x = (math.cos(solid.yaw) * dx + math.sin(solid.yaw) * dy) / solid.half_sizes[0]
    y = (-math.sin(solid.yaw) * dx + math.cos(solid.yaw) * dy) / solid.half_sizes[1]
    z = dz / solid.half_sizes[2]
    if solid.shape == "box":
        return (np.abs(x) <= 1) & (np.abs(y) <= 1) & (np.abs(z) <= 1)
    if solid.shape == "cylinder":
        return (x**2 + y**2 <= 1) & (np.abs(z) <= 1)
    return x**2 + y**2 + z**2 <= 1


def random_rays(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rays from a distance of about 3 towards the neighbourhood of the solid."""
    numbers = np.random.default_rng(seed)
    origins = numbers.normal(size=(count, 3))
    origins = 3.0 * origins / np.linalg.norm(origins, axis=-1, keepdims=True) + [1.0, -0.5, 0.7]
    targets = numbers.uniform(-0.5, 0.5, (count, 3)) + [1.0, -0.5, 0.7]
    return origins.astype(np.float32), (targets - origins).astype(np.float32)


@pytest.mark.parametrize("shape", ["box", "cylinder", "ellipsoid"])
@pytest.mark.parametrize("yaw", [0.0, 0.8, -2.5])
def test_intersect_solid__matches_marching_along_the_ray(shape: Shape, yaw: float) -> None:
    solid = make_solid(shape, yaw)
    origins, directions = random_rays(60)
    found = intersect_solid(solid, origins, directions)
    steps = np.linspace(0.0, 2.0, 4001)
    for origin, direction, distance in zip(origins, directions, found, strict=True):
        inside = is_inside(solid, origin + steps[:, None] * direction)
        if inside.any():
            # Marching finds the entry to within one step; a graze shorter than a step may be found by us alone.
            assert distance == pytest.approx(steps[np.argmax(inside)], abs=6e-4)
        elif np.isfinite(distance):
            middle = is_inside(solid, (origin + (distance + np.linspace(0, 5e-4, 50)[:, None]) * direction))
            assert middle.any()
    assert 20 < np.isfinite(found).sum() < 60


def test_intersect_solid__closed_forms() -> None:
    origins, directions = np.zeros((1, 3), np.float32), np.array([[1.0, 0.0, 0.0]], np.float32)
    ball = Solid("ellipsoid", (5.0, 0.0, 0.0), (2.0, 1.0, 1.0), GREY, "lamp")
    assert intersect_solid(ball, origins, directions).tolist() == [3.0]
    # Twice as long a direction halves the distance.
    assert intersect_solid(ball, origins, 2 * directions).tolist() == [1.5]
    turned = Solid("box", (5.0, 0.0, 0.0), (1.0, 1.0, 1.0), GREY, "lamp", yaw=math.pi / 4)
    assert intersect_solid(turned, origins, directions)[0] == pytest.approx(5.0 - math.sqrt(2.0), abs=1e-5)
    # From above, parallel to a cylinder's axis: inside its disc and beside it.
    tube = Solid("cylinder", (0.0, 0.0, 0.0), (1.0, 1.0, 0.5), GREY, "lamp")
    above = np.array([[0.5, 0.0, 3.0], [1.5, 0.0, 3.0]], np.float32)
    down = np.array([[0.0, 0.0, -1.0]] * 2, np.float32)
    assert intersect_solid(tube, above, down).tolist() == [2.5, np.inf]


def test_intersect_solid__rays_along_a_face_and_behind() -> None:
    cube = Solid("box", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), GREY, "lamp")
    origins = np.array([[-3.0, 1.0, 0.0], [-3.0, 1.1, 0.0], [3.0, 0.0, 0.0]], np.float32)
    directions = np.array([[1.0, 0.0, 0.0]] * 3, np.float32)
    # Edge-on in the face's plane, beside it, behind the ray: all missed, without a warning.
    assert intersect_solid(cube, origins, directions).tolist() == [np.inf] * 3


def test_trace_rays__nearest_of_many_is_the_minimum_over_each() -> None:
    numbers = np.random.default_rng(1)
    shapes: tuple[Shape, ...] = ("box", "cylinder", "ellipsoid")
    solids = [
        Solid(shapes[index % 3], tuple(numbers.uniform(-2, 2, 3)), tuple(numbers.uniform(0.1, 0.5, 3)), GREY, "chair")
        for index in range(12)
    ]
    origin = np.array([0.0, 0.0, 4.0], np.float32)
    directions = np.concatenate([numbers.uniform(-0.5, 0.5, (300, 2)), np.full((300, 1), -1.0)], axis=1)
    directions = directions.astype(np.float32)
    origins = np.broadcast_to(origin, directions.shape)
    each = np.stack([intersect_solid(solid, origins, directions) for solid in solids])
    hits = trace_rays(solids, origins, directions)
    np.testing.assert_array_equal(hits.distances, each.min(axis=0))
    hit = np.isfinite(hits.distances)
    np.testing.assert_array_equal(hits.indices[hit], each.argmin(axis=0)[hit])
    assert (hits.indices[~hit] == -1).all() and hit.any() and not hit.all()
    # Rays of one camera, three to a pixel, skip solids that cannot be seen without changing anything.
    bundled = trace_camera_rays(solids, origin, directions.reshape(100, 3, 3))
    np.testing.assert_allclose(bundled.distances, hits.distances, rtol=1e-5)
    np.testing.assert_array_equal(bundled.indices, hits.indices)


@pytest.mark.parametrize("shape", ["box", "cylinder", "ellipsoid"])
def test_place_on_surface__points_lie_on_it_with_normals_outward(shape: Shape) -> None:
    solid = make_solid(shape, 0.6)
    directions = np.random.default_rng(2).uniform(-1, 1, (50, 3))
    points, normals = place_on_surface(solid, directions)
    assert is_inside(solid, points - 1e-3 * normals).all()
    assert not is_inside(solid, points + 1e-3 * normals).any()
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1.0, rtol=1e-5)
    # Unit space keeps the direction from the centre.
    unit = find_unit_points(solid, points)
    np.testing.assert_allclose(
        unit / np.linalg.norm(unit, axis=-1, keepdims=True),
        directions / np.linalg.norm(directions, axis=-1, keepdims=True),
        atol=1e-5,
    )
    # A ray against the normal comes back to the point.
    distances = intersect_solid(solid, points + 0.05 * normals, -normals)
    np.testing.assert_allclose(distances, 0.05, atol=1e-4)
