"""Scenes for fine-tuning: what `--ckpts` names, and `SceneBank`, which holds many on disk and a few on the device.

nerfstudio runs become scene files first, kept in one folder and exported again only if the run has changed, so that
everything after this knows only scene files. All scene files are open from the start and memory-mapped: that costs
address space, not memory. A scene that is asked for is moved to the device and made ready to render; when the budget is
reached, the one that was used longest ago leaves. 230 scenes of a million Gaussians are 39 GB of files, and each takes
0.47 GB while it is ready (D = 64).

A solved lift also fits what each view alone said. Averaging the features over the lifted views
(`lifting.blending.average_over_views`) removes that; `SceneAverages` does it once per scene and keeps the result.

A lift solves A f = b with A = sum of R_j^T W_j R_j and b = sum of R_j^T W_j t_j over views j (R_j blends features to
the view's pixels, t_j are its tokens in the features' space, W_j its weights). Without view j the residual at f is
-(R_j^T W_j (t_j - R_j f)); one Jacobi step, with the row sums d of A that the file keeps as `blend_weight`, gives

    f_loo = f - R_j^T W_j (t_j - R_j f) / (d - d_j).

Averaged features are such sums over d already, and the same step takes the view's part out of them.
"""

import glob
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from fit3d_ns.analysis.pictures import upscale
from fit3d_ns.data.layouts import RUN_CONFIG, find_runs
from fit3d_ns.features import BackboneDescription, TokenModel
from fit3d_ns.geometry.undistortion import resize_lens
from fit3d_ns.lifting.blending import AVERAGING_SAMPLES, average_over_views, find_lifted, find_usable
from fit3d_ns.rasterization import backproject_features, rasterize_features
from fit3d_ns.scene import FeatureScene, PosedCapture, View, load_scene, save_scene
from fit3d_ns.utils.device import choose_budget_gb
from fit3d_ns.utils.files import hash_bytes, hash_file
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.selection import select_evenly
from fit3d_ns.utils.tensor_files import TensorStore

CPU_SCENES_GB = 8.0
"""Ready scenes on a CPU take at most this by default, in 1e9 bytes."""
MAX_AVERAGED_VIEWS = 64
"""Views that are averaged over, evenly spread; more cost time and change little."""
SMALLEST_SHARE = 1e-3
"""Gaussians of which other views hold less than this share of the blend weight were seen by the one view alone."""
_NUM_HASHED_BLOCKS, _HASHED_ROWS = 4, 256
"""Rows that a scene's hash reads: a few whole stretches, because rows far apart would page in the whole file."""


def compute_scene_hash(scene: FeatureScene) -> str:
    """Hashes the decoder, stretches of all the Gaussians' tensors, and which views were lifted; after a dash, the
    checksums that its file has of all tensors.

    Whatever a target is made from must change the hash; of the scene, as opened, only the stretches are read.
    """
    count = scene.gaussians.num_gaussians
    starts = sorted({count * block // _NUM_HASHED_BLOCKS for block in range(_NUM_HASHED_BLOCKS)})
    tensors = [value.detach() for value in scene.decoder.parameters()]
    for value in scene.gaussians.tensors().values():
        tensors += [value[start : start + _HASHED_ROWS] for start in starts]
    settings = f"{count} {scene.rasterize_mode} {scene.eps2d}"
    if scene.lifted_views is not None:
        settings += f" {' '.join(scene.lifted_views)}"
    content_hash = hash_bytes(settings, *(tensor.contiguous().numpy().tobytes() for tensor in tensors))
    checksums = scene.file.checksums if scene.file else None
    return f"{content_hash}-{hash_bytes(repr(sorted(checksums.items())))}" if checksums else content_hash


@dataclass
class SceneAverages:
    """Features of the scenes of one bank, averaged over their lifted views.

    They are as large as those of the files (128 MB for a million Gaussians of 64 channels), so the store keeps them in
    memory within a budget, and beyond it on disk if there is a folder; where neither has room they are computed again.
    Kept or computed they are the same half-precision numbers.
    """

    scenes: Sequence[FeatureScene]
    store: TensorStore
    data_root: Path | None = None
    """Where captures with their masks lie, if they were moved."""
    max_views: int | None = MAX_AVERAGED_VIEWS
    """At most so many views are taken; None takes all, so that any of them can be left out of the average."""
    num_averaged: int = 0
    _hashes: dict[int, str] = field(default_factory=dict)

    def apply(self, index: int, scene: FeatureScene) -> FeatureScene:
        """The scene with averaged features, from its index and itself, ready on any device with its file's features.

        ValueError where the capture is not there, a mask is damaged, or the disk is full.
        """
        kept = self.store.load(self.compute_hash(index), "features")
        if kept is not None:
            features = kept["features"].to(scene.gaussians.features.device)
            return replace(scene, gaussians=scene.gaussians.with_features(features))
        capture = scene.capture(self.data_root)
        num_usable, num_lifted = len(find_usable(scene, capture)), len(find_lifted(scene))
        if num_usable < num_lifted:
            said = f"Features of scene {scene.scene_id} are averaged over {num_usable} of its {num_lifted} lifted views"
            notice(f"{said}; the masks of the others are gone.")
        averaged = average_over_views(scene, capture, self.max_views)
        self.num_averaged += 1
        self.store.save(self.compute_hash(index), {"features": averaged.gaussians.features.cpu()})
        return averaged

    def compute_hash(self, index: int) -> str:
        """Hashes everything that is averaged: the scene, and the cameras and masks of the views."""
        if index not in self._hashes:
            scene = self.scenes[index]
            parts: list[object] = [AVERAGING_SAMPLES, scene.backbone.patch_size]
            for view in select_evenly(find_usable(scene, scene.capture(self.data_root)), self.max_views):
                mask = None if view.frame.mask_path is None else hash_file(view.frame.mask_path)
                size = (view.width, view.height)
                lens = resize_lens(view.frame.lens, *size)
                parts += [view.name, *size, view.K.tolist(), view.camera_to_world.tolist(), lens, mask]
            views_hash = hash_bytes(*(repr(part).encode() for part in parts))
            self._hashes[index] = hash_bytes(compute_scene_hash(scene).encode(), views_hash.encode())
        return self._hashes[index]


@torch.no_grad()
def leave_view_out(
    scene: FeatureScene, capture: PosedCapture, view: View, original: TokenModel
) -> tuple[FeatureScene, Bool[Tensor, " num_gaussians"]]:
    """The scene as if `view` had not been lifted, and which Gaussians other views know; the decoder stays.

    Gaussians that no other view saw cannot forget it: they keep their features and should not teach. A view that was
    not lifted changes nothing. `capture` is where the view's photograph is, `original` the backbone whose tokens were
    lifted; ValueError where the scene keeps no blend weights.
    """
    if not bool(scene.gaussians.blend_weight.any()):
        raise ValueError(f"Scene {scene.scene_id} has no blend weights, which leave-one-out needs; lift it again.")
    if view.name not in {lifted.name for lifted in find_lifted(scene)}:
        return scene, torch.ones_like(scene.gaussians.blend_weight, dtype=torch.bool)
    device = scene.gaussians.means.device
    features_and_one = scene.features_and_one
    info = scene.activated.project(view.camera)
    blended = rasterize_features(features_and_one, info)[0]
    # (h, w, 3) -> (1, 3, h, w)
    image = capture.load_image(view).permute(2, 0, 1)[None].to(device).float() / 255.0
    # Tokens in the features' space: least squares of the decoder on a constant map.
    tokens, decoder = original(image).maps[0].float(), scene.decoder
    centred = tokens if decoder.bias is None else tokens - decoder.bias.float()
    own = centred @ torch.linalg.pinv(decoder.weight.sum(dim=(2, 3)).float()).T
    # (h, w, d) -> (H, W, d), each pixel its own token's value.
    spread = upscale(own, (view.height, view.width))
    weights = capture.load_valid_mask(view).to(device)[..., None] * blended[..., -1:]
    residual = (spread - blended[..., :-1]) * weights
    sums, own_weight = backproject_features(residual[None], info)
    total = scene.gaussians.blend_weight.float()
    rest = total - own_weight
    is_known = rest > SMALLEST_SHARE * total
    step = torch.where(is_known[:, None], sums / rest.clamp(min=1e-12)[:, None], 0.0)
    return replace(scene, gaussians=scene.gaussians.with_features(features_and_one[:, :-1] - step)), is_known


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

    `load_run` reads the lifted scene of a nerfstudio run from its `config.yml`, or raises ValueError; `may_export` is
    False on processes that wait until another one has exported.
    """
    files = []
    for scene in scenes:
        path = scene
        if scene.name == RUN_CONFIG:
            # The hash changes when the run was trained on: its checkpoints have other names, sizes or times then.
            checkpoints = sorted(path for path in scene.parent.rglob("*.ckpt") if path.is_file())
            parts = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in [scene, *checkpoints]]
            run_hash = hash_bytes(str(scene.absolute()), *parts)
            path = export_folder / f"{scene.parent.name}-{run_hash}{SCENE_SUFFIX}"
            if not path.is_file() and may_export:
                notice(f"Exporting {scene.parent} to {path}")
                save_scene(load_run(scene), path)
        files.append(path)
    return files


class SceneBank:
    """Scenes by index; `bank[i]` is ready to render on the device.

    `averages` is None, or what replaces the features of each scene before they are rendered.
    """

    def __init__(self, paths: Sequence[Path], device: torch.device | str = "cpu", memory_gb: float | None = None):
        """Opens all scene files; ready scenes will take at most `memory_gb` (above 0) times 1e9 bytes on the device.

        By default these are `CPU_SCENES_GB`, or half of what a CUDA card has free.
        ValueError where there is no path, a file is not a whole scene, or a scene is larger than the budget.
        """
        if not paths:
            raise ValueError("There are no scenes; give at least one with --ckpts.")
        self.device = torch.device(device)
        memory_gb = choose_budget_gb(self.device, CPU_SCENES_GB) if memory_gb is None else memory_gb
        self.paths = [Path(path) for path in paths]
        self.max_bytes = int(memory_gb * 1e9)
        self.on_disk = [load_scene(path) for path in self.paths]
        self.averages: SceneAverages | None = None
        self.num_loads = 0
        self._ready: OrderedDict[int, FeatureScene] = OrderedDict()
        self._averaged: set[int] = set()
        for path, scene in zip(self.paths, self.on_disk, strict=True):
            if scene.num_bytes > self.max_bytes:
                problem = f"{path} takes {scene.num_bytes / 1e9:.2f} GB when it is ready"
                raise ValueError(f"{problem}, the budget is {self.max_bytes / 1e9:.2f} GB; raise --scene-memory-gb.")

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
