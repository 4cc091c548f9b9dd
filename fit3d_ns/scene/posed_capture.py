"""`PosedCapture`: the photographs of a scene with pinhole cameras in the training frame.

A *frame* is a photograph as it lies on disk, distorted and in the dataset's world; a *view* is the pinhole camera that
every stage renders and every stage's pixels belong to. The training frame is the dataset's world moved by
`dataparser_transform` and multiplied by `dataparser_scale`. All stages load pixels here: photograph, resized to the
view's size, then undistorted, all in 8 bits. As JSON values (`record_capture`), every float survives to the bit and
every path is relative to the root.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from fit3d_ns.data import images
from fit3d_ns.data.frames import CaptureFiles, Frame, PointCloud, Split
from fit3d_ns.geometry.cameras import MAX_PIXELS, Camera, Lens, transform_camera_to_worlds
from fit3d_ns.geometry.undistortion import Undistortion, compute_undistortion, resize_lens
from fit3d_ns.utils.progress import notice_once

MAX_SIDE = 1600
"""Longer side in pixels that photographs are reduced to by default, as nerfstudio-data does."""


@dataclass(frozen=True)
class View:
    """One pinhole camera to render, and the frame whose photograph it sees."""

    name: str
    """Path of the photograph relative to the capture's root, with slashes; unique in a capture."""
    camera_to_world: Float[Tensor, "3 4"]
    """OpenGL camera pose in the training frame, float32."""
    K: Float[Tensor, "3 3"]
    """Pinhole intrinsics of the undistorted picture, in pixels."""
    width: int
    height: int
    split: Split
    """`test` views never train anything."""
    frame: Frame
    """The photograph on disk, with its own lens and its pose in the dataset's world."""

    @property
    def camera(self) -> Camera:
        return Camera(self.camera_to_world, self.K, self.width, self.height)

    @property
    def undistortion(self) -> Undistortion:
        """How the photograph, at the view's size, is moved into the view."""
        return compute_undistortion(resize_lens(self.frame.lens, self.width, self.height))


@dataclass(frozen=True)
class PosedCapture:
    """Views of one scene in one training frame."""

    root: Path
    """Folder below which all photographs lie."""
    views: list[View]
    """Usable views in file order."""
    dataparser_transform: Float[Tensor, "3 4"]
    """Rigid motion from the dataset's world, before scaling."""
    dataparser_scale: float
    """Factor after the motion, positive."""
    metric_scale: float | None
    """Units of the training frame per metre, or None where the dataset's world has no known unit."""
    points: PointCloud | None = None
    """Seed points in the training frame."""
    num_bad: int = 0
    """Frames left out because the dataset marks them as bad."""
    scene_id: str = ""
    layout: str = ""
    """Disk layout it was read from."""

    def __post_init__(self) -> None:
        if len(self.name_to_view) != len(self.views):
            raise ValueError(f"{self.root} lists a photograph twice; every frame needs an image file of its own.")

    @cached_property
    def name_to_view(self) -> dict[str, View]:
        return {view.name: view for view in self.views}

    def select(self, *splits: Split) -> list[View]:
        return [view for view in self.views if view.split in splits]

    def load_image(self, view: View) -> UInt8[Tensor, "height width 3"]:
        """The undistorted photograph at the view's size, black where it is transparent; divide by 255 for [0, 1].

        A file that is missing, damaged or of another size than its camera says is a ValueError, as in the next two.
        """
        image = _fit(images.load_image(view.frame.image_path), view, view.frame.image_path, cv2.INTER_AREA)
        return view.undistortion.apply_to_image(image)

    def load_valid_mask(self, view: View) -> Bool[Tensor, "height width"]:
        """True where a pixel of `load_image` may be used: inside the photograph, not masked, not transparent."""
        valid_mask = self.load_mask(view)
        opaque = self.load_opaque_mask(view)
        return valid_mask if opaque is None else valid_mask & opaque

    def load_mask(self, view: View) -> Bool[Tensor, "height width"]:
        """True inside the photograph where no mask file says otherwise; transparent pixels too."""
        if view.frame.mask_path is None:
            return view.undistortion.inside
        return self._move_mask(images.load_mask(view.frame.mask_path), view, view.frame.mask_path)

    def load_opaque_mask(self, view: View) -> Bool[Tensor, "height width"] | None:
        """True where the photograph is not transparent; None where it has no alpha channel, or is gone."""
        path = view.frame.image_path
        if not path.is_file() or not images.read_image_header(path).has_transparency_data:
            return None
        opaque = images.find_opaque(images.load_rgba(path))
        if not bool(opaque.all()):
            notice_once("transparency", f"What is transparent in photographs such as {path} is taken as background.")
        return self._move_mask(opaque, view, path)

    def load_rgba(self, view: View) -> UInt8[Tensor, "height width channels"]:
        """The picture of `load_image`, where it has an alpha channel with its own colours and alpha."""
        path = view.frame.image_path
        rgba = images.load_rgba(path)
        if rgba.shape[-1] == 3:
            return self.load_image(view)
        # OpenCV weights all channels alike: colours times alpha are moved, then divided by it again.
        premultiplied = torch.cat([images.composite_on_black(rgba), rgba[..., 3:]], dim=-1)
        fitted = _fit(premultiplied, view, path, cv2.INTER_AREA)
        parts = (fitted[..., :3].contiguous(), fitted[..., 3:].expand(-1, -1, 3).contiguous())
        premultiplied, alpha = (view.undistortion.apply_to_image(part).float() for part in parts)
        colours = (premultiplied * 255.0 / alpha.clamp(min=1.0)).round().clamp(0.0, 255.0)
        return torch.cat([colours, alpha[..., :1]], dim=-1).to(torch.uint8)

    def _move_mask(self, mask: Bool[Tensor, "rows columns"], view: View, path: Path) -> Bool[Tensor, "height width"]:
        # As for the image, but a pixel that mixes valid with invalid ones is invalid.
        shares = _fit(mask.float(), view, path, cv2.INTER_AREA, is_exact=False)
        return view.undistortion.apply_to_mask(shares > 1.0 - 1e-4)

    def load_depth(self, view: View) -> Float[Tensor, "height width"] | None:
        """Measured z-depth in metres, undistorted, 0 = no measurement; None where the frame has no depth file.

        Multiply by `metric_scale` for units of the training frame.
        """
        if view.frame.depth_path is None:
            return None
        depth = images.load_depth(view.frame.depth_path)
        depth = _fit(depth, view, view.frame.depth_path, cv2.INTER_NEAREST_EXACT, is_exact=False)
        return view.undistortion.apply_to_depth(depth)

    def move(self, data_root: Path) -> "PosedCapture":
        """The same capture below another folder, all relative paths kept."""
        views = []
        for view in self.views:
            paths = {name: getattr(view.frame, name) for name in ("image_path", "mask_path", "depth_path")}
            moved = {name: data_root / path.relative_to(self.root) for name, path in paths.items() if path is not None}
            views.append(replace(view, frame=replace(view.frame, **moved)))
        return replace(self, root=data_root, views=views)


def create_posed_capture(
    files: CaptureFiles,
    dataparser_transform: Float[Tensor, "3 4"] | None = None,
    dataparser_scale: float = 1.0,
    downscale_factor: int = 1,
) -> PosedCapture:
    """Moves a scene folder's frames into the training frame and gives each its pinhole camera.

    `dataparser_transform` is a rigid motion of the dataset's world (none by default), `dataparser_scale` a positive
    factor after it; photographs are reduced by `downscale_factor`, at least 1, before they are undistorted. ValueError:
    no usable frame, a photograph outside the root, or a scale or factor out of range.
    """
    transform = torch.eye(4)[:3] if dataparser_transform is None else dataparser_transform.detach().cpu().float()
    if not dataparser_scale > 0 or downscale_factor < 1:
        raise ValueError(f"Scale {dataparser_scale} must be positive, the factor {downscale_factor} 1 or more.")
    usable = [frame for frame in files.frames if not frame.is_bad]
    if not usable:
        raise ValueError(f"{files.root} has no usable frame: all {len(files.frames)} are marked as bad.")
    # `--data` may have named the camera file; the photographs lie below its folder.
    root = files.root.parent if files.root.is_file() else Path(files.root)
    return PosedCapture(
        root=root,
        views=[_create_view(frame, root, transform, dataparser_scale, downscale_factor) for frame in usable],
        dataparser_transform=transform,
        dataparser_scale=float(dataparser_scale),
        metric_scale=float(dataparser_scale) if files.is_metric else None,
        points=None if files.points is None else files.points.transform(transform, dataparser_scale),
        num_bad=len(files.frames) - len(usable),
        scene_id=files.scene_id or root.absolute().name,
        layout=files.layout,
    )


def choose_downscale_factor(longer_side: int, max_side: int, flag: str) -> int:
    """The smallest power of two that brings photographs to at most `max_side` pixels; 0 leaves them as they are.

    Where it reduces them it says so, once, with the `flag` that changes it.
    """
    factor = 1
    while max_side > 0 and longer_side > max_side * factor:
        factor *= 2
    if factor > 1:
        notice_once("size", f"Photographs of {longer_side} pixels are reduced {factor} times; {flag} keeps them.")
    return factor


def record_capture(capture: PosedCapture) -> dict[str, Any]:
    """The capture without its points; lenses are written once and referred to by number.

    ValueError where a mask or depth map lies outside the root.
    """
    lenses: dict[Lens, int] = {}
    views = [
        {
            "image": view.name,
            "mask": view.frame.mask_path and _relative(view.frame.mask_path, capture.root),
            "depth": view.frame.depth_path and _relative(view.frame.depth_path, capture.root),
            "split": view.split,
            "lens": lenses.setdefault(view.frame.lens, len(lenses)),
            "dataset_camera_to_world": _numbers(view.frame.camera_to_world),
            "camera_to_world": _numbers(view.camera_to_world),
            "K": _numbers(view.K),
            "width": view.width,
            "height": view.height,
        }
        for view in capture.views
    ]
    return {
        "root": str(Path(capture.root).absolute()),
        "scene_id": capture.scene_id,
        "layout": capture.layout,
        "num_bad": capture.num_bad,
        "dataparser_transform": _numbers(capture.dataparser_transform),
        "dataparser_scale": capture.dataparser_scale,
        "metric_scale": capture.metric_scale,
        # Earlier versions know no centred lenses.
        "lenses": [{k: value for k, value in asdict(lens).items() if k != "is_centred" or value} for lens in lenses],
        "views": views,
    }


def parse_capture(record: dict[str, Any]) -> PosedCapture:
    """The capture that `record_capture` wrote, with paths below the recorded root.

    KeyError, TypeError, IndexError or ValueError where the record is not what `record_capture` writes.
    """
    root, scale, metric = Path(record["root"]), record["dataparser_scale"], record["metric_scale"]
    for name in ("scene_id", "layout"):
        if not isinstance(record[name], str):
            raise ValueError(f"`{name}` is {record[name]!r}")
    if not all(math.isfinite(float(factor)) and factor > 0 for factor in (scale, 1 if metric is None else metric)):
        raise ValueError(f"the scales {scale!r} and {metric!r} are not positive")
    lenses = [Lens(**{**lens, "distortion": tuple(lens["distortion"])}) for lens in record["lenses"]]
    return PosedCapture(
        root=root,
        views=[_parse_view(view, root, lenses) for view in record["views"]],
        dataparser_transform=_parse_numbers(record["dataparser_transform"], 3, 4),
        dataparser_scale=float(scale),
        metric_scale=None if metric is None else float(metric),
        num_bad=int(record["num_bad"]),
        scene_id=record["scene_id"],
        layout=record["layout"],
    )


def _create_view(frame: Frame, root: Path, transform: Tensor, scale: float, downscale_factor: int) -> View:
    width = max(frame.lens.width // downscale_factor, 1)
    height = max(frame.lens.height // downscale_factor, 1)
    return View(
        name=_relative(frame.image_path, root),
        camera_to_world=transform_camera_to_worlds(frame.camera_to_world.float(), transform, scale),
        K=compute_undistortion(resize_lens(frame.lens, width, height)).lens.K,
        width=width,
        height=height,
        split=frame.split,
        frame=frame,
    )


def _fit(picture: Tensor, view: View, path: Path, interpolation: int, is_exact: bool = True) -> Tensor:
    """A picture of the photograph's size, or unless `is_exact` of its aspect, at the view's size; else a ValueError."""
    height, width = picture.shape[:2]
    lens = view.frame.lens
    sizes = (width, height), (lens.width, lens.height)
    if sizes[0] != sizes[1] and (is_exact or not images.has_aspect(*sizes)):
        problem = f"{path} is {width}x{height}, its camera says {lens.width}x{lens.height}"
        raise ValueError(f"{problem}; correct the camera file or restore the file.")
    if (width, height) == (view.width, view.height):
        return picture
    return torch.from_numpy(cv2.resize(picture.numpy(), (view.width, view.height), interpolation=interpolation))


def _parse_view(record: dict[str, Any], root: Path, lenses: list[Lens]) -> View:
    width, height = int(record["width"]), int(record["height"])
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"a view has {width}x{height} pixels")
    if record["split"] not in get_args(Split):
        raise ValueError(f"a view is of the split {record['split']!r}")
    frame = Frame(
        image_path=_below(record["image"], root),
        lens=lenses[record["lens"]],
        camera_to_world=_parse_numbers(record["dataset_camera_to_world"], 3, 4),
        split=record["split"],
        mask_path=None if record["mask"] is None else _below(record["mask"], root),
        depth_path=None if record["depth"] is None else _below(record["depth"], root),
    )
    return View(
        name=record["image"],
        camera_to_world=_parse_numbers(record["camera_to_world"], 3, 4),
        K=_parse_numbers(record["K"], 3, 3),
        width=width,
        height=height,
        split=record["split"],
        frame=frame,
    )


def _relative(path: Path, root: Path) -> str:
    try:
        return Path(path).relative_to(root).as_posix()
    except ValueError as error:
        raise ValueError(f"{path} lies outside the capture's root {root}; move it below that folder.") from error


def _below(name: str, root: Path) -> Path:
    """A path of the file; one that leaves the root was not written by us."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"path {name!r} leaves the capture's root")
    return root / path


def _parse_numbers(value: Any, *shape: int) -> Tensor:
    matrix = np.array(value, dtype=np.float64)
    if matrix.shape != shape or not np.isfinite(matrix).all():
        raise ValueError(f"a matrix of {' x '.join(map(str, shape))} numbers is {str(value)[:60]}")
    return torch.from_numpy(matrix).float()


def _numbers(matrix: Tensor) -> list[list[float]]:
    # float32 to Python float and back is exact.
    return matrix.detach().cpu().float().tolist()
