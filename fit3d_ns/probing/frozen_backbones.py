"""`FrozenBackbones`: original and fine-tuned vision transformer side by side, frozen; images in, features out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features import BackboneDescription, FeatureExtractor, create_extractor, describe_backbone
from fit3d_ns.features.backbones import Normalization
from fit3d_ns.features.sources import ADAPTER_NAME
from fit3d_ns.probing.assembly import Assembly, FrozenFeatures, Part, list_parts
from fit3d_ns.probing.patch_fit import PatchFit, PatchFitRule
from fit3d_ns.utils.progress import notice


@dataclass(frozen=True)
class BackboneConfig:
    """Which features a probe reads."""

    assembly: Assembly = "original"
    """What is made of original and fine-tuned features."""
    backbone: str = "dinov2_small"
    """The original: one of the paper's names or any timm id."""
    backbone_weights: Path | None = None
    """File with the original's weights; timm's download by default."""
    finetuned: Path | None = None
    """The fine-tuned backbone: a folder that fit3d-finetune wrote, or a weights file for the original's architecture
    (FiT3D's and Splat-and-Distill's published ones)."""
    normalization: Normalization = "timm"
    """Whose mean and deviation normalise images; the public code takes ImageNet's for all."""
    patch_fit: PatchFitRule = "pad"
    """How images meet the patch grid."""


class FrozenBackbones:
    """The backbones that an assembly needs, made by `create_frozen_backbones`."""

    def __init__(self, extractors: Sequence[FeatureExtractor], layers: Sequence[int], patch_fit: PatchFitRule) -> None:
        self.extractors = list(extractors)
        self.layers = list(layers)
        self.patch_fit: PatchFitRule = patch_fit

    @property
    def description(self) -> BackboneDescription:
        """Of the first part; all parts agree in patch size and embedding."""
        return self.extractors[0].description

    @property
    def embed_dim(self) -> int:
        """Length of a token of one part."""
        return self.description.embed_dim

    @property
    def has_class_token(self) -> bool:
        """False for backbones without one."""
        return self.description.num_prefix_tokens > 0

    def create_fit(self, height: int, width: int) -> PatchFit:
        """How images of a size meet the patch grid."""
        return PatchFit(height, width, self.description.patch_size, self.patch_fit)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "batch 3 height width"]) -> FrozenFeatures:
        """Features of images in [0, 1], float32, on the backbones' device."""
        images = images.to(self.extractors[0].device)
        fit = self.create_fit(*images.shape[-2:])
        maps, class_tokens = [], []
        for extractor in self.extractors:
            fitted = fit.fit_images(images, extractor.description.mean)
            tokens = extractor.extract_layers(fitted, self.layers)
            maps.append(torch.stack([layer.maps for layer in tokens], dim=1))
            class_tokens.append(torch.stack([_class_token(layer.prefix_tokens) for layer in tokens], dim=1))
        return FrozenFeatures(torch.stack(maps, dim=1).float(), torch.stack(class_tokens, dim=1).float())


def describe_backbones(config: BackboneConfig, *, norm: bool) -> dict[Part, BackboneDescription]:
    """The backbones that the assembly runs, compared with each other, without loading weights.

    Raises:
        ValueError: An assembly without the fine-tuned backbone it needs, or backbones that do not fit together.
    """
    parts = list_parts(config.assembly)
    if "finetuned" in parts and config.finetuned is None:
        raise ValueError(f"Assembly {config.assembly} needs a fine-tuned backbone; give --finetuned FOLDER.")
    if "finetuned" not in parts and config.finetuned is not None:
        notice(f"Assembly {config.assembly} reads the original backbone only; --finetuned is not used.")
    described: dict[Part, BackboneDescription] = {}
    if "original" in parts:
        described["original"] = describe_backbone(
            config.backbone, config.backbone_weights, config.normalization, norm=norm
        )
    if "finetuned" in parts:
        assert config.finetuned is not None
        described["finetuned"] = _describe_finetuned(config, config.finetuned, norm)
    if len(described) == 2:
        _check_pair(described["original"], described["finetuned"])
    return described


def create_frozen_backbones(
    config: BackboneConfig,
    *,
    norm: bool,
    num_layers: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> FrozenBackbones:
    """Builds the backbones that the assembly runs and loads their weights.

    Args:
        config: Which ones.
        norm: Whether the final norm is applied (segmentation and classification) or not (depth).
        num_layers: 1 for the last block, more for as many evenly spaced ones up to it.
        device: Where they run.
        dtype: In which type they run; features come out in float32.

    Raises:
        ValueError: As `describe_backbones`; or weights that are missing or do not fit.
    """
    described = describe_backbones(config, norm=norm)
    num_blocks = next(iter(described.values())).num_blocks
    if num_layers > num_blocks:
        raise ValueError(f"{num_layers} layers are asked for, the backbone has {num_blocks} blocks.")
    layers = [num_blocks * (index + 1) // num_layers - 1 for index in range(num_layers)]
    extractors = [create_extractor(description, device=device, dtype=dtype) for description in described.values()]
    return FrozenBackbones(extractors, layers, config.patch_fit)


def describe_settings(described: dict[Part, BackboneDescription]) -> dict[str, Any]:
    """What a result record says about the backbones; no path of this machine."""
    return {part: description.to_metadata() for part, description in described.items()}


def _describe_finetuned(config: BackboneConfig, finetuned: Path, norm: bool) -> BackboneDescription:
    if finetuned.is_dir():
        # An adapter stands behind the final norm, so its tokens are normed whatever the probe reads of the original.
        norm = norm or (finetuned / ADAPTER_NAME).is_file()
        return describe_backbone(f"local-dir:{finetuned}", None, config.normalization, norm=norm)
    if not finetuned.is_file():
        raise ValueError(
            f"No such fine-tuned backbone: {finetuned}; give a folder of fit3d-finetune or a weights file."
        )
    return describe_backbone(config.backbone, finetuned, config.normalization, norm=norm)


def _check_pair(original: BackboneDescription, finetuned: BackboneDescription) -> None:
    names = [description.architecture.split(".")[0] for description in (original, finetuned)]
    shapes = [
        (description.patch_size, description.embed_dim, description.num_blocks) for description in (original, finetuned)
    ]
    if names[0] != names[1] or shapes[0] != shapes[1]:
        raise ValueError(
            f"The fine-tuned backbone is a {names[1]}, the original a {names[0]}; "
            "fine-tuned features can only be assembled with those of the backbone they come from."
        )
    if (original.mean, original.std) != (finetuned.mean, finetuned.std):
        notice(f"Original and fine-tuned {names[0]} normalise images differently; each gets its own.")


def _class_token(prefix_tokens: Float[Tensor, "batch prefix embed"]) -> Float[Tensor, "batch class_dim"]:
    if prefix_tokens.shape[1] == 0:
        return prefix_tokens.new_zeros(prefix_tokens.shape[0], 0)
    return prefix_tokens[:, 0]
