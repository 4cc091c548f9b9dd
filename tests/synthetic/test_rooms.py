import math

import numpy as np
import pytest
import torch

from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.synthetic import rooms as toy
from fit3d_ns.synthetic.rooms import CLASSES, Material, Room, Solid

GREY = Material("blotches", False, (1.0, 1.0, 0.0, 0.0, 0.0), (0.5,) * 9)


def test_intersect_solid__closed_forms() -> None:
    origin, along_x = np.zeros(3, np.float32), np.array([[1, 2, -1], [0, 0, 0], [0, 0, 0]], np.float32)
    ball = Solid("lamp", GREY, 3, (5.0, 0.0, 0.0), (2.0, 1.0, 1.0))
    # Twice as long a ray halves the distance; what is behind is not hit.
    assert toy.intersect_solid(ball, origin, along_x).tolist() == [3.0, 1.5, np.inf]
    turned = Solid("lamp", GREY, 0, (5.0, 0.0, 0.0), (1.0, 1.0, 1.0), yaw=math.pi / 4)
    assert toy.intersect_solid(turned, origin, along_x)[0] == pytest.approx(5.0 - math.sqrt(2.0), abs=1e-5)
    for x, along_the_axis, across in ((0.5, 2.5, 3.0 - math.sqrt(0.75)), (1.5, np.inf, np.inf)):
        tube = Solid("lamp", GREY, 2, (x, 0.0, -3.0), (1.0, 1.0, 0.5))
        assert toy.intersect_solid(tube, origin, -np.eye(3, dtype=np.float32)[:, 2:]) == pytest.approx(along_the_axis)
        start = np.array([0.0, -3.0, -3.0], np.float32)
        assert toy.intersect_solid(tube, start, np.eye(3, dtype=np.float32)[:, 1:2]) == pytest.approx(across)


def test_render_room__depth_labels_and_points_of_a_box_in_an_empty_room() -> None:
    boxes = {
        "floor": ((0.0, 0.0, -0.5), (5.0, 5.0, 0.5)),
        "wall": ((0.0, 4.0, 1.0), (5.0, 1.0, 2.0)),
        "ceiling": ((0.0, 0.0, 3.5), (5.0, 5.0, 0.5)),
        "bed": ((0.0, 1.5, 1.0), (0.3, 0.5, 0.3)),
    }
    room = Room((6.0, 6.0, 3.0), [Solid(label, GREY, 0, *place) for label, place in boxes.items()])
    # From (0, -2, 1) along +y: the box's face is 3 m away, the wall 5 m.
    pose = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, -2.0], [0.0, 1.0, 0.0, 1.0]])
    view = toy.render_room(room, pose, Lens(40.0, 40.0, 16.0, 12.0, 32, 24))
    y, x = torch.meshgrid((torch.arange(24) - 11.5) / 40, (torch.arange(32) - 15.5) / 40, indexing="ij")
    on_box = (x.abs() * 3.0 < 0.3) & (y.abs() * 3.0 < 0.3)
    floor_or_ceiling = torch.where(y > 0, 1.0 / y, -2.0 / y)
    depth = torch.where(on_box, 3.0, floor_or_ceiling.clamp(max=5.0))
    torch.testing.assert_close(view.depth, depth, atol=1e-4, rtol=1e-4)
    assert (view.labels == CLASSES.index("bed")).equal(on_box)
    torch.testing.assert_close(view.points, torch.stack([x * depth, depth - 2, 1 - y * depth], -1), atol=1e-3, rtol=0)


def test_build_room__rooms_differ_share_classes_and_leave_the_walk_clear() -> None:
    rooms = [toy.build_room(np.random.default_rng(seed)) for seed in range(12)]
    assert len({room.size for room in rooms}) == len(rooms) and toy.build_room(np.random.default_rng(3)) == rooms[3]
    for room in rooms:
        assert {solid.label for solid in room.solids} == set(CLASSES)
        low, high = np.array([-0.5, -0.5, 0.0]) * room.size - 1e-3, np.array([0.5, 0.5, 1.0]) * room.size + 1e-3
        walks = torch.cat([toy.walk_through(room.size, num_frames, start=1.0) for num_frames in (24, 120)])
        for solid in room.solids:
            reach = np.abs(np.linalg.inv(solid.to_unit_space)).sum(axis=1)
            fits = (solid.centre - reach > low).all() and (solid.centre + reach < high).all()
            assert fits or solid.label in toy.SHELL, solid
            # Distance of the cameras to the box around the solid, along its own axes.
            beyond = np.abs((walks[:, :, 3].numpy() - solid.centre) @ solid.to_unit_space.T) - 1.0
            assert np.linalg.norm(beyond.clip(0.0) * solid.half_sizes, axis=-1).min() > 0.05, solid


@pytest.mark.parametrize("num_frames", [24, 120])
def test_walk_through__is_smooth_and_upright(num_frames: int) -> None:
    poses = toy.walk_through((5.0, 4.8, 2.6), num_frames, start=1.0)
    rotations, positions = poses[:, :, :3], poses[:, :, 3]
    step = (positions - positions.roll(1, 0)).norm(dim=-1)
    assert 0.05 < step.min() and step.max() < 0.75
    # Neighbouring views turn by less than half the field of view of 72 degrees; all are upright rotations.
    cosine = (rotations[:, :, 2] * rotations[:, :, 2].roll(1, 0)).sum(-1)
    assert torch.rad2deg(torch.arccos(cosine.clip(-1, 1))).max() < 36.0
    torch.testing.assert_close(rotations.mT @ rotations, torch.eye(3).expand(num_frames, 3, 3), atol=1e-5, rtol=0)
    assert (torch.linalg.det(rotations) > 0).all() and (poses[:, 2, 0] == 0).all() and (poses[:, 2, 1] > 0).all()
