"""`Lens`: the intrinsics and distortion of one photograph as it lies on disk."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from fit3d_ns.geometry.cameras import create_K

LensModel = Literal["pinhole", "opencv", "fisheye"]
MAX_PIXELS = 178_956_970
"""Of a picture. Pillow refuses larger ones, as files that unpack to anything."""


@dataclass(frozen=True)
class Lens:
    """Pinhole intrinsics in pixels (pixel centres at +0.5) with an optional OpenCV distortion."""

    fx: float
    """Horizontal focal length in pixels, positive."""
    fy: float
    """Vertical focal length in pixels, positive."""
    cx: float
    """Column of the principal point."""
    cy: float
    """Row of the principal point."""
    width: int
    """Image width in pixels."""
    height: int
    """Image height in pixels."""
    model: LensModel = "pinhole"
    """`opencv`: polynomial radial and tangential; `fisheye`: OpenCV's equidistant polynomial."""
    distortion: tuple[float, ...] = field(default=())
    """`opencv`: k1 k2 p1 p2 [k3 [k4 k5 k6]], OpenCV's order; `fisheye`: k1 k2 k3 k4; `pinhole`: empty."""

    def __post_init__(self) -> None:
        values = (self.fx, self.fy, self.cx, self.cy, self.width, self.height, *self.distortion)
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise ValueError(f"A lens has numbers that are not finite: {values}; correct the camera file.")
        if not isinstance(self.width, int) or not isinstance(self.height, int) or min(self.width, self.height) < 1:
            raise ValueError(f"A camera has {self.width}x{self.height} pixels; correct the camera file.")
        if self.width * self.height > MAX_PIXELS:
            raise ValueError(
                f"A camera has {self.width}x{self.height} pixels, more than the {MAX_PIXELS} of the largest photograph "
                "that is read; correct the camera file, or use smaller photographs."
            )
        if self.model not in get_args(LensModel):
            raise ValueError(f"A lens is {self.model!r}; known are {', '.join(get_args(LensModel))}.")

    @property
    def K(self) -> Float[Tensor, "3 3"]:
        """Intrinsics matrix, float32."""
        return create_K(self.fx, self.fy, self.cx, self.cy)

    @property
    def is_distorted(self) -> bool:
        """False for pinhole lenses and for OpenCV lenses whose coefficients are all zero.

        A fisheye lens bends rays even when all its coefficients are zero.
        """
        return self.model == "fisheye" or any(coefficient != 0.0 for coefficient in self.distortion)
