"""Changes of training pictures, as the published evaluations of segmentation and depth make them.

Pictures are uint8 arrays [height, width, 3] in RGB, maps [height, width]. All randomness comes from the generator that
is passed in, so a sample depends on (seed, position) and on nothing else.
"""

import cv2
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from fit3d_ns.probing.datasets.frames import IGNORE_INDEX
from fit3d_ns.probing.segmentation.slide_windows import Window

Picture = UInt8[np.ndarray, "height width 3"]


def resize_keeping_ratio(
    image: Picture, labels: Shaped[np.ndarray, "height width"], short_side: float, long_side: float
) -> tuple[UInt8[np.ndarray, "new_height new_width 3"], Shaped[np.ndarray, "new_height new_width"]]:
    """Largest size that fits into (long_side, short_side); bilinear for the picture, nearest for the map."""
    height, width = image.shape[:2]
    size = compute_size(height, width, short_side, long_side)
    if size == (height, width):
        return image, labels
    resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    return resized, cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def compute_size(height: int, width: int, short_side: float, long_side: float) -> tuple[int, int]:
    """(height, width) after `resize_keeping_ratio`, rounded to the nearest pixel."""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def draw_window(height: int, width: int, size: tuple[int, int], generator: np.random.Generator) -> Window:
    """A random window of (rows, columns), cut down to the picture where that is smaller."""
    rows, columns = min(size[0], height), min(size[1], width)
    top = int(generator.integers(height - rows + 1))
    left = int(generator.integers(width - columns + 1))
    return Window(top, left, rows, columns)


def draw_varied_window(
    labels: UInt8[np.ndarray, "height width"],
    size: tuple[int, int],
    max_share: float,
    generator: np.random.Generator,
    num_tries: int = 10,
) -> Window:
    """A random window in which no class has `max_share` of the labelled pixels or more, if a few tries find one.

    mmsegmentation's `RandomCrop` with `cat_max_ratio`: windows of a single class are drawn again, too.
    """
    window = draw_window(labels.shape[0], labels.shape[1], size, generator)
    for _ in range(num_tries):
        counts = np.bincount(labels[window.slices].reshape(-1), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        if np.count_nonzero(counts) > 1 and counts.max() < max_share * counts.sum():
            break
        window = draw_window(labels.shape[0], labels.shape[1], size, generator)
    return window


def draw_resized_window(
    height: int,
    width: int,
    generator: np.random.Generator,
    area_range: tuple[float, float] = (0.08, 1.0),
    ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
    num_tries: int = 10,
) -> Window:
    """A random window as torchvision's `RandomResizedCrop` draws it; DINOv2's evaluation takes its ranges as they are.

    Args:
        height: Of the picture.
        width: Of the picture.
        generator: The randomness.
        area_range: Least and largest share of the picture's area, drawn evenly.
        ratio_range: Least and largest width over height, drawn evenly in its logarithm.
        num_tries: Windows larger than the picture are drawn again so often; after that it is the largest window in the
            middle whose ratio is allowed, whatever its area.
    """
    for _ in range(num_tries):
        area = height * width * generator.uniform(*area_range)
        ratio = float(np.exp(generator.uniform(*np.log(ratio_range))))
        rows, columns = round(float(np.sqrt(area / ratio))), round(float(np.sqrt(area * ratio)))
        if 0 < rows <= height and 0 < columns <= width:
            return draw_window(height, width, (rows, columns), generator)
    rows = min(height, round(width / ratio_range[0]))
    columns = min(width, round(height * ratio_range[1]))
    return Window((height - rows) // 2, (width - columns) // 2, rows, columns)


def distort_colours(image: Picture, generator: np.random.Generator) -> Picture:
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


def shift_colours(
    image: Picture,
    brightness_range: tuple[float, float],
    generator: np.random.Generator,
    probability: float = 0.5,
    gamma_range: tuple[float, float] = (0.9, 1.1),
    colour_range: tuple[float, float] = (0.9, 1.1),
) -> Picture:
    """The depth evaluations' colour augmentation: gamma, brightness, and a factor for each channel."""
    if generator.random() >= probability:
        return image
    values = (image.astype(np.float32) / 255.0) ** generator.uniform(*gamma_range)
    factors = generator.uniform(*brightness_range) * generator.uniform(*colour_range, size=3)
    return (np.clip(values * factors, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def rotate(
    image: Picture, depth: Float[np.ndarray, "height width"], degrees: float
) -> tuple[Picture, Float[np.ndarray, "height width"]]:
    """Turns both about the middle; new corners are black and have no depth."""
    height, width = depth.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -degrees, 1.0)
    turned = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)
    # Depth must not be mixed over edges.
    return turned, cv2.warpAffine(depth, matrix, (width, height), flags=cv2.INTER_NEAREST)


def _scale(values: np.ndarray, factor: float, offset: float) -> np.ndarray:
    return np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)
