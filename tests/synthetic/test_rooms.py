import numpy as np
import pytest
import torch

from fit3d_ns.synthetic.rendering import CLASSES, SHELL, Room
from fit3d_ns.synthetic.rooms import build_room, walk_through


@pytest.fixture(scope="module")
def rooms() -> list[Room]:
    return [build_room(np.random.default_rng(seed)) for seed in range(12)]


def test_build_room__rooms_share_classes_and_differ_and_furniture_stays_inside(rooms: list[Room]) -> None:
    assert len({room.size for room in rooms}) == len(rooms) and build_room(np.random.default_rng(3)) == rooms[3]
    for room in rooms:
        assert {solid.label for solid in room.solids} == set(CLASSES)
        low, high = np.array([-0.5, -0.5, 0.0]) * room.size - 1e-3, np.array([0.5, 0.5, 1.0]) * room.size + 1e-3
        for solid in room.solids:
            reach = np.abs(np.linalg.inv(solid.to_unit_space)).sum(axis=1)
            fits = (solid.centre - reach > low).all() and (solid.centre + reach < high).all()
            assert fits or solid.label in SHELL, solid


@pytest.mark.parametrize("num_frames", [24, 120])
def test_walk_through__keeps_clear_of_furniture_and_moves_smoothly(rooms: list[Room], num_frames: int) -> None:
    for room in rooms:
        poses = walk_through(room.size, num_frames, start=1.0)
        rotations, positions = poses[:, :, :3], poses[:, :, 3].numpy()
        for solid in room.solids:
            # Distance to the box around the solid, along its own axes.
            unit = (positions - solid.centre) @ solid.to_unit_space.T
            beyond = np.maximum(np.abs(unit) - 1.0, 0.0) * solid.half_sizes
            assert np.linalg.norm(beyond, axis=-1).min() > 0.05, solid
        step = np.linalg.norm(np.diff(positions, axis=0, append=positions[:1]), axis=-1)
        assert 0.05 < step.min() and step.max() < 0.75
        # Neighbouring views turn by less than half the field of view of 72 degrees; all are upright rotations.
        cosine = (rotations[:, :, 2] * rotations[:, :, 2].roll(1, 0)).sum(-1)
        assert torch.rad2deg(torch.arccos(cosine.clip(-1, 1))).max() < 36.0
        torch.testing.assert_close(rotations.mT @ rotations, torch.eye(3).expand(num_frames, 3, 3), atol=1e-5, rtol=0)
        assert (torch.linalg.det(rotations) > 0).all() and (poses[:, 2, 0] == 0).all() and (poses[:, 2, 1] > 0).all()
