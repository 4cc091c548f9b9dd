"""Scenes for fine-tuning: what `--ckpts` names, and `SceneBank`, which holds many on disk and a few on the device.

nerfstudio runs become scene files first, kept in one folder and exported again only if the run has changed, so that
everything after this knows only scene files. All scene files are open from the start and memory-mapped: that costs
address space, not memory. A scene that is asked for is moved to the device and made ready to render; when the budget is
reached, the one that was used longest ago leaves. 230 scenes of a million Gaussians are 39 GB of files, and each takes
0.47 GB while it is ready (D = 64).
"""

import glob
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fit3d_ns.data.layouts import RUN_CONFIG, find_runs
from fit3d_ns.features import BackboneDescription
from fit3d_ns.finetuning.lifted_views import SceneAverages
from fit3d_ns.scene import FeatureScene, load_scene, save_scene
from fit3d_ns.utils.files import hash_bytes
from fit3d_ns.utils.progress import notice

SCENE_SUFFIX = ".safetensors"


def find_scenes(patterns: Sequence[str | Path], flag: str = "--ckpts") -> list[Path]:
    """Scene files and `config.yml`s that the patterns name, each once, in order of the patterns, sorted within one.

    Patterns are files, globs (`**` descends), folders of scene files, and folders of nerfstudio runs. One that matches
    nothing, or a file that is neither, raises ValueError with the flag that gave it.
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
    scenes: Sequence[Path], export_folder: Path, load_run: Callable[[Path], FeatureScene], *, may_export: bool = True
) -> list[Path]:
    """Scene files for `find_scenes`' result: runs are exported to `export_folder`, under a name with the run's hash.

    Args:
        load_run: Reads the lifted scene of a nerfstudio run from its `config.yml`; ValueError where it cannot.
        may_export: False on processes that wait until another one has exported.
    """
    files = []
    for scene in scenes:
        path = scene
        if scene.name == RUN_CONFIG:
            path = export_folder / f"{scene.parent.name}-{_hash_run(scene)}{SCENE_SUFFIX}"
            if not path.is_file() and may_export:
                notice(f"Exporting {scene.parent} to {path}")
                save_scene(load_run(scene), path)
        files.append(path)
    return files


class SceneBank:
    """Scenes by index; `bank[i]` is ready to render on the device.

    `averages` is None, or what replaces the features of each scene before they are rendered.
    """

    def __init__(self, paths: Sequence[Path], device: torch.device | str = "cpu", memory_gb: float = 8.0):
        """Opens all scene files; ready scenes will take at most `memory_gb` (above 0) times 1e9 bytes on the device.

        ValueError where there is no path, a file is not a whole scene, or a scene is larger than the budget.
        """
        if not paths:
            raise ValueError("There are no scenes; give at least one with --ckpts.")
        if not memory_gb > 0:
            raise ValueError(f"The memory budget for scenes is {memory_gb} GB; it must be above 0.")
        self.paths = [Path(path) for path in paths]
        self.device = torch.device(device)
        self.max_bytes = int(memory_gb * 1e9)
        self.on_disk = [load_scene(path) for path in self.paths]
        self.averages: SceneAverages | None = None
        self.num_loads = 0
        self._ready: OrderedDict[int, FeatureScene] = OrderedDict()
        self._averaged: set[int] = set()
        for path, scene in zip(self.paths, self.on_disk, strict=True):
            if scene.num_bytes > self.max_bytes:
                raise ValueError(
                    f"{path} takes {scene.num_bytes / 1e9:.2f} GB when it is ready, the budget is "
                    f"{self.max_bytes / 1e9:.2f} GB; raise --scene-memory-gb."
                )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> FeatureScene:
        scene = self.get_geometry(index)
        if self.averages is not None and index not in self._averaged:
            scene = self._ready[index] = self.averages.apply(index, scene)
            self._averaged.add(index)
        return scene

    def get_geometry(self, index: int) -> FeatureScene:
        """The scene ready to render colour and depth; its features may not be averaged yet, which takes its time."""
        if index in self._ready:
            self._ready.move_to_end(index)
            return self._ready[index]
        needed = self.on_disk[index].num_bytes
        while self._ready and self.num_bytes + needed > self.max_bytes:
            oldest, _ = self._ready.popitem(last=False)
            self._averaged.discard(oldest)
        scene = self.on_disk[index]
        # A copy, so that what is activated for rendering leaves with it; the mapped file stays open.
        self._ready[index] = replace(scene) if self.device.type == "cpu" else scene.to(self.device)
        self.num_loads += 1
        return self._ready[index]

    @property
    def num_bytes(self) -> int:
        """Bytes that ready scenes take at present."""
        return sum(scene.num_bytes for scene in self._ready.values())

    def announce(self, index: int) -> None:
        """Asks the system to read a scene's file ahead, so that the device does not wait for the disk."""
        if index in self._ready or not hasattr(os, "posix_fadvise"):
            return
        with open(self.paths[index], "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def check_backbones(self, backbone: BackboneDescription) -> None:
        """Refuses scenes that were lifted with another backbone, other weights or other preprocessing.

        The ValueError names the first of them, and both sides of every difference.
        """
        for path, scene in zip(self.paths, self.on_disk, strict=True):
            differences = scene.backbone.find_differences(backbone)
            if len(differences) == 1 and differences[0].startswith("weights_hash") and backbone.weights is None:
                raise ValueError(
                    f"{path} was lifted with weights of {scene.backbone.backbone} from a file that it does not name; "
                    "give that file with --backbone-weights."
                )
            if differences:
                raise ValueError(
                    f"{path} was lifted with {scene.backbone.backbone}, fine-tuning was asked for {backbone.backbone}: "
                    f"{'; '.join(differences)} (scene against backbone); lift the scene with this backbone, or give "
                    "the scene's own with --backbone and --backbone-weights."
                )


def _expand(match: Path, flag: str) -> list[Path]:
    if match.is_dir():
        # A folder of scene files is that, whatever else lies in it; only its direct children count.
        return sorted(match.glob(f"*{SCENE_SUFFIX}")) or find_runs(match)
    if match.suffix == SCENE_SUFFIX or match.name == RUN_CONFIG:
        return [match]
    raise ValueError(f"{match} is not a scene file (.safetensors), run folder or config.yml; take it out of {flag}.")


def _hash_run(config: Path) -> str:
    """Changes when the run was trained on: its checkpoints have other names, sizes or times then."""
    checkpoints = sorted(path for path in config.parent.rglob("*.ckpt") if path.is_file())
    parts = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in [config, *checkpoints]]
    return hash_bytes(str(config.absolute()).encode(), *(part.encode() for part in parts))
