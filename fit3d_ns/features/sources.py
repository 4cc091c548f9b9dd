"""Names of vision transformers: which architecture a name stands for, and where its weights come from.

A backbone is named by one of the paper's six names, by any timm id of a `VisionTransformer` or `Eva` (DINOv3), by
`toy_rooms_vit` (the small one in this package, for first tries without a download), by `local-dir:FOLDER` or a path to
a folder with `config.json` and `model.safetensors` (what fine-tuning writes), or by `random:NAME`, which is the
architecture of NAME with untrained weights. Nothing is random unless it is named so.
"""

import difflib
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fit3d_ns.utils.files import hash_bytes, hash_file, read_json
from fit3d_ns.utils.package_files import read_table

PAPER_BACKBONES = {row["name"]: row["model"] for row in read_table(Path(__file__).with_name("paper_backbones.csv"))}
"""The names of the paper's code and the timm checkpoints they stand for."""

TOY_BACKBONE = "toy_rooms_vit"
"""The backbone in the package: trained on synthetic rooms alone; its card is in its folder."""
TOY_FOLDER = Path(__file__).with_name(TOY_BACKBONE)
RANDOM_PREFIX = "random:"
RANDOM_SEED = 0
"""Seed of untrained weights: the same architecture has the same random weights on every machine."""
WEIGHTS_NAME = "model.safetensors"
"""The weights in a fine-tuned folder."""
ADAPTER_NAME = "adapter.safetensors"
"""In a fine-tuned folder, next to the weights: a block behind the backbone (`adapters.py`)."""
ADAPTER_KEY = "fit3d_adapter"
"""In the folder's `config.json`, if it has one: the arguments of `SwinAdapter`."""
_LOCAL_PREFIX = "local-dir:"
_HUB_PREFIX = "hf-hub:"
ModelArgs = tuple[tuple[str, Any], ...]
_MODULES_WITH_VITS = ("vision_transformer", "eva", "deit")
MODEL_ARGS = frozenset(Path(__file__).with_name("model_args.txt").read_text(encoding="utf-8").split())
"""Arguments of timm's vision transformers that only shape the network; `checkpoint_path`, for one, loads a file."""
LARGEST_ARGUMENT = 100_000
LARGEST_DEPTH = 256
LARGEST_CHANNEL = 10.0
"""Largest mean or deviation of a channel; images are in [0, 1]."""


@dataclass(frozen=True)
class BackboneSource:
    """What a name stands for; names that `BackboneDescription` has mean the same here."""

    architecture: str
    weights_hash: str
    is_random: bool = False
    weights: Path | None = None
    model_args: ModelArgs = ()
    """Arguments of timm's constructor that a fine-tuned folder recorded, sorted by name."""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    """Channel means and deviations that a fine-tuned folder recorded."""


def list_backbones() -> list[str]:
    """The paper's names, then every timm id of a vision transformer, with and without checkpoint tags."""
    import timm

    modules = list(_MODULES_WITH_VITS)
    ids = timm.list_models(module=modules) + timm.list_models(module=modules, pretrained=True, include_tags=True)
    return [*PAPER_BACKBONES, TOY_BACKBONE, *sorted(set(ids))]


def expand_architecture(architecture: str, model_args: ModelArgs = ()) -> tuple[str, dict[str, Any]]:
    """timm's name of an architecture and the arguments of its constructor; the toy is a known one at other sizes."""
    if architecture != TOY_BACKBONE:
        return architecture, dict(model_args)
    toy_architecture, toy_args = _read_toy_shape()
    return toy_architecture, {**toy_args, **dict(model_args)}


def resolve_source(backbone: str, weights: Path | None) -> BackboneSource:
    """Finds out what a name and an optional file of weights stand for; nothing is loaded or downloaded.

    ValueError for an unknown name, a missing file or folder, a weights file for random weights, or no weights.
    """
    if weights is not None and not weights.is_file():
        raise ValueError(f"No such weights file: {weights}; give the path of a .safetensors or .pth file.")
    if backbone.startswith(RANDOM_PREFIX):
        architecture = _resolve_architecture(backbone)
        if weights is not None:
            raise ValueError(f"{backbone} asks for random weights, but a weights file is given too; drop one of them.")
        digest = hash_bytes(b"random", architecture.encode(), str(RANDOM_SEED).encode())
        return BackboneSource(architecture, digest, is_random=True)
    folder = find_backbone_folder(backbone)
    if folder is not None:
        return _read_folder(folder, weights)
    architecture = _resolve_architecture(backbone)
    if architecture == TOY_BACKBONE:
        return _read_folder(TOY_FOLDER, weights)
    if weights is not None:
        return BackboneSource(architecture, _hash_weights(weights), weights=weights)
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(architecture)
    if config is None or not config.has_weights:
        problem = f"timm publishes no weights for {architecture}"
        raise ValueError(f"{problem}; give --backbone-weights FILE, or {RANDOM_PREFIX}{architecture} for random ones.")
    return BackboneSource(architecture, hash_bytes("timm", architecture, str(config.hf_hub_id or config.url)))


def find_backbone_folder(backbone: str) -> Path | None:
    """The folder a backbone's name points to, or None where the name is not a path; known names are never folders."""
    if backbone.startswith(_LOCAL_PREFIX):
        return Path(backbone.removeprefix(_LOCAL_PREFIX)).expanduser()
    if backbone.startswith((RANDOM_PREFIX, _HUB_PREFIX)):
        return None
    if os.sep in backbone or backbone.startswith((".", "~")):
        return Path(backbone).expanduser()
    if not (Path(backbone) / "config.json").is_file() or backbone in (*PAPER_BACKBONES, TOY_BACKBONE):
        return None
    from timm.models import is_model, split_model_name_tag

    return None if is_model(split_model_name_tag(backbone)[0]) else Path(backbone)


def _read_folder(folder: Path, weights: Path | None) -> BackboneSource:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a backbone: it has no config.json; give a folder that fit3d-finetune wrote.")
    config = read_json(folder / "config.json")
    weights = weights or folder / WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_NAME}; copy the folder again, or give --backbone-weights FILE.")
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{folder / 'config.json'} names no `architecture`; give a folder that fit3d-finetune wrote.")
    architecture = _resolve_architecture(config["architecture"])
    pretrained_cfg = config.get("pretrained_cfg", config)
    model_args = _read_model_args(config.get("model_args") or {}, folder / "config.json", weights.stat().st_size)
    weights_hash = _hash_weights(weights)
    if ADAPTER_KEY in config:
        if not (folder / ADAPTER_NAME).is_file():
            raise ValueError(f"{folder} has no {ADAPTER_NAME}, which its config.json names; copy the folder again.")
        # The backbone's weights are the original's; its tokens are not.
        weights_hash = hash_bytes(weights_hash.encode(), _hash_weights(folder / ADAPTER_NAME).encode())
    toy_architecture, toy_args = _read_toy_shape()
    if architecture.split(".")[0] == toy_architecture and model_args.items() >= toy_args.items():
        # What was fine-tuned from the toy has its architecture.
        architecture = TOY_BACKBONE
        model_args = {key: value for key, value in model_args.items() if key not in toy_args}
    return BackboneSource(
        architecture,
        weights_hash,
        weights=weights,
        model_args=tuple(sorted(model_args.items())),
        mean=_read_channels(pretrained_cfg, "mean", folder),
        std=_read_channels(pretrained_cfg, "std", folder),
    )


@lru_cache(maxsize=1)
def _read_toy_shape() -> tuple[str, dict[str, Any]]:
    """timm's architecture and the arguments that make it the toy."""
    config = read_json(TOY_FOLDER / "config.json")
    unset = ("num_classes", "dynamic_img_size")
    return config["architecture"], {k: _freeze(value) for k, value in config["model_args"].items() if k not in unset}


def _read_model_args(found: Any, path: Path, num_bytes: int) -> dict[str, Any]:
    """Arguments of a fine-tuned folder that only shape the network; nothing else reaches timm.

    ValueError for one that is unknown or would load something, or numbers that the weights file cannot hold.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{path} has model_args={found!r}, expected names with values; restore the file.")
    model_args = {key: _freeze(value) for key, value in found.items() if key not in ("num_classes", "dynamic_img_size")}
    for key, value in model_args.items():
        if key not in MODEL_ARGS:
            raise ValueError(f"{path} has model_args.{key}, which does not shape a vision transformer; take it out.")
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(item, (bool, int, float, str)) or item is None for item in numbers):
            raise ValueError(f"{path} has model_args.{key}={value!r}, expected a plain value.")
        limit = LARGEST_DEPTH if key == "depth" else LARGEST_ARGUMENT
        if any(isinstance(item, (int, float)) and not abs(item) <= limit for item in numbers):
            raise ValueError(f"{path} has model_args.{key}={value!r}, beyond any vision transformer; restore the file.")
    depth, width = (model_args.get(key) or 1 for key in ("depth", "embed_dim"))
    # Attention alone has 4 width^2 weights a block, each of at least one byte.
    if isinstance(depth, (int, float)) and isinstance(width, (int, float)) and 4 * depth * width**2 > num_bytes:
        problem = f"{path} has depth {depth} and embed_dim {width}"
        raise ValueError(f"{problem}, more than its weights file of {num_bytes} bytes holds; copy the folder again.")
    return model_args


def _resolve_architecture(given: str) -> str:
    """timm's name of an architecture, with the tag of its default checkpoint where none is given."""
    from timm.models import get_pretrained_cfg, is_model, split_model_name_tag

    # timm's own repositories on the hub carry the names of its checkpoints.
    name = given.removeprefix(RANDOM_PREFIX)
    name = PAPER_BACKBONES.get(name, name.removeprefix(_HUB_PREFIX + "timm/"))
    architecture, _ = split_model_name_tag(name)
    if name == TOY_BACKBONE:
        return name
    if is_model(architecture):
        with suppress(RuntimeError):  # The model is known, the tag may not be.
            config = get_pretrained_cfg(name)
            return f"{architecture}.{config.tag}" if config is not None and config.tag else architecture
    nearest = difflib.get_close_matches(name, list_backbones(), n=3, cutoff=0.5) or list(PAPER_BACKBONES)[:3]
    is_folder = not given.startswith((RANDOM_PREFIX, _HUB_PREFIX))
    beside = f" There is no folder {given} with a config.json either." if is_folder else ""
    raise ValueError(f"Unknown backbone {given!r}; did you mean {', '.join(nearest)}?{beside}")


def _hash_weights(path: Path) -> str:
    status = path.stat()
    return _hash_unchanged_file(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash_unchanged_file(path: Path, size: int, modified_ns: int) -> str:
    return hash_file(path)


def _read_channels(config: Any, key: str, folder: Path) -> tuple[float, float, float] | None:
    values = config.get(key) if isinstance(config, dict) else None
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"{folder / 'config.json'} has {key}={values!r}, expected three numbers; correct the file.")
    if not all(abs(value) <= LARGEST_CHANNEL for value in values) or (key == "std" and min(values) <= 0):
        raise ValueError(f"{folder / 'config.json'} has {key}={values!r}, which cannot normalise images; correct it.")
    return float(values[0]), float(values[1]), float(values[2])


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value
