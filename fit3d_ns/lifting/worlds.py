"""Worlds in which Gaussians may lie, and how the capture's cameras get there.

A PLY does not say which world it is in. `dataset`: the world of the capture's camera file. `colmap`: the world of
COLMAP's model, from which ns-process-data and ScanNet++ moved their poses. `training`: nerfstudio's training frame, as
`ns-export gaussian-splat` writes it, known by the run's `dataparser_transforms.json`, else as nerfstudio's defaults
place these cameras. `gsplat`: COLMAP's world as gsplat's example trainer normalises it. Each is a rigid motion and a
scale of the dataset's world. The cameras are moved into the PLY's world, never the Gaussians, so colours that depend on
the direction stay right.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial.transform import Rotation
from torch import Tensor

from fit3d_ns.data.frames import CaptureFiles
from fit3d_ns.geometry.cameras import transform_points
from fit3d_ns.utils.files import read_json

TRANSFORMS_NAME = "dataparser_transforms.json"
"""nerfstudio writes it into every run's folder."""
_FEWEST_POINTS = 4
"""Fewer points have no principal axes."""
PlyWorld = Literal["dataset", "colmap", "training", "gsplat"]
WORLDS: tuple[PlyWorld, ...] = ("dataset", "colmap", "training", "gsplat")


@dataclass(frozen=True)
class WorldChange:
    """From the dataset's world into another one: x -> (rotation x + translation) * scale."""

    transform: Float[Tensor, "3 4"]
    """Rigid motion."""
    scale: float
    """Factor afterwards, positive."""

    def after(self, first: "WorldChange") -> "WorldChange":
        """This change, applied after another one."""
        rotation, translation = self.transform[:, :3], self.transform[:, 3]
        # (R (R1 x + t1) s1 + t) s = (R R1 x + R t1 + t / s1) s1 s
        moved = rotation @ first.transform[:, 3] + translation / first.scale
        transform = torch.cat([rotation @ first.transform[:, :3], moved[:, None]], dim=1)
        return WorldChange(transform, first.scale * self.scale)


def find_changes(world: PlyWorld, files: CaptureFiles, run: Path) -> list[WorldChange]:
    """How the dataset's world may become the given one; where that is open, all readings.

    `run` is a nerfstudio run's `dataparser_transforms.json`, for `training`; where there is none, nerfstudio's defaults
    are taken. ValueError where the capture knows no COLMAP world, or the transforms are wrong.
    """
    unchanged = WorldChange(torch.eye(4)[:3], 1.0)
    # A world that was moved to the cameras: files of the capture were not, what was made of it was.
    moved = WorldChange(torch.cat([torch.eye(3), torch.tensor(files.origin)[:, None]], dim=1), 1.0)
    dataset = [unchanged, moved] if any(files.origin) else [unchanged]
    if world == "dataset":
        return dataset
    to_colmap = None
    if files.colmap_to_world is not None:
        to_colmap = invert_similarity(files.colmap_to_world, f"The applied_transform of {files.root}")
    if world == "colmap":
        if to_colmap is None:
            problem = f"{files.root} does not say where COLMAP's world lies (no applied_transform, no colmap/sparse/0)"
            raise ValueError(f"{problem}; use --ply-world dataset or training.")
        return [to_colmap]
    if world == "gsplat":
        return _normalise_as_gsplat(files, to_colmap or dataset[-1])
    if not run.is_file():
        return [_normalise_as_nerfstudio(files)]
    if to_colmap is not None and not torch.equal(to_colmap.transform, unchanged.transform):
        # nerfstudio's own dataparser folds `applied_transform` into what it records: its transform begins at COLMAP's
        # world. Ours and others begin at the dataset's. The file does not tell which it is; the photographs do.
        dataset.append(to_colmap)
    return [read_similarity(run)[0].after(first) for first in dataset]


def read_similarity(path: Path) -> list[WorldChange]:
    """A 4x4 (or 3x4) matrix from a text, `.npy` or `.json` file, and its inverse: files do not say which way they go.

    JSON holds the matrix alone, or under `transform`, perhaps with a `scale` afterwards as nerfstudio writes it.
    """
    if not path.is_file():
        raise ValueError(f"No such file: {path}; give a 4x4 matrix with --ply-transform.")
    try:
        if path.suffix == ".json":
            content = read_json(path)
            scale = 1.0
            if isinstance(content, dict):
                content, scale = content["transform"], float(content.get("scale", 1.0))
            matrix = np.array(content, dtype=np.float64) * scale
        else:
            delimiter = "," if b"," in path.read_bytes() else None
            matrix = np.load(path) if path.suffix == ".npy" else np.loadtxt(path, delimiter=delimiter)
            matrix = np.asarray(matrix, dtype=np.float64)
    except Exception as error:
        # numpy parses the header of a `.npy` as Python does, with exceptions of any type.
        raise ValueError(f"{path} does not hold a 4x4 matrix of numbers ({error}); correct it.") from error
    if matrix.shape not in ((4, 4), (3, 4)) or not np.isfinite(matrix).all():
        raise ValueError(f"{path} holds a matrix of shape {matrix.shape}; expected 4x4, all numbers finite.")
    inverse = invert_similarity(torch.from_numpy(matrix[:3]), f"The matrix in {path}")
    return [invert_similarity(inverse.transform.double() * inverse.scale, f"The matrix in {path}"), inverse]


def invert_similarity(matrix: Float[Tensor, "3 4"], source: str) -> WorldChange:
    """The inverse of a rotation with a scale and a translation; a matrix that mirrors or shears is a ValueError."""
    linear = matrix[:, :3].double()
    determinant = float(torch.linalg.det(linear))
    if not determinant > 0:
        raise ValueError(f"{source} mirrors the world or is singular; correct it.")
    scale = determinant ** (1 / 3)
    rotation = (linear / scale).T
    if not torch.allclose(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-3):
        raise ValueError(f"{source} is not a rotation with one scale; correct it.")
    return _create_change(rotation, -rotation @ matrix[:, 3].double(), 1.0 / scale)


def _collect_cameras(files: CaptureFiles) -> Float[Tensor, "frames 3 4"]:
    return torch.stack([frame.camera_to_world.double() for frame in files.frames if not frame.is_bad])


def _normalise_as_nerfstudio(files: CaptureFiles) -> WorldChange:
    """nerfstudio's defaults: mean up vector to +z, mean centre to the origin, all centres within [-1, 1]."""
    poses = _collect_cameras(files)
    rotation = _turn(poses[:, :, 1].mean(dim=0), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    centres = poses[:, :, 3] @ rotation.T
    translation = -centres.mean(dim=0)
    reach = float((centres + translation).abs().max())
    return _create_change(rotation, translation, 1.0 / reach if reach > 0 else 1.0)


def _normalise_as_gsplat(files: CaptureFiles, base: WorldChange) -> list[WorldChange]:
    """gsplat's example trainer: cameras upright around what they look at, then the points' principal axes.

    Versions differ in what they do after the cameras, and the signs of axes are open: all are given.
    """
    poses = _collect_cameras(files)
    base_rotation = base.transform[:, :3].double()
    rotations = base_rotation @ poses[:, :, :3]
    centres = transform_points(poses[:, :, 3], base.transform, base.scale)
    # Its cameras have OpenCV's axes, and their mean up vector becomes -y.
    turn = _turn(rotations[:, :, 1].mean(dim=0), torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64))
    centres, forward = centres @ turn.T, -(turn @ rotations)[:, :, 2]
    nearest = centres - (forward * centres).sum(dim=1, keepdim=True) * forward
    translation = -_median(nearest)
    distances = (centres + translation).norm(dim=1)
    scale = 1.0 / max(float(_median(distances[:, None])), 1e-12)
    upright = _create_change(turn, translation, scale).after(base)
    if files.points is None or len(files.points.xyz) < _FEWEST_POINTS:
        return [upright]
    points = transform_points(files.points.xyz.double(), upright.transform, upright.scale)
    centre = _median(points)
    spread = torch.cov((points - centre).T)
    if not bool(spread.isfinite().all()):
        return [upright]
    _, axes = torch.linalg.eigh(spread)
    # Rows are the axes, that of the largest spread first.
    principal = axes.flip(1).T
    changes = [upright]
    for signs in itertools.product((1.0, -1.0), repeat=3):
        rotation = torch.tensor(signs, dtype=torch.float64)[:, None] * principal
        if torch.linalg.det(rotation) > 0:
            changes.append(_create_change(rotation, -rotation @ centre, 1.0).after(upright))
    return changes


def _create_change(rotation: Tensor, translation: Tensor, scale: float) -> WorldChange:
    return WorldChange(torch.cat([rotation, translation[:, None]], dim=1).float(), scale)


def _turn(start: Float[Tensor, " 3"], end: Float[Tensor, " 3"]) -> Float[Tensor, "3 3"]:
    """The smallest rotation that turns one direction into another."""
    return torch.from_numpy(Rotation.align_vectors(end[None].numpy(), start[None].numpy())[0].as_matrix())


def _median(values: Float[Tensor, "rows columns"]) -> Float[Tensor, " columns"]:
    # numpy's: the mean of the middle two.
    return torch.from_numpy(np.median(values.numpy(), axis=0))
