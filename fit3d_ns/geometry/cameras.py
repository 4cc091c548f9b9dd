"""Camera conventions, fixed here and nowhere else.

`camera_to_worlds` [..., 3, 4] is OpenGL (nerfstudio): x right, y up, z towards the viewer.
`viewmats` [..., 4, 4] is world-to-camera in OpenCV (gsplat): x right, y down, z into the scene.
`Ks` [..., 3, 3] are in pixels; the centre of the top left pixel is (0.5, 0.5), so resizing scales both rows.
A `Lens` holds intrinsics and distortion of one photograph as stored on disk.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Points = Float[Tensor, "points 3"]


def viewmats_from_camera_to_worlds(camera_to_worlds: Float[Tensor, "*batch 3 4"]) -> Float[Tensor, "*batch 4 4"]:
    """World-to-camera matrices of OpenGL camera poses. Differentiable; the rotation part must be orthonormal."""
    flip = camera_to_worlds.new_tensor([1.0, -1.0, -1.0])
    rotation = (camera_to_worlds[..., :3, :3] * flip).transpose(-1, -2)
    translation = -(rotation @ camera_to_worlds[..., :3, 3:])
    return _homogeneous(torch.cat([rotation, translation], dim=-1))


def camera_to_worlds_from_viewmats(viewmats: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 3 4"]:
    """The inverse of `viewmats_from_camera_to_worlds`."""
    flip = viewmats.new_tensor([1.0, -1.0, -1.0])
    rotation = viewmats[..., :3, :3].transpose(-1, -2)
    translation = -(rotation @ viewmats[..., :3, 3:])
    return torch.cat([rotation * flip, translation], dim=-1)


class Camera(NamedTuple):
    """A pinhole camera to render."""

    camera_to_world: Float[Tensor, "3 4"]
    """OpenGL pose."""
    K: Float[Tensor, "3 3"]
    """Intrinsics in pixels of the picture."""
    width: int
    height: int


def create_K(fx: float, fy: float, cx: float, cy: float) -> Float[Tensor, "3 3"]:
    """Intrinsics matrix in pixels, float32."""
    return torch.tensor([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def resize_Ks(
    Ks: Float[Tensor, "*batch 3 3"], size: tuple[int, int], new_size: tuple[int, int]
) -> Float[Tensor, "*batch 3 3"]:
    """Intrinsics after the image was resized from `size` to `new_size`, both (width, height) in pixels."""
    scale = Ks.new_tensor([new_size[0] / size[0], new_size[1] / size[1], 1.0])
    return Ks * scale[:, None]


def crop_Ks(Ks: Float[Tensor, "*batch 3 3"], left: float, top: float) -> Float[Tensor, "*batch 3 3"]:
    """Intrinsics after `left` columns and `top` rows of pixels were cut off."""
    return Ks - Ks.new_tensor([[0.0, 0.0, left], [0.0, 0.0, top], [0.0, 0.0, 0.0]])


def project_points(
    points: Points, viewmat: Float[Tensor, "4 4"], K: Float[Tensor, "3 3"]
) -> tuple[Float[Tensor, "points 2"], Float[Tensor, " points"]]:
    """Pixel coordinates (x, y) and z-depth of world points; only depth > 0 is in front of the camera."""
    in_camera = points @ viewmat[:3, :3].T + viewmat[:3, 3]
    projected = in_camera @ K.T
    return projected[:, :2] / projected[:, 2:], in_camera[:, 2]


def is_inside(
    pixels: Float[Tensor, "points 2"], depth: Float[Tensor, " points"], width: int, height: int
) -> Bool[Tensor, " points"]:
    """Which of the points that `project_points` gives are in front of the camera and in its picture."""
    return (depth > 0) & (pixels >= 0).all(dim=1) & (pixels[:, 0] < width) & (pixels[:, 1] < height)


def transform_camera_to_worlds(
    camera_to_worlds: Float[Tensor, "*batch 3 4"], transform: Float[Tensor, "3 4"], scale: float
) -> Float[Tensor, "*batch 3 4"]:
    """Poses in a world that was first moved by the rigid `transform` and then multiplied by `scale`.

    This is the order of nerfstudio's `dataparser_transform` and `dataparser_scale`.
    """
    moved = _homogeneous(transform) @ _homogeneous(camera_to_worlds)
    return torch.cat([moved[..., :3, :3], moved[..., :3, 3:] * scale], dim=-1)


def transform_points(points: Points, transform: Float[Tensor, "3 4"], scale: float) -> Points:
    """World points under the same change of world as `transform_camera_to_worlds`."""
    transform = transform.to(points)
    return (points @ transform[:, :3].T + transform[:, 3]) * scale


def _homogeneous(matrices: Float[Tensor, "*batch 3 4"]) -> Float[Tensor, "*batch 4 4"]:
    bottom = matrices.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*matrices.shape[:-2], 1, 4)
    return torch.cat([matrices, bottom], dim=-2)


LensModel = Literal["pinhole", "opencv", "fisheye"]
MAX_PIXELS = 178_956_970
"""Largest size of an image that is read. Pillow rejects larger files as possible decompression bombs."""


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
    distortion: tuple[float, ...] = ()
    """`opencv`: k1 k2 p1 p2 [k3 [k4 k5 k6]], OpenCV's order; `fisheye`: k1 k2 k3 k4; `pinhole`: empty."""
    is_centred: bool = field(default=False, repr=False)
    """Whether undistortion puts the principal point into the middle (paper's preparation); K says so too, in hashes."""

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
        return create_K(self.fx, self.fy, self.cx, self.cy)

    @property
    def is_distorted(self) -> bool:
        """False for pinhole lenses and for OpenCV lenses whose coefficients are all zero.

        A fisheye lens bends rays even when all its coefficients are zero.
        """
        return self.model == "fisheye" or any(coefficient != 0.0 for coefficient in self.distortion)
