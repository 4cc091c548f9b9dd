"""Stand-ins for backbones: features that are known in advance."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.probing.frozen_features import FrozenBackbones, FrozenFeatures
from fit3d_ns.probing.pictures import PatchFitRule


@dataclass(frozen=True)
class FakeDescription:
    patch_size: int = 4
    embed_dim: int = 3
    mean: tuple[float, float, float] = (0.25, 0.5, 0.75)
    num_prefix_tokens: int = 1


class MeanColourBackbones(FrozenBackbones):
    """The token of a patch is its mean colour: what the image says at a place can be read off the features there."""

    def __init__(self, patch_fit: PatchFitRule = "pad") -> None:
        super().__init__([], [0], patch_fit)
        self.extractors = [None]  # type: ignore[list-item]
        self.num_images = 0

    @property
    def description(self) -> Any:
        return FakeDescription()

    def __call__(self, images: Tensor) -> FrozenFeatures:
        self.num_images += len(images)
        fitted = self.create_fit(*images.shape[-2:]).fit_images(images, self.description.mean)
        patch = self.description.patch_size
        if self.patch_fit == "resize":
            size = (images.shape[-2] // patch * patch, images.shape[-1] // patch * patch)
            fitted = torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        # (b, 3, h, w) -> (b, h, w, 3)
        tokens = torch.nn.functional.avg_pool2d(fitted, patch).permute(0, 2, 3, 1)
        return FrozenFeatures(tokens[:, None, None], fitted.mean(dim=(2, 3))[:, None, None])


def create_features(seed: int, batch: int = 2, parts: int = 1, layers: int = 1, h: int = 3, w: int = 4, embed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return FrozenFeatures(
        torch.randn(batch, parts, layers, h, w, embed, generator=generator),
        torch.randn(batch, parts, layers, embed, generator=generator),
    )
