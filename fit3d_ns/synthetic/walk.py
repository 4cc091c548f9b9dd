"""The camera's walk through a synthetic room (world: metres, z up, the room's middle at x = y = 0)."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_FRAMES_PER_ROUND = 48
_FROM_WALL = 0.95
"""Metres that the camera keeps from the walls where it comes nearest to them."""


def walk_through(size: tuple[float, float, float], num_frames: int, start: float) -> Float[Tensor, "frames 3 4"]:
    """OpenGL camera poses on an oval round the room's middle, looking across it; a closed, smooth path.

    Args:
        size: Width, depth and height of the room in metres.
        num_frames: Number of poses; beyond 48, the oval is walked several times at changing heights.
        start: Angle of the first pose in radians.
    """
    num_rounds = max(1, round(num_frames / _FRAMES_PER_ROUND))
    poses = []
    for index in range(num_frames):
        phase = 2.0 * math.pi * index / num_frames
        angle = start + num_rounds * phase
        wobble = math.sin(3.0 * angle + phase)
        reach = 1.0 - 0.08 * math.sin(2.0 * angle + phase)
        position = np.array(
            [
                (0.5 * size[0] - _FROM_WALL) * reach * math.cos(angle),
                (0.5 * size[1] - _FROM_WALL) * reach * math.sin(angle),
                1.5 + 0.12 * wobble + 0.15 * math.sin(phase + 1.0),
            ]
        )
        side = 0.35 * math.sin(2.0 * angle + 2.0 * phase)
        target = np.array([-0.5 * math.cos(angle + side), -0.5 * math.sin(angle + side), 0.95 + 0.1 * wobble])
        poses.append(look_at(position, target))
    return torch.stack(poses)


def look_at(position: Float[np.ndarray, " 3"], target: Float[np.ndarray, " 3"]) -> Float[Tensor, "3 4"]:
    """The upright OpenGL pose at `position` that looks at `target`, z up, float32."""
    backward = (position - target) / np.linalg.norm(position - target)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    pose = np.stack([right, np.cross(backward, right), backward, position], axis=-1)
    return torch.from_numpy(pose).float()
