"""From labelled frames to what the depth backbones are shown: whole images or random crops.

Depth travels with the image: moved by nearest neighbour only, 0 wherever it is not known, padding included.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.probing import augmentation
from fit3d_ns.probing.datasets.frames import DepthConvention, LabelledFrame, LabelledSet
from fit3d_ns.probing.feature_memory import Picture
from fit3d_ns.probing.frozen_backbones import FrozenBackbones
from fit3d_ns.probing.patch_fit import sample_nearest
from fit3d_ns.probing.protocol import spread_over
from fit3d_ns.probing.segmentation.pictures import name_frame, to_image, to_tensor

MAX_ROTATION = 2.5
"""Degrees, either way, for half of the training crops."""
DEPTHS_PER_TOKEN = 2
"""Depth values per token and axis that the loss reads where features are kept."""


@dataclass(frozen=True)
class ImageKey:
    """Names one whole image; equal keys are equal pictures."""

    frame: Hashable
    """Names the frame."""
    is_flipped: bool
    """Mirrored left to right."""
    is_training: bool
    """Cut to the part that the set trains on."""


def choose_crop_size(labelled_set: LabelledSet, short_side: int | None) -> tuple[int, int]:
    """The published crop, 352x704 for KITTI and 416x544 elsewhere, cut down to the training images where they are
    smaller: padding would teach the head another kind of picture than it is tested on."""
    convention = labelled_set.depth
    published = (352, 704) if convention.bottom_crop else (416, 544)
    sizes = []
    for frame in spread_over(labelled_set.frames, 5):
        image = _crop_training(_crop_bottom(frame.load_image().numpy(), convention), convention)
        sizes.append(_compute_size(image, short_side))
    return min(published[0], *(size[0] for size in sizes)), min(published[1], *(size[1] for size in sizes))


@dataclass(frozen=True)
class DepthPictures:
    """Makes pictures out of the frames of several sets of one convention."""

    backbones: FrozenBackbones
    """Decide how pictures meet the patch grid."""
    convention: DepthConvention
    """Which part of an image is trained on, and seen at all."""
    short_side: int | None
    """Images are resized to it, pixels; None keeps their size."""
    crop_size: tuple[int, int]
    """Height and width of random crops."""

    def load_image(self, frame: LabelledFrame) -> UInt8[np.ndarray, "height width 3"]:
        """The photograph as the set's benchmark sees it, at its own size."""
        return _crop_bottom(frame.load_image().numpy(), self.convention)

    def load_depth(self, frame: LabelledFrame) -> Float[Tensor, "height width"]:
        """Its depth; `load_image`'s size."""
        assert frame.load_depth is not None
        return torch.from_numpy(_crop_bottom(frame.load_depth().numpy(), self.convention))

    def choose_key(self, frame: LabelledFrame, generator: np.random.Generator) -> ImageKey:
        """The whole image, mirrored or not, by chance."""
        # Where training images are cut, they are other pictures than those of evaluation.
        return ImageKey(name_frame(frame), bool(generator.integers(2)), self.convention.train_crop is not None)

    def list_keys(self, frame: LabelledFrame, is_flip_averaged: bool) -> list[Hashable]:
        """The pictures that an evaluation reads: the whole image and, to average, its mirror image."""
        flips = (False, True) if is_flip_averaged else (False,)
        return [ImageKey(name_frame(frame), flipped, False) for flipped in flips]

    def load_whole(self, frame: LabelledFrame, key: ImageKey) -> Picture:
        """A whole image with the depth that the loss reads."""
        image, depth = self.load_image(frame), self.load_depth(frame).numpy()
        if key.is_training:
            image, depth = _crop_training(image, self.convention), _crop_training(depth, self.convention)
        image = self._resize(image)
        depth = sample_nearest(torch.from_numpy(depth.copy()), (image.shape[0], image.shape[1])).numpy()
        if key.is_flipped:
            image, depth = image[:, ::-1], depth[:, ::-1]
        fit = self.backbones.create_fit(image.shape[0], image.shape[1])
        targets = fit.fit_targets(to_tensor(depth)[None], 0.0)[0]
        patch = self.backbones.description.patch_size
        grid = (targets.shape[0] // patch * DEPTHS_PER_TOKEN, targets.shape[1] // patch * DEPTHS_PER_TOKEN)
        return Picture(to_image(image), sample_nearest(targets, grid))

    def compute_size(self, frame: LabelledFrame) -> tuple[int, int]:
        """Height and width of a whole evaluation image."""
        height, width = self._resize(self.load_image(frame)).shape[:2]
        return height, width

    def augment(self, frame: LabelledFrame, generator: np.random.Generator) -> Picture:
        """The published augmentation: training part, rotation, mirror, crop, colours; padded to the crop."""
        image, depth = self.load_image(frame), self.load_depth(frame).numpy()
        image, depth = _crop_training(image, self.convention), _crop_training(depth, self.convention)
        image = self._resize(image)
        depth = sample_nearest(torch.from_numpy(depth.copy()), (image.shape[0], image.shape[1])).numpy()
        if generator.random() < 0.5:
            image, depth = augmentation.rotate(image, depth, float(generator.uniform(-MAX_ROTATION, MAX_ROTATION)))
        if generator.random() < 0.5:
            image, depth = image[:, ::-1], depth[:, ::-1]
        window = augmentation.draw_window(depth.shape[0], depth.shape[1], self.crop_size, generator)
        image, depth = image[window.slices], depth[window.slices]
        image = augmentation.shift_colours(np.ascontiguousarray(image), self.convention.brightness_range, generator)
        padded, targets = self._pad_to_crop(to_image(image), to_tensor(depth))
        fit = self.backbones.create_fit(*targets.shape)
        return Picture(padded, fit.fit_targets(targets[None], 0.0)[0])

    def _pad_to_crop(self, image: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        """Fills up at the right and bottom with the channel mean, which is zero after normalisation."""
        height, width = depth.shape
        full = torch.tensor(self.backbones.description.mean)[:, None, None].repeat(1, *self.crop_size)
        full[:, :height, :width] = image
        targets = torch.zeros(self.crop_size)
        targets[:height, :width] = depth
        return full, targets

    def _resize(self, image: np.ndarray) -> np.ndarray:
        height, width = _compute_size(image, self.short_side)
        if (height, width) == image.shape[:2]:
            return image
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _compute_size(image: np.ndarray, short_side: int | None) -> tuple[int, int]:
    height, width = image.shape[:2]
    if short_side is None:
        return height, width
    return augmentation.compute_size(height, width, float(short_side), float(max(height, width) * short_side))


def _crop_bottom(picture: np.ndarray, convention: DepthConvention) -> np.ndarray:
    """KITTI's benchmark crop: at the bottom, in the middle; pictures that are smaller stay whole along that axis."""
    if convention.bottom_crop is None:
        return picture
    height, width = picture.shape[:2]
    rows, columns = min(convention.bottom_crop[0], height), min(convention.bottom_crop[1], width)
    left = (width - columns) // 2
    return picture[height - rows :, left : left + columns]


def _crop_training(picture: np.ndarray, convention: DepthConvention) -> np.ndarray:
    if convention.train_crop is None:
        return picture
    top, bottom, left, right = convention.train_crop
    return picture[top:bottom, left:right]
