"""Reads and writes the DSLR part of a ScanNet++ scene, which docs/datasets.md draws.

A COLMAP point (x, y, z) is (y, x, -z) in the world of the transforms files. Both worlds are in metres. Photographs,
masks and depth maps are only named here; `images.py` opens them when `scene/posed_capture.py` asks for a view.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.data.colmap import read_colmap_points, write_colmap_points
from fit3d_ns.data.frames import CaptureFiles, Frame, PointCloud, Split, count_splits, resolve_inside
from fit3d_ns.data.images import IGNORE_INDEX, save_depth, save_image, save_index_map
from fit3d_ns.data.transforms import list_entries, parse_frame, parse_lens
from fit3d_ns.geometry.cameras import Lens, transform_camera_to_worlds
from fit3d_ns.utils.files import read_json, write_json

Variant = Literal["undistorted", "fisheye", "prepared"]

PREPARED_CAMERAS = "transforms_train.json"
"""Camera file of a scene as FiT3D's authors prepare it, with `images/`, `masks/` and `points3D.txt` beside it."""
_VARIANTS: dict[Variant, tuple[str, str, str]] = {
    "undistorted": ("nerfstudio/transforms_undistorted.json", "undistorted_images", "undistorted_anon_masks"),
    "fisheye": ("nerfstudio/transforms.json", "resized_images", "resized_anon_masks"),
    "prepared": (PREPARED_CAMERAS, "images", "masks"),
}
"""Camera file, and folders of images and masks."""


@dataclass(frozen=True)
class SceneFrame:
    """A photograph to write; what has no class (255) is masked."""

    camera_to_world: Float[Tensor, "3 4"]
    """OpenGL pose in COLMAP's world."""
    image: UInt8[Tensor, "height width 3"]
    depth: Float[Tensor, "height width"]
    """z-depth in metres."""
    labels: UInt8[Tensor, "height width"]
    is_test: bool


def read_scannetpp(path: Path, variant: Literal["auto"] | Variant = "auto") -> CaptureFiles:
    """Reads a ScanNet++ scene folder, its `dslr` folder, or what FiT3D's authors make of it; a piece that is missing or
    wrong is a ValueError.

    `auto` takes the undistorted images if all of them are there.
    """
    path = Path(path)
    dslr = path / "dslr" if (path / "dslr").is_dir() else path
    if variant == "auto" and dslr == path and (path / PREPARED_CAMERAS).is_file():
        variant = "prepared"
    elif not (dslr / "nerfstudio").is_dir():
        raise ValueError(f"{path} is not a ScanNet++ scene: there is no dslr/nerfstudio folder with the camera files.")
    reason = ""
    if variant == "auto":
        missing = _find_missing_piece(dslr)
        variant = "fisheye" if missing else "undistorted"
        reason = f" because {missing} is missing" if missing else ""
    camera_file, images, _ = _VARIANTS[variant]
    transforms = dslr / camera_file
    if not transforms.is_file():
        raise ValueError(f"No camera file {transforms}; download the scene's dslr/nerfstudio folder.")
    frames, num_without_camera = _read_frames(dslr, variant, read_json(transforms))
    points = read_colmap_points(dslr if variant == "prepared" else dslr / "colmap")
    skipped = f"; {num_without_camera} listed train frames have no camera" if num_without_camera else ""
    return CaptureFiles(
        root=path,
        layout="scannetpp",
        description=(
            f"ScanNet++ scene {path}: {transforms.name} with {images}{reason}, "
            f"{count_splits(frames)}, {len(points.xyz) if points else 'no'} COLMAP points{skipped}."
        ),
        frames=frames,
        points=points.transform(colmap_to_world()) if points else None,
        is_metric=True,
        scene_id=dslr.absolute().parent.name if dslr.name == "dslr" else path.absolute().name,
        colmap_to_world=colmap_to_world(),
    )


def write_scannetpp(
    folder: Path, lens: Lens, frames: Sequence[SceneFrame], points: PointCloud, classes: Sequence[str]
) -> None:
    """Writes `folder/dslr`, with class indices in `labels/*.png` and their names in `classes.json`.

    A pinhole lens gives both variants, the same pictures twice, a fisheye lens its own. Points are in COLMAP's world.
    """
    dslr = folder / "dslr"
    variants = [_VARIANTS["undistorted"]] if lens.model == "pinhole" else []
    variants += [_VARIANTS["fisheye"]]
    pictures = [name for _, *names in variants for name in names]
    for name in ("render_depth", "labels", "nerfstudio", "colmap", *pictures):
        (dslr / name).mkdir(parents=True)
    poses = torch.stack([frame.camera_to_world for frame in frames]).double()
    poses = transform_camera_to_worlds(poses, colmap_to_world().double(), scale=1.0)
    entries: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for index, (frame, pose) in enumerate(zip(frames, poses.tolist(), strict=True)):
        image_name, mask_name = f"DSC{index:05d}.JPG", f"DSC{index:05d}.png"
        for _, images, masks in variants:
            save_image(frame.image, dslr / images / image_name, quality=97)
            save_index_map((frame.labels != IGNORE_INDEX).byte() * 255, dslr / masks / mask_name)
        save_depth(frame.depth, dslr / "render_depth" / mask_name)
        save_index_map(frame.labels, dslr / "labels" / mask_name)
        entry = {"file_path": image_name, "mask_path": mask_name, "is_bad": False}
        entries[frame.is_test].append({**entry, "transform_matrix": [*pose, [0.0, 0.0, 0.0, 1.0]]})
    transforms = {
        **{"fl_x": lens.fx, "fl_y": lens.fy, "cx": lens.cx, "cy": lens.cy, "w": lens.width, "h": lens.height},
        **dict(zip(("k1", "k2", "k3", "k4"), lens.distortion or (0.0,) * 4, strict=True)),
        **{"camera_model": "PINHOLE" if lens.model == "pinhole" else "OPENCV_FISHEYE", "has_mask": True},
        **{"frames": entries[False], "test_frames": entries[True]},
    }
    for camera_file, *_ in variants:
        write_json(dslr / camera_file, transforms)
    train, test = ([entry["file_path"] for entry in part] for part in entries)
    write_json(dslr / "train_test_lists.json", {"train": train, "test": test, "has_masks": True})
    write_json(dslr / "classes.json", {"classes": list(classes), "ignore_index": IGNORE_INDEX})
    write_colmap_points(points, dslr / "colmap" / "points3D.txt")


def colmap_to_world() -> Float[Tensor, "3 4"]:
    """Moves COLMAP's points into the world of the transforms files: (x, y, z) -> (y, x, -z)."""
    return torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]])


def _find_missing_piece(dslr: Path) -> str | None:
    """The first thing that keeps the undistorted variant from being complete, or None."""
    camera_file, images, masks = _VARIANTS["undistorted"]
    if not (dslr / camera_file).is_file():
        return camera_file
    meta = read_json(dslr / camera_file)
    for folder in (images, masks) if meta.get("has_mask", True) else (images,):
        if not (dslr / folder).is_dir():
            return f"{folder}/"
    # Only paths are read: cameras of a variant that is not taken may be wrong.
    entries = list_entries(meta, dslr / camera_file, "frames", "test_frames")
    for entry in (entry for entry in entries if not entry.get("is_bad", False)):
        image = resolve_inside(dslr / images, entry["file_path"], str(dslr / camera_file))
        for path in (image, _find_mask(dslr, masks, meta, entry)):
            if path is not None and not path.is_file():
                return str(path.relative_to(dslr))
    return None


def _read_frames(dslr: Path, variant: Variant, meta: Mapping[str, Any]) -> tuple[list[Frame], int]:
    """All frames, and how many names of the train list have no camera."""
    camera_file, images, masks = _VARIANTS[variant]
    transforms = dslr / camera_file
    entries = list_entries(meta, transforms, "frames", "test_frames")
    names = [entry["file_path"] for entry in entries]
    listed, num_without_camera = _read_split_lists(dslr, set(names))
    num_train = len(meta.get("frames") or [])
    # Depth maps were made with the lens of `transforms.json`; without it nothing tells whose they are.
    fisheye = dslr / _VARIANTS["fisheye"][0]
    has_depth = fisheye.is_file() and (dslr / "render_depth").is_dir()
    depth_lens = parse_lens(read_json(fisheye), str(fisheye)) if has_depth else None
    frames = []
    for index, (name, entry) in enumerate(zip(names, entries, strict=True)):
        source = f"Frame {name} in {transforms}"
        image_path = resolve_inside(dslr / images, name, source)
        split: Split = listed.get(name, "train" if index < num_train else "test")
        frame = parse_frame(entry, meta, image_path, split, source)
        if not frame.is_bad:
            frame = replace(frame, mask_path=_find_mask(dslr, masks, meta, entry))
        depth_path = dslr / "render_depth" / f"{Path(name).stem}.png"
        if frame.lens == depth_lens and depth_path.is_file():
            frame = replace(frame, depth_path=depth_path)
        frames.append(frame)
    return frames, num_without_camera


def _read_split_lists(dslr: Path, names: set[str]) -> tuple[dict[str, Split], int]:
    """Split of each listed frame (test wins), and the number of train names without a camera."""
    path = dslr / "train_test_lists.json"
    if not path.is_file():
        return {}, 0
    lists = read_json(path)
    if not isinstance(lists, dict) or not isinstance(lists.get("train"), list):
        raise ValueError(f"{path} has no list `train`; restore the file.")
    test = lists.get("test") or []
    absent = [name for name in test if name not in names]
    if absent:
        problem = f"{path} names {len(absent)} test frames without a camera ({', '.join(map(str, absent[:3]))})"
        raise ValueError(f"{problem}; remove them from the list or restore the camera file.")
    splits: dict[str, Split] = {name: "train" for name in lists["train"] if name in names}
    splits.update({name: "test" for name in test})
    return splits, sum(name not in names for name in lists["train"])


def _find_mask(dslr: Path, masks: str, meta: Mapping[str, Any], entry: Mapping[str, Any]) -> Path | None:
    if masks == _VARIANTS["prepared"][2]:
        # Found by the photograph's name, as FiT3D does.
        path = dslr / masks / f"{Path(entry['file_path']).stem}.png"
        return path if path.is_file() else None
    if not meta.get("has_mask", True) or not entry.get("mask_path"):
        return None
    return resolve_inside(dslr / masks, entry["mask_path"], f"Frame {entry.get('file_path')} in {dslr}")
