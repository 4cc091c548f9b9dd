"""From labelled frames to what the segmentation backbones are shown: windows of a resized image, fixed or random.

Labels travel with the image: resized by nearest neighbour, and `IGNORE_INDEX` where the image is padded.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.probing.datasets.frames import IGNORE_INDEX, LabelledFrame, LabelledSet
from fit3d_ns.probing.frozen_features import FrozenBackbones
from fit3d_ns.probing.pictures import (
    Picture,
    PictureKey,
    Window,
    compute_size,
    create_padded_picture,
    create_whole_picture,
    draw_window,
)
from fit3d_ns.probing.samples import Inputs
from fit3d_ns.utils.selection import select_evenly

PUBLISHED_SHORT_SIDE = 512
LONG_SIDE_RATIO = 4.0
"""Images are at most this many times longer than the short side asked for (2048 to 512)."""
SCALE_RANGE = (0.5, 2.0)
"""Random scale of training images."""
LABELS_PER_TOKEN = 4
"""Labels per token and axis that the loss reads where features are kept."""


@dataclass
class SegmentationInputs(Inputs):
    """Cuts pictures out of the frames of several sets; the `part` of a key is the number of a window.

    Images are resized to the short side; windows and crops have `crop_side`, and windows lie `stride` pixels apart.
    """

    backbones: FrozenBackbones
    short_side: int
    crop_side: int
    stride: int
    max_class_share: float = 0.75
    _windows: dict[Hashable, list[Window]] = field(default_factory=dict, repr=False)

    def list_keys(self, frame: LabelledFrame) -> list[PictureKey]:
        """The windows of a frame that slide inference reads."""
        return [PictureKey(frame.key, part=number) for number in range(len(self.list_windows(frame)))]

    def list_windows(self, frame: LabelledFrame) -> list[Window]:
        if frame.key not in self._windows:
            size = _compute_size(frame.load_image().numpy(), self.short_side)
            self._windows[frame.key] = list_windows(*size, self.crop_side, self.stride)
        return self._windows[frame.key]

    def choose_key(self, frame: LabelledFrame, generator: np.random.Generator) -> PictureKey:
        number = int(generator.integers(len(self.list_windows(frame))))
        return PictureKey(frame.key, bool(generator.integers(2)), number)

    def load(self, frame: LabelledFrame, key: PictureKey) -> Picture:
        """A window with the labels that the loss reads."""
        assert frame.load_labels is not None
        window = self.list_windows(frame)[key.part]
        image = _resize(frame.load_image().numpy(), self.short_side, cv2.INTER_LINEAR)[window.slices]
        labels = _resize(frame.load_labels().numpy(), self.short_side, cv2.INTER_NEAREST_EXACT)[window.slices]
        if key.is_flipped:
            image, labels = image[:, ::-1], labels[:, ::-1]
        fit = self.backbones.create_fit(window.height, window.width)
        return create_whole_picture(image, labels, fit, LABELS_PER_TOKEN, IGNORE_INDEX)

    def augment(self, frame: LabelledFrame, generator: np.random.Generator) -> Picture:
        """The published augmentation: scale, crop without a dominating class, mirror, colours; padded to the crop."""
        assert frame.load_labels is not None
        image, labels = frame.load_image().numpy(), frame.load_labels().numpy()
        short_side = self.short_side * float(generator.uniform(*SCALE_RANGE))
        image = _resize(image, short_side, cv2.INTER_LINEAR)
        labels = _resize(labels, short_side, cv2.INTER_NEAREST_EXACT)
        window = draw_varied_window(labels, self.crop_side, self.max_class_share, generator)
        image, labels = image[window.slices], labels[window.slices]
        if generator.integers(2):
            image, labels = image[:, ::-1], labels[:, ::-1]
        image = distort_colours(np.ascontiguousarray(image), generator)
        fit = self.backbones.create_fit(self.crop_side, self.crop_side)
        return create_padded_picture(image, labels, fit, self.backbones.description.mean, IGNORE_INDEX)


def choose_short_side(labelled_set: LabelledSet, patch_size: int) -> int:
    """512 as published, or twice the images' own shorter side where that is smaller, in whole patches."""
    sides = [min(frame.load_image().shape[:2]) for frame in select_evenly(labelled_set.frames, 5)]
    side = 2 * sorted(sides)[len(sides) // 2]
    return PUBLISHED_SHORT_SIDE if side >= PUBLISHED_SHORT_SIDE else max(side // patch_size, 1) * patch_size


def list_windows(height: int, width: int, side: int, stride: int) -> list[Window]:
    """Windows of `side` every `stride` pixels, row by row; the last ones are moved inwards to end at the border.

    mmsegmentation's slide inference. Windows are cut down to the image where that is smaller; the stride is at most the
    side, so that every pixel is covered.
    """
    if not 0 < stride <= side:
        raise ValueError(f"Stride {stride} must be positive and at most the window's side {side}.")
    rows, columns = min(side, height), min(side, width)
    tops = [min(top, height - rows) for top in range(0, height - rows + stride, stride)]
    lefts = [min(left, width - columns) for left in range(0, width - columns + stride, stride)]
    return [Window(top, left, rows, columns) for top in tops for left in lefts]


def average_windows(
    maps: Sequence[Float[Tensor, "channels window_height window_width"]],
    windows: Sequence[Window],
    height: int,
    width: int,
) -> Float[Tensor, "channels height width"]:
    """The mean, at every pixel, of the maps of all windows over it."""
    total = maps[0].new_zeros(maps[0].shape[0], height, width)
    count = maps[0].new_zeros(height, width)
    for window_map, window in zip(maps, windows, strict=True):
        rows, columns = window.slices
        total[:, rows, columns] += window_map
        count[rows, columns] += 1
    return total / count


def draw_varied_window(
    labels: UInt8[np.ndarray, "height width"],
    side: int,
    max_share: float,
    generator: np.random.Generator,
    num_tries: int = 10,
) -> Window:
    """A random window in which no class has `max_share` of the labelled pixels or more, if a few tries find one.

    mmsegmentation's `RandomCrop` with `cat_max_ratio`: windows of a single class are drawn again, too.
    """
    for _ in range(num_tries + 1):
        window = draw_window(labels.shape[0], labels.shape[1], (side, side), generator)
        counts = np.bincount(labels[window.slices].reshape(-1), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        if np.count_nonzero(counts) > 1 and counts.max() < max_share * counts.sum():
            break
    return window


def distort_colours(
    image: UInt8[np.ndarray, "height width 3"], generator: np.random.Generator
) -> UInt8[np.ndarray, "height width 3"]:
    """mmsegmentation's `PhotoMetricDistortion`: each with probability one half, brightness +-32, contrast 0.5 to 1.5
    (before or after the rest), saturation 0.5 to 1.5, hue +-18 of 180."""
    image = image.copy()
    if generator.integers(2):
        image = _scale(image, 1.0, generator.uniform(-32.0, 32.0))
    contrast_first = bool(generator.integers(2))
    if contrast_first and generator.integers(2):
        image = _scale(image, generator.uniform(0.5, 1.5), 0.0)
    if generator.integers(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _scale(hsv[..., 1], generator.uniform(0.5, 1.5), 0.0)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if generator.integers(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        # OpenCV's 8-bit hue goes from 0 to 179.
        hsv[..., 0] = ((hsv[..., 0].astype(np.int64) + int(generator.integers(-18, 18))) % 180).astype(np.uint8)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first and generator.integers(2):
        image = _scale(image, generator.uniform(0.5, 1.5), 0.0)
    return image


def _scale(values: np.ndarray, factor: float, offset: float) -> np.ndarray:
    return np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


def _compute_size(picture: np.ndarray, short_side: int | float) -> tuple[int, int]:
    return compute_size(picture.shape[0], picture.shape[1], float(short_side), short_side * LONG_SIDE_RATIO)


def _resize(picture: np.ndarray, short_side: int | float, interpolation: int) -> np.ndarray:
    """To the largest size that fits into the short side and four times as much."""
    height, width = _compute_size(picture, short_side)
    if (height, width) == picture.shape[:2]:
        return picture
    return cv2.resize(picture, (width, height), interpolation=interpolation)
