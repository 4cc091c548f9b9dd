"""The scene file: one `.safetensors` that holds a `FeatureScene`, memory-mapped when read, without pickle.

Tensors: the fields of `Gaussians` in their stored types, `decoder.weight` [E, D, 3, 3], `decoder.bias` [E] if
there is one, and `pca.*` if there is a basis. Everything else is JSON in the header under `fit3d_scene`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.features import BackboneDescription
from fit3d_ns.scene.feature_decoder import FeatureDecoder
from fit3d_ns.scene.feature_scene import FeatureScene
from fit3d_ns.scene.gaussians import STORED_DTYPES, Gaussians
from fit3d_ns.scene.photograph_roots import confirm_root
from fit3d_ns.scene.posed_capture import parse_capture, record_capture
from fit3d_ns.utils.files import write_atomically

SCHEMA_VERSION = 1
HEADER_KEY = "fit3d_scene"
TRAINING_SECONDS = "training_seconds"
"""Metric of a scene that was lifted from a finished run: seconds by phase of the run that made its geometry."""
_GEOMETRY_PHASES = ("setup", "colour")
# Phases that only measure or show.
_UNCOUNTED_PHASES = ("evaluation", "viewer", "photographs", "pictures")
_PCA_TENSORS = ("mean", "components", "explained_variance", "colour_low", "colour_high")


@dataclass(frozen=True)
class SceneCosts:
    """What one scene takes on disk and took to make (Tables 5 and 8 of the paper)."""

    scene_id: str
    feature_dim: int
    num_gaussians: int
    file_mb: float
    """Size of the scene file, 1e6 bytes."""
    stage1_hours: float | None
    """Training of colour and solving of features; None where the geometry's training is not known (PLYs, runs of other
    methods)."""


def save_scene(scene: FeatureScene, path: Path, include_sh: bool = False) -> None:
    """Writes a scene file, atomically; `.safetensors` is the customary suffix.

    With `include_sh` it also stores the colour's dependence on the direction (twice the size at degree 3 and D = 64).

    Raises:
        ValueError: The disk is full, or a mask lies outside the capture's root; nothing is written.
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
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with write_atomically(Path(path)) as temporary:
        save_file(on_cpu, temporary, metadata={HEADER_KEY: json.dumps(header)})
    if scene.source is None:
        # Made here, from a capture that its maker named.
        confirm_root(scene.posed_capture.root)


def load_scene(path: Path | str, device: torch.device | str = "cpu") -> FeatureScene:
    """Opens a scene file. On the CPU its tensors stay on disk until they are read.

    Raises:
        ValueError: The file is missing, cut short, no scene file, or one of a newer schema.
    """
    path = Path(path)
    header, tensors = _read_file(path)
    try:
        scene = FeatureScene(
            gaussians=Gaussians(**{name: tensors[name] for name in STORED_DTYPES if name in tensors}),
            decoder=FeatureDecoder.from_weights(tensors["decoder.weight"], tensors.get("decoder.bias")),
            posed_capture=parse_capture(header["capture"]),
            backbone=BackboneDescription.from_metadata(header["backbone"], header.get("backbone_place")),
            pca=_parse_pca(tensors, header["pca_total_variance"]) if "pca.mean" in tensors else None,
            token_reading=header["token_reading"],
            rasterize_mode=header["rasterize_mode"],
            eps2d=float(header["eps2d"]),
            metrics=header["figures"],
            # Files of earlier versions do not name them.
            lifted_views=None if header.get("lifted_views") is None else tuple(map(str, header["lifted_views"])),
            source=path,
        )
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole scene file ({error!r}); export the scene again.") from error
    return scene if torch.device(device).type == "cpu" else scene.to(device)


def read_scene_costs(scene: FeatureScene, path: Path) -> SceneCosts:
    """Costs of a scene that was loaded from `path`."""
    gaussians, hours = scene.gaussians, compute_stage1_hours(scene.metrics)
    return SceneCosts(scene.scene_id, gaussians.feature_dim, gaussians.num_gaussians, path.stat().st_size / 1e6, hours)


def compute_stage1_hours(metrics: Mapping[str, Any]) -> float | None:
    """Hours of stage I from a scene's metrics; None where the training of its geometry is not among them."""
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


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a scene file; give the .safetensors file.")
    if not path.is_file():
        raise ValueError(f"No such scene file: {path}.")
    _check_length(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
            if text is None:
                raise ValueError(
                    f"{path} holds tensors but no scene; make scene files with fit3d-export or fit3d-lift."
                )
            header = json.loads(text)
            version = header.get("schema_version", 0)
            if version > SCHEMA_VERSION:
                raise ValueError(
                    f"{path} has scene schema {version}, this version reads up to {SCHEMA_VERSION}; update fit3d-ns."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable scene file ({error}); copy or export it again.") from error
    for name, dtype in STORED_DTYPES.items():
        if name in tensors and tensors[name].dtype != dtype:
            raise ValueError(f"{path} stores `{name}` as {tensors[name].dtype}, expected {dtype}; export it again.")
    return header, tensors


def _check_length(path: Path) -> None:
    """Distinguishes a file that was cut from one that never was a scene; safetensors' messages for both are obscure."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) >= 8 and start[8:] != b"{":
            raise ValueError(f"{path} is not a scene file; give a .safetensors made by fit3d-export or fit3d-lift.")
        if len(start) < 8 or size < 8 + length:
            raise ValueError(f"{path} is cut short ({size} bytes); copy or export it again.")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} has a damaged header; copy or export it again.") from error
    if size < 8 + length + end:
        raise ValueError(f"{path} is cut short: {size} of {8 + length + end} bytes; copy or export it again.")


def _parse_pca(tensors: dict[str, Tensor], total_variance: float) -> PcaBasis:
    return PcaBasis(**{name: tensors[f"pca.{name}"] for name in _PCA_TENSORS}, total_variance=float(total_variance))
