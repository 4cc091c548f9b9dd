"""How images of any size meet the patch grid, and how maps of tokens come back to pixels.

- `pad`: the image is put into the middle of the next larger multiple of the patch size, surrounded by the channel mean
  (zeros after normalisation), and the border is cut off the prediction again.
- `pad-stretch`: the same, but the prediction of the padded image is stretched over the image, border included: what the
  published evaluation does. Off by up to half a patch at the edges.
- `resize`: the image is resized to the next smaller multiple, as stages I and II do.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

PatchFitRule = Literal["pad", "pad-stretch", "resize"]


@dataclass(frozen=True)
class PatchFit:
    """The fit of images of one size."""

    height: int
    """Of the images, pixels."""
    width: int
    """Of the images, pixels."""
    patch_size: int
    """Side of a patch, pixels."""
    rule: PatchFitRule = "pad"
    """See the module."""

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Pixels added at the left, right, top and bottom; the odd one goes to the right and bottom."""
        if self.rule == "resize":
            return (0, 0, 0, 0)
        extra_width, extra_height = -self.width % self.patch_size, -self.height % self.patch_size
        left, top = extra_width // 2, extra_height // 2
        return (left, extra_width - left, top, extra_height - top)

    def fit_images(
        self, images: Float[Tensor, "batch 3 height width"], mean: tuple[float, float, float]
    ) -> Float[Tensor, "batch 3 fitted_height fitted_width"]:
        """Pads with the mean; `resize` leaves images as they are, because the extractor resizes them itself."""
        if not any(self.padding):
            return images
        center = images.new_tensor(mean)[:, None, None]
        return F.pad(images - center, self.padding) + center

    def fit_targets(
        self, targets: Shaped[Tensor, "batch height width"], fill: int | float
    ) -> Shaped[Tensor, "batch fitted_height fitted_width"]:
        """Per-pixel targets as the token map sees them; `fill` marks the border that does not count."""
        if self.rule != "pad" or not any(self.padding):
            return targets
        return F.pad(targets, self.padding, value=fill)

    def restore(self, maps: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels height width"]:
        """Predictions on the token grid, or a multiple of it, to the images' pixels, bilinearly."""
        left, right, top, bottom = self.padding if self.rule == "pad" else (0, 0, 0, 0)
        size = (self.height + top + bottom, self.width + left + right)
        restored = resize_map(maps, size)
        return restored[:, :, top : top + self.height, left : left + self.width]


def resize_map(
    maps: Float[Tensor, "batch channels h w"], size: tuple[int, int]
) -> Float[Tensor, "batch channels height width"]:
    """Bilinear resize to (height, width), pixel centres at +0.5 (align_corners False), no antialias."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def sample_nearest(
    targets: Shaped[Tensor, "*batch height width"], size: tuple[int, int]
) -> Shaped[Tensor, "*batch new_height new_width"]:
    """The pixel at the centre of each cell of a grid of (rows, columns) over the targets."""
    height, width = targets.shape[-2:]
    rows = ((torch.arange(size[0], device=targets.device) + 0.5) * height / size[0]).long()
    columns = ((torch.arange(size[1], device=targets.device) + 0.5) * width / size[1]).long()
    return targets[..., rows[:, None], columns]
