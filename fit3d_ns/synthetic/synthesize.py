"""`synthesize_scenes`: small furnished rooms with exact ground truth, in the DSLR layout of ScanNet++.

<output_dir>/synthesis.json         metrics of what was made
<output_dir>/room_00/dslr/          as `data/scannetpp.py` writes it; the world of a room, z up, is COLMAP's
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from fit3d_ns.data.frames import PointCloud
from fit3d_ns.data.images import IGNORE_INDEX
from fit3d_ns.data.scannetpp import SceneFrame, write_scannetpp
from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.synthetic.rooms import CLASSES, build_room, render_room, walk_through
from fit3d_ns.utils.files import hash_bytes, hash_file, read_json, write_atomically, write_json
from fit3d_ns.utils.limits import Limited, Limits
from fit3d_ns.utils.progress import notice, track
from fit3d_ns.utils.selection import derive_seed

METRICS_NAME = "synthesis.json"
_RECORDED = ("seed", "num_frames", "width", "height", "lens", "num_points")


@dataclass(frozen=True)
class SynthesisConfig(Limited):
    """Which rooms to make, and how to photograph them."""

    output_dir: Path
    """Folder for the scenes; new, empty, or with what the same settings made."""
    num_scenes: Annotated[int, Limits(at_least=1)] = 2
    """Number of rooms, at least 1. Room k is the same whatever the number."""
    num_frames: Annotated[int, Limits(at_least=2)] = 24
    """Photographs of each room, at least 2; every 8th is held out as test."""
    width: Annotated[int, Limits(at_least=16)] = 160
    """Image width in pixels, at least 16."""
    height: Annotated[int, Limits(at_least=16)] = 120
    """Image height in pixels, at least 16."""
    seed: int = 0
    """Chooses the rooms; the same seed gives the same files."""
    num_points: Annotated[int, Limits(at_least=1)] = 20_000
    """Seed points of each room, drawn from the surfaces that train frames see."""
    lens: Literal["pinhole", "fisheye"] = "pinhole"
    """`pinhole` writes the undistorted variant and a copy as the resized one; `fisheye` writes the resized variant
    alone, photographed through a fisheye lens as ScanNet++'s camera has."""
    overwrite: bool = False
    """Replace a folder that an earlier run of this command made."""


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
        is_same = settings.items() <= found.items() and len(found["scenes"]) == num_scenes
        return found if is_same and found["files_hash"] == _hash_files(folder) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _hash_files(folder: Path) -> str:
    """Hash of the names and contents of all files but `synthesis.json`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != METRICS_NAME)
    return hash_bytes(*(f"{path.relative_to(folder)} {hash_file(path)}" for path in files))


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
            is_test = position in test
            if position % 6 == 3 and not is_test:
                # As anonymisation does, hide a box of a fifth of both sides.
                high, wide = config.height // 5, config.width // 5
                row, column = numbers.integers((config.height - high, config.width - wide))
                view.labels[row : row + high, column : column + wide] = IGNORE_INDEX
                view.image[row : row + high, column : column + wide] = 128
            frames.append(SceneFrame(camera_to_worlds[position], view.image, view.depth, view.labels, is_test))
            if not is_test:
                drawn = numbers.permutation(np.flatnonzero(view.labels != IGNORE_INDEX))[:points_per_frame]
                xyz.append(view.points.reshape(-1, 3)[drawn])
                rgb.append(view.image.reshape(-1, 3)[drawn])
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
