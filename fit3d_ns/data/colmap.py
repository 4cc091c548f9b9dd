"""Reads a COLMAP model (`sparse/0` or `colmap/sparse/0`, text or binary) with its `images` folder, through pycolmap.

The dataset's world is COLMAP's own. Masks are `masks/<image name>.png` (COLMAP's rule) or `masks/<stem>.png`.
Every 8th image in order of names is test.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fit3d_ns.data.camera_entries import (
    FRAMES_PER_TEST_FRAME,
    check_camera_to_world,
    check_frame_files,
    choose_splits,
    count_splits,
    create_lens,
    resolve_inside,
)
from fit3d_ns.data.frames import CaptureFiles, Frame
from fit3d_ns.data.points import find_colmap_points, read_colmap_points
from fit3d_ns.geometry.cameras import camera_to_worlds_from_viewmats
from fit3d_ns.geometry.lenses import Lens

_MODEL_FOLDERS = ("sparse/0", "colmap/sparse/0", "sparse", "colmap/sparse", "colmap")

# Positions of fx, fy, cx, cy in COLMAP's parameters; all that follows is distortion, in OpenCV's order.
_PERSPECTIVE_LAYOUTS = {
    "SIMPLE_PINHOLE": (0, 0, 1, 2),
    "PINHOLE": (0, 1, 2, 3),
    "SIMPLE_RADIAL": (0, 0, 1, 2),
    "RADIAL": (0, 0, 1, 2),
    "OPENCV": (0, 1, 2, 3),
    "FULL_OPENCV": (0, 1, 2, 3),
}
_FISHEYE_LAYOUTS = {
    "SIMPLE_RADIAL_FISHEYE": (0, 0, 1, 2),
    "RADIAL_FISHEYE": (0, 0, 1, 2),
    "OPENCV_FISHEYE": (0, 1, 2, 3),
}


def find_colmap_model(root: Path) -> Path | None:
    """The first of the usual folders that holds `cameras.bin` or `cameras.txt`, or None."""
    candidates = [Path(root) / folder for folder in _MODEL_FOLDERS]
    return next((c for c in candidates if (c / "cameras.bin").is_file() or (c / "cameras.txt").is_file()), None)


def read_colmap(path: Path) -> CaptureFiles:
    """Reads a folder with a COLMAP model and `images`.

    Raises:
        ValueError: A piece is missing or wrong; the message names it.
    """
    root = Path(path)
    model = find_colmap_model(root)
    if model is None:
        raise ValueError(f"{root} has no COLMAP model: no cameras.bin or cameras.txt in {', '.join(_MODEL_FOLDERS)}.")
    if not (root / "images").is_dir():
        raise ValueError(f"{root} has a COLMAP model but no folder `images`; put the photographs there.")
    reconstruction = _load_model(model)
    images = [image for image in reconstruction.images.values() if image.has_pose]
    images.sort(key=lambda image: image.name)
    if not images:
        raise ValueError(f"The COLMAP model {model} has no registered images; reconstruct the capture anew.")
    lenses = {
        camera_id: _read_lens(camera, f"Camera {camera_id} of {model}")
        for camera_id, camera in reconstruction.cameras.items()
    }
    frames = []
    for image, split in zip(images, choose_splits([image.name for image in images]), strict=True):
        source = f"Image {image.name} of {model}"
        frame = Frame(
            image_path=resolve_inside(root / "images", image.name, source),
            lens=lenses[image.camera_id],
            camera_to_world=_read_pose(image, source),
            split=split,
            mask_path=_find_mask(root / "masks", image.name),
        )
        check_frame_files(frame)
        frames.append(frame)
    found = find_colmap_points(model)
    points = read_colmap_points(found) if found is not None else None
    if points is not None and not len(points.xyz):
        points = None
    return CaptureFiles(
        root=root,
        layout="colmap",
        description=(
            f"COLMAP model {model}: {count_splits(frames)} (every {FRAMES_PER_TEST_FRAME}th is test), "
            f"{len(points.xyz) if points else 'no'} points."
        ),
        frames=frames,
        points=points,
        scene_id=root.absolute().name,
        colmap_to_world=torch.eye(4)[:3],
    )


def _load_model(model: Path) -> Any:
    try:
        import pycolmap
    except ImportError as error:
        raise ValueError("Reading COLMAP models needs pycolmap; run `pip install pycolmap`.") from error
    suffix = ".bin" if (model / "cameras.bin").is_file() else ".txt"
    for name in ("images", "points3D"):
        if not (model / f"{name}{suffix}").is_file():
            raise ValueError(f"The COLMAP model {model} has no {name}{suffix}; copy the whole model.")
    try:
        return pycolmap.Reconstruction(str(model))
    except Exception as error:
        raise ValueError(f"The COLMAP model {model} cannot be read ({_first_line(error)}); copy it again.") from error


def _read_lens(camera: Any, source: str) -> Lens:
    model = getattr(camera.model, "name", str(camera.model))
    layouts = {**_PERSPECTIVE_LAYOUTS, **_FISHEYE_LAYOUTS}
    if model not in layouts:
        raise ValueError(
            f"{source} has the camera model {model}; known are {', '.join(layouts)}. "
            "Undistort the images with COLMAP first."
        )
    values = [float(value) for value in camera.params]
    fx, fy, cx, cy = (values[position] for position in layouts[model])
    return create_lens(
        fx=fx,
        fy=fy,
        cx=cx,
        cy=cy,
        width=float(camera.width),
        height=float(camera.height),
        is_fisheye=model in _FISHEYE_LAYOUTS,
        distortion=values[max(layouts[model]) + 1 :],
        source=source,
    )


def _read_pose(image: Any, source: str) -> torch.Tensor:
    # A method since pycolmap 3.12, an attribute before.
    pose = image.cam_from_world() if callable(image.cam_from_world) else image.cam_from_world
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3] = torch.from_numpy(np.asarray(pose.matrix(), dtype=np.float64)[:3])
    return check_camera_to_world(camera_to_worlds_from_viewmats(viewmat).numpy(), source)


def _find_mask(folder: Path, name: str) -> Path | None:
    candidates = [folder / f"{name}.png", (folder / name).with_suffix(".png")]
    return next((path for path in candidates if path.is_file()), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
