"""What the camera files of all layouts share: lenses, poses, paths and the cheap checks of a frame.

`entry` is one JSON object of a `transforms.json`; `source` says in errors where it stands.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data.frames import Frame, Split
from fit3d_ns.data.images import check_depth_mode, read_image_header
from fit3d_ns.geometry.lenses import Lens

FRAMES_PER_TEST_FRAME = 8
"""Without lists, every 8th frame in order of names is held out, as the splatting literature does."""

PERSPECTIVE_MODELS = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV")
FISHEYE_MODELS = ("OPENCV_FISHEYE",)
_LARGEST_SHEAR = 1e-2


def list_entries(meta: Any, key: str, source: Path) -> list[dict[str, Any]]:
    """The frames listed under `key`; a missing list is empty.

    Raises:
        ValueError: `meta` is no object, or the list holds something else than objects with a `file_path`.
    """
    entries = (meta.get(key) or []) if isinstance(meta, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{source} has no list `{key}`; restore the file.")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("file_path"), str):
            raise ValueError(f"Entry {index} of `{key}` in {source} has no file_path; remove or correct it.")
    return entries


def check_unique(names: Sequence[str], source: Path) -> None:
    """Raises ValueError if a camera file names an image twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{source} lists {name} more than once; remove the repeated frame.")
        seen.add(name)


def parse_lens(entry: Mapping[str, Any], source: str) -> Lens:
    """Reads `fl_x fl_y cx cy w h camera_model k1..k4 p1 p2` (or `distortion_params`) of a transforms.json.

    As in nerfstudio, a perspective model may carry coefficients whatever its name is; without `camera_model` it is
    perspective.

    Raises:
        ValueError: A key is missing, a value is not finite or not positive, or the model is unknown.
    """
    missing = [key for key in ("fl_x", "cx", "cy", "w", "h") if key not in entry]
    if missing:
        raise ValueError(f"{source} has no {', '.join(missing)}; add the intrinsics to the file or to each frame.")
    numbers = {
        key: _parse_number(entry, key, source)
        for key in ("fl_x", "fl_y", "cx", "cy", "w", "h", "k1", "k2", "k3", "k4", "p1", "p2")
        if key in entry
    }
    if "distortion_params" in entry:
        numbers.update(_parse_distortion_params(entry["distortion_params"], source))
    model = str(entry.get("camera_model", "OPENCV"))
    if model not in PERSPECTIVE_MODELS + FISHEYE_MODELS:
        raise ValueError(
            f"{source} has the camera model {model}; known are {', '.join(PERSPECTIVE_MODELS + FISHEYE_MODELS)}."
        )
    k1, k2, k3, k4 = (numbers.get(f"k{index}", 0.0) for index in range(1, 5))
    if model not in FISHEYE_MODELS and k4 != 0.0:
        raise ValueError(f"{source} has k4 = {k4}, which the camera model {model} does not know; set it to 0.")
    p1, p2 = numbers.get("p1", 0.0), numbers.get("p2", 0.0)
    distortion = (k1, k2, k3, k4) if model in FISHEYE_MODELS else (k1, k2, p1, p2, k3)
    return create_lens(
        fx=numbers["fl_x"],
        fy=numbers.get("fl_y", numbers["fl_x"]),
        cx=numbers["cx"],
        cy=numbers["cy"],
        width=numbers["w"],
        height=numbers["h"],
        is_fisheye=model in FISHEYE_MODELS,
        distortion=distortion,
        source=source,
    )


def create_lens(
    *,
    fx: float,
    fy: float,
    cx: float,
    cy: float,
    width: float,
    height: float,
    is_fisheye: bool,
    distortion: Sequence[float],
    source: str,
) -> Lens:
    """A checked lens; perspective ones become pinhole when all coefficients are zero.

    Raises:
        ValueError: A number is not finite, or a focal length or size is not positive.
    """
    if not all(math.isfinite(value) for value in (fx, fy, cx, cy, width, height, *distortion)):
        raise ValueError(f"{source} has intrinsics that are not finite; correct the camera file.")
    if fx <= 0 or fy <= 0 or width < 1 or height < 1 or width != int(width) or height != int(height):
        raise ValueError(
            f"{source} has focal lengths {fx:g}, {fy:g} and size {width:g}x{height:g}; "
            "they must be positive, sizes whole numbers."
        )
    is_pinhole = not is_fisheye and not any(distortion)
    return Lens(
        fx=float(fx),
        fy=float(fy),
        cx=float(cx),
        cy=float(cy),
        width=int(width),
        height=int(height),
        model="fisheye" if is_fisheye else "pinhole" if is_pinhole else "opencv",
        distortion=() if is_pinhole else tuple(float(value) for value in distortion),
    )


def parse_camera_to_world(entry: Mapping[str, Any], source: str) -> Float[Tensor, "3 4"]:
    """Reads `transform_matrix`, a 4x4 or 3x4 OpenGL camera pose.

    Raises:
        ValueError: The matrix is missing, of another shape, not finite, singular, or no rotation.
    """
    try:
        matrix = np.array(entry["transform_matrix"], dtype=np.float64)
    except KeyError as error:
        raise ValueError(f"{source} has no transform_matrix; add the frame's pose or remove the frame.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} has a transform_matrix that is no 4x4 matrix of numbers; correct it.") from error
    if matrix.shape not in ((4, 4), (3, 4)):
        raise ValueError(f"{source} has a transform_matrix of shape {matrix.shape}; expected 4x4 or 3x4.")
    return check_camera_to_world(matrix[:3], source)


def check_camera_to_world(matrix: Float[np.ndarray, "3 4"], source: str) -> Float[Tensor, "3 4"]:
    """The pose as float32, its rotation freed from rounding in the file.

    Raises:
        ValueError: The pose is not finite, singular, or its axes are not orthonormal and right-handed.
    """
    if not np.isfinite(matrix).all():
        raise ValueError(f"{source} has a transform_matrix with NaN or infinite values; remove the frame or its mark.")
    left, stretch, right = np.linalg.svd(matrix[:, :3])
    if stretch[2] < 1e-6:
        raise ValueError(f"{source} has a singular transform_matrix; remove the frame or correct its pose.")
    if np.abs(stretch - 1.0).max() > _LARGEST_SHEAR or np.linalg.det(matrix[:, :3]) < 0:
        raise ValueError(
            f"{source} has a transform_matrix that is no rotation (axes stretched by {stretch.min():.3g} to "
            f"{stretch.max():.3g}, determinant {np.linalg.det(matrix[:, :3]):.3g}); correct the pose."
        )
    return torch.from_numpy(np.concatenate([left @ right, matrix[:, 3:]], axis=1)).float()


def resolve_inside(root: Path, relative: str, source: str) -> Path:
    """The path `relative` below `root`; links inside the folder are followed, climbing out of it is not.

    Raises:
        ValueError: The path is no text, absolute outside `root`, or climbs out by `..`.
    """
    if not isinstance(relative, str) or not relative:
        raise ValueError(f"{source} names a file by {relative!r}; expected a path relative to {root}.")
    pure = PurePosixPath(relative.replace("\\", "/"))
    if pure.is_absolute():
        if not pure.is_relative_to(root.absolute().as_posix()):
            raise ValueError(f"{source} names {relative}, which is outside of {root}; use paths relative to it.")
        pure = pure.relative_to(root.absolute().as_posix())
    depth = 0
    for part in pure.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            raise ValueError(f"{source} names {relative}, which climbs out of {root}; use paths inside of it.")
    return root / pure


def check_frame_files(frame: Frame) -> None:
    """Reads the headers of a frame's files: they must be there and of the camera's size.

    Raises:
        ValueError: A file is missing, empty, no image, or of another size than the camera.
    """
    expected = frame.lens.width, frame.lens.height
    image = read_image_header(frame.image_path)
    if (image.width, image.height) != expected:
        raise ValueError(
            f"Image {frame.image_path} is {image.width}x{image.height}, its camera says {expected[0]}x{expected[1]}; "
            "correct w and h or use the images that belong to the cameras."
        )
    for path, what in ((frame.mask_path, "Mask"), (frame.depth_path, "Depth map")):
        if path is None:
            continue
        header = read_image_header(path, what)
        if (header.width, header.height) != expected:
            raise ValueError(
                f"{what} {path} is {header.width}x{header.height}, its image {expected[0]}x{expected[1]}; "
                "make it anew at the image's size or remove it."
            )
        if what == "Depth map":
            check_depth_mode(path, header.mode)


def choose_splits(names: Sequence[str]) -> list[Split]:
    """Every 8th name in sorted order is test, the others train; a lone frame trains."""
    order = sorted(range(len(names)), key=lambda index: names[index])
    splits: list[Split] = ["train"] * len(names)
    if len(names) > 1:
        for index in order[::FRAMES_PER_TEST_FRAME]:
            splits[index] = "test"
    return splits


def count_splits(frames: Sequence[Frame]) -> str:
    """For descriptions: "56 train, 8 test frames (2 bad)"."""
    counts = {split: sum(frame.split == split for frame in frames) for split in ("train", "val", "test")}
    listed = ", ".join(f"{count} {split}" for split, count in counts.items() if count)
    num_bad = sum(frame.is_bad for frame in frames)
    return f"{listed} frames" + (f" ({num_bad} of them bad)" if num_bad else "")


def _parse_number(entry: Mapping[str, Any], key: str, source: str) -> float:
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{source} has {key} = {value!r}; expected a number.")
    return float(value)


def _parse_distortion_params(values: Any, source: str) -> dict[str, float]:
    """nerfstudio's list k1 k2 k3 k4 p1 p2."""
    names = ("k1", "k2", "k3", "k4", "p1", "p2")
    if not isinstance(values, list) or len(values) != len(names):
        raise ValueError(f"{source} has distortion_params {values!r}; expected the six numbers {' '.join(names)}.")
    return {name: _parse_number(dict(zip(names, values, strict=True)), name, source) for name in names}
