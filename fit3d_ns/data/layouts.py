"""`read_capture`: finds out which layout a folder has and reads it; `find_runs`: nerfstudio's runs below a folder."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fit3d_ns.data.capture_checks import check_capture
from fit3d_ns.data.colmap import find_colmap_models, read_colmap
from fit3d_ns.data.frames import CaptureFiles, Layout
from fit3d_ns.data.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_visible
from fit3d_ns.data.scannetpp import PREPARED_CAMERAS, read_scannetpp
from fit3d_ns.data.transforms import read_transforms
from fit3d_ns.utils.errors import reading

RUN_CONFIG = "config.yml"
"""nerfstudio's name of a run's configuration."""
_READERS = {"scannetpp": read_scannetpp, "nerfstudio": read_transforms, "colmap": read_colmap}


def read_capture(path: Path, layout: Literal["auto"] | Layout = "auto", is_strict: bool = False) -> CaptureFiles:
    """Reads a scene from disk; of all files the headers are checked, a few photographs are held against seed points.

    ValueError where there is no such scene, no known layout, or something in it is wrong; the message names the piece.

    Args:
        path: The scene folder, the `dslr` folder of a ScanNet++ scene, or a camera file (`*.json`).
        layout: `auto` looks in this order: `dslr/` is ScanNet++, `transforms.json` nerfstudio's layout, `sparse/` or
            `colmap/` COLMAP, `transforms_train.json` with `images/` ScanNet++ as FiT3D's authors prepare it.
        is_strict: Refuse a missing photograph; otherwise its frame is left out where most are there.
    """
    path = Path(path).resolve() if Path(path).name == ".." else Path(path)  # Scenes are called as their folders.
    if not path.exists():
        raise ValueError(f"No such scene: {path}; check the path given as --data.")
    chosen = _find_layout(path) if layout == "auto" else layout
    with reading(f"The capture {path}"):
        capture = check_capture(_READERS[chosen](path), is_strict)
    if not any(frame.split == "train" and not frame.is_bad for frame in capture.frames):
        raise ValueError(f"{path} has no usable train frame; all are bad or held out.")
    return capture


def find_runs(folder: Path) -> list[Path]:
    """The config.yml of each run in nerfstudio's own layout: OUTPUT/EXPERIMENT/METHOD/TIMESTAMP, or a part of it.

    A run has its checkpoints next to the config; hidden folders, and what lies deeper, do not count.
    """
    runs: list[Path] = []
    for depth in range(4):
        for config in sorted(folder.glob(f"{'*/' * depth}{RUN_CONFIG}")):
            is_hidden = any(part.startswith(".") for part in config.relative_to(folder).parts)
            is_inside = any(run.parent in config.parents for run in runs)
            if not is_hidden and not is_inside and (config.parent / "nerfstudio_models").is_dir():
                runs.append(config)
    return sorted(runs)


def _find_layout(path: Path) -> Layout:
    """The layout of an existing folder or camera file; where the folder holds scenes, the error names some of them."""
    if path.is_file():
        if path.suffix == ".json":
            return "nerfstudio"
        _refuse_without_cameras([path], VIDEO_SUFFIXES)
        raise ValueError(f"{path} is a file; give the scene's folder or its transforms.json.")
    if (path / "dslr").is_dir() or (path / "nerfstudio").is_dir():
        return "scannetpp"
    if (path / "transforms.json").is_file():
        return "nerfstudio"
    if find_colmap_models(path):
        return "colmap"
    if (path / PREPARED_CAMERAS).is_file() and (path / "images").is_dir():
        return "scannetpp"
    scenes = sorted(child.name for child in path.iterdir() if (child / "dslr").is_dir())
    if scenes:
        problem = f"{path} holds {len(scenes)} ScanNet++ scenes ({', '.join(scenes[:5])})"
        raise ValueError(f"{problem}; give one, such as {path / scenes[0]}.")
    found = sorted([*path.iterdir(), *(path / "images").glob("*")])
    _refuse_without_cameras(found, (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))
    raise ValueError(
        f"{path} holds no scene: there is no dslr/ (ScanNet++), no transforms.json (nerfstudio), no sparse/0 (COLMAP); "
        "check the path given as --data."
    )


def _refuse_without_cameras(files: Sequence[Path], suffixes: Sequence[str]) -> None:
    """Raises ValueError at the first file with one of the suffixes, with the command that finds its cameras."""
    for file in files:
        if is_visible(file, suffixes) and file.is_file():
            if file.suffix.lower() in VIDEO_SUFFIXES:
                video = f"ns-process-data video --data {shlex.quote(str(file))} --output-dir SCENE"
                after = f"`{video}` (needs ffmpeg and COLMAP) and give SCENE as --data."
            else:
                folder = file.parent.parent if file.parent.name == "images" else file.parent
                after = f"`fit3d-prepare photos {shlex.quote(str(folder))}`, which finds them, and then this again."
            raise ValueError(f"{file} has no cameras beside it; run {after}")
