"""Gaussians as other tools write them, from a file or from the folder in which the tool keeps its files.

A folder is a run of gsplat's example trainer (`ckpts/`, one file for each GPU) or of Inria's code, and FiT3D's
(`point_cloud/iteration_*/`); of either the newest step is taken. FiT3D's has features, `sem_*`, which a checkpoint
decodes, and `cfg_args` with the backbone's name. Its `pretrained_feat_gaussians_*.pth` holds many scenes by id, with
opacities, scales and rotations activated; so are those of SceneSplat's folders, an array a file (`coord.npy` ...).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fit3d_ns.data.images import is_visible
from fit3d_ns.data.ply import SH_CONSTANT, read_ply_elements
from fit3d_ns.scene.feature_decoder import FeatureDecoder
from fit3d_ns.scene.feature_scene import FeatureScene
from fit3d_ns.scene.gaussians import Gaussians
from fit3d_ns.scene.ply import MAX_OPACITY_LOGIT, read_ply, write_ply
from fit3d_ns.utils.errors import first_line
from fit3d_ns.utils.files import write_atomically
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.tensor_files import load_torch_file

_CHECKPOINT = re.compile(r"(.*?)(\d+)(?:_rank(\d{1,3}))?\.pt")
"""A checkpoint's name: text, step, and on which GPU its Gaussians were trained."""
_GSPLAT_ROWS = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "sh0": (1, 3)}
_NUM_REST = (0, 3, 8, 15, 24)
_ITERATION = "point_cloud/iteration_*/point_cloud.ply"
_MODEL_NAME = re.compile(r"\bmodel_name='([^']+)'")
_PACKED_ROWS = {"means3D": (3,), "rotations": (4,), "scales": (3,), "opacity": (1,)}
_ARRAY_ROWS = {"coord": (3,), "quat": (4,), "scale": (3,), "opacity": (1,), "color": (3,)}
"""SceneSplat's arrays, in the same order; colours are 8-bit, quaternions wxyz."""


class Splats(NamedTuple):
    """Gaussians as they were read."""

    gaussians: Gaussians
    num_dropped: int
    """Gaussians left out because a number was NaN, infinite or too large."""
    decoder: FeatureDecoder | None = None
    """What decodes their features; None where they have none."""


def read_splats(path: Path) -> tuple[Gaussians, int]:
    """Reads Gaussians; the number is of those left out because a value was NaN, infinite or too large.

    Takes a PLY file, a checkpoint of gsplat's example trainer with those of its other GPUs, a run's folder or one of
    SceneSplat's arrays.
    ValueError as in `read_ply`, and for a checkpoint that is damaged, holds code, lacks gsplat's `splats`, or whose
    other GPUs' are missing.
    """
    if ranks := _find_checkpoints(path):
        if path not in ranks or len(ranks) > 1:
            notice(f"Of {path}, the Gaussians in {', '.join(rank.name for rank in ranks)} are taken.")
        return _join_checkpoints(ranks)
    if not path.is_dir():
        return read_ply(path)
    if (path / "coord.npy").is_file():
        return _read_arrays(path)
    ply = _find_newest_ply(path)
    notice(f"Of {path}, the Gaussians in {ply.relative_to(path)} are taken.")
    return read_ply(ply)


def write_fit3d(scene: FeatureScene, ply_path: Path, decoder_path: Path) -> None:
    """Writes a scene as FiT3D does: Gaussians with `sem_*` and a checkpoint with the convolution as `0.weight`.

    A bias becomes one more channel that is 1 for every Gaussian: it blends to alpha, so the centre tap `bias` gives
    `bias * alpha`, exactly. (FiT3D's own kernels are compiled for 64 channels; lift without a bias for those.)
    """
    gaussians, weight = scene.gaussians, scene.decoder.weight.detach().float().cpu()
    if scene.decoder.bias is not None:
        extra = torch.zeros_like(weight[:, :1])
        extra[:, 0, 1, 1] = scene.decoder.bias.detach().float().cpu()
        weight = torch.cat([weight, extra], dim=1)
        gaussians = replace(gaussians, features=torch.nn.functional.pad(gaussians.features, (0, 1), value=1.0))
    write_ply(gaussians, ply_path, sh_degree=3)
    with write_atomically(Path(decoder_path)) as temporary:
        torch.save({"0.weight": weight.contiguous()}, temporary)


def has_features(path: Path, backbone: str | None) -> bool:
    """Whether a packed file or a run's folder has features and their decoder, of the given backbone or of any for None.

    ValueError for a run with features whose decoder is not there.
    """
    if backbone is not None and read_model_name(path) not in (None, backbone):
        return False
    return path.suffix == ".pth" or _find_decoder(path) is not None


def read_model_name(run: Path) -> str | None:
    """The backbone whose tokens a run of FiT3D lifted, by its `cfg_args`; None where it does not say."""
    path = run / "cfg_args"
    match = _MODEL_NAME.search(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    return None if match is None else match[1]


def list_splats(path: Path, data: Path, keep_features: bool) -> list[tuple[str, Path, Callable[[], Splats]]]:
    """Name, captured folder and reader of each scene in a file or a run's folder: of a packed file those in `data`.

    Features are read only if they are to be kept. ValueError for a packed file that is none, or has no scene in `data`.
    """
    if path.suffix != ".pth":
        return [(path.name if path.is_dir() else path.stem, data, partial(_read_run, path, keep_features))]
    scenes = _load_tensors(path, mmap=True)
    needed = {*_PACKED_ROWS, "shs", "sem", "feat_cnn"}
    if not isinstance(scenes, dict) or not scenes:
        raise ValueError(f"{path} holds no scenes by their id; give FiT3D's pretrained_feat_gaussians_*.pth.")
    for name, scene in scenes.items():
        is_name = Path(str(name)).name == name and str(name).strip(".")
        if not isinstance(scene, dict) or needed - set(scene) or not is_name:
            raise ValueError(f"`{name}` in {path} is no scene with {', '.join(sorted(needed))}; export a PLY.")
    found = [name for name in scenes if (data / name).is_dir()]
    if not found:
        raise ValueError(
            f"{data} has no folder for any of the scenes in {path} ({', '.join(list(scenes)[:3])}); correct it."
        )
    if len(found) < len(scenes):
        notice(f"{len(scenes) - len(found)} of the {len(scenes)} scenes in {path} have no folder in {data}: left out.")
    reader = partial(_unpack, keep_features=keep_features)
    return [(name, data / name, partial(reader, scenes[name], f"Scene {name} in {path}")) for name in found]


def _find_newest_ply(folder: Path) -> Path:
    """The PLY of the last iteration in a run's folder of Inria's code; ValueError where there is none."""
    found = {int(path.parent.name[10:]): path for path in folder.glob(_ITERATION) if path.parent.name[10:].isdecimal()}
    if not found:
        raise ValueError(
            f"The folder {folder} holds no Gaussians: no ckpts/*.pt (gsplat), no {_ITERATION} (Inria's code, FiT3D); "
            "give the file itself."
        )
    return found[max(found)]


def _load_tensors(path: Path, mmap: bool = False) -> Any:
    """What a checkpoint holds, without running code from it; with `mmap` tensors stay on disk until they are read."""
    if not path.is_file():
        raise ValueError(f"Checkpoint {path} is missing; restore it or name another one.")
    try:
        return load_torch_file(path, mmap)
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): it is damaged, or holds more than tensors, "
            "and code from files is not run; copy it again or export a PLY."
        ) from error


def _check_rows(tensors: Mapping[str, Any], rows: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises ValueError where one of the named tensors is not as many floating-point rows of the given shape."""
    num = None
    for name, shape in rows.items():
        tensor = tensors[name]
        is_dense = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided
        if num is None and is_dense and tensor.dim():
            num = len(tensor)
        if not is_dense or tuple(tensor.shape) != (num, *shape):
            found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            expected = ", ".join(map(str, (num or "N", *shape)))
            raise ValueError(f"{source} has `{name}` of {found}; expected floating-point [{expected}].")


def _find_checkpoints(path: Path) -> list[Path]:
    """gsplat's checkpoints of the step of a file, or of the last one in a folder, by GPU; none for other files.

    ValueError where a gap among the GPUs, or another step, says that some are missing.
    """
    folder = path.parent if not path.is_dir() else path / "ckpts" if (path / "ckpts").is_dir() else path
    # By step and name, and then by GPU.
    groups: dict[tuple[int, str], dict[int, Path]] = {}
    for file in sorted(folder.glob("*.pt")):
        if is_visible(file, (".pt",)) and (match := _CHECKPOINT.fullmatch(file.name)):
            name, step, rank = match.groups()
            groups.setdefault((int(step), name if rank is None else f"{name}*_rank"), {})[int(rank or 0)] = file
    own = [key for key, group in groups.items() if path.is_dir() or path in group.values()]
    if not own:
        return [path] if path.suffix == ".pt" else []
    step, name = max(own)
    num = 1 + max(max(group) for (_, other), group in groups.items() if other == name)
    missing = [f"rank {rank}" for rank in range(num) if rank not in groups[step, name]]
    if missing:
        raise ValueError(
            f"Of step {step} in {folder}, {', '.join(missing)} of {num} GPUs is missing, and with it a part of the "
            "scene; copy all files, or move the other steps away if they were trained on more GPUs."
        )
    return [groups[step, name][rank] for rank in range(num)]


def _join_checkpoints(paths: list[Path]) -> tuple[Gaussians, int]:
    parts = [_read_checkpoint(path) for path in paths]
    if len({part["shN"].shape[1] for part in parts}) > 1:
        raise ValueError(f"The checkpoints beside {paths[0]} have harmonics of different degrees; copy them again.")
    joined = {name: torch.cat([part[name].float() for part in parts]) for name in parts[0]}
    gaussians = Gaussians.from_raw(
        means=joined["means"],
        quats=joined["quats"],
        log_scales=joined["scales"],
        opacity_logits=joined["opacities"].clamp(max=MAX_OPACITY_LOGIT),
        sh_dc=joined["sh0"].reshape(-1, 3),
        sh_rest=joined["shN"],
        drop_invalid=True,
    )
    num = len(joined["means"])
    if gaussians.num_gaussians == 0:
        raise ValueError(f"{paths[0]} holds no usable Gaussian ({num} in the file, all NaN or infinite).")
    return gaussians, num - gaussians.num_gaussians


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """gsplat's `splats`, checked."""
    content = _load_tensors(path)
    splats = content.get("splats") if isinstance(content, dict) else None
    splats = dict(splats) if isinstance(splats, dict) else {}
    lacking = [name for name in _GSPLAT_ROWS if name not in splats]
    if lacking:
        raise ValueError(f"{path} is no checkpoint of gsplat: its `splats` lack {', '.join(lacking)}; export a PLY.")
    rows = dict(_GSPLAT_ROWS)
    if "shN" in splats:
        rows["shN"] = (next((num for num in _NUM_REST if getattr(splats["shN"], "shape", ())[1:] == (num, 3)), 15), 3)
    _check_rows(splats, rows, str(path))
    return {"shN": torch.zeros(len(splats["means"]), 0, 3), **{name: splats[name] for name in rows}}


def _read_arrays(folder: Path) -> tuple[Gaussians, int]:
    """SceneSplat's arrays of a scene, whose colours do not depend on the direction."""
    arrays: dict[str, Tensor] = {}
    for name in _ARRAY_ROWS:
        try:
            arrays[name] = torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False)).float()
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise ValueError(f"{folder / name}.npy cannot be read ({first_line(error)}); copy it again.") from error
    arrays["opacity"] = arrays["opacity"].reshape(-1, 1)
    _check_rows(arrays, _ARRAY_ROWS, str(folder))
    activated = {packed: arrays[name] for packed, name in zip(_PACKED_ROWS, _ARRAY_ROWS, strict=False)}
    activated["shs"] = (arrays["color"][:, None] / 255.0 - 0.5) / SH_CONSTANT
    gaussians = _undo_activations(activated, str(folder))
    return gaussians, len(arrays["coord"]) - gaussians.num_gaussians


def _find_decoder(path: Path) -> Path | None:
    if not (path / "point_cloud").is_dir():
        return None
    ply = _find_newest_ply(path)
    if "sem_0" not in (read_ply_elements(ply)["vertex"].dtype.names or ()):
        return None
    decoder = path / f"chkpnt{ply.parent.name.removeprefix('iteration_')}.pth"
    if not decoder.is_file():
        raise ValueError(f"{ply} has features without {decoder}, which decodes them; give the PLY to lift anew.")
    return decoder


def _read_run(path: Path, keep_features: bool) -> Splats:
    gaussians, num_dropped = read_splats(path)
    decoder_path = _find_decoder(path) if keep_features else None
    if decoder_path is None:
        return Splats(gaussians.with_features(gaussians.features[:, :0]), num_dropped)
    decoder = _create_decoder(_load_tensors(decoder_path), decoder_path)
    if decoder.feature_dim != gaussians.feature_dim:
        raise ValueError(
            f"{path} has {gaussians.feature_dim} sem_* properties, {decoder_path.name} takes {decoder.feature_dim} "
            "channels; give the checkpoint that was saved with the PLY."
        )
    return Splats(gaussians, num_dropped, decoder)


def _unpack(scene: Mapping[str, Any], source: str, keep_features: bool) -> Splats:
    decoder = _create_decoder(scene["feat_cnn"], source)
    num = 1 + next((num for num in _NUM_REST if getattr(scene["shs"], "shape", ())[1:] == (1 + num, 3)), 15)
    _check_rows(scene, {**_PACKED_ROWS, "sem": (decoder.feature_dim,), "shs": (num, 3)}, source)
    gaussians = _undo_activations({**scene, "sem": scene["sem"] if keep_features else None}, source)
    return Splats(gaussians, len(scene["opacity"]) - gaussians.num_gaussians, decoder if keep_features else None)


def _undo_activations(scene: Mapping[str, Any], source: str) -> Gaussians:
    """Of FiT3D's names; ValueError where an opacity is none."""
    opacities = scene["opacity"].detach().float()
    if bool(((opacities < 0) | (opacities > 1)).any()):
        raise ValueError(f"{source} has opacities outside of 0 to 1, which such scenes have not.")
    return Gaussians.from_raw(
        means=scene["means3D"],
        quats=scene["rotations"],
        log_scales=scene["scales"].detach().float().log(),
        opacity_logits=opacities.logit().clamp(-MAX_OPACITY_LOGIT, MAX_OPACITY_LOGIT),
        sh_dc=scene["shs"][:, 0],
        sh_rest=scene["shs"][:, 1:],
        features=scene.get("sem"),
        drop_invalid=True,
    )


def _create_decoder(state: Any, source: Path | str) -> FeatureDecoder:
    weight = state.get("0.weight") if isinstance(state, dict) else None
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[2:] != (3, 3) or weight.is_sparse:
        raise ValueError(f"{source} has no 3x3 convolution `0.weight`; give FiT3D's feat_decoder checkpoint.")
    if not bool(weight.float().isfinite().all()):
        raise ValueError(f"{source} has weights that are NaN or infinite; train the scene again.")
    return FeatureDecoder.from_weights(weight.float())
