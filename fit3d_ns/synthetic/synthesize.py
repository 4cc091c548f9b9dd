"""`synthesize_scenes`: small indoor captures with exact ground truth, in ScanNet++'s layout.

    <output_dir>/
      synthesis.json                      figures of what was made
      room_00/dslr/                       as `scannetpp.py` draws it, and
        labels/*.png, classes.json        8-bit class indices, 255 = ignore; names of the classes
      room_01/ ...

Rooms are built with z up, which is COLMAP's world here; a point (x, y, z) of it is (y, x, -z) in the transforms'.
"""

import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data.frames import PointCloud
from fit3d_ns.geometry.lenses import Lens
from fit3d_ns.synthetic.furniture import CLASSES
from fit3d_ns.synthetic.rooms import build_room
from fit3d_ns.synthetic.scannetpp_writer import SceneFrame, write_scannetpp
from fit3d_ns.synthetic.views import RoomRenderer, SyntheticView
from fit3d_ns.synthetic.walk import walk_through
from fit3d_ns.utils.errors import is_disk_full
from fit3d_ns.utils.files import read_json, write_json
from fit3d_ns.utils.progress import track
from fit3d_ns.utils.seeds import derive_seed

FIGURES_NAME = "synthesis.json"
IGNORE_INDEX = 255

_FIELD_OF_VIEW = 72.0
"""Horizontal, in degrees."""
_FISHEYE_COEFFICIENTS = (0.03, -0.008, 0.002, -0.0004)
_FRAMES_PER_TEST_FRAME, _FIRST_TEST_FRAME = 8, 4
_FRAMES_PER_HIDDEN_BOX, _FIRST_HIDDEN_BOX = 6, 3


@dataclass(frozen=True)
class SynthesisConfig:
    """Which rooms to make, and how to photograph them."""

    output_dir: Path
    """Folder for the scenes; it must be new or empty."""
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


def synthesize_scenes(config: SynthesisConfig) -> dict[str, Any]:
    """Makes all scenes, in a folder beside that takes the name `output_dir` when everything is there.

    Returns:
        What was written to `synthesis.json`: settings, and for each scene counts, seconds and shares of the classes.

    Raises:
        ValueError: `output_dir` is not empty (without `overwrite`), or not ours to replace; or the disk is full.
    """
    output_dir = Path(config.output_dir).resolve()
    _check_replaceable(output_dir, config.overwrite)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    unfinished, replaced = (output_dir.with_name(f".{output_dir.name}.{mark}.{end}") for end in ("tmp", "old"))
    try:
        scenes = [_synthesize_scene(config, index, unfinished) for index in range(config.num_scenes)]
        figures: dict[str, Any] = {
            "seed": config.seed,
            "num_frames": config.num_frames,
            "width": config.width,
            "height": config.height,
            "lens": config.lens,
            "classes": list(CLASSES),
            "scenes": scenes,
        }
        write_json(unfinished / FIGURES_NAME, figures)
        if output_dir.exists():
            output_dir.rename(replaced)
        unfinished.rename(output_dir)
    except OSError as error:
        if is_disk_full(error):
            raise ValueError(f"No space left for {output_dir}; free some or choose another folder.") from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if output_dir.exists():
            shutil.rmtree(replaced, ignore_errors=True)
    return figures


def _synthesize_scene(config: SynthesisConfig, index: int, folder: Path) -> dict[str, Any]:
    """Makes one scene and returns its figures."""
    start = time.perf_counter()
    name = f"room_{index:02d}"
    numbers = np.random.default_rng(derive_seed(config.seed, "room", index))
    room = build_room(numbers)
    renderer = RoomRenderer(room)
    lens = _choose_lens(config, numbers)
    camera_to_worlds = walk_through(room.size, config.num_frames, start=float(numbers.uniform(0.0, 6.28)))
    test = set(range(min(_FIRST_TEST_FRAME, config.num_frames - 1), config.num_frames, _FRAMES_PER_TEST_FRAME))
    points_per_frame = -(-config.num_points // (config.num_frames - len(test)))

    def photograph(position: int) -> tuple[SceneFrame, PointCloud]:
        # Each frame has numbers of its own, so that the order in which threads finish does not matter.
        own_numbers = np.random.default_rng(derive_seed(config.seed, "frame", index, position))
        view = renderer.render(camera_to_worlds[position], lens)
        frame = _finish_frame(position, camera_to_worlds[position], view, position in test, own_numbers)
        return frame, _draw_points(frame, view, points_per_frame, own_numbers)

    with ThreadPoolExecutor(max_workers=4) as pool:
        photographed = pool.map(photograph, range(config.num_frames))
        pairs = list(track(photographed, f"Photographing {name}", total=config.num_frames))
    frames = [frame for frame, _ in pairs]
    drawn = [points for frame, points in pairs if not frame.is_test]
    chosen = torch.from_numpy(numbers.permutation(sum(len(points.xyz) for points in drawn))[: config.num_points])
    points = PointCloud(
        torch.cat([points.xyz for points in drawn])[chosen], torch.cat([points.rgb for points in drawn])[chosen]
    )
    write_scannetpp(folder / name, lens, frames, points, classes=CLASSES, ignore_index=IGNORE_INDEX)
    counts = np.bincount(torch.cat([frame.labels.flatten() for frame in frames]).numpy(), minlength=256)
    shares = counts[: len(CLASSES)] / counts.sum()
    return {
        "name": name,
        "train_frames": sum(not frame.is_test for frame in frames),
        "test_frames": sum(frame.is_test for frame in frames),
        "points": len(points.xyz),
        "solids": len(room.solids),
        "room_size_m": [round(length, 3) for length in room.size],
        "mean_depth_m": round(float(torch.stack([frame.depth for frame in frames]).mean()), 3),
        "class_shares": {label: round(float(share), 4) for label, share in zip(CLASSES, shares, strict=True)},
        "seconds": round(time.perf_counter() - start, 2),
    }


def _choose_lens(config: SynthesisConfig, numbers: np.random.Generator) -> Lens:
    """A lens whose principal point lies up to 2 % of the size beside the middle."""
    half_angle = np.radians(0.5 * _FIELD_OF_VIEW)
    reach = half_angle if config.lens == "fisheye" else np.tan(half_angle)
    focal = round(0.5 * config.width / float(reach), 3)
    aside = numbers.uniform(0.008, 0.02, 2) * numbers.choice([-1.0, 1.0], 2)
    return Lens(
        fx=focal,
        fy=focal,
        cx=round(config.width * (0.5 + float(aside[0])), 3),
        cy=round(config.height * (0.5 + float(aside[1])), 3),
        width=config.width,
        height=config.height,
        model=config.lens,
        distortion=_FISHEYE_COEFFICIENTS if config.lens == "fisheye" else (),
    )


def _finish_frame(
    position: int,
    camera_to_world: Float[Tensor, "3 4"],
    view: SyntheticView,
    is_test: bool,
    numbers: np.random.Generator,
) -> SceneFrame:
    """A frame as it is written; every 6th hides a box of a fifth of both sides, as anonymisation does."""
    valid_mask = torch.ones_like(view.depth, dtype=torch.bool)
    if not is_test and position % _FRAMES_PER_HIDDEN_BOX == _FIRST_HIDDEN_BOX:
        height, width = valid_mask.shape
        row, column = int(numbers.integers(height - height // 5)), int(numbers.integers(width - width // 5))
        valid_mask[row : row + height // 5, column : column + width // 5] = False
    image = torch.where(valid_mask[..., None], view.image, 0.5)
    return SceneFrame(
        name=f"DSC{position:05d}",
        camera_to_world=camera_to_world,
        image=(image * 255.0).round().to(torch.uint8),
        valid_mask=valid_mask,
        depth=view.depth,
        labels=torch.where(valid_mask, view.labels, IGNORE_INDEX).to(torch.uint8),
        is_test=is_test,
    )


def _draw_points(frame: SceneFrame, view: SyntheticView, count: int, numbers: np.random.Generator) -> PointCloud:
    """Surface points under random visible pixels, exact in place and colour."""
    visible = torch.nonzero(frame.valid_mask.flatten())[:, 0]
    drawn = visible[torch.from_numpy(numbers.permutation(len(visible))[:count])]
    return PointCloud(view.points.reshape(-1, 3)[drawn], frame.image.reshape(-1, 3)[drawn])


def _check_replaceable(output_dir: Path, overwrite: bool) -> None:
    if output_dir.is_file():
        raise ValueError(f"{output_dir} is a file; give the name of a folder.")
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{output_dir} is not empty; choose another --output-dir or add --overwrite.")
    # Only what this command made may be deleted.
    figures = output_dir / FIGURES_NAME
    if not figures.is_file() or "scenes" not in read_json(figures):
        raise ValueError(f"{output_dir} was not made by fit3d-synthesize; it is not replaced. Choose another folder.")
