"""Reads a COLMAP model (`sparse/0` or `colmap/sparse/0`, text or binary) with its photographs, or only its points.

Where COLMAP could not connect all photographs it writes several models; that with most photographs is taken. The
dataset's world is COLMAP's own. Masks are `masks/<image name>.png` (COLMAP's rule) or `masks/<stem>` with any suffix.
Every 8th image in order of names is test. Models go through pycolmap. Points are read here: pycolmap has no reader
for them alone, and gives those of a model in an order of its own.
"""

import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fit3d_ns.data import frames
from fit3d_ns.data.frames import CaptureFiles, Frame, PointCloud
from fit3d_ns.data.images import IMAGE_SUFFIXES, list_images
from fit3d_ns.geometry.cameras import Lens, camera_to_worlds_from_viewmats
from fit3d_ns.utils.errors import first_line
from fit3d_ns.utils.files import refuse_lfs_pointer, write_atomically

_MODEL_FOLDERS = ("sparse", "colmap/sparse", "colmap")
"""Where models lie, or folders of models with a number each."""
_NUM_FOCAL_LENGTHS = {
    **{"SIMPLE_PINHOLE": 1, "PINHOLE": 2, "SIMPLE_RADIAL": 1, "RADIAL": 1, "OPENCV": 2, "FULL_OPENCV": 2},
    **{"SIMPLE_RADIAL_FISHEYE": 1, "RADIAL_FISHEYE": 1, "OPENCV_FISHEYE": 2, "SIMPLE_FISHEYE": 1, "FISHEYE": 2},
}
"""Focal lengths of the camera models that are read. Principal point and distortion, in OpenCV's order, follow them."""
_NUM_PARAMETERS = (3, 4, 4, 5, 8, 8, 12, 5, 4, 5, 12, 16, 4, 5, 3, 4, 6, 2)
"""How many parameters each of COLMAP's camera models has, by the model's number."""


def read_colmap(path: Path) -> CaptureFiles:
    """Reads a folder with a COLMAP model and `images`; a piece that is missing or wrong is a ValueError."""
    root = Path(path)
    models = find_colmap_models(root)
    if not models:
        raise ValueError(f"{root} has no COLMAP model: no cameras.bin or cameras.txt in {', '.join(_MODEL_FOLDERS)}.")
    photographs = find_photographs(root)
    if not list_images(photographs):
        raise ValueError(f"{root} has a COLMAP model but no photographs; put them into its folder `images`.")
    # Points first, for the sake of their errors.
    read = [(model, read_colmap_points(model), _load_model(model)) for model in models]
    read.sort(key=lambda found: found[2].num_reg_images(), reverse=True)
    model, points, reconstruction = read[0]
    images = [image for image in reconstruction.images.values() if image.has_pose]
    images.sort(key=lambda image: image.name)
    if not images:
        raise ValueError(f"The COLMAP model {model} has no registered images; reconstruct the capture again.")
    if not (photographs / images[0].name).is_file() and (root / images[0].name).is_file():
        photographs = root  # Where COLMAP was told that the photographs' folder is the capture's own.
    cameras = reconstruction.cameras.items()
    lenses = {number: _read_lens(camera, f"Camera {number} of {model}") for number, camera in cameras}
    posed = []
    for image, split in zip(images, frames.choose_splits([image.name for image in images]), strict=True):
        source = f"Image {image.name} of {model}"
        frame = Frame(
            image_path=frames.resolve_inside(photographs, image.name, source),
            lens=lenses[image.camera_id],
            camera_to_world=_read_pose(image, source),
            split=split,
            mask_path=_find_mask(root / "masks", image.name),
        )
        posed.append(frame)
    return CaptureFiles(
        root=root,
        layout="colmap",
        description=(
            f"COLMAP model {model}: {frames.count_splits(posed)} (every {frames.FRAMES_PER_TEST_FRAME}th is test), "
            f"{len(points.xyz) if points else 'no'} points{_describe_left_out(root, photographs, posed, read[1:])}."
        ),
        frames=posed,
        points=points,
        scene_id=root.absolute().name,
        colmap_to_world=torch.eye(4)[:3],
    )


def read_colmap_points(folder: Path) -> PointCloud | None:
    """The points of `points3D.bin`, else `points3D.txt`, in COLMAP's own world; None where there are none."""
    path = next((path for path in (folder / "points3D.bin", folder / "points3D.txt") if path.is_file()), None)
    if path is None:
        return None
    xyz, rgb = _parse_binary_points(path) if path.suffix == ".bin" else _parse_text_points(path)
    return frames.create_points(xyz, rgb, path)


def write_colmap_points(points: PointCloud, path: Path) -> None:
    """Writes a `points3D.txt` without tracks; positions to four decimals, a tenth of a millimetre."""
    header = "POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)"
    rows = np.column_stack([np.arange(1, len(points.xyz) + 1), points.xyz.numpy(), points.rgb.numpy()])
    with write_atomically(path) as temporary:
        np.savetxt(temporary, rows, "%d %.4f %.4f %.4f %d %d %d 0", header=header)


def find_photographs(root: Path) -> Path:
    """The folder that names in a model start from: `images`, or the capture's own where there is none."""
    return root / "images" if (root / "images").is_dir() else root


def find_colmap_models(root: Path) -> list[Path]:
    """The models of the first usual folder that has some."""
    for base in (root / folder for folder in _MODEL_FOLDERS):
        folders = [base, *sorted(path for path in base.glob("*") if path.is_dir())]
        models = [path for path in folders if any((path / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt"))]
        if models:
            return models
    return []


def _describe_left_out(root: Path, photographs: Path, posed: list[Frame], others: list[tuple[Path, Any, Any]]) -> str:
    """What the description says of other models, of photographs that no model registered, and of few masks.

    ValueError where there are masks and none belongs to a photograph.
    """
    known, said, masks = {frame.image_path.with_suffix("") for frame in posed}, "", root / "masks"
    if others:
        listed = ", ".join(f"{path.name} with {other.num_reg_images()} images" for path, _, other in others)
        said = f"; of {len(others) + 1} models it has most images, left out are {listed}"
        names = [image.name for _, _, other in others for image in other.images.values()]
        known |= {(photographs / name).with_suffix("") for name in names}
    lost = [
        path for path in list_images(photographs) if path.with_suffix("") not in known and masks not in path.parents
    ]
    num_masks = sum(frame.mask_path is not None for frame in posed)
    if num_masks < len(posed) and list_images(masks):
        if not num_masks:
            raise ValueError(f"No mask in {masks} has a photograph's name, as {posed[0].image_path.name}.png would.")
        said += f"; {num_masks} have masks"
    return said + (f"; {len(lost)} photographs are in none" if lost else "")


def _load_model(model: Path) -> Any:
    import pycolmap

    suffix = ".bin" if (model / "cameras.bin").is_file() else ".txt"
    for name in ("images", "points3D"):
        if not (model / f"{name}{suffix}").is_file():
            raise ValueError(f"The COLMAP model {model} has no {name}{suffix}; copy the whole model.")
    for path in model.glob(f"*{suffix}"):
        refuse_lfs_pointer(path)
        if suffix == ".bin" and path.stem in ("cameras", "images", "rigs", "frames"):
            _find_records(path)
    try:
        return pycolmap.Reconstruction(str(model))
    except Exception as error:
        raise ValueError(f"The COLMAP model {model} cannot be read ({first_line(error)}); copy it again.") from error


def _read_lens(camera: Any, source: str) -> Lens:
    model = getattr(camera.model, "name", str(camera.model))
    if model not in _NUM_FOCAL_LENGTHS:
        problem = f"{source} has the camera model {model}; known are {', '.join(_NUM_FOCAL_LENGTHS)}"
        raise ValueError(f"{problem}. Undistort the images with COLMAP first.")
    num_focal = _NUM_FOCAL_LENGTHS[model]
    cx, cy, *distortion = camera.params[num_focal:]
    intrinsics = camera.params[0], camera.params[num_focal - 1], cx, cy
    size = float(camera.width), float(camera.height)
    return frames.create_lens(intrinsics, size, distortion, model.endswith("FISHEYE"), source)


def _read_pose(image: Any, source: str) -> torch.Tensor:
    # A method since pycolmap 3.12, an attribute before.
    pose = image.cam_from_world() if callable(image.cam_from_world) else image.cam_from_world
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[:3] = torch.from_numpy(np.asarray(pose.matrix(), dtype=np.float64)[:3])
    return frames.check_camera_to_world(camera_to_worlds_from_viewmats(viewmat).numpy(), source)


def _find_mask(folder: Path, name: str) -> Path | None:
    path = folder / name.replace("\\", "/")
    candidates = [Path(f"{path}.png"), *(path.with_suffix(suffix) for suffix in (".png", *IMAGE_SUFFIXES))]
    return next((path for path in candidates if path.is_file()), None)


def _parse_text_points(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with warnings.catch_warnings():
            # numpy warns where a file holds no points.
            warnings.simplefilter("ignore", UserWarning)
            # id x y z r g b error track...
            values = np.loadtxt(path, usecols=range(1, 7), ndmin=2, encoding="utf-8").reshape(-1, 6)
    except ValueError as error:
        raise ValueError(f"{path} is not a COLMAP points3D file ({error}); restore it.") from error
    return values[:, :3], values[:, 3:].clip(0, 255).astype(np.uint8)


def _find_records(path: Path) -> tuple[bytes, list[int]]:
    """The content of a binary file and where each of its records begins.

    Counts are held against the file's size, because pycolmap takes memory for whatever they say: ValueError where the
    file is cut short, or a count is damaged.
    """
    content = path.read_bytes()
    num_records, offset, starts = int.from_bytes(content[:8], "little"), 8, []
    try:
        for _ in range(num_records):
            starts.append(offset)
            offset = _RECORD_ENDS[path.stem](content, offset)
        if offset > len(content):
            raise IndexError
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"{path} is cut short or damaged: fewer than {num_records} records; copy it again.") from error
    return content, starts


def _find_image_end(content: bytes, offset: int) -> int:
    # Id, pose and camera come before the name.
    name_end = content.index(b"\0", offset + 64) + 1
    (num_points,) = struct.unpack_from("<Q", content, name_end)
    return name_end + 8 + 24 * num_points


def _find_rig_end(content: bytes, offset: int) -> int:
    _, num_sensors = struct.unpack_from("<II", content, offset)
    # The first sensor is the reference and has no pose.
    offset += 16 if num_sensors else 8
    for _ in range(num_sensors - 1):
        has_pose = content[offset + 8]
        offset += 9 + (56 if has_pose else 0)
    return offset


_RECORD_ENDS: dict[str, Callable[[bytes, int], int]] = {
    "cameras": lambda content, at: at + 24 + 8 * _NUM_PARAMETERS[struct.unpack_from("<Ii", content, at)[1]],
    "images": _find_image_end,
    "rigs": _find_rig_end,
    "frames": lambda content, at: at + 68 + 16 * struct.unpack_from("<II7dI", content, at)[-1],
    "points3D": lambda content, at: at + 51 + 8 * struct.unpack_from("<Q", content, at + 43)[0],
}


def _parse_binary_points(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content, starts = _find_records(path)
    # One point: id u64, xyz 3 f64, rgb 3 u8, error f64, track length u64, then 8 bytes for each of its elements.
    packed = b"".join(content[start + 8 : start + 35] for start in starts)
    points = np.frombuffer(packed, [("xyz", "<f8", 3), ("rgb", "u1", 3)])
    return points["xyz"].copy(), points["rgb"].copy()
