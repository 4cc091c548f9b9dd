"""`FrozenBackbones`, images in and features out; `Assembler`, which makes one map of original and fine-tuned features.

Symbols: a *part* is one backbone, original first; `maps` are [batch, parts, layers, h, w, embed], class tokens
[batch, parts, layers, embed]. The assemblies `original` and `finetuned` have one part, so does `duplicate`; the others
have two (Tables 6, 7 and 13).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.features import BackboneDescription, FeatureExtractor, create_extractor, describe_backbone
from fit3d_ns.features.backbones import Normalization
from fit3d_ns.features.sources import ADAPTER_NAME
from fit3d_ns.probing.pictures import PatchFit, PatchFitRule
from fit3d_ns.utils.progress import notice

Assembly = Literal["original", "finetuned", "concat", "duplicate", "add", "linear"]
"""`concat` is the paper's; `finetuned` is the fine-tuned backbone alone; `duplicate` is the control of Table 13, the
original next to itself; `add` and `linear` (a trained layer back to the original's size) are Table 7's."""
Part = Literal["original", "finetuned"]

ClassTokenSource = Literal["auto", "original", "finetuned", "none"]
"""Whose class token is put next to the patch tokens: `auto` takes the original's (the public code) where it runs."""


def list_parts(assembly: Assembly) -> tuple[Part, ...]:
    """The backbones that have to run."""
    if assembly == "finetuned":
        return ("finetuned",)
    return ("original",) if assembly in ("original", "duplicate") else ("original", "finetuned")


@dataclass(frozen=True)
class BackboneConfig:
    """Which features a probe reads."""

    assembly: Assembly = "original"
    """How original and fine-tuned features are joined."""
    backbone: str = "dinov2_small"
    """The original backbone: one of the paper's names, any timm id, or `toy_rooms_vit`, which needs no download."""
    backbone_weights: Path | None = None
    """File with the original's weights; timm downloads them if it is not given."""
    finetuned: Path | None = None
    """The fine-tuned backbone: a folder that fit3d-finetune wrote, or a weights file."""
    normalization: Normalization | None = None
    """Whose mean and deviation normalise images. By default `timm`, the backbone's own; `imagenet` with --paper."""
    patch_fit: PatchFitRule | None = None
    """How images meet the patch grid: `pad` by default, `pad-stretch` with --paper; multi-view measures resize."""


@dataclass(frozen=True)
class FrozenFeatures:
    """Patch tokens and class tokens of a batch of images; without class tokens their last axis has size 0."""

    maps: Float[Tensor, "batch parts layers h w embed"]
    class_tokens: Float[Tensor, "batch parts layers embed"]

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "FrozenFeatures":
        return FrozenFeatures(self.maps.to(device, dtype), self.class_tokens.to(device, dtype))


@dataclass(eq=False)
class FrozenBackbones:
    """The backbones that an assembly needs, made by `create_frozen_backbones`."""

    extractors: list[FeatureExtractor]
    layers: list[int]
    """Blocks that are read, counted from 0."""
    patch_fit: PatchFitRule

    @property
    def description(self) -> BackboneDescription:
        """Description of the first part; all parts agree in patch size and embedding."""
        return self.extractors[0].description

    @property
    def embed_dim(self) -> int:
        return self.description.embed_dim

    @property
    def has_class_token(self) -> bool:
        """False for backbones that have only patch tokens."""
        return self.description.num_prefix_tokens > 0

    def create_fit(self, height: int, width: int) -> PatchFit:
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
            # The first prefix token, or none: (b, p, e) -> (b, e) or (b, 0)
            class_tokens.append(torch.stack([layer.prefix_tokens[:, :1].flatten(1) for layer in tokens], dim=1))
        return FrozenFeatures(torch.stack(maps, dim=1).float(), torch.stack(class_tokens, dim=1).float())


def describe_backbones(config: BackboneConfig, *, norm: bool) -> dict[Part, BackboneDescription]:
    """The backbones that the assembly runs, without loading weights; ValueError if they do not fit together."""
    parts = list_parts(config.assembly)
    if "finetuned" in parts and config.finetuned is None:
        raise ValueError(f"Assembly {config.assembly} needs a fine-tuned backbone; give --finetuned FOLDER.")
    if "finetuned" not in parts and config.finetuned is not None:
        notice(f"Assembly {config.assembly} reads the original backbone only; --finetuned is not used.")
    described: dict[Part, BackboneDescription] = {}
    normalization = config.normalization or "timm"
    if "original" in parts:
        described["original"] = describe_backbone(config.backbone, config.backbone_weights, normalization, norm=norm)
    if "finetuned" in parts:
        name, weights = config.backbone, config.finetuned
        assert weights is not None
        if weights.is_dir():
            # An adapter follows the final norm, so its tokens are normed whatever the probe reads of the original.
            norm = norm or (weights / ADAPTER_NAME).is_file()
            name, weights = f"local-dir:{weights}", None
        elif not weights.is_file():
            raise ValueError(f"No such fine-tuned backbone: {weights}; give a fit3d-finetune folder or a weights file.")
        described["finetuned"] = describe_backbone(name, weights, normalization, norm=norm)
    if len(described) == 2:
        _check_pair(described["original"], described["finetuned"])
    return described


def create_frozen_backbones(
    config: BackboneConfig, *, norm: bool, num_layers: int = 1, device: torch.device | str = "cpu"
) -> FrozenBackbones:
    """Builds the backbones that the assembly runs, with or without the final `norm`, and loads their weights.

    `num_layers` is 1 for the last block, more for as many evenly spaced ones up to it.
    """
    described = describe_backbones(config, norm=norm)
    num_blocks = next(iter(described.values())).num_blocks
    if num_layers > num_blocks:
        raise ValueError(f"{num_layers} layers are asked for, the backbone has {num_blocks} blocks.")
    layers = [num_blocks * (index + 1) // num_layers - 1 for index in range(num_layers)]
    extractors = [create_extractor(description, device=device) for description in described.values()]
    return FrozenBackbones(extractors, layers, config.patch_fit or "pad")


class Assembler(nn.Module):
    """Makes one map, and one class token, out of the parts of a layer; only `linear` has something to learn."""

    def __init__(self, assembly: Assembly, embed_dim: int, class_token_source: ClassTokenSource = "auto") -> None:
        super().__init__()
        self.assembly, self.embed_dim = assembly, embed_dim
        self.parts = list_parts(assembly)
        chosen = self.parts[0] if class_token_source == "auto" else class_token_source
        if chosen != "none" and chosen not in self.parts:
            only = f"only {', '.join(self.parts)} runs"
            raise ValueError(f"The class token of the {chosen} backbone is asked for, but {only}.")
        self.class_token_part = None if chosen == "none" else self.parts.index(chosen)
        self.fusion = nn.Linear(2 * embed_dim, embed_dim) if assembly == "linear" else None

    @property
    def out_dim(self) -> int:
        """Channels of the assembled map."""
        return 2 * self.embed_dim if self.assembly in ("concat", "duplicate") else self.embed_dim

    @property
    def width(self) -> int:
        """Inputs of the first linear layer that is trained on the patch tokens."""
        return self.out_dim if self.fusion is None else 2 * self.embed_dim

    @property
    def class_dim(self) -> int:
        """Length of the class token that goes with the map; 0 where none is asked for."""
        return 0 if self.class_token_part is None else self.embed_dim

    def forward(self, features: FrozenFeatures, layer: int = -1) -> Float[Tensor, "batch channels h w"]:
        """The assembled map of one layer."""
        # (b, h, w, c) -> (b, c, h, w)
        return self.assemble(features.maps[:, :, layer]).permute(0, 3, 1, 2)

    def assemble(self, parts: Float[Tensor, "batch parts *grid embed"]) -> Float[Tensor, "batch *grid channels"]:
        """Assembles vectors of any grid, the empty one included."""
        if self.assembly in ("original", "finetuned"):
            return parts[:, 0]
        if self.assembly == "add":
            return parts[:, 0] + parts[:, 1]
        # The last part of `duplicate` is its first.
        joined = torch.cat([parts[:, 0], parts[:, -1]], dim=-1)
        return joined if self.fusion is None else self.fusion(joined)

    def select_class_token(self, features: FrozenFeatures, layer: int = -1) -> Float[Tensor, "batch class_dim"]:
        """The class token of one layer; [batch, 0] where none is asked for."""
        if self.class_token_part is None:
            return features.class_tokens[:, 0, layer, :0]
        return features.class_tokens[:, self.class_token_part, layer]


def _check_pair(original: BackboneDescription, finetuned: BackboneDescription) -> None:
    pair = (original, finetuned)
    names = [description.architecture.split(".")[0] for description in pair]
    shapes = [(description.patch_size, description.embed_dim, description.num_blocks) for description in pair]
    if names[0] != names[1] or shapes[0] != shapes[1]:
        raise ValueError(
            f"The fine-tuned backbone is a {names[1]}, the original a {names[0]}; "
            "fine-tuned features can only be assembled with those of the backbone they come from."
        )
    if (original.mean, original.std) != (finetuned.mean, finetuned.std):
        notice(f"Original and fine-tuned {names[0]} normalise images differently; each gets its own.")
