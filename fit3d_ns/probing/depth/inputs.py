"""From labelled frames to what the depth backbones are shown: whole images or random crops.

Depth travels with the image: moved by nearest neighbour only, 0 wherever it is not known, padding included.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.probing.datasets.frames import DepthConvention, LabelledFrame, LabelledSet
from fit3d_ns.probing.frozen_features import FrozenBackbones
from fit3d_ns.probing.pictures import (
    Picture,
    PictureKey,
    compute_size,
    create_padded_picture,
    create_whole_picture,
    draw_window,
    sample_nearest,
)
from fit3d_ns.probing.samples import Inputs
from fit3d_ns.utils.selection import select_evenly

MAX_ROTATION = 2.5
"""Degrees, either way, for half of the training crops."""
DEPTHS_PER_TOKEN = 2
"""Depth values per token and axis that the loss reads where features are kept."""
EVALUATION, TRAINING = 0, 1
"""Parts of a frame: the whole image, or what the set trains on."""


@dataclass(frozen=True)
class DepthInputs(Inputs):
    """Makes pictures out of the frames of several sets of one convention.

    Images are resized to the short side, or keep their size for None; `crop_size` is (height, width) of random crops.
    """

    backbones: FrozenBackbones
    convention: DepthConvention
    short_side: int | None
    crop_size: tuple[int, int]

    def load_image(self, frame: LabelledFrame) -> UInt8[np.ndarray, "height width 3"]:
        """The photograph as the set's benchmark sees it, at its own size, which `load_depth` shares."""
        return _crop(frame.load_image().numpy(), self.convention, EVALUATION)

    def load_depth(self, frame: LabelledFrame) -> Float[Tensor, "height width"]:
        assert frame.load_depth is not None
        return torch.from_numpy(_crop(frame.load_depth().numpy(), self.convention, EVALUATION))

    def compute_size(self, frame: LabelledFrame) -> tuple[int, int]:
        """Height and width of a whole evaluation image."""
        return _compute_size(self.load_image(frame), self.short_side)

    def choose_key(self, frame: LabelledFrame, generator: np.random.Generator) -> PictureKey:
        part = EVALUATION if self.convention.train_crop is None else TRAINING
        return PictureKey(frame.key, bool(generator.integers(2)), part)

    def load(self, frame: LabelledFrame, key: PictureKey) -> Picture:
        """A whole image with the depth that the loss reads."""
        image, depth = self._load_pair(frame, key.part)
        if key.is_flipped:
            image, depth = image[:, ::-1], depth[:, ::-1]
        return create_whole_picture(image, depth, self.backbones.create_fit(*depth.shape), DEPTHS_PER_TOKEN, 0.0)

    def augment(self, frame: LabelledFrame, generator: np.random.Generator) -> Picture:
        """The published augmentation: training part, rotation, mirror, crop, colours; padded to the crop."""
        image, depth = self._load_pair(frame, TRAINING)
        if generator.random() < 0.5:
            image, depth = rotate(image, depth, float(generator.uniform(-MAX_ROTATION, MAX_ROTATION)))
        if generator.random() < 0.5:
            image, depth = image[:, ::-1], depth[:, ::-1]
        window = draw_window(depth.shape[0], depth.shape[1], self.crop_size, generator)
        image, depth = image[window.slices], depth[window.slices]
        image = shift_colours(np.ascontiguousarray(image), self.convention.brightness_range, generator)
        fit = self.backbones.create_fit(*self.crop_size)
        return create_padded_picture(image, depth, fit, self.backbones.description.mean, 0.0)

    def _load_pair(self, frame: LabelledFrame, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and depth of one size, as they are shown."""
        assert frame.load_depth is not None
        pair = frame.load_image().numpy(), frame.load_depth().numpy()
        image, depth = (_crop(picture, self.convention, part) for picture in pair)
        height, width = _compute_size(image, self.short_side)
        if (height, width) != image.shape[:2]:
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        return image, sample_nearest(torch.from_numpy(depth.copy()), (height, width)).numpy()


def choose_crop_size(labelled_set: LabelledSet, short_side: int | None) -> tuple[int, int]:
    """The published crop, 352x704 for KITTI and 416x544 elsewhere, cut down to the training images where they are
    smaller: padding would teach the head another kind of picture than it is tested on."""
    convention = labelled_set.depth
    published = (352, 704) if convention.bottom_crop else (416, 544)
    frames = select_evenly(labelled_set.frames, 5)
    images = (_crop(frame.load_image().numpy(), convention, TRAINING) for frame in frames)
    sizes = [_compute_size(image, short_side) for image in images]
    return min(published[0], *(size[0] for size in sizes)), min(published[1], *(size[1] for size in sizes))


def rotate(
    image: UInt8[np.ndarray, "height width 3"], depth: Float[np.ndarray, "height width"], degrees: float
) -> tuple[UInt8[np.ndarray, "height width 3"], Float[np.ndarray, "height width"]]:
    """Turns both about the middle; new corners are black and have no depth."""
    height, width = depth.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -degrees, 1.0)
    turned = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)
    # Depth must not be mixed over edges.
    return turned, cv2.warpAffine(depth, matrix, (width, height), flags=cv2.INTER_NEAREST)


def shift_colours(
    image: UInt8[np.ndarray, "height width 3"],
    brightness_range: tuple[float, float],
    generator: np.random.Generator,
    probability: float = 0.5,
    gamma_range: tuple[float, float] = (0.9, 1.1),
    colour_range: tuple[float, float] = (0.9, 1.1),
) -> UInt8[np.ndarray, "height width 3"]:
    """The depth evaluations' colour augmentation: gamma, brightness, and a factor for each channel."""
    if generator.random() >= probability:
        return image
    values = (image.astype(np.float32) / 255.0) ** generator.uniform(*gamma_range)
    factors = generator.uniform(*brightness_range) * generator.uniform(*colour_range, size=3)
    return (np.clip(values * factors, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _compute_size(image: np.ndarray, short_side: int | None) -> tuple[int, int]:
    height, width = image.shape[:2]
    return (height, width) if short_side is None else compute_size(height, width, short_side)


def _crop(picture: np.ndarray, convention: DepthConvention, part: int) -> np.ndarray:
    """KITTI's benchmark crop, at most as large as the picture; of that what the set trains on, if `part` says so."""
    if convention.bottom_crop is not None:
        height, width = picture.shape[:2]
        rows, columns = min(convention.bottom_crop[0], height), min(convention.bottom_crop[1], width)
        left = (width - columns) // 2
        picture = picture[height - rows :, left : left + columns]
    if part == TRAINING and convention.train_crop is not None:
        top, bottom, left, right = convention.train_crop
        picture = picture[top:bottom, left:right]
    return picture
