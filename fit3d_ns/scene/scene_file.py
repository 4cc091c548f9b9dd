"""The scene file: one `.safetensors` that holds a `FeatureScene`, memory-mapped when read, without pickle.

Tensors: the fields of `Gaussians` in their stored types, `decoder.weight` [E, D, 3, 3], `decoder.bias` [E] if
there is one, and `pca.*` if there is a basis. Everything else is JSON in the header under `fit3d_scene`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.features import BackboneDescription
from fit3d_ns.rasterization import RasterizeMode
from fit3d_ns.scene.feature_decoder import FeatureDecoder, TokenReadingRule
from fit3d_ns.scene.feature_scene import FeatureScene
from fit3d_ns.scene.gaussians import STORED_DTYPES, Gaussians
from fit3d_ns.scene.photograph_roots import confirm_root
from fit3d_ns.scene.posed_capture import parse_capture, record_capture
from fit3d_ns.utils.files import parse_json
from fit3d_ns.utils.tensor_files import TensorFile, open_tensors, save_tensors

SCHEMA_VERSION = 1
HEADER_KEY = "fit3d_scene"
TRAINING_SECONDS = "training_seconds"
"""Metric of a scene that was lifted from a finished run: seconds by phase of the run that made its geometry."""
_GEOMETRY_PHASES = ("setup", "colour")
# Phases that only measure or show.
_UNCOUNTED_PHASES = ("evaluation", "viewer", "photographs", "pictures")
_PCA_TENSORS = ("mean", "components", "explained_variance", "colour_low", "colour_high")


def save_scene(scene: FeatureScene, path: Path, include_sh: bool = False) -> None:
    """Writes a scene file, atomically; `.safetensors` is the customary suffix.

    With `include_sh` it also stores the colour's dependence on the direction (twice the size at degree 3 and D = 64).
    ValueError where the disk is full, or a mask lies outside the capture's root; nothing is written then.
    """
    gaussians = scene.gaussians if include_sh else replace(scene.gaussians, sh_rest=None)
    tensors = gaussians.tensors()
    tensors["decoder.weight"] = scene.decoder.weight.detach().float()
    if scene.decoder.bias is not None:
        tensors["decoder.bias"] = scene.decoder.bias.detach().float()
    if scene.pca is not None:
        tensors.update({f"pca.{name}": getattr(scene.pca, name).float() for name in _PCA_TENSORS})
    header = {
        "schema_version": SCHEMA_VERSION,
        "capture": record_capture(scene.posed_capture),
        "backbone": scene.backbone.to_metadata(),
        # Of this machine, as the capture's root is: later commands look there for the same weights.
        "backbone_place": scene.backbone.place,
        "token_reading": scene.token_reading,
        "rasterize_mode": scene.rasterize_mode,
        "eps2d": scene.eps2d,
        "pca_total_variance": None if scene.pca is None else scene.pca.total_variance,
        "bytes_per_gaussian": gaussians.bytes_per_gaussian,
        # The key is from the first version of the format.
        "figures": dict(scene.metrics),
        "lifted_views": None if scene.lifted_views is None else list(scene.lifted_views),
    }
    save_tensors(Path(path), tensors, {HEADER_KEY: json.dumps(header)})
    if scene.source is None:
        # Made here, from a capture that its maker named.
        confirm_root(scene.posed_capture.root)


def load_scene(path: Path | str, device: torch.device | str = "cpu") -> FeatureScene:
    """Opens a scene file. On the CPU its tensors stay on disk, and unchecked, until they are rendered.

    ValueError where the file is missing, cut short, no scene file, or one of a newer schema.
    """
    path = Path(path)
    header, file = _read_file(path)
    tensors = file.tensors
    try:
        pca = {name: tensors[f"pca.{name}"] for name in _PCA_TENSORS} if "pca.mean" in tensors else None
        scene = FeatureScene(
            gaussians=Gaussians(**{name: tensors[name] for name in STORED_DTYPES if name in tensors}),
            decoder=FeatureDecoder.from_weights(tensors["decoder.weight"], tensors.get("decoder.bias")),
            posed_capture=parse_capture(header["capture"]),
            backbone=BackboneDescription.from_metadata(header["backbone"], header.get("backbone_place")),
            pca=None if pca is None else PcaBasis(**pca, total_variance=float(header["pca_total_variance"])),
            token_reading=_choose(header["token_reading"], get_args(TokenReadingRule)),
            rasterize_mode=_choose(header["rasterize_mode"], get_args(RasterizeMode)),
            eps2d=float(header["eps2d"]),
            metrics=dict(header["figures"]),
            # Files of earlier versions do not name them.
            lifted_views=None if header.get("lifted_views") is None else tuple(map(str, header["lifted_views"])),
            file=file,
        )
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a whole scene file ({error!r}); export the scene again.") from error
    return scene if torch.device(device).type == "cpu" else scene.to(device)


def read_scene_costs(scene: FeatureScene, path: Path) -> dict[str, Any]:
    """What a scene that was loaded from `path` takes on disk (1e6 bytes) and took to make, for Tables 5 and 8."""
    return {
        "scene_id": scene.scene_id,
        "feature_dim": scene.gaussians.feature_dim,
        "num_gaussians": scene.gaussians.num_gaussians,
        "file_mb": path.stat().st_size / 1e6,
        "stage1_hours": compute_stage1_hours(scene.metrics),
    }


def compute_stage1_hours(metrics: Mapping[str, Any]) -> float | None:
    """Hours of training colour and solving features from a scene's metrics.

    None where the training of its geometry is not among them (PLYs, runs of other methods).
    """
    phases = _read_phases(metrics)
    if not phases.get("colour"):
        return None
    return sum(seconds for name, seconds in phases.items() if name not in _UNCOUNTED_PHASES) / 3600.0


def find_geometry_seconds(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What the training of a scene's or run's geometry took, by phase; time spent on features is not part of it."""
    phases = _read_phases(metrics)
    return {name: phases[name] for name in _GEOMETRY_PHASES if name in phases}


def _read_phases(metrics: Mapping[str, Any]) -> dict[str, float]:
    phases: dict[str, float] = {}
    for key in ("seconds", TRAINING_SECONDS):
        value = metrics.get(key)
        if isinstance(value, Mapping):
            phases |= {name: float(seconds) for name, seconds in value.items() if isinstance(seconds, (int, float))}
    return phases


def _read_file(path: Path) -> tuple[dict[str, Any], TensorFile]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a scene file; give the .safetensors file.")
    if not path.is_file():
        raise ValueError(f"No such scene file: {path}.")
    with open(path, "rb") as start:
        if start.read(9)[8:] not in (b"{", b""):
            raise ValueError(f"{path} is not a scene file; give a .safetensors made by fit3d-export or fit3d-lift.")
    file = open_tensors(path, known=(HEADER_KEY, "format"))
    if HEADER_KEY not in file.metadata:
        raise ValueError(f"{path} holds tensors but no scene; make scene files with fit3d-export or fit3d-lift.")
    header = parse_json(file.metadata[HEADER_KEY], f"The header of {path}")
    version = header.get("schema_version", 0) if isinstance(header, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path} is not a whole scene file (schema {version!r}); export the scene again.")
    if version > SCHEMA_VERSION:
        raise ValueError(f"{path} has scene schema {version}, this one reads up to {SCHEMA_VERSION}; update fit3d-ns.")
    for name, tensor in file.tensors.items():
        expected = STORED_DTYPES.get(name, torch.float32)
        if tensor.dtype != expected:
            raise ValueError(f"{path} stores `{name}` as {tensor.dtype}, expected {expected}; export it again.")
    return header, file


def _choose(value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return value
