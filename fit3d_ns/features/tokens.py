"""`Tokens`, the output of a vision transformer, and `TokenModel`, the module that computes it.

Images are [B, 3, H, W] in [0, 1]. They are resized to the largest multiple of the patch size p that fits into them
(paper code, `forward_2d_model`), so the patch grid is (h, w) = (H // p, W // p); tokens are in its row-major order. The
resize keeps the image's borders in place: with pixel centres at +0.5, token (i, j) stands at x = (j + 0.5) W / w,
y = (i + 0.5) H / h of the image before the resize.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fit3d_ns.features.backbones import BackboneDescription

_UNUSED_MODULES = ("fc_norm", "attn_pool", "head", "head_dist")


@dataclass(frozen=True, eq=False)
class Tokens:
    """The output of a vision transformer for a batch of images."""

    patch_tokens: Float[Tensor, "batch patches embed"]
    """One token per patch, rows first: token `i * w + j` belongs to row i, column j."""
    prefix_tokens: Float[Tensor, "batch prefix embed"]
    """Class token first, then registers; `prefix` may be 0."""
    patch_grid: tuple[int, int]
    """Rows h and columns w; `patches` is h * w."""

    @property
    def maps(self) -> Float[Tensor, "batch h w embed"]:
        # (b, h*w, e) -> (b, h, w, e)
        return self.patch_tokens.unflatten(1, self.patch_grid)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Tokens":
        return Tokens(self.patch_tokens.to(device, dtype), self.prefix_tokens.to(device, dtype), self.patch_grid)


class TokenModel(nn.Module):
    """A vision transformer from images in [0, 1] to tokens, with gradients; stage II wraps and trains it.

    Parameters that no token passes through (classifiers' norms, attention pooling; the final norm if it is not applied)
    are frozen, because distributed training fails on parameters that the loss cannot reach. `model` is timm's own
    module, so its state dict is what timm loads; there is nothing else to save.
    """

    def __init__(self, model: nn.Module, description: BackboneDescription) -> None:
        super().__init__()
        self.model: Any = model
        self.description = description
        names = _UNUSED_MODULES if description.norm else (*_UNUSED_MODULES, "norm")
        for name in names:
            module = getattr(model, name, None)
            if isinstance(module, nn.Module):
                module.requires_grad_(False)

    def to_timm(self) -> nn.Module:
        """timm's module, its `pretrained_cfg` with the mean and deviation in use; ValueError where it is not all."""
        self.model.pretrained_cfg |= {"mean": self.description.mean, "std": self.description.std}
        return self.model  # type: ignore[no-any-return]

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Tokens:
        """Tokens of the last block, after the final norm if the description says so."""
        return self.forward_layers(images, [self.description.num_blocks - 1])[0]

    def forward_layers(self, images: Float[Tensor, "batch 3 height width"], layers: Sequence[int]) -> list[Tokens]:
        """Tokens of several blocks, counted from 0, in rising order; the norm is treated as in `forward`."""
        outputs = self.forward_unnormed(images, layers)
        return [self.apply_norm(tokens) for tokens in outputs] if self.description.norm else outputs

    def forward_unnormed(self, images: Float[Tensor, "batch 3 height width"], layers: Sequence[int]) -> list[Tokens]:
        """Tokens of several blocks before the final norm, whatever the description says."""
        description = self.description
        patch_grid = compute_patch_grid(images.shape[-2], images.shape[-1], description.patch_size)
        fitted = fit_to_patch_grid(images, description.patch_size)
        # (3,) -> (3, 1, 1)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (description.mean, description.std))
        has_prefix = description.num_prefix_tokens > 0
        outputs = self.model.forward_intermediates(
            # Resizing and normalising keep the images' precision; a half-precision backbone is fed in its own.
            ((fitted - mean) / std).to(self.model.patch_embed.proj.weight.dtype),
            indices=sorted(layers),
            # Eva fails when asked for prefix tokens it does not have.
            return_prefix_tokens=has_prefix,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if has_prefix:
            return [Tokens(patches, prefix, patch_grid) for patches, prefix in outputs]
        return [Tokens(patches, patches[:, :0], patch_grid) for patches in outputs]

    def apply_norm(self, tokens: Tokens) -> Tokens:
        """Applies the backbone's final norm to tokens that were made without it."""
        return Tokens(self.model.norm(tokens.patch_tokens), self.model.norm(tokens.prefix_tokens), tokens.patch_grid)


def compute_patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Number of patch rows and columns of an image; ValueError where it is smaller than one patch."""
    if height < patch_size or width < patch_size:
        problem = f"Image of {width}x{height} pixels is smaller than one patch of {patch_size}x{patch_size}"
        raise ValueError(f"{problem}; give a larger image or a backbone with smaller patches.")
    return height // patch_size, width // patch_size


def fit_to_patch_grid(
    images: Float[Tensor, "batch channels height width"], patch_size: int
) -> Float[Tensor, "batch channels fitted_height fitted_width"]:
    """Resizes to the floor multiple of the patch size; images that are one already are returned as they are.

    Four pixels are sampled, as in both of the paper's stages: shrinking by less than a patch leaves little to alias.
    """
    height, width = images.shape[-2:]
    rows, columns = compute_patch_grid(height, width, patch_size)
    size = (rows * patch_size, columns * patch_size)
    if size == (height, width):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
