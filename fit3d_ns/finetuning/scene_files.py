"""What `--ckpts` takes: scene files, globs of them, and nerfstudio runs (`config.yml` or the folder that holds one).

Runs become scene files first, kept in one folder and made anew only if the run has changed, so that everything after
this knows scene files only.
"""

import glob
from collections.abc import Callable, Sequence
from pathlib import Path

from fit3d_ns.scene import FeatureScene, save_scene
from fit3d_ns.utils.files import hash_bytes
from fit3d_ns.utils.progress import notice

LoadRun = Callable[[Path], FeatureScene]
"""Reads the lifted scene of a nerfstudio run from its `config.yml`."""

SCENE_SUFFIX = ".safetensors"
RUN_CONFIG = "config.yml"


def find_scenes(patterns: Sequence[str | Path], flag: str = "--ckpts") -> list[Path]:
    """Scene files and `config.yml`s that the patterns name, each once, in order of the patterns, sorted within one.

    Args:
        patterns: Files, globs (`**` descends), run folders (each `config.yml` below counts), folders of scene files.
        flag: Where they were given, for messages.

    Raises:
        ValueError: A pattern matches nothing, or a file that is neither.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        # A name that exists is taken as it is, brackets and all.
        names = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)
        matches = sorted(Path(name) for name in names)
        scenes = [scene for match in matches for scene in _expand(match, flag)]
        if not scenes:
            kind = "no scene file and no nerfstudio run" if matches else "nothing"
            raise ValueError(
                f"{flag} {pattern} matches {kind}; give .safetensors files of fit3d-export or fit3d-lift, "
                "or nerfstudio run folders."
            )
        found += scenes
    return list(dict.fromkeys(found))


def prepare_scene_files(
    scenes: Sequence[Path], export_folder: Path, load_run: LoadRun | None, *, may_export: bool = True
) -> list[Path]:
    """Scene files for `find_scenes`' result: runs are exported to `export_folder`, under a name that hashes the run.

    Args:
        scenes: Scene files and `config.yml`s.
        export_folder: Where exported scenes lie.
        load_run: Reads a run; None where that is not possible.
        may_export: False on processes that wait until another one has exported.

    Raises:
        ValueError: A run is given and cannot be read here.
    """
    files = []
    for scene in scenes:
        if scene.name != RUN_CONFIG:
            files.append(scene)
            continue
        if load_run is None:
            raise ValueError(f"{scene} is a nerfstudio run, which cannot be read here; export it with fit3d-export.")
        path = export_folder / f"{scene.parent.name}-{_hash_run(scene)}{SCENE_SUFFIX}"
        if not path.is_file() and may_export:
            notice(f"Exporting {scene.parent} to {path}")
            save_scene(load_run(scene), path)
        files.append(path)
    return files


def _expand(match: Path, flag: str) -> list[Path]:
    if match.is_dir():
        # Outputs of fine-tuning beside scenes are folders with `model.safetensors`; only direct children count.
        return sorted(match.rglob(RUN_CONFIG)) or sorted(match.glob(f"*{SCENE_SUFFIX}"))
    if match.suffix == SCENE_SUFFIX or match.name == RUN_CONFIG:
        return [match]
    raise ValueError(f"{match} is no scene file (.safetensors), run folder or config.yml; take it out of {flag}.")


def _hash_run(config: Path) -> str:
    """Changes when the run was trained on: its checkpoints have other names, sizes or times then."""
    checkpoints = sorted(path for path in config.parent.rglob("*.ckpt") if path.is_file())
    parts = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in [config, *checkpoints]]
    return hash_bytes(str(config.absolute()).encode(), *(part.encode() for part in parts))
