"""`synthesize_scenes`: small furnished rooms with exact ground truth, in the DSLR layout of ScanNet++.

    <output_dir>/synthesis.json         metrics of what was made
    <output_dir>/room_00/dslr/          as `data/scannetpp.py` draws it, and
      labels/*.png, classes.json        8-bit class indices, 255 = ignore; names of the classes

The world of a room, z up, is COLMAP's; its point (x, y, z) is (y, x, -z) in the world of the transforms files.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from fit3d_ns.data.colmap import write_colmap_points
from fit3d_ns.data.frames import PointCloud
from fit3d_ns.data.images import save_depth, save_image, save_index_map
from fit3d_ns.data.scannetpp import colmap_to_world
from fit3d_ns.geometry.cameras import Lens, transform_camera_to_worlds
from fit3d_ns.synthetic.rooms import CLASSES, build_room, render_room, walk_through
from fit3d_ns.utils.files import hash_bytes, hash_file, read_json, write_atomically, write_json
from fit3d_ns.utils.progress import notice, track
from fit3d_ns.utils.selection import derive_seed

METRICS_NAME = "synthesis.json"
_RECORDED = ("seed", "num_frames", "width", "height", "lens", "num_points")
_IGNORE_INDEX = 255


@dataclass(frozen=True)
class SynthesisConfig:
    """Which rooms to make, and how to photograph them."""

    output_dir: Path
    """Folder for the scenes; new, empty, or with what the same settings made."""
    num_scenes: int = 2
    """Number of rooms, at least 1. Room k is the same whatever the number."""
    num_frames: int = 24
    """Photographs of each room, at least 2; every 8th is held out as test."""
    width: int = 160
    """Image width in pixels, at least 16."""
    height: int = 120
    """Image height in pixels, at least 16."""
    seed: int = 0
    """Chooses the rooms; the same seed gives the same files."""
    num_points: int = 20_000
    """Seed points of each room, drawn from the surfaces that train frames see."""
    lens: Literal["pinhole", "fisheye"] = "pinhole"
    """`pinhole` writes the undistorted variant and a copy as the resized one; `fisheye` writes the resized variant
    alone, photographed through a fisheye lens as ScanNet++'s camera has."""
    overwrite: bool = False
    """Replace a folder that an earlier run of this command made."""

    def __post_init__(self) -> None:
        for name, least in (("num_scenes", 1), ("num_frames", 2), ("width", 16), ("height", 16), ("num_points", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


@dataclass(frozen=True)
class SceneFrame:
    """A photograph to write: its name without suffix, OpenGL pose in COLMAP's world, z-depth in metres and classes."""

    name: str
    camera_to_world: Float[Tensor, "3 4"]
    image: UInt8[Tensor, "height width 3"]
    valid_mask: Bool[Tensor, "height width"]
    depth: Float[Tensor, "height width"]
    labels: UInt8[Tensor, "height width"]
    is_test: bool


def synthesize_scenes(config: SynthesisConfig) -> dict[str, Any]:
    """Makes all scenes; they take their place when all are complete. Returns what is written to `synthesis.json`.

    A folder that holds exactly what the same settings made is finished and stays as it is. ValueError where
    `output_dir` holds something else (without `overwrite`), or is not ours to replace.
    """
    output_dir = Path(config.output_dir).resolve()
    if output_dir.is_file():
        raise ValueError(f"{output_dir} is a file; give the name of a folder.")
    settings: dict[str, Any] = {name: getattr(config, name) for name in _RECORDED}
    if output_dir.is_dir() and any(output_dir.iterdir()):
        finished = _find_finished(output_dir, settings, config.num_scenes)
        if finished is not None and not config.overwrite:
            notice(f"{output_dir} holds the scenes of these settings already; --overwrite makes them again.")
            return finished
        if not config.overwrite:
            raise ValueError(f"{output_dir} is not empty; choose another --output-dir or add --overwrite.")
        if not (output_dir / METRICS_NAME).is_file() or "scenes" not in read_json(output_dir / METRICS_NAME):
            raise ValueError(f"{output_dir} was not made by fit3d-synthesize and is kept; choose another folder.")
    with write_atomically(output_dir) as folder:
        folder.mkdir()
        metrics = settings | {"classes": list(CLASSES)}
        metrics["scenes"] = [_synthesize_scene(config, index, folder) for index in range(config.num_scenes)]
        metrics["files_hash"] = _hash_files(folder)
        write_json(folder / METRICS_NAME, metrics)
    return metrics


def _find_finished(folder: Path, settings: dict[str, Any], num_scenes: int) -> dict[str, Any] | None:
    """What `synthesis.json` says, if the folder holds what these settings made and nothing else."""
    try:
        found = read_json(folder / METRICS_NAME)
        same = all(found[name] == value for name, value in settings.items()) and len(found["scenes"]) == num_scenes
        return found if same and found["files_hash"] == _hash_files(folder) else None
    except (ValueError, KeyError, TypeError):
        return None


def _hash_files(folder: Path) -> str:
    """Hash of the names and contents of all files but `synthesis.json`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != METRICS_NAME)
    return hash_bytes(*(f"{path.relative_to(folder)} {hash_file(path)}" for path in files))


def write_scannetpp(
    folder: Path, lens: Lens, frames: Sequence[SceneFrame], points: PointCloud, classes: Sequence[str]
) -> None:
    """Writes `folder/dslr`, the points being in COLMAP's world; a pinhole lens gives both variants, fisheye one."""
    dslr = folder / "dslr"
    variants = ("resized", "undistorted") if lens.model == "pinhole" else ("resized",)
    pictures = [f"{variant}_{kind}" for variant in variants for kind in ("images", "anon_masks")]
    for name in ("render_depth", "labels", "nerfstudio", "colmap", *pictures):
        (dslr / name).mkdir(parents=True)
    poses = torch.stack([frame.camera_to_world for frame in frames]).double()
    poses = transform_camera_to_worlds(poses, colmap_to_world().double(), scale=1.0)
    entries: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for frame, pose in zip(frames, poses.tolist(), strict=True):
        image_name, mask_name = f"{frame.name}.JPG", f"{frame.name}.png"
        for variant in variants:
            save_image(frame.image, dslr / f"{variant}_images" / image_name, quality=97)
            save_index_map(frame.valid_mask.byte() * 255, dslr / f"{variant}_anon_masks" / mask_name)
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
    for name in ("transforms.json", "transforms_undistorted.json")[: len(variants)]:
        write_json(dslr / "nerfstudio" / name, transforms)
    train, test = ([entry["file_path"] for entry in part] for part in entries)
    write_json(dslr / "train_test_lists.json", {"train": train, "test": test, "has_masks": True})
    write_json(dslr / "classes.json", {"classes": list(classes), "ignore_index": _IGNORE_INDEX})
    write_colmap_points(points, dslr / "colmap" / "points3D.txt")


def _synthesize_scene(config: SynthesisConfig, index: int, folder: Path) -> dict[str, Any]:
    """Makes one scene and returns its metrics."""
    start, name = time.perf_counter(), f"room_{index:02d}"
    numbers = np.random.default_rng(derive_seed(config.seed, "room", index))
    room, lens = build_room(numbers), _choose_lens(config, numbers)
    camera_to_worlds = walk_through(room.size, config.num_frames, start=numbers.uniform(0.0, 6.28))
    test = range(min(4, config.num_frames - 1), config.num_frames, 8)
    points_per_frame = -(-config.num_points // (config.num_frames - len(test)))
    frames, xyz, rgb = [], [], []
    with ThreadPoolExecutor(max_workers=4) as pool:
        views = pool.map(lambda camera_to_world: render_room(room, camera_to_world, lens), camera_to_worlds)
        for position, view in enumerate(track(views, f"Photographing {name}", total=config.num_frames)):
            valid_mask = torch.ones_like(view.depth, dtype=torch.bool)
            if position % 6 == 3 and position not in test:
                # As anonymisation does, hide a box of a fifth of both sides.
                high, wide = config.height // 5, config.width // 5
                row, column = numbers.integers((config.height - high, config.width - wide))
                valid_mask[row : row + high, column : column + wide] = False
            image = (torch.where(valid_mask[..., None], view.image, 0.5) * 255.0).round().byte()
            labels = torch.where(valid_mask, view.labels, _IGNORE_INDEX).byte()
            pose, is_test = camera_to_worlds[position], position in test
            frames.append(SceneFrame(f"DSC{position:05d}", pose, image, valid_mask, view.depth, labels, is_test))
            if not is_test:
                drawn = numbers.permutation(np.flatnonzero(valid_mask))[:points_per_frame]
                xyz.append(view.points.reshape(-1, 3)[drawn])
                rgb.append(image.reshape(-1, 3)[drawn])
    points = PointCloud(torch.cat(xyz)[: config.num_points], torch.cat(rgb)[: config.num_points])
    write_scannetpp(folder / name, lens, frames, points, CLASSES)
    labels, depths = (torch.stack([getattr(frame, kind) for frame in frames]) for kind in ("labels", "depth"))
    return {
        "name": name,
        "train_frames": len(xyz),
        "test_frames": len(test),
        "points": len(points.xyz),
        "solids": len(room.solids),
        "room_size_m": [round(length, 3) for length in room.size],
        "mean_depth_m": round(float(depths.mean()), 3),
        "class_shares": {CLASSES[i]: round(float((labels == i).float().mean()), 4) for i in range(len(CLASSES))},
        "seconds": round(time.perf_counter() - start, 2),
    }


def _choose_lens(config: SynthesisConfig, numbers: np.random.Generator) -> Lens:
    """A lens of 72 degrees whose principal point lies up to 2 % of the size away from the middle."""
    half_angle = np.radians(36.0)
    focal = round(0.5 * config.width / float(half_angle if config.lens == "fisheye" else np.tan(half_angle)), 3)
    cx, cy = (0.5 + numbers.uniform(0.008, 0.02, 2) * numbers.choice([-1.0, 1.0], 2)) * (config.width, config.height)
    distortion = (0.03, -0.008, 0.002, -0.0004) if config.lens == "fisheye" else ()
    centre = round(float(cx), 3), round(float(cy), 3)
    return Lens(focal, focal, *centre, config.width, config.height, config.lens, distortion)
