"""What can be known of a vision transformer without loading it, and how timm builds it; names are in `sources.py`."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fit3d_ns.features.preprocessing import IMAGENET_MEAN, IMAGENET_STD, ResizeRule
from fit3d_ns.features.sources import find_backbone_folder, resolve_source
from fit3d_ns.utils.files import hash_bytes

Normalization = Literal["timm", "imagenet"]
"""`timm`: each model's own mean and deviation; `imagenet`: ImageNet's for all, as the paper's code does."""


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
        name = Path(self.backbone).name if find_backbone_folder(self.backbone) is not None else self.backbone
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
        backbone: A name as `sources.py` lists them.
        weights: A file with weights (`weights.py` says which kinds); None: timm's download, or the folder's own.
        normalization: Whose mean and deviation normalise the images.
        norm: Whether the final norm is applied to the tokens.
        resize_rule: How images are resized to the patch grid.

    Raises:
        ValueError: Unknown name (nearest ones are given), missing file, no vision transformer, or no weights to be had.
    """
    source = resolve_source(backbone, Path(weights) if weights is not None else None)
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
class _Shape:
    patch_size: int
    embed_dim: int
    num_blocks: int
    num_prefix_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


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
