"""Windows that slide over an image, and the mean of what a probe says about each (mmsegmentation's slide inference)."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels."""

    top: int
    """First row."""
    left: int
    """First column."""
    height: int
    """Rows."""
    width: int
    """Columns."""

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, for indexing."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def list_windows(height: int, width: int, side: int, stride: int) -> list[Window]:
    """Windows of `side` every `stride` pixels, row by row; the last ones are moved inwards to end at the border.

    Args:
        height: Of the image.
        width: Of the image.
        side: Of a window; cut down to the image where that is smaller.
        stride: Between windows, at most `side`, so that every pixel is covered.
    """
    if not 0 < stride <= side:
        raise ValueError(f"Stride {stride} must be positive and at most the window's side {side}.")
    rows, columns = min(side, height), min(side, width)
    tops = [min(index * stride, height - rows) for index in range(_count(height, rows, stride))]
    lefts = [min(index * stride, width - columns) for index in range(_count(width, columns, stride))]
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


def _count(length: int, side: int, stride: int) -> int:
    return max(length - side + stride - 1, 0) // stride + 1
