"""`Undistortion`: the pinhole camera that replaces a distorted lens, and how pictures are moved into it.

One implementation serves all stages, so that they see the same pixels.
Our pixel centres are at +0.5, OpenCV's at integers: only this file converts between the two.

The pinhole camera has the photograph's size, and its whole picture was seen by the lens:

- `opencv` lenses: the largest rectangle of the undistorted picture without a border, stretched to the image size
  (`cv2.getOptimalNewCameraMatrix` at alpha 0, as nerfstudio takes it).
- `fisheye` lenses: `cv2.fisheye.estimateNewCameraMatrixForUndistortRectify` at balance 0, as the paper's
  preparation of ScanNet++ does, but with the principal point where it comes out.

Where OpenCV's choice still looks past the picture's edge, the focal lengths grow until it does not. Of lenses that are
to be centred, the paper's way, they stay, and what lies past the edge is masked.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from fit3d_ns.geometry.cameras import Lens


@dataclass(frozen=True)
class Undistortion:
    """A pinhole lens and, for each of its pixels, where the photograph, of the lens's size, shows the same ray."""

    lens: Lens
    """The pinhole lens after undistortion; the given lens itself where that has no distortion."""
    columns: Float[Tensor, "height width"] | None = None
    """Column in the photograph, pixel centres at +0.5; None where nothing needs to be moved."""
    rows: Float[Tensor, "height width"] | None = None
    """Row in the photograph, pixel centres at +0.5; None where nothing needs to be moved."""

    def apply_to_image(self, image: Shaped[Tensor, "height width 3"]) -> Shaped[Tensor, "height width 3"]:
        """Moves a picture, uint8 or float32, bilinearly; beyond the edge it is mirrored (paper's preparation)."""
        return self._remap(image, cv2.INTER_LINEAR, cv2.BORDER_REFLECT_101)

    def apply_to_mask(self, valid_mask: Bool[Tensor, "height width"]) -> Bool[Tensor, "height width"]:
        """Moves a mask (True = use); a pixel stays valid if all that it mixes is valid and inside the photograph."""
        moved = self._remap(valid_mask.to(torch.uint8) * 255, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
        return (moved == 255) & self.inside

    def apply_to_depth(self, depth: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
        """Moves a z-depth map by nearest neighbour; 0 beyond the edge. Undistorting does not change z."""
        return torch.where(self.inside, self._remap(depth.float(), cv2.INTER_NEAREST, cv2.BORDER_REPLICATE), 0.0)

    @property
    def inside(self) -> Bool[Tensor, "height width"]:
        """True where the photograph covers the pinhole camera's pixel centre; everywhere, for sane lenses."""
        if self.columns is None or self.rows is None:
            return torch.ones(self.lens.height, self.lens.width, dtype=torch.bool)
        # The maps are float32: a pixel on the very edge must not fall out by rounding.
        slack = 0.01
        inside_columns = (self.columns > -slack) & (self.columns < self.lens.width + slack)
        return inside_columns & (self.rows > -slack) & (self.rows < self.lens.height + slack)

    def _remap(self, picture: Tensor, interpolation: int, border: int) -> Tensor:
        if self.columns is None or self.rows is None:
            return picture
        columns, rows = self.columns.numpy() - 0.5, self.rows.numpy() - 0.5
        moved = cv2.remap(np.ascontiguousarray(picture.numpy()), columns, rows, interpolation, borderMode=border)
        return torch.from_numpy(moved)


@lru_cache(maxsize=8)
def compute_undistortion(lens: Lens) -> Undistortion:
    """The undistortion of a lens; the last few are kept, as most captures have one lens.

    ValueError where the distortion cannot be undone: the coefficients do not describe a real lens, or a fisheye sees
    what lies behind it.
    """
    if not lens.is_distorted:
        return Undistortion(replace(lens, model="pinhole", distortion=()))
    if lens.model == "fisheye":
        _refuse_views_behind(lens)
    pinhole = _choose_pinhole(lens)
    centred = replace(pinhole, cx=lens.width / 2, cy=lens.height / 2)
    pinhole = centred if lens.is_centred else _grow_focal_lengths(lens, pinhole)
    distortion = _opencv_coefficients(lens)
    size = (lens.width, lens.height)
    create_maps = (cv2.fisheye if lens.model == "fisheye" else cv2).initUndistortRectifyMap
    columns, rows = create_maps(_opencv_K(lens), distortion, np.eye(3), _opencv_K(pinhole), size, cv2.CV_32FC1)
    # Where the maps' Jacobian is not positive, the photograph would be shown twice or mirrored.
    to_right = np.diff(columns, axis=1)[:-1], np.diff(rows, axis=1)[:-1]
    to_below = np.diff(columns, axis=0)[:, :-1], np.diff(rows, axis=0)[:, :-1]
    if (to_right[0] * to_below[1] <= to_right[1] * to_below[0]).any():
        raise ValueError(_describe_failure(lens))
    return Undistortion(pinhole, torch.from_numpy(columns + 0.5), torch.from_numpy(rows + 0.5))


def distort_points(lens: Lens, points: Float[np.ndarray, "points 2"]) -> Float[np.ndarray, "points 2"]:
    """Pixels (column, row; centres at +0.5) at which a lens shows the rays (x, y, 1), in float64."""
    if not lens.is_distorted or not len(points):
        return points * [lens.fx, lens.fy] + [lens.cx, lens.cy]
    rays, nothing = np.insert(points.astype(np.float64), 2, 1.0, axis=1)[:, None], np.zeros(3)
    project = cv2.fisheye.projectPoints if lens.model == "fisheye" else cv2.projectPoints
    pixels, _ = project(rays, nothing, nothing, _opencv_K(lens), _opencv_coefficients(lens))
    return pixels[:, 0] + 0.5


def find_rays(lens: Lens, pixels: Float[np.ndarray, "points 2"]) -> Float[np.ndarray, "points 2"]:
    """Rays (x, y, 1) that a lens shows at pixels (column, row; centres at +0.5): the inverse of `distort_points`.

    Distortion is undone by OpenCV's iteration, to about 1e-9 for lenses that do not fold.
    """
    if not lens.is_distorted:
        return (pixels - [lens.cx, lens.cy]) / [lens.fx, lens.fy]
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 100, 1e-10)
    at_integers = np.ascontiguousarray(pixels[:, None] - 0.5, dtype=np.float64)
    K, coefficients = _opencv_K(lens), _opencv_coefficients(lens)
    if lens.model == "fisheye":
        return cv2.fisheye.undistortPoints(at_integers, K, coefficients, criteria=criteria)[:, 0]
    return cv2.undistortPointsIter(at_integers, K, coefficients, np.eye(3), np.eye(3), criteria)[:, 0]


def resize_lens(lens: Lens, width: int, height: int) -> Lens:
    """The lens after its photograph was resized to `width` x `height`; distortion does not depend on size."""
    x, y = width / lens.width, height / lens.height
    return replace(lens, fx=lens.fx * x, fy=lens.fy * y, cx=lens.cx * x, cy=lens.cy * y, width=width, height=height)


def _choose_pinhole(lens: Lens) -> Lens:
    given = _opencv_K(lens), _opencv_coefficients(lens), (lens.width, lens.height)
    if lens.model == "fisheye":
        K = cv2.fisheye.estimateNewCameraMatrixForUndistortRectify(*given, np.eye(3), balance=0.0)
    else:
        K, _ = cv2.getOptimalNewCameraMatrix(*given, 0)
    K = np.asarray(K, dtype=np.float64)
    ratios = K[0, 0] / lens.fx, K[1, 1] / lens.fy
    if not np.isfinite(K).all() or not all(0.05 < ratio < 20.0 for ratio in ratios):
        raise ValueError(_describe_failure(lens))
    fx, fy, cx, cy = map(float, (K[0, 0], K[1, 1], K[0, 2] + 0.5, K[1, 2] + 0.5))
    return Lens(fx, fy, cx, cy, lens.width, lens.height)


def _refuse_views_behind(lens: Lens) -> None:
    """Raises ValueError for a fisheye that sees 90 degrees and more off its axis at the middle of some edge."""
    k1, k2, k3, k4 = _opencv_coefficients(lens)
    theta = np.linspace(0.0, np.pi / 2, 500)
    bent = theta * (1 + k1 * theta**2 + k2 * theta**4 + k3 * theta**6 + k4 * theta**8)
    edges = (lens.cx / lens.fx, (lens.width - lens.cx) / lens.fx, lens.cy / lens.fy, (lens.height - lens.cy) / lens.fy)
    # Where the polynomial folds before 90 degrees, the coefficients are at fault.
    if (np.diff(bent) > 0).all() and max(edges) >= bent[-1]:
        raise ValueError(
            f"A {lens.width}x{lens.height} fisheye with focal length {lens.fx:g} sees 180 degrees and more, which no "
            "flat picture shows; crop the photographs to the middle 150 degrees or less (and cx, cy, w, h with them)."
        )


def _grow_focal_lengths(lens: Lens, pinhole: Lens) -> Lens:
    """Narrows the view in steps of 0.2 % until the lens sees the outermost pixel centres of the pinhole picture."""
    step, max_steps = 1.002, 1000
    columns, rows = np.arange(pinhole.width) + 0.5, np.arange(pinhole.height) + 0.5
    right, bottom = pinhole.width - 0.5, pinhole.height - 0.5
    edges: list[tuple[Any, Any]] = [(columns, 0.5), (columns, bottom), (0.5, rows), (right, rows)]
    frame = np.concatenate([np.stack(np.broadcast_arrays(x, y), axis=-1) for x, y in edges])
    for _ in range(max_steps):
        seen = distort_points(lens, (frame - [pinhole.cx, pinhole.cy]) / [pinhole.fx, pinhole.fy])
        if (seen >= 0.0).all() and (seen <= [lens.width, lens.height]).all():
            return pinhole
        pinhole = replace(pinhole, fx=pinhole.fx * step, fy=pinhole.fy * step)
    raise ValueError(_describe_failure(lens))


def _describe_failure(lens: Lens) -> str:
    return (
        f"The {lens.model} distortion {lens.distortion} of a {lens.width}x{lens.height} camera with focal length "
        f"{lens.fx:g} cannot be undone; check the coefficients, their order and the principal point in the camera file."
    )


def _opencv_K(lens: Lens) -> Float[np.ndarray, "3 3"]:
    return np.array([[lens.fx, 0.0, lens.cx - 0.5], [0.0, lens.fy, lens.cy - 0.5], [0.0, 0.0, 1.0]])


def _opencv_coefficients(lens: Lens) -> Float[np.ndarray, " coefficients"]:
    """All coefficients that the model has, those not given being zero."""
    size = 4 if lens.model == "fisheye" else 8
    if len(lens.distortion) > size:
        raise ValueError(f"{len(lens.distortion)} distortion coefficients given, {lens.model} has at most {size}.")
    return np.array([*lens.distortion, *[0.0] * (size - len(lens.distortion))])
