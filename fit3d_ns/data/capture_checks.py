"""What is done with a capture once its layout is read: which photographs are there, do they fit their cameras, do the
cameras see the seed points.

What can be put right without guessing is put right and said in the description: photographs that are missing or were
resized, a world far away from its origin. Everything else is a ValueError that names the piece.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data.frames import CaptureFiles, Frame
from fit3d_ns.data.images import IMAGE_SUFFIXES, check_depth_mode, has_aspect, load_image, read_image_header
from fit3d_ns.geometry.cameras import transform_points, viewmats_from_camera_to_worlds
from fit3d_ns.geometry.undistortion import distort_points, resize_lens
from fit3d_ns.utils.selection import select_evenly

_FAR = 100.0
"""Worlds whose cameras are so many times further from the origin than from each other are moved to it."""
_FEWEST_POINTS = 100
"""Fewer seed points tell nothing about the cameras."""
_SAMPLED_POINTS, _SAMPLED_CAMERAS, _COMPARED_CAMERAS = 5000, 32, 6
_NOT_IN_VIEW, _IN_VIEW = 0.005, 0.05
"""Shares of the seed points that some camera sees: below the first it is a fault, above the second an explanation."""
_MUCH_WORSE, _SMALL_DIFFERENCE = 1.8, 8.0
"""The right reading brings colours nearer by at least this factor; below the second, of 255, they are near."""
_OPENCV_AXES = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
_POSE_FAULTS = {
    "its poses have OpenCV's axes (x right, y down, z forward); negate the second and third column": 1,
    "its poses are world-to-camera in OpenCV's axes; invert them, then negate the second and third column": 2,
    "its poses are world-to-camera; invert them": 3,
}
_MOVES = {
    "(x, z, -y)": [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, -1.0, 0.0, 0.0]],
    "(x, -z, y)": [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, 0.0]],
    "(y, x, -z)": [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]],
}
"""How the worlds of COLMAP, nerfstudio and ScanNet++ become each other."""


def check_capture(files: CaptureFiles, is_strict: bool = False) -> CaptureFiles:
    """The capture with the photographs that are there, lenses of their sizes and float32 numbers near the origin.

    Frames without a photograph are left out where most are there, unless `is_strict`. ValueError where one is refused,
    a photograph, mask or depth map is damaged or of another shape than its camera, or no camera sees any seed point.
    """
    files, said_missing = _leave_out_missing(files, is_strict)
    frames, said_resized = _fit_lenses(files.frames)
    files, said_far = _move_to_origin(replace(files, frames=frames))
    _check_conventions(files)
    said = [sentence for sentence in (files.description, said_missing, said_resized, said_far) if sentence]
    return replace(files, description=" ".join(said))


def _leave_out_missing(files: CaptureFiles, is_strict: bool) -> tuple[CaptureFiles, str]:
    frames = [frame if frame.is_bad else _find_other_suffix(frame) for frame in files.frames]
    missing = {index for index, frame in enumerate(frames) if not frame.is_bad and not frame.image_path.is_file()}
    if not missing:
        return replace(files, frames=frames), ""
    usable = sum(not frame.is_bad for frame in frames)
    first = frames[min(missing)].image_path
    if is_strict or 2 * len(missing) >= usable:
        problem = f"Image {first} is missing, as {len(missing)} of {usable} photographs of {files.root} are"
        raise ValueError(f"{problem}; restore them or take their frames out of the camera file.")
    return replace(files, frames=[frame for index, frame in enumerate(frames) if index not in missing]), (
        f"{len(missing)} of {usable} photographs are missing, such as {first.name}: their frames are left out."
    )


def _find_other_suffix(frame: Frame) -> Frame:
    """The frame with the photograph of the same name that is there, where one was converted (`a.PNG` to `a.jpg`)
    or files of older tools leave the suffix out."""
    path = frame.image_path
    if path.is_file() or not path.parent.is_dir():
        return frame
    suffixes = [suffix for lower in IMAGE_SUFFIXES for suffix in (lower, lower.upper())]
    # What follows a dot may be a part of the name: `frame.0001`.
    others = (path.with_name(stem + suffix) for stem in (path.name, path.stem) for suffix in suffixes)
    found = next(filter(Path.is_file, others), None)
    return frame if found is None else replace(frame, image_path=found)


def _fit_lenses(frames: Sequence[Frame]) -> tuple[list[Frame], str]:
    """Frames with lenses of their photographs' sizes, and a sentence about those that were resized."""
    fitted = [frame if frame.is_bad else _fit_lens(frame) for frame in frames]
    resized = [(given, found) for given, found in zip(frames, fitted, strict=True) if given.lens != found.lens]
    if not resized:
        return fitted, ""
    given, found = resized[0]
    return fitted, (
        f"{len(resized)} photographs are of another size than their cameras say (such as {found.image_path.name}: "
        f"{found.lens.width}x{found.lens.height}, not {given.lens.width}x{given.lens.height}): intrinsics are scaled."
    )


def _fit_lens(frame: Frame) -> Frame:
    """Reads the headers of a frame's files, which must have the shape that the camera says."""
    lens = frame.lens
    size = read_image_header(frame.image_path).size
    if size != (lens.width, lens.height):
        sizes = f"Image {frame.image_path} is {size[0]}x{size[1]}, its camera says {lens.width}x{lens.height}"
        if not has_aspect(size, (lens.width, lens.height)):
            turned = size[::-1] == (lens.width, lens.height) or has_aspect(size[::-1], (lens.width, lens.height))
            what = (
                "the camera belongs to the picture turned upright; turn the pixels (`mogrify -auto-orient`)"
                if turned
                else "correct w and h or use the images that belong to the cameras"
            )
            raise ValueError(f"{sizes}; {what}.")
        frame = replace(frame, lens=resize_lens(lens, *size))
    for path, what in ((frame.mask_path, "Mask"), (frame.depth_path, "Depth map")):
        if path is None:
            continue
        if path.suffix in (".npy", ".npz", ".exr") and what == "Depth map":
            raise ValueError(f"{what} {path} is an array; write 16-bit grey PNGs in millimetres.")
        header = read_image_header(path, what)
        if header.size not in (size, (lens.width, lens.height)) and not has_aspect(header.size, size):
            problem = f"{what} {path} is {header.width}x{header.height}, its image {size[0]}x{size[1]}"
            raise ValueError(f"{problem}; make it again with the image's aspect or remove it.")
        if what == "Depth map":
            check_depth_mode(path, header.mode)
    return frame


def _move_to_origin(files: CaptureFiles) -> tuple[CaptureFiles, str]:
    """float32 has 7 digits: of georeferenced coordinates they would leave nothing of a room."""
    usable = [frame for frame in files.frames if not frame.is_bad]
    offset, said = torch.zeros(3, dtype=torch.float64), ""
    if usable:
        centres = torch.stack([frame.camera_to_world[:, 3].double() for frame in usable])
        spread = float((centres.amax(dim=0) - centres.amin(dim=0)).max())
        if float(centres.abs().max()) > _FAR * max(spread, 1.0):
            offset = centres.mean(dim=0).round()
            place = ", ".join(f"{value:.0f}" for value in offset.tolist())
            said = f"Its world begins at ({place}), far from its origin."
    frames = [replace(frame, camera_to_world=_shift(frame.camera_to_world, offset)) for frame in files.frames]
    points = files.points
    if points is not None:
        points = replace(points, xyz=(points.xyz.double() - offset).float())
    colmap_to_world = None if files.colmap_to_world is None else _shift(files.colmap_to_world, offset)
    origin = tuple(offset.tolist())
    return replace(files, frames=frames, points=points, colmap_to_world=colmap_to_world, origin=origin), said


def _shift(matrix: Float[Tensor, "3 4"], offset: Float[Tensor, " 3"]) -> Float[Tensor, "3 4"]:
    return torch.cat([matrix[:, :3].double(), (matrix[:, 3].double() - offset)[:, None]], dim=1).float()


@dataclass(frozen=True)
class _View:
    """How cameras see points under one reading of poses and worlds."""

    share: float
    """Share of the points that are in front of some camera and inside its picture."""
    difference: float = math.nan
    """Median difference between the points' colours and the pixels there, of 255, mean over photographs."""
    num_compared: int = 0


def _check_conventions(files: CaptureFiles) -> None:
    """Raises ValueError where cameras see no seed points, or see them where the photographs have other colours.

    The sentence names the convention under which points and photographs belong together. A room's cameras see some of
    its points in any convention; there the colours tell.
    """
    if files.points is None or len(files.points.xyz) < _FEWEST_POINTS:
        return
    frames = select_evenly([frame for frame in files.frames if not frame.is_bad], _SAMPLED_CAMERAS)
    num_points = len(files.points.xyz)
    chosen = torch.linspace(0, num_points - 1, min(num_points, _SAMPLED_POINTS)).long()
    points, rgb = files.points.xyz[chosen].double(), files.points.rgb[chosen].float()
    compared = select_evenly(frames, _COMPARED_CAMERAS) if bool((rgb != rgb[:1]).any()) else []
    pictures = {}
    for frame in compared:
        # A photograph that is damaged is reported by whoever needs it.
        with suppress(ValueError):
            pictures[frame.image_path] = load_image(frame.image_path).float()
    given = _view(points, rgb, frames, pictures)
    worlds = {f"its points (x, y, z) are {name} in the world of the poses; move them": m for name, m in _MOVES.items()}
    if files.colmap_to_world is not None:
        worlds["its points are in COLMAP's world; move them by applied_transform"] = files.colmap_to_world.tolist()
    read = {reason: [_reinterpret(frame, fault) for frame in frames] for reason, fault in _POSE_FAULTS.items()}
    views = {reason: _view(points, rgb, others, pictures) for reason, others in read.items()}
    for reason, matrix in worlds.items():
        moved = transform_points(points, torch.tensor(matrix, dtype=torch.float64), 1.0)
        views[reason] = _view(moved, rgb, frames, pictures)
    if given.share < _NOT_IN_VIEW:
        best = max(views, key=lambda reason: views[reason].share)
        likely = (
            f"probably {best} ({views[best].share:.0%} would be in view)"
            if views[best].share >= _IN_VIEW
            else "poses and points are of different worlds; correct them, or take the points out of the capture"
        )
        raise ValueError(f"No camera of {files.root} sees any of its {num_points} seed points: {likely}.")
    better = {
        reason: view.difference
        for reason, view in views.items()
        if 4 * view.num_compared >= given.num_compared and _MUCH_WORSE * view.difference < given.difference
    }
    if better and given.difference > _SMALL_DIFFERENCE:
        best = min(better, key=lambda reason: better[reason])
        raise ValueError(
            f"Cameras of {files.root} see its seed points where its photographs show something else: probably {best} "
            f"(colours would differ by {better[best]:.0f} instead of {given.difference:.0f} of 255)."
        )


def _view(
    points: Float[Tensor, "points 3"],
    rgb: Float[Tensor, "points 3"],
    frames: Sequence[Frame],
    pictures: Mapping[Path, Float[Tensor, "height width 3"]],
) -> _View:
    seen = torch.zeros(len(points), dtype=torch.bool)
    medians, num_compared = [], 0
    for frame in frames:
        viewmat = viewmats_from_camera_to_worlds(frame.camera_to_world.double())
        in_camera = points @ viewmat[:3, :3].T + viewmat[:3, 3]
        ahead = (in_camera[:, 2] > 1e-6).nonzero()[:, 0]
        pixels = torch.from_numpy(distort_points(frame.lens, (in_camera[ahead, :2] / in_camera[ahead, 2:]).numpy()))
        size = torch.tensor([frame.lens.width, frame.lens.height])
        inside = ((pixels >= 0.0) & (pixels < size)).all(dim=1)
        seen[ahead[inside]] = True
        if frame.image_path in pictures and bool(inside.any()):
            columns, rows = pixels[inside].long().unbind(dim=1)
            difference = (pictures[frame.image_path][rows, columns] - rgb[ahead[inside]]).abs().mean(dim=1)
            medians.append(float(difference.median()))
            num_compared += len(difference)
    return _View(float(seen.float().mean()), sum(medians) / len(medians) if medians else math.nan, num_compared)


def _reinterpret(frame: Frame, fault: int) -> Frame:
    """The frame if its pose had been written in another convention."""
    pose = torch.cat([frame.camera_to_world.double(), _OPENCV_AXES[3:]])
    if fault > 1:
        pose = torch.linalg.inv(pose)
    return replace(frame, camera_to_world=(pose @ _OPENCV_AXES if fault < 3 else pose)[:3])
