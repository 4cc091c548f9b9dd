"""From labelled frames to what the segmentation backbones are shown: windows of a resized image, fixed or random.

Labels travel with the image: resized by nearest neighbour, padded with `IGNORE_INDEX` where the image is padded.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fit3d_ns.probing import augmentation
from fit3d_ns.probing.datasets.frames import IGNORE_INDEX, LabelledFrame, LabelledSet
from fit3d_ns.probing.feature_memory import Picture
from fit3d_ns.probing.frozen_backbones import FrozenBackbones
from fit3d_ns.probing.patch_fit import sample_nearest
from fit3d_ns.probing.protocol import spread_over
from fit3d_ns.probing.segmentation.slide_windows import Window, list_windows

PUBLISHED_SHORT_SIDE = 512
LONG_SIDE_RATIO = 4.0
"""Images are at most this many times longer than the short side asked for (2048 to 512)."""
SCALE_RANGE = (0.5, 2.0)
"""Random scale of training images."""
LABELS_PER_TOKEN = 4
"""Labels per token and axis that the loss reads where features are kept."""


@dataclass(frozen=True)
class WindowKey:
    """Names one window of one frame; equal keys are equal pictures."""

    frame: Hashable
    """Names the frame."""
    number: int
    """Which window."""
    is_flipped: bool
    """Mirrored left to right."""


@dataclass
class SegmentationPictures:
    """Cuts pictures out of the frames of several sets."""

    backbones: FrozenBackbones
    """Decide how pictures meet the patch grid."""
    short_side: int
    """Images are resized to it, pixels."""
    crop_side: int
    """Side of windows and crops."""
    stride: int
    """Between windows."""
    max_class_share: float = 0.75
    """See `augmentation.draw_varied_window`."""
    _windows: dict[Hashable, list[Window]] = field(default_factory=dict, repr=False)

    def list_keys(self, frame: LabelledFrame) -> list[Hashable]:
        """The windows of a frame that slide inference reads."""
        return [WindowKey(name_frame(frame), number, False) for number in range(len(self.list_windows(frame)))]

    def list_windows(self, frame: LabelledFrame) -> list[Window]:
        """The windows of a frame's resized image."""
        name = name_frame(frame)
        if name not in self._windows:
            height, width = self._load_image(frame).shape[:2]
            self._windows[name] = list_windows(height, width, self.crop_side, self.stride)
        return self._windows[name]

    def choose_key(self, frame: LabelledFrame, generator: np.random.Generator) -> WindowKey:
        """A window of a frame, mirrored or not, by chance."""
        number = int(generator.integers(len(self.list_windows(frame))))
        return WindowKey(name_frame(frame), number, bool(generator.integers(2)))

    def load_window(self, frame: LabelledFrame, key: WindowKey) -> Picture:
        """A window with the labels that the loss reads; without labels for frames that have none."""
        window = self.list_windows(frame)[key.number]
        image = self._load_image(frame)[window.slices]
        labels: np.ndarray = np.full(image.shape[:2], IGNORE_INDEX, dtype=np.uint8)
        if frame.load_labels is not None:
            full = frame.load_labels().numpy()
            height, width = self._compute_size(full)
            labels = cv2.resize(full, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)[window.slices]
        if key.is_flipped:
            image, labels = image[:, ::-1], labels[:, ::-1]
        fit = self.backbones.create_fit(window.height, window.width)
        targets = fit.fit_targets(to_tensor(labels)[None], IGNORE_INDEX)[0]
        patch = self.backbones.description.patch_size
        grid = (targets.shape[0] // patch * LABELS_PER_TOKEN, targets.shape[1] // patch * LABELS_PER_TOKEN)
        return Picture(to_image(image), sample_nearest(targets, grid))

    def augment(self, frame: LabelledFrame, generator: np.random.Generator) -> Picture:
        """The published augmentation: scale, crop without a dominating class, mirror, colours; padded to the crop."""
        assert frame.load_labels is not None
        image, labels = frame.load_image().numpy(), frame.load_labels().numpy()
        scale = float(generator.uniform(*SCALE_RANGE))
        short = self.short_side * scale
        image, labels = augmentation.resize_keeping_ratio(image, labels, short, short * LONG_SIDE_RATIO)
        size = (self.crop_side, self.crop_side)
        window = augmentation.draw_varied_window(labels, size, self.max_class_share, generator)
        image, labels = image[window.slices], labels[window.slices]
        if generator.integers(2):
            image, labels = image[:, ::-1], labels[:, ::-1]
        image = augmentation.distort_colours(np.ascontiguousarray(image), generator)
        padded, targets = self._pad_to_crop(to_image(image), to_tensor(labels))
        fit = self.backbones.create_fit(*targets.shape)
        return Picture(padded, fit.fit_targets(targets[None], IGNORE_INDEX)[0])

    def _pad_to_crop(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Fills up at the right and bottom with the channel mean, which is zero after normalisation."""
        height, width = labels.shape
        full = torch.tensor(self.backbones.description.mean)[:, None, None].repeat(1, self.crop_side, self.crop_side)
        full[:, :height, :width] = image
        targets = torch.full((self.crop_side, self.crop_side), IGNORE_INDEX, dtype=torch.uint8)
        targets[:height, :width] = labels
        return full, targets

    def _load_image(self, frame: LabelledFrame) -> np.ndarray:
        image = frame.load_image().numpy()
        height, width = self._compute_size(image)
        if (height, width) == image.shape[:2]:
            return image
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)

    def _compute_size(self, picture: np.ndarray) -> tuple[int, int]:
        short = float(self.short_side)
        return augmentation.compute_size(picture.shape[0], picture.shape[1], short, short * LONG_SIDE_RATIO)


def choose_short_side(labelled_set: LabelledSet, patch_size: int) -> int:
    """512 as published, or twice the images' own shorter side where that is smaller, in whole patches."""
    sides = [min(frame.load_image().shape[:2]) for frame in spread_over(labelled_set.frames, 5)]
    side = 2 * sorted(sides)[len(sides) // 2]
    return PUBLISHED_SHORT_SIDE if side >= PUBLISHED_SHORT_SIDE else max(side // patch_size, 1) * patch_size


def name_frame(frame: LabelledFrame) -> Hashable:
    """Names a frame across sets."""
    return (frame.files, frame.name)


def to_image(picture: UInt8[np.ndarray, "height width 3"]) -> Tensor:
    """An 8-bit picture as [3, height, width] in [0, 1]."""
    # (h, w, 3) -> (3, h, w)
    return to_tensor(picture).permute(2, 0, 1).float() / 255


def to_tensor(array: np.ndarray) -> Tensor:
    """A tensor of its own memory; mirrored arrays have negative strides, which torch refuses."""
    return torch.from_numpy(np.ascontiguousarray(array))
