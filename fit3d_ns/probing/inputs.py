"""From labelled frames to what backbones are shown: windows of an image for segmentation, whole images for depth.

Targets travel with the image. Labels are resized by nearest neighbour, and `IGNORE_INDEX` where the image is padded;
depth is moved by nearest neighbour only, 0 wherever it is not known, padding included.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.probing import pictures
from fit3d_ns.probing.datasets.frames import IGNORE_INDEX, DepthConvention, LabelledFrame, LabelledSet
from fit3d_ns.probing.frozen_features import FrozenBackbones
from fit3d_ns.probing.pictures import Picture, PictureKey, Window, compute_size
from fit3d_ns.probing.samples import Inputs
from fit3d_ns.utils.selection import select_evenly

Photo = UInt8[np.ndarray, "height width 3"]
DepthMap = Float[np.ndarray, "height width"]
PUBLISHED_SHORT_SIDE = 512
LONG_SIDE_RATIO = 4.0
"""Images are at most this many times longer than the short side asked for (2048 to 512)."""
SCALE_RANGE = (0.5, 2.0)
"""Random scale of training images."""
LABELS_PER_TOKEN = 4
"""Labels per token and axis that the loss reads where features are kept."""
MAX_ROTATION = 2.5
"""Degrees, either way, for half of the training crops."""
DEPTHS_PER_TOKEN = 2
"""Depth values per token and axis that the loss reads where features are kept."""
EVALUATION, TRAINING = 0, 1
"""Parts of a frame: the whole image, or what the set trains on."""


class MapInputs(Inputs):
    """Pictures with a target for each pixel, which both tasks make in the same way of an image and its targets."""

    backbones: FrozenBackbones
    targets_per_token: int

    def create_whole_picture(self, image: np.ndarray, target: np.ndarray, is_flipped: bool) -> Picture:
        """A picture whose features are kept, with the few targets per token and axis that the loss reads."""
        if is_flipped:
            image, target = image[:, ::-1], target[:, ::-1]
        fit = self.backbones.create_fit(*target.shape)
        fitted = fit.fit_targets(pictures.to_tensor(target), self.fill)
        rows, columns = (side // fit.patch_size * self.targets_per_token for side in fitted.shape)
        return Picture(pictures.to_image(image), pictures.sample_nearest(fitted, (rows, columns)))

    def create_padded_picture(self, image: np.ndarray, target: np.ndarray, size: tuple[int, int]) -> Picture:
        """A crop, filled up right and below to a size by the channel mean, and targets that do not count."""
        (height, width), fit = target.shape, self.backbones.create_fit(*size)
        padded = torch.tensor(self.backbones.description.mean)[:, None, None].repeat(1, *size)
        padded[:, :height, :width] = pictures.to_image(image)
        targets = F.pad(pictures.to_tensor(target), (0, size[1] - width, 0, size[0] - height), value=self.fill)
        return Picture(padded, fit.fit_targets(targets, self.fill))


@dataclass
class SegmentationInputs(MapInputs):
    """Cuts pictures out of the frames of several sets; the `part` of a key is the number of a window.

    Images are resized to the short side; windows and crops have `crop_side`, and windows lie `stride` pixels apart.
    """

    backbones: FrozenBackbones
    short_side: int
    crop_side: int
    stride: int
    max_class_share: float = 0.75
    targets_per_token: int = LABELS_PER_TOKEN
    fill = IGNORE_INDEX
    _windows: dict[Hashable, list[Window]] = field(default_factory=dict, repr=False)

    def list_keys(self, frame: LabelledFrame) -> list[PictureKey]:
        """The windows of a frame that slide inference reads."""
        return [PictureKey(frame.key, part=number) for number in range(len(self.list_windows(frame)))]

    def list_windows(self, frame: LabelledFrame) -> list[Window]:
        if frame.key not in self._windows:
            height, width, _ = frame.load_image().shape
            size = compute_size(height, width, self.short_side, LONG_SIDE_RATIO * self.short_side)
            self._windows[frame.key] = list_windows(*size, self.crop_side, self.stride)
        return self._windows[frame.key]

    def choose_key(self, frame: LabelledFrame, generator: np.random.Generator) -> PictureKey:
        number = int(generator.integers(len(self.list_windows(frame))))
        return PictureKey(frame.key, bool(generator.integers(2)), number)

    def load(self, frame: LabelledFrame, key: PictureKey) -> Picture:
        window = self.list_windows(frame)[key.part]
        pair = self._load_pair(frame, float(self.short_side), LONG_SIDE_RATIO * self.short_side)
        image, labels = (picture[window.slices] for picture in pair)
        return self.create_whole_picture(image, labels, key.is_flipped)

    def augment(self, frame: LabelledFrame, generator: np.random.Generator) -> Picture:
        """The published augmentation: scale, crop without a dominating class, mirror, colours; padded to the crop."""
        # mmcv cuts the scaled sides off to whole pixels before it fits the picture into them.
        ratio = float(generator.uniform(*SCALE_RANGE))
        sides = float(int(self.short_side * ratio)), float(int(LONG_SIDE_RATIO * self.short_side * ratio))
        image, labels = self._load_pair(frame, *sides, nearest=cv2.INTER_NEAREST)
        window = draw_varied_window(labels, self.crop_side, self.max_class_share, generator)
        image, labels = image[window.slices], labels[window.slices]
        if generator.integers(2):
            image, labels = image[:, ::-1], labels[:, ::-1]
        image = distort_colours(np.ascontiguousarray(image), generator)
        return self.create_padded_picture(image, labels, (self.crop_side, self.crop_side))

    def _load_pair(
        self, frame: LabelledFrame, short_side: float, long_side: float, nearest: int = cv2.INTER_NEAREST_EXACT
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image and labels, each resized by its own size; labels by the pixel at a centre, or as mmcv takes it."""
        assert frame.load_labels is not None
        image, labels = frame.load_image().numpy(), frame.load_labels().numpy()
        sizes = [compute_size(picture.shape[0], picture.shape[1], short_side, long_side) for picture in (image, labels)]
        return cv2.resize(image, sizes[0][::-1]), cv2.resize(labels, sizes[1][::-1], interpolation=nearest)


def choose_short_side(labelled_set: LabelledSet, patch_size: int) -> int:
    """512 as published, or twice the images' own shorter side where that is smaller, in whole patches."""
    sides = [min(frame.load_image().shape[:2]) for frame in select_evenly(labelled_set.frames, 5)]
    side = 2 * sorted(sides)[len(sides) // 2]
    return PUBLISHED_SHORT_SIDE if side >= PUBLISHED_SHORT_SIDE else max(side // patch_size, 1) * patch_size


def list_windows(height: int, width: int, side: int, stride: int) -> list[Window]:
    """Windows of `side` every `stride` pixels, row by row; the last ones are moved inwards to end at the border.

    mmsegmentation's slide inference. Windows are cut down to smaller images; the stride is at most the side.
    """
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
    labels: UInt8[np.ndarray, "height width"], side: int, max_share: float, generator: np.random.Generator
) -> Window:
    """A random window in which no class has `max_share` of the labelled pixels or more, if eleven tries find one.

    mmsegmentation's `RandomCrop` with `cat_max_ratio`: windows of a single class are drawn again, too.
    """
    for _ in range(11):
        window = pictures.draw_window(labels.shape[0], labels.shape[1], (side, side), generator)
        counts = np.bincount(labels[window.slices].reshape(-1), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        if np.count_nonzero(counts) > 1 and counts.max() < max_share * counts.sum():
            break
    return window


def distort_colours(image: Photo, generator: np.random.Generator) -> Photo:
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


@dataclass(frozen=True)
class DepthInputs(MapInputs):
    """Makes pictures out of the frames of several sets of one convention.

    Images are resized to the short side, or keep their size for None; `crop_size` is (height, width) of random crops.
    """

    backbones: FrozenBackbones
    convention: DepthConvention
    short_side: int | None
    crop_size: tuple[int, int]
    targets_per_token: int = DEPTHS_PER_TOKEN

    def list_keys(self, frame: LabelledFrame) -> list[PictureKey]:
        """What the set trains on of a frame, as it is."""
        return [PictureKey(frame.key, part=EVALUATION if self.convention.train_crop is None else TRAINING)]

    def load_image(self, frame: LabelledFrame) -> Photo:
        """The photograph as the set's benchmark sees it, at its own size, which `load_depth` shares."""
        return _crop(frame.load_image().numpy(), self.convention, EVALUATION)

    def load_depth(self, frame: LabelledFrame) -> Float[Tensor, "height width"]:
        assert frame.load_depth is not None
        return torch.from_numpy(_crop(frame.load_depth().numpy(), self.convention, EVALUATION))

    def compute_size(self, frame: LabelledFrame) -> tuple[int, int]:
        """Height and width of a whole evaluation image."""
        height, width, _ = self.load_image(frame).shape
        return compute_size(height, width, self.short_side)

    def choose_key(self, frame: LabelledFrame, generator: np.random.Generator) -> PictureKey:
        return replace(self.list_keys(frame)[0], is_flipped=bool(generator.integers(2)))

    def load(self, frame: LabelledFrame, key: PictureKey) -> Picture:
        return self.create_whole_picture(*self._load_pair(frame, key.part), key.is_flipped)

    def augment(self, frame: LabelledFrame, generator: np.random.Generator) -> Picture:
        """The published augmentation: training part, rotation, mirror, crop, colours; padded to the crop."""
        image, depth = self._load_pair(frame, TRAINING)
        if generator.random() < 0.5:
            image, depth = rotate(image, depth, float(generator.uniform(-MAX_ROTATION, MAX_ROTATION)))
        if generator.random() < 0.5:
            image, depth = image[:, ::-1], depth[:, ::-1]
        window = pictures.draw_window(depth.shape[0], depth.shape[1], self.crop_size, generator)
        image, depth = image[window.slices], depth[window.slices]
        image = shift_colours(np.ascontiguousarray(image), self.convention.brightness_range, generator)
        return self.create_padded_picture(image, depth, self.crop_size)

    def _load_pair(self, frame: LabelledFrame, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and depth of one size, as they are shown."""
        assert frame.load_depth is not None
        pair = frame.load_image().numpy(), frame.load_depth().numpy()
        image, depth = (_crop(picture, self.convention, part) for picture in pair)
        size = compute_size(image.shape[0], image.shape[1], self.short_side)
        depth = pictures.sample_nearest(torch.from_numpy(depth.copy()), size).numpy()
        return cv2.resize(image, size[::-1]), depth


def choose_crop_size(labelled_set: LabelledSet, short_side: int | None) -> tuple[int, int]:
    """The published crop, 352x704 for KITTI and 416x544 elsewhere, cut down to the training images where they are
    smaller: padding would teach the head another kind of picture than it is tested on."""
    convention = labelled_set.depth
    published = (352, 704) if convention.bottom_crop else (416, 544)
    frames = select_evenly(labelled_set.frames, 5)
    images = (_crop(frame.load_image().numpy(), convention, TRAINING) for frame in frames)
    sizes = [compute_size(image.shape[0], image.shape[1], short_side) for image in images]
    return min(published[0], *(size[0] for size in sizes)), min(published[1], *(size[1] for size in sizes))


def rotate(image: Photo, depth: DepthMap, degrees: float) -> tuple[Photo, DepthMap]:
    """Turns both about the middle; new corners are black and have no depth."""
    height, width = depth.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -degrees, 1.0)
    turned = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)
    # Depth must not be mixed over edges.
    return turned, cv2.warpAffine(depth, matrix, (width, height), flags=cv2.INTER_NEAREST)


def shift_colours(image: Photo, brightness_range: tuple[float, float], generator: np.random.Generator) -> Photo:
    """The public depth evaluation's `ColorAug`, half of the time: gamma 0.9 to 1.1, brightness, 0.9 to 1.1 a channel.

    It raises values of 0 to 255 to the gamma, not of 0 to 1: a gamma of .9 darkens a grey of 127 to 78.
    """
    if generator.random() >= 0.5:
        return image
    values = image.astype(np.float32) ** generator.uniform(0.9, 1.1)
    factors = generator.uniform(*brightness_range) * generator.uniform(0.9, 1.1, size=3)
    return (np.clip(values * factors, 0.0, 255.0) + 0.5).astype(np.uint8)


def _scale(values: np.ndarray, factor: float, offset: float) -> np.ndarray:
    return np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


def _crop(picture: np.ndarray, convention: DepthConvention, part: int) -> np.ndarray:
    """KITTI's benchmark crop, at most as large as the picture; only what the set trains on, if `part` is `TRAINING`."""
    if convention.bottom_crop is not None:
        height, width = picture.shape[:2]
        rows, columns = min(convention.bottom_crop[0], height), min(convention.bottom_crop[1], width)
        left = (width - columns) // 2
        picture = picture[height - rows :, left : left + columns]
    if part == TRAINING and convention.train_crop is not None:
        top, bottom, left, right = convention.train_crop
        picture = picture[top:bottom, left:right]
    return picture
