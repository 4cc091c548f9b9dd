"""Writes a scene in ScanNet++'s DSLR layout (drawn in `scannetpp.py`), with class labels beside it.

Poses and points are given in COLMAP's world; the transforms files hold them in theirs, (x, y, z) -> (y, x, -z).
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from fit3d_ns.data.colmap import write_colmap_points
from fit3d_ns.data.frames import PointCloud
from fit3d_ns.data.images import save_depth, save_image, save_index_map
from fit3d_ns.data.scannetpp import colmap_to_world
from fit3d_ns.geometry.cameras import transform_camera_to_worlds, viewmats_from_camera_to_worlds
from fit3d_ns.geometry.lenses import Lens
from fit3d_ns.utils.files import write_json

_JPEG_QUALITY = 97


@dataclass(frozen=True)
class SceneFrame:
    """One frame to write."""

    name: str
    """File name without suffix."""
    camera_to_world: Float[Tensor, "3 4"]
    """OpenGL camera pose in COLMAP's world."""
    image: UInt8[Tensor, "height width 3"]
    """The photograph, distorted as the lens says."""
    valid_mask: Bool[Tensor, "height width"]
    """True = use."""
    depth: Float[Tensor, "height width"]
    """z-depth in metres; 0 = none."""
    labels: UInt8[Tensor, "height width"]
    """Class indices."""
    is_test: bool
    """Held out."""


def write_scannetpp(
    folder: Path,
    lens: Lens,
    frames: Sequence[SceneFrame],
    points: PointCloud,
    classes: Sequence[str],
    ignore_index: int,
) -> None:
    """Writes `folder/dslr`. A pinhole lens gives both variants (byte for byte the same), others the resized one alone.

    Args:
        folder: The scene folder, made here.
        lens: The one lens of all frames, pinhole or fisheye.
        frames: All frames in order.
        points: Seed points in COLMAP's world.
        classes: Names of the label indices 0, 1, ...
        ignore_index: Label of pixels without a class.
    """
    dslr = folder / "dslr"
    variants = ["resized", "undistorted"] if lens.model == "pinhole" else ["resized"]
    folders = ["render_depth", "labels", "nerfstudio", "colmap"]
    for name in [*folders, *(f"{variant}_{kind}" for variant in variants for kind in ("images", "anon_masks"))]:
        (dslr / name).mkdir(parents=True)
    for frame in frames:
        save_image(frame.image, dslr / "resized_images" / f"{frame.name}.JPG", _JPEG_QUALITY)
        save_index_map(frame.valid_mask.to(torch.uint8) * 255, dslr / "resized_anon_masks" / f"{frame.name}.png")
        save_depth(frame.depth, dslr / "render_depth" / f"{frame.name}.png")
        save_index_map(frame.labels, dslr / "labels" / f"{frame.name}.png")
        for variant in variants[1:]:
            for kind in (f"images/{frame.name}.JPG", f"anon_masks/{frame.name}.png"):
                shutil.copyfile(dslr / f"resized_{kind}", dslr / f"{variant}_{kind}")
    transforms = _describe_cameras(lens, frames)
    write_json(dslr / "nerfstudio" / "transforms.json", transforms)
    if "undistorted" in variants:
        write_json(dslr / "nerfstudio" / "transforms_undistorted.json", transforms)
    train = [f"{frame.name}.JPG" for frame in frames if not frame.is_test]
    test = [f"{frame.name}.JPG" for frame in frames if frame.is_test]
    write_json(dslr / "train_test_lists.json", {"train": train, "test": test, "has_masks": True})
    write_json(dslr / "classes.json", {"classes": list(classes), "ignore_index": ignore_index})
    _write_colmap(dslr / "colmap", lens, frames, points)


def _describe_cameras(lens: Lens, frames: Sequence[SceneFrame]) -> dict[str, Any]:
    poses = torch.stack([frame.camera_to_world for frame in frames]).double()
    moved = transform_camera_to_worlds(poses, colmap_to_world().double(), scale=1.0)
    entries = [
        {
            "file_path": f"{frame.name}.JPG",
            "mask_path": f"{frame.name}.png",
            "is_bad": False,
            "transform_matrix": [*pose.tolist(), [0.0, 0.0, 0.0, 1.0]],
        }
        for frame, pose in zip(frames, moved, strict=True)
    ]
    coefficients = dict(zip(("k1", "k2", "k3", "k4"), lens.distortion or (0.0,) * 4, strict=True))
    return {
        **{"fl_x": lens.fx, "fl_y": lens.fy, "cx": lens.cx, "cy": lens.cy, "w": lens.width, "h": lens.height},
        **coefficients,
        "camera_model": "PINHOLE" if lens.model == "pinhole" else "OPENCV_FISHEYE",
        "has_mask": True,
        "frames": [entry for entry, frame in zip(entries, frames, strict=True) if not frame.is_test],
        "test_frames": [entry for entry, frame in zip(entries, frames, strict=True) if frame.is_test],
    }


def _write_colmap(folder: Path, lens: Lens, frames: Sequence[SceneFrame], points: PointCloud) -> None:
    """COLMAP's three text files, without 2D tracks."""
    model = "PINHOLE" if lens.model == "pinhole" else "OPENCV_FISHEYE"
    numbers = [lens.fx, lens.fy, lens.cx, lens.cy, *lens.distortion]
    camera = f"1 {model} {lens.width} {lens.height} {' '.join(map(repr, numbers))}"
    (folder / "cameras.txt").write_text(f"# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n{camera}\n")
    lines = ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME", "# (empty line: no 2D points)"]
    for index, frame in enumerate(frames, start=1):
        viewmat = viewmats_from_camera_to_worlds(frame.camera_to_world.double()).numpy()
        pose = [*compute_quaternion(viewmat[:3, :3]), *viewmat[:3, 3]]
        lines += [f"{index} {' '.join(repr(float(value)) for value in pose)} 1 {frame.name}.JPG", ""]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    write_colmap_points(points, folder / "points3D.txt")


def compute_quaternion(rotation: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, " 4"]:
    """Unit quaternion wxyz, w >= 0, of a rotation matrix; the eigenvector method of Bar-Itzhack (2000)."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotation
    symmetric = np.array(
        [
            [xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, xx - yy - zz, xy + yx, xz + zx],
            [xz - zx, xy + yx, yy - xx - zz, yz + zy],
            [yx - xy, xz + zx, yz + zy, zz - xx - yy],
        ]
    )
    quaternion = np.linalg.eigh(symmetric)[1][:, -1]
    return quaternion if quaternion[0] >= 0.0 else -quaternion
