"""Names of vision transformers, and what can be known of one without loading it.

A backbone is named by one of the paper's six names, by any timm id of a `VisionTransformer` or `Eva` (DINOv3),
by `local-dir:FOLDER` or a path to a folder with `config.json` and `model.safetensors` (what fine-tuning writes), or by
`random:NAME`, which is the architecture of NAME with untrained weights. Nothing is random unless it is named so.
"""

import difflib
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fit3d_ns.features.preprocessing import IMAGENET_MEAN, IMAGENET_STD, ResizeRule
from fit3d_ns.utils.files import hash_bytes, hash_file, read_json

Normalization = Literal["timm", "imagenet"]
"""`timm`: each model's own mean and deviation; `imagenet`: ImageNet's for all, as the paper's code does."""

PAPER_BACKBONES = {
    "dinov2_small": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_base": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_reg_small": "vit_small_patch14_reg4_dinov2.lvd142m",
    "clip_base": "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",
    "mae_base": "vit_base_patch16_224.mae",
    "deit3_base": "deit3_base_patch16_224.fb_in1k",
}
"""The paper's names (Table 4 and its code's `MODEL_LIST`) and the timm checkpoints they stand for."""

RANDOM_PREFIX = "random:"
RANDOM_SEED = 0
"""Seed of untrained weights: the same architecture has the same random weights on every machine."""
_LOCAL_PREFIX = "local-dir:"
_MODULES_WITH_VITS = ("vision_transformer", "eva", "deit")


@dataclass(frozen=True)
class BackboneDescription:
    """Everything about a backbone that decides which tokens an image becomes."""

    backbone: str
    """The name as the user gave it."""
    architecture: str
    """timm's model name, with the checkpoint's tag where there is one."""
    patch_size: int
    """Side of a patch in pixels."""
    embed_dim: int
    """Length E of a token."""
    num_blocks: int
    """Number of transformer blocks."""
    num_prefix_tokens: int
    """Class token plus registers."""
    mean: tuple[float, float, float]
    """Subtracted from images in [0, 1]."""
    std: tuple[float, float, float]
    """Divides images after that."""
    normalization: Normalization
    """Where `mean` and `std` come from."""
    resize_rule: ResizeRule
    """How images are resized to the patch grid."""
    norm: bool
    """True if the final norm is applied to the last block's tokens."""
    weights_hash: str
    """Of a file: hash of its bytes. Of a timm download: hash of the checkpoint's published name, which timm does not
    reuse. Of random weights: hash of architecture and seed. 16 hexadecimal digits."""
    is_random: bool
    """True for untrained weights; features then say nothing about quality."""
    weights: Path | None = field(default=None, compare=False)
    """The file the weights come from; None for timm's download and for random weights."""
    model_args: tuple[tuple[str, Any], ...] = ()
    """Arguments of timm's constructor that a fine-tuned folder recorded."""

    @property
    def identity(self) -> str:
        """A name fit for folders, equal only for descriptions that give the same tokens for the same image."""
        digest = hash_bytes(
            *(
                repr(part).encode()
                for part in (
                    self.architecture,
                    self.model_args,
                    self.weights_hash,
                    tuple(map(float, self.mean)),
                    tuple(map(float, self.std)),
                    self.resize_rule,
                    self.norm,
                )
            )
        )
        kind = "random-" if self.is_random else ""
        return f"{kind}{self.architecture}-{digest}"

    @property
    def label(self) -> str:
        """For titles and log lines; untrained weights are called random."""
        return f"{self.architecture} (random weights)" if self.is_random else self.backbone

    def to_metadata(self) -> dict[str, Any]:
        """Plain values for JSON: what a scene file or a result record stores; no path of this machine."""
        name = Path(self.backbone).name if _find_folder(self.backbone) is not None else self.backbone
        return {
            "backbone": name,
            "architecture": self.architecture,
            "patch_size": self.patch_size,
            "embed_dim": self.embed_dim,
            "num_prefix_tokens": self.num_prefix_tokens,
            "mean": list(self.mean),
            "std": list(self.std),
            "normalization": self.normalization,
            "resize_rule": self.resize_rule,
            "norm": self.norm,
            "weights_hash": self.weights_hash,
            "is_random": self.is_random,
            "identity": self.identity,
        }


def describe_backbone(
    backbone: str,
    weights: Path | str | None = None,
    normalization: Normalization = "timm",
    *,
    norm: bool = True,
    resize_rule: ResizeRule = "bilinear",
) -> BackboneDescription:
    """Says what a backbone is without building it (timm makes it on torch's meta device) and without its weights.

    Args:
        backbone: A name as the module's docstring lists them.
        weights: A file with weights (`weights.py` says which kinds); None: timm's download, or the folder's own.
        normalization: Whose mean and deviation normalise the images.
        norm: Whether the final norm is applied to the tokens.
        resize_rule: How images are resized to the patch grid.

    Raises:
        ValueError: Unknown name (nearest ones are given), missing file, no vision transformer, or no weights to be had.
    """
    source = _resolve_source(backbone, Path(weights) if weights is not None else None)
    shape = _measure_architecture(source.architecture, source.model_args)
    timm_mean, timm_std = source.mean or shape.mean, source.std or shape.std
    return BackboneDescription(
        backbone=backbone,
        architecture=source.architecture,
        patch_size=shape.patch_size,
        embed_dim=shape.embed_dim,
        num_blocks=shape.num_blocks,
        num_prefix_tokens=shape.num_prefix_tokens,
        mean=timm_mean if normalization == "timm" else IMAGENET_MEAN,
        std=timm_std if normalization == "timm" else IMAGENET_STD,
        normalization=normalization,
        resize_rule=resize_rule,
        norm=norm,
        weights_hash=source.weights_hash,
        is_random=source.is_random,
        weights=source.weights,
        model_args=source.model_args,
    )


def list_backbones() -> list[str]:
    """The paper's names, then every timm id of a vision transformer, with and without checkpoint tags."""
    import timm

    ids: list[str] = []
    for module in _MODULES_WITH_VITS:
        ids += timm.list_models(module=module) + timm.list_models(module=module, pretrained=True, include_tags=True)
    return [*PAPER_BACKBONES, *sorted(set(ids))]


def create_timm_model(architecture: str, model_args: tuple[tuple[str, Any], ...] = (), **kwargs: Any) -> nn.Module:
    """Builds the timm model without head, for images of any size.

    Raises:
        ValueError: The model is no `VisionTransformer` or `Eva`.
    """
    import timm
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    arguments = {"num_classes": 0, "dynamic_img_size": True, **dict(model_args), **kwargs}
    try:
        model = timm.create_model(architecture, **arguments)
    except TypeError as error:
        raise ValueError(
            f"Backbone {architecture} cannot be built as a vision transformer for images of any size ({error}); "
            "choose a `VisionTransformer` or `Eva` id of timm."
        ) from error
    if not isinstance(model, (VisionTransformer, Eva)):
        raise ValueError(
            f"Backbone {architecture} is a {type(model).__name__}, not a plain vision transformer; "
            "choose a `VisionTransformer` or `Eva` id of timm, for example dinov2_small."
        )
    return model


@dataclass(frozen=True)
class _Source:
    architecture: str
    weights_hash: str
    is_random: bool = False
    weights: Path | None = None
    model_args: tuple[tuple[str, Any], ...] = ()
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class _Shape:
    patch_size: int
    embed_dim: int
    num_blocks: int
    num_prefix_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _resolve_source(backbone: str, weights: Path | None) -> _Source:
    if weights is not None and not weights.is_file():
        raise ValueError(f"No such weights file: {weights}; give the path of a .safetensors or .pth file.")
    if backbone.startswith(RANDOM_PREFIX):
        architecture = _resolve_architecture(backbone.removeprefix(RANDOM_PREFIX), backbone)
        if weights is not None:
            raise ValueError(f"{backbone} asks for random weights, but a weights file is given too; drop one of them.")
        digest = hash_bytes(b"random", architecture.encode(), str(RANDOM_SEED).encode())
        return _Source(architecture, digest, is_random=True)
    folder = _find_folder(backbone)
    if folder is not None:
        return _read_folder(folder, weights)
    architecture = _resolve_architecture(backbone, backbone)
    if weights is not None:
        return _Source(architecture, _hash_weights(weights), weights=weights)
    return _Source(architecture, _hash_published_name(architecture))


def _find_folder(backbone: str) -> Path | None:
    if backbone.startswith(_LOCAL_PREFIX):
        return Path(backbone.removeprefix(_LOCAL_PREFIX))
    is_path = os.sep in backbone or backbone.startswith((".", "~")) or (Path(backbone) / "config.json").is_file()
    return Path(backbone).expanduser() if is_path else None


def _read_folder(folder: Path, weights: Path | None) -> _Source:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no backbone: it has no config.json; give a folder that fit3d-finetune wrote.")
    config = read_json(folder / "config.json")
    weights = weights or folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{folder} has no model.safetensors; copy the folder again, or give --backbone-weights FILE.")
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError(f"{folder / 'config.json'} names no `architecture`; give a folder that fit3d-finetune wrote.")
    architecture = _resolve_architecture(config["architecture"], config["architecture"])
    pretrained_cfg = config.get("pretrained_cfg", config)
    model_args = {key: _freeze(value) for key, value in (config.get("model_args") or {}).items()}
    for key in ("num_classes", "dynamic_img_size"):
        model_args.pop(key, None)
    return _Source(
        architecture,
        _hash_weights(weights),
        weights=weights,
        model_args=tuple(sorted(model_args.items())),
        mean=tuple(pretrained_cfg["mean"]) if "mean" in pretrained_cfg else None,
        std=tuple(pretrained_cfg["std"]) if "std" in pretrained_cfg else None,
    )


def _resolve_architecture(name: str, given: str) -> str:
    from timm.models import get_pretrained_cfg, is_model, split_model_name_tag

    name = PAPER_BACKBONES.get(name, name)
    architecture, tag = split_model_name_tag(name)
    if is_model(architecture):
        try:
            config = get_pretrained_cfg(name)
        except RuntimeError:
            config = None
            known_tag = False
        else:
            known_tag = True
        if known_tag:
            return f"{architecture}.{config.tag}" if config is not None and config.tag else architecture
    nearest = difflib.get_close_matches(name, list_backbones(), n=3, cutoff=0.5) or list(PAPER_BACKBONES)[:3]
    raise ValueError(f"Unknown backbone {given!r}; did you mean {', '.join(nearest)}?")


def _hash_published_name(architecture: str) -> str:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(architecture)
    if config is None or not config.has_weights:
        raise ValueError(
            f"timm publishes no weights for {architecture}; "
            f"give --backbone-weights FILE, or {RANDOM_PREFIX}{architecture} for random ones."
        )
    return hash_bytes(b"timm", architecture.encode(), str(config.hf_hub_id or config.url).encode())


def _hash_weights(path: Path) -> str:
    status = path.stat()
    return _hash_unchanged_file(str(path.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash_unchanged_file(path: str, size: int, modified_ns: int) -> str:
    return hash_file(Path(path))


@lru_cache(maxsize=64)
def _measure_architecture(architecture: str, model_args: tuple[tuple[str, Any], ...]) -> _Shape:
    with torch.device("meta"):
        model: Any = create_timm_model(architecture, model_args)
    patch_height, patch_width = model.patch_embed.patch_size
    if patch_height != patch_width:
        raise ValueError(
            f"Backbone {architecture} has patches of {patch_width}x{patch_height} pixels; choose one with square ones."
        )
    mean, std = model.pretrained_cfg.get("mean", IMAGENET_MEAN), model.pretrained_cfg.get("std", IMAGENET_STD)
    return _Shape(
        patch_size=int(patch_height),
        embed_dim=int(model.embed_dim),
        num_blocks=len(model.blocks),
        num_prefix_tokens=int(model.num_prefix_tokens),
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
    )


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value
