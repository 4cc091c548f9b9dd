"""Renders views of a synthetic room exactly: colour, z-depth and class labels, through any lens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fit3d_ns.geometry.lenses import Lens
from fit3d_ns.geometry.undistortion import find_rays
from fit3d_ns.synthetic.furniture import CLASSES
from fit3d_ns.synthetic.lighting import BakedLight, bake_light
from fit3d_ns.synthetic.ray_tracing import Solid, find_unit_points, trace_camera_rays
from fit3d_ns.synthetic.rooms import Room
from fit3d_ns.synthetic.textures import compute_albedo

_SAMPLES = ((0.0, 0.0), (-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))
"""Where each pixel is looked at, from its centre; depth and label are those of the first."""


@dataclass(frozen=True)
class SyntheticView:
    """One view of a room; nothing in it is estimated."""

    image: Float[Tensor, "height width 3"]
    """Colour in [0, 1], the mean over five places of each pixel."""
    depth: Float[Tensor, "height width"]
    """z-depth at the pixel centre, in metres."""
    labels: UInt8[Tensor, "height width"]
    """Index into `CLASSES` of what the pixel centre shows."""
    points: Float[Tensor, "height width 3"]
    """World point that the pixel centre shows."""


class RoomRenderer:
    """A room with its light baked, ready to be looked at from anywhere."""

    def __init__(self, room: Room) -> None:
        self._solids = room.solids
        self._light: BakedLight = bake_light(room.solids, room.lights, room.size, room.ambient)
        self._labels = np.array([CLASSES.index(solid.label) for solid in room.solids], dtype=np.uint8)
        self._emission = np.array([solid.material.emission for solid in room.solids], dtype=np.float32)

    def render(self, camera_to_world: Float[Tensor, "3 4"], lens: Lens) -> SyntheticView:
        """Renders one view.

        Args:
            camera_to_world: OpenGL pose in the room's world, inside the room and outside of all furniture.
            lens: Intrinsics and distortion; the picture is distorted as it says.
        """
        # (samples, h*w, 3) -> (h*w, samples, 3), from OpenCV's axes to OpenGL's, then to the world.
        rays = _find_sample_rays(lens) * np.asarray([1.0, -1.0, -1.0], dtype=np.float32)
        pose = camera_to_world.numpy()
        directions = rays @ pose[:, :3].T
        hits = trace_camera_rays(self._solids, pose[:, 3], directions)
        assert (hits.indices >= 0).all(), "A room is closed: every ray ends on a wall at the latest."
        points = pose[:, 3] + directions.reshape(-1, 3) * hits.distances[:, None]
        colours = self._shade(points.astype(np.float32), hits.indices)
        shape = (lens.height, lens.width, len(_SAMPLES))
        return SyntheticView(
            image=torch.from_numpy(colours.reshape(*shape, 3).mean(axis=2)),
            # Rays have z = 1 in the camera, so distances along them are z-depths.
            depth=torch.from_numpy(hits.distances.reshape(shape)[:, :, 0].copy()),
            labels=torch.from_numpy(self._labels[hits.indices].reshape(shape)[:, :, 0].copy()),
            points=torch.from_numpy(points.reshape(*shape, 3)[:, :, 0].astype(np.float32)),
        )

    def _shade(
        self, points: Float[np.ndarray, "points 3"], indices: Int[np.ndarray, " points"]
    ) -> Float[np.ndarray, "points 3"]:
        """Colour of surface points in [0, 1], the same from everywhere."""
        albedo = np.empty_like(points)
        unit_points = np.empty_like(points)
        for solid, chosen in _group_by_solid(self._solids, indices):
            unit_points[chosen] = find_unit_points(solid, points[chosen])
            albedo[chosen] = compute_albedo(solid.material, unit_points[chosen], solid.half_sizes)
        light = self._light.look_up(indices, unit_points)
        emission = self._emission[indices][:, None]
        return np.clip(albedo * np.where(emission > 0.0, emission, light), 0.0, 1.0)


def _find_sample_rays(lens: Lens) -> Float[np.ndarray, "pixels samples 3"]:
    """Rays (x, y, 1) in OpenCV's axes for each pixel, row by row, and each of its samples."""
    rows, columns = np.mgrid[: lens.height, : lens.width] + 0.5
    centres = np.stack([columns.ravel(), rows.ravel()], axis=-1)
    samples = [find_rays(lens, centres + np.array(offset)) for offset in _SAMPLES]
    rays = np.stack(samples, axis=1)
    return np.concatenate([rays, np.ones_like(rays[..., :1])], axis=-1).astype(np.float32)


def _group_by_solid(
    solids: Sequence[Solid], indices: Int[np.ndarray, " points"]
) -> list[tuple[Solid, Int[np.ndarray, " chosen"]]]:
    """Each solid that is seen, with the positions at which it is."""
    order = np.argsort(indices, kind="stable")
    bounds = np.searchsorted(indices[order], np.arange(len(solids) + 1))
    return [
        (solid, order[low:high]) for solid, low, high in zip(solids, bounds[:-1], bounds[1:], strict=True) if high > low
    ]
