"""Pictures as the backbones are shown them: windows, sizes, and how an image meets the patch grid.

Photographs are uint8 arrays [height, width, 3] in RGB until they become a `Picture`. An image whose sides are not
multiples of the patch size meets the grid by one of three rules:

- `pad`: the image is put into the middle of the next larger multiple of the patch size, surrounded by the channel mean
  (zeros after normalisation), and the border is cut off the prediction again.
- `pad-stretch`: the same, but the prediction of the padded image is stretched over the image, border included: what the
  published evaluation does. Off by up to half a patch at the edges.
- `resize`: the image is resized to the next smaller multiple, as stages I and II do.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

PatchFitRule = Literal["pad", "pad-stretch", "resize"]


@dataclass(frozen=True)
class Picture:
    """What is passed through the backbones, in [0, 1], and the labels or depth that the head is to predict."""

    image: Float[Tensor, "3 height width"]
    target: Shaped[Tensor, "*size"]


@dataclass(frozen=True)
class PictureKey:
    """Names a fixed picture of a frame (`LabelledFrame.key`); the `part` is counted by the task."""

    frame: Hashable
    is_flipped: bool = False
    part: int = 0


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels, from its first row and column on."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, for indexing."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True)
class PatchFit:
    """How images of one size, in pixels, meet the patch grid; the module describes the rules."""

    height: int
    width: int
    patch_size: int
    rule: PatchFitRule = "pad"

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
        self, targets: Shaped[Tensor, "height width"], fill: int | float
    ) -> Shaped[Tensor, "fitted_height fitted_width"]:
        """Per-pixel targets as the token map sees them; `fill` marks the border that does not count."""
        if self.rule != "pad" or not any(self.padding):
            return targets
        return F.pad(targets, self.padding, value=fill)

    def restore(self, maps: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels height width"]:
        """Predictions on the token grid, or a multiple of it, to the images' pixels, bilinearly."""
        left, right, top, bottom = self.padding if self.rule == "pad" else (0, 0, 0, 0)
        restored = resize_map(maps, (self.height + top + bottom, self.width + left + right))
        return restored[:, :, top : top + self.height, left : left + self.width]


def compute_size(
    height: int, width: int, short_side: float | int | None, long_side: float | int = math.inf
) -> tuple[int, int]:
    """The largest (height, width) of the same ratio that fits into both sides, rounded; the same for None."""
    if short_side is None:
        return height, width
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def draw_window(height: int, width: int, size: tuple[int, int], generator: np.random.Generator) -> Window:
    """A random window of (rows, columns), cut down to the picture where that is smaller."""
    rows, columns = min(size[0], height), min(size[1], width)
    top = int(generator.integers(height - rows + 1))
    left = int(generator.integers(width - columns + 1))
    return Window(top, left, rows, columns)


def to_image(picture: np.ndarray) -> Float[Tensor, "3 height width"]:
    """An 8-bit picture [height, width, 3] as a tensor in [0, 1]."""
    # (h, w, 3) -> (3, h, w)
    return to_tensor(picture).permute(2, 0, 1).float() / 255


def to_tensor(array: np.ndarray) -> Tensor:
    """A tensor of its own memory; mirrored arrays have negative strides, which torch refuses."""
    return torch.from_numpy(np.ascontiguousarray(array))


def resize_map(
    maps: Float[Tensor, "batch channels h w"], size: tuple[int, int]
) -> Float[Tensor, "batch channels height width"]:
    """Bilinear resize to (height, width), pixel centres at +0.5 (align_corners False), no antialias."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def sample_nearest(
    targets: Shaped[Tensor, "height width"], size: tuple[int, int]
) -> Shaped[Tensor, "new_height new_width"]:
    """The pixel at the centre of each cell of a grid of (rows, columns) over the targets."""
    height, width = targets.shape
    rows = ((torch.arange(size[0]) + 0.5) * height / size[0]).long()
    columns = ((torch.arange(size[1]) + 0.5) * width / size[1]).long()
    return targets[rows[:, None], columns]
