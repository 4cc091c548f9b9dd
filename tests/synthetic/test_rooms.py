import numpy as np
import pytest
import torch

from fit3d_ns.synthetic.furniture import CLASSES
from fit3d_ns.synthetic.lighting import AreaLight, BakedLight, bake_light
from fit3d_ns.synthetic.materials import Material, hash_lattice, value_noise
from fit3d_ns.synthetic.ray_tracing import Solid, find_unit_points
from fit3d_ns.synthetic.rooms import Room, build_room
from fit3d_ns.synthetic.textures import PATTERNS, compute_albedo
from fit3d_ns.synthetic.walk import look_at, walk_through

GREY = Material("plain", ((0.5, 0.5, 0.5),) * 3)
FLOOR = Solid("box", (0.0, 0.0, -0.5), (2.0, 2.0, 0.5), GREY, "floor")
SIZE = (4.0, 4.0, 3.0)


def light_on_floor(light: BakedLight, x: float, y: float) -> np.ndarray:
    return light.look_up(np.array([0]), find_unit_points(FLOOR, np.array([[x, y, 0.0]], np.float32)))[0]


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_compute_albedo__patterns_are_colourful_bounded_and_repeatable(pattern: str) -> None:
    material = Material(pattern, ((0.8, 0.3, 0.2), (0.2, 0.4, 0.7), (0.9, 0.9, 0.1)), 0.1, seed=5)
    points = np.random.default_rng(0).uniform(-1, 1, (400, 3)).astype(np.float32)
    points[:, 1] = 1.0
    albedo = compute_albedo(material, points, (0.8, 0.1, 0.6))
    assert albedo.min() >= 0.0 and albedo.max() <= 1.0
    assert albedo.std(axis=0).max() > 0.02
    np.testing.assert_array_equal(albedo[:7], compute_albedo(material, points[:7], (0.8, 0.1, 0.6)))


def test_value_noise__takes_lattice_values_at_corners_and_their_mean_between() -> None:
    corners = np.array([[3, -2, 5], [4, -2, 5]])
    values = hash_lattice(*corners.T, seed=9)
    np.testing.assert_allclose(value_noise(corners.astype(np.float32), 9), values, atol=1e-6)
    middle = np.array([[3.5, -2.0, 5.0]], np.float32)
    np.testing.assert_allclose(value_noise(middle, 9), [values.mean()], atol=1e-6)


def test_hash_lattice__is_uniform_and_depends_on_everything() -> None:
    x, y, z = (axis.ravel() for axis in np.mgrid[-8:8, -8:8, -8:8])
    values = hash_lattice(x, y, z, 1)
    counts = np.histogram(values, bins=8, range=(0, 1))[0]
    # 512 expected in each bin, with a standard deviation of 21.
    assert np.abs(counts - 512).max() < 110
    for other in (hash_lattice(x + 1, y, z, 1), hash_lattice(x, y + 1, z, 1), hash_lattice(x, y, z, 2)):
        assert abs(np.corrcoef(values, other)[0, 1]) < 0.06


def test_bake_light__open_floor_under_one_point_has_the_closed_form() -> None:
    light = AreaLight(np.array([[0.0, 0.0, 2.0]], np.float32), (1.0, 0.5, 0.25))
    baked = bake_light([FLOOR], [light], SIZE, ambient=(0.3, 0.3, 0.3), texel_size=0.1)
    for x in (0.0, 0.65, 1.45):
        distance = np.hypot(x, 2.0)
        # Cosine times the falloff 1 / (1 + (d / 2 m)^2); nothing takes ambient light away.
        expected = 0.3 + np.array([1.0, 0.5, 0.25]) * (2.0 / distance) / (1.0 + (distance / 2.0) ** 2)
        # Texels are 0.1 m apart and 4 mm above the floor.
        np.testing.assert_allclose(light_on_floor(baked, x, 0.05), expected, atol=0.01)


def test_bake_light__solids_throw_shadows_and_take_ambient_light() -> None:
    block = Solid("box", (0.0, 0.0, 1.0), (0.5, 0.5, 0.05), GREY, "table")
    light = AreaLight(np.array([[0.0, 0.0, 2.0]], np.float32), (1.0, 1.0, 1.0))
    dark = bake_light([FLOOR, block], [light], SIZE, ambient=(0.0, 0.0, 0.0), texel_size=0.1)
    # The shadow of a plate halfway up is twice its size.
    assert light_on_floor(dark, 0.8, 0.05)[0] == 0.0
    assert light_on_floor(dark, 1.2, 0.05)[0] > 0.2
    low = Solid("box", (0.0, 0.0, 0.3), (0.5, 0.5, 0.05), GREY, "table")
    ambient = bake_light([FLOOR, low], [], SIZE, ambient=(1.0, 1.0, 1.0), texel_size=0.1)
    assert light_on_floor(ambient, 0.0, 0.05)[0] < 0.8
    assert light_on_floor(ambient, 1.9, 1.9)[0] == pytest.approx(1.0, abs=0.02)


def test_bake_light__flat_lights_shine_to_one_side() -> None:
    away = AreaLight(np.array([[0.0, 0.0, 2.0]], np.float32), (1.0, 1.0, 1.0), direction=(0.0, 0.0, 1.0))
    towards = AreaLight(away.points, away.colour, direction=(0.0, 0.0, -1.0))
    nothing = (0.0, 0.0, 0.0)
    assert light_on_floor(bake_light([FLOOR], [away], SIZE, nothing), 0.3, 0.3)[0] == 0.0
    assert light_on_floor(bake_light([FLOOR], [towards], SIZE, nothing), 0.3, 0.3)[0] > 0.4


@pytest.fixture(scope="module")
def rooms() -> list[Room]:
    return [build_room(np.random.default_rng(seed)) for seed in range(12)]


def test_build_room__rooms_share_classes_and_differ(rooms: list[Room]) -> None:
    for room in rooms:
        found = {solid.label for solid in room.solids}
        assert found <= set(CLASSES)
        # A crowded room may lack a free wall for window, curtains or pictures, never the furniture.
        assert set(CLASSES) - found <= {"window", "curtain", "picture"}
        assert room.lights
    assert len({room.size for room in rooms}) == len(rooms)
    assert sum("window" in {solid.label for solid in room.solids} for room in rooms) >= 8


def test_build_room__furniture_stays_within_the_walls(rooms: list[Room]) -> None:
    for room in rooms:
        for solid in room.solids:
            if solid.label in ("wall", "floor", "ceiling"):
                continue
            reach = np.abs(solid.axes.T) @ np.asarray(solid.half_sizes)
            low, high = np.asarray(solid.centre) - reach, np.asarray(solid.centre) + reach
            assert (low > [-room.size[0] / 2 - 1e-3, -room.size[1] / 2 - 1e-3, -1e-3]).all(), solid
            assert (high < [room.size[0] / 2 + 1e-3, room.size[1] / 2 + 1e-3, room.size[2] + 1e-3]).all(), solid


@pytest.mark.parametrize("num_frames", [24, 120])
def test_walk_through__keeps_clear_of_furniture_and_moves_smoothly(rooms: list[Room], num_frames: int) -> None:
    for room in rooms:
        poses = walk_through(room.size, num_frames, start=1.0)
        positions = poses[:, :, 3].numpy()
        for solid in room.solids:
            # Distance to the box around the solid, along its own axes.
            beyond = np.maximum(np.abs(find_unit_points(solid, positions)) - 1.0, 0.0) * solid.half_sizes
            assert np.linalg.norm(beyond, axis=-1).min() > 0.05, (solid.label, solid.centre)
        step = np.linalg.norm(np.diff(positions, axis=0, append=positions[:1]), axis=-1)
        assert 0.05 < step.min() and step.max() < 0.75
        # Neighbouring views turn by less than half the field of view of 72 degrees.
        forward = poses[:, :, 2].numpy()
        turn = np.degrees(np.arccos(np.clip((forward * np.roll(forward, 1, axis=0)).sum(-1), -1, 1)))
        assert turn.max() < 36.0


def test_look_at__is_upright_and_looks_there() -> None:
    pose = look_at(np.array([2.0, -1.0, 1.5]), np.array([0.0, 0.5, 0.5]))
    rotation, position = pose[:, :3], pose[:, 3]
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(3), atol=1e-6, rtol=0)
    assert torch.linalg.det(rotation).item() == pytest.approx(1.0, abs=1e-5)
    # The target lies on the camera's -z axis; right has no height; up points up.
    target = rotation.T @ (torch.tensor([0.0, 0.5, 0.5]) - position)
    torch.testing.assert_close(target[:2], torch.zeros(2), atol=1e-6, rtol=0)
    assert target[2] < 0 and pose[2, 0] == 0.0 and pose[2, 1] > 0
