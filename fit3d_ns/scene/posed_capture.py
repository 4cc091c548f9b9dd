"""`PosedCapture`: the photographs of a scene with pinhole cameras in the training frame.

A *frame* is a photograph as it lies on disk, distorted and in the dataset's world; a *view* is the pinhole camera that
every stage renders and every stage's pixels belong to. The training frame is the dataset's world moved by
`dataparser_transform` and multiplied by `dataparser_scale`. All stages load pixels here: photograph, resized to the
view's size, then undistorted, all in 8 bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from fit3d_ns.data.frames import CaptureFiles, Frame, PointCloud, Split
from fit3d_ns.data.images import load_depth, load_image, load_mask
from fit3d_ns.geometry.cameras import transform_camera_to_worlds
from fit3d_ns.geometry.lenses import Lens
from fit3d_ns.geometry.undistortion import Undistortion, compute_undistortion, resize_lens


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
    """Width of the undistorted picture in pixels."""
    height: int
    """Height of the undistorted picture in pixels."""
    split: Split
    """`test` views never train anything."""
    frame: Frame
    """The photograph on disk, with its own lens and its pose in the dataset's world."""

    @property
    def lens(self) -> Lens:
        """The photograph's lens at the view's size, before undistortion."""
        if (self.frame.lens.width, self.frame.lens.height) == (self.width, self.height):
            return self.frame.lens
        return resize_lens(self.frame.lens, self.width, self.height)


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
    """Name of the scene."""
    layout: str = ""
    """Disk layout it was read from."""
    name_to_view: dict[str, View] = field(init=False, repr=False, compare=False)
    """The views by name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name_to_view", {view.name: view for view in self.views})
        if len(self.name_to_view) != len(self.views):
            raise ValueError(f"{self.root} lists a photograph twice; every frame needs an image file of its own.")

    def select(self, *splits: Split) -> list[View]:
        """The views of the given splits, in file order."""
        return [view for view in self.views if view.split in splits]

    def load_image(self, view: View) -> UInt8[Tensor, "height width 3"]:
        """The undistorted photograph at the view's size; divide by 255 for [0, 1].

        Raises:
            ValueError: The file is missing, damaged or of another size than its camera says; the message names it.
        """
        image = load_image(view.frame.image_path)
        _check_size(image, view, view.frame.image_path)
        if image.shape[:2] != (view.height, view.width):
            resized = cv2.resize(image.numpy(), (view.width, view.height), interpolation=cv2.INTER_AREA)
            image = torch.from_numpy(resized)
        return self.compute_undistortion(view).apply_to_image(image)

    def load_valid_mask(self, view: View) -> Bool[Tensor, "height width"]:
        """True where a pixel of `load_image` may be used: inside the photograph and not masked.

        Raises:
            ValueError: The mask is missing, damaged or of another size than the photograph.
        """
        undistortion = self.compute_undistortion(view)
        if view.frame.mask_path is None:
            return undistortion.inside
        mask = load_mask(view.frame.mask_path)
        _check_size(mask, view, view.frame.mask_path)
        if mask.shape != (view.height, view.width):
            # As for the image, but a pixel that mixes valid with invalid ones is invalid.
            shares = cv2.resize(mask.float().numpy(), (view.width, view.height), interpolation=cv2.INTER_AREA)
            mask = torch.from_numpy(shares) > 1.0 - 1e-4
        return undistortion.apply_to_mask(mask)

    def load_depth(self, view: View) -> Float[Tensor, "height width"] | None:
        """Measured z-depth in metres, undistorted, 0 = no measurement; None where the frame has no depth file.

        Multiply by `metric_scale` for units of the training frame.
        """
        if view.frame.depth_path is None:
            return None
        depth = load_depth(view.frame.depth_path)
        _check_size(depth, view, view.frame.depth_path)
        if depth.shape != (view.height, view.width):
            resized = cv2.resize(depth.numpy(), (view.width, view.height), interpolation=cv2.INTER_NEAREST_EXACT)
            depth = torch.from_numpy(resized)
        return self.compute_undistortion(view).apply_to_depth(depth)

    def compute_undistortion(self, view: View) -> Undistortion:
        """How the photograph, at the view's size, is moved into the view."""
        return compute_undistortion(view.lens)

    def replace_camera_to_worlds(self, camera_to_worlds: Sequence[Float[Tensor, "3 4"]]) -> "PosedCapture":
        """The same capture with other poses in the training frame, one per view (a camera optimizer's result)."""
        moved = [
            replace(view, camera_to_world=camera_to_world.detach().cpu().float())
            for view, camera_to_world in zip(self.views, camera_to_worlds, strict=True)
        ]
        return replace(self, views=moved)

    def move(self, data_root: Path) -> "PosedCapture":
        """The same capture below another folder, all relative paths kept."""
        return replace(self, root=data_root, views=[_move_view(view, self.root, data_root) for view in self.views])


def create_posed_capture(
    files: CaptureFiles,
    dataparser_transform: Float[Tensor, "3 4"] | None = None,
    dataparser_scale: float = 1.0,
    downscale_factor: int = 1,
) -> PosedCapture:
    """Moves a scene folder's frames into the training frame and gives each its pinhole camera.

    Args:
        files: The scene folder as read.
        dataparser_transform: Rigid motion of the dataset's world; none by default.
        dataparser_scale: Factor after the motion, positive.
        downscale_factor: Photographs are reduced by this factor before they are undistorted, at least 1.

    Raises:
        ValueError: No usable frame, a photograph outside the root, or a scale or factor out of range.
    """
    transform = torch.eye(4)[:3] if dataparser_transform is None else dataparser_transform.detach().cpu().float()
    if not dataparser_scale > 0 or downscale_factor < 1:
        raise ValueError(
            f"Scale {dataparser_scale} must be positive and the downscale factor {downscale_factor} at least 1."
        )
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


def _create_view(frame: Frame, root: Path, transform: Tensor, scale: float, downscale_factor: int) -> View:
    try:
        name = Path(frame.image_path).relative_to(root).as_posix()
    except ValueError as error:
        raise ValueError(f"Photograph {frame.image_path} lies outside {root}; move it below that folder.") from error
    width = max(frame.lens.width // downscale_factor, 1)
    height = max(frame.lens.height // downscale_factor, 1)
    lens = frame.lens if downscale_factor == 1 else resize_lens(frame.lens, width, height)
    return View(
        name=name,
        camera_to_world=transform_camera_to_worlds(frame.camera_to_world.float(), transform, scale),
        K=compute_undistortion(lens).lens.K,
        width=width,
        height=height,
        split=frame.split,
        frame=frame,
    )


def _move_view(view: View, root: Path, new_root: Path) -> View:
    frame = view.frame
    moved = replace(
        frame,
        image_path=new_root / frame.image_path.relative_to(root),
        mask_path=None if frame.mask_path is None else new_root / frame.mask_path.relative_to(root),
        depth_path=None if frame.depth_path is None else new_root / frame.depth_path.relative_to(root),
    )
    return replace(view, frame=moved)


def _check_size(picture: Tensor, view: View, path: Path) -> None:
    height, width = picture.shape[:2]
    lens = view.frame.lens
    if (width, height) != (lens.width, lens.height):
        raise ValueError(
            f"{path} is {width}x{height}, its camera says {lens.width}x{lens.height}; "
            "correct the camera file or restore the file."
        )
