"""Reads ScanNet++ scenes with depth or labels: one scene, or the whole download.

    <scene>/dslr/                        as `scannetpp.py` draws it, with
      render_depth/*.png                 16-bit millimetres, aligned with resized_images
      labels/*.png                       8-bit class indices of the list below, 255 = does not count
    <scene>/classes.json                 or dslr/classes.json, dslr/labels/classes.json: {"classes": [...]}

    <root>/                              the whole download
      data/<scene>/dslr/                 or the scenes directly below the root
      splits/nvs_sem_{train,val}.txt     scene names
      metadata/semantic_benchmark/top100.txt
      semantics/<scene>/<image>.png      labels, as the official toolkit's `semantics_2d` writes them with top100.txt

Distorted photographs, their depth and labels are undistorted together, those wider than 1600 pixels halved before, as
the paper does. Pixels that the anonymisation masks hide do not count. A single scene gives the frames of its own
train or test list; frames marked as bad are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from fit3d_ns.data.frames import Frame
from fit3d_ns.data.images import load_image, load_mask
from fit3d_ns.data.scannetpp import read_scannetpp
from fit3d_ns.geometry.undistortion import Undistortion, compute_undistortion, resize_lens
from fit3d_ns.probing.datasets.files import LabelTable, create_frame, read_lines
from fit3d_ns.probing.datasets.folders import read_class_names
from fit3d_ns.probing.datasets.frames import (
    IGNORE_INDEX,
    DepthConvention,
    LabelledFrame,
    LabelledSet,
    LabelledSplit,
    ProbeTask,
)

MAX_DEPTH = 20.0
"""Metres; the paper's range for ScanNet++."""
HALVED_FROM_WIDTH = 1600
"""Wider photographs are halved (1752x1168 becomes 876x584)."""


@dataclass(frozen=True)
class _LabelSource:
    folder: Path
    keeps_suffix: bool
    class_names: tuple[str, ...]


def is_scannetpp_scene(path: Path) -> bool:
    """True for a scene folder or its `dslr` folder."""
    return (path / "dslr" / "nerfstudio").is_dir() or (path / "nerfstudio").is_dir()


def find_scannetpp_scenes(root: Path) -> Path | None:
    """The folder whose children are scenes, or None."""
    for folder in (root / "data", root):
        if folder.is_dir() and any((child / "dslr").is_dir() for child in folder.iterdir()):
            return folder
    return None


def read_scannetpp_labelled(
    path: Path, split: LabelledSplit | None, task: ProbeTask, max_depth: float | None = None
) -> LabelledSet:
    """Reads a scene, or the scenes of the official split list, with depth or labels, whichever the task needs.

    The split of a scene is its own train or test frames, or all for None; that of a root is `nvs_sem_train` or
    `nvs_sem_val`, whole scenes. From `max_depth` metres on (None: 20) depth does not count.
    """
    if task == "classification":
        raise ValueError("ScanNet++ has no classes of whole pictures; probe segmentation or depth.")
    convention = DepthConvention(max_depth=max_depth or MAX_DEPTH)
    if is_scannetpp_scene(path):
        frames, names = _read_scene(path, split, task, path)
        return LabelledSet(path.resolve().name, frames, names, depth=convention, is_sequence=True)
    folder = find_scannetpp_scenes(path)
    if folder is None:
        raise ValueError(f"{path} holds no ScanNet++ scenes: no data/<scene>/dslr/ and no <scene>/dslr/.")
    listing = path / "splits" / f"nvs_sem_{'train' if split != 'test' else 'val'}.txt"
    scenes = read_lines(listing, "download the splits folder of ScanNet++")
    frames, names = [], ()
    for scene in scenes:
        if not (folder / scene / "dslr").is_dir():
            raise ValueError(f"{listing} names {scene}, which has no dslr/ below {folder}; download the scene.")
        scene_frames, scene_names = _read_scene(folder / scene, None, task, path)
        if names and scene_names != names:
            raise ValueError(f"Scene {scene} has other classes than {scenes[0]}; use one class list for all scenes.")
        frames, names = [*frames, *scene_frames], scene_names
    return LabelledSet("scannetpp", frames, names, depth=convention, is_sequence=True)


def _read_scene(
    path: Path, split: LabelledSplit | None, task: ProbeTask, root: Path
) -> tuple[list[LabelledFrame], tuple[str, ...]]:
    dslr = path / "dslr" if (path / "dslr").is_dir() else path
    capture = read_scannetpp(path)
    source = _find_labels(dslr, root) if task == "segmentation" else None
    if task == "depth" and not any(frame.depth_path for frame in capture.frames):
        if not (dslr / "render_depth").is_dir():
            raise ValueError(f"{path} has no dslr/render_depth/, which a depth probe needs; download or render it.")
        # Depth belongs to the distorted pictures; both are undistorted here.
        capture = read_scannetpp(path, variant="fisheye")
    scene_id = capture.scene_id
    frames = []
    for frame in capture.frames:
        if frame.is_bad or (split is not None and (frame.split == "test") != (split == "test")):
            continue
        if task == "depth" and frame.depth_path is None:
            raise ValueError(
                f"Image {frame.image_path} has no depth map in {dslr / 'render_depth'}; render it or mark the frame."
            )
        frames.append(_create(frame, scene_id, source))
    if not frames:
        raise ValueError(f"{path} has no {split or 'usable'} frames; see dslr/train_test_lists.json.")
    return frames, source.class_names if source else ()


def _find_labels(dslr: Path, root: Path) -> _LabelSource:
    scene = dslr.resolve().parent
    if (dslr / "labels").is_dir():
        places = (scene, dslr, dslr / "labels", scene.parent)
        listing = next((place / "classes.json" for place in places if (place / "classes.json").is_file()), None)
        if listing is None:
            raise ValueError(f"{dslr / 'labels'} comes without classes.json; write it into {scene}.")
        return _LabelSource(dslr / "labels", False, read_class_names(listing))
    folder = root / "semantics" / scene.name
    if not folder.is_dir():
        raise ValueError(
            f"Scene {scene} has no labels: neither dslr/labels/ nor {folder} exists; "
            "write them with the ScanNet++ toolkit (semantics_2d) first."
        )
    listing = root / "metadata" / "semantic_benchmark" / "top100.txt"
    names = tuple(read_lines(listing, "download the metadata folder of ScanNet++"))
    # The toolkit appends to the whole name: DSC00001.JPG.png.
    return _LabelSource(folder, True, names)


def _create(frame: Frame, scene_id: str, source: _LabelSource | None) -> LabelledFrame:
    label_path, depth_path = None, frame.depth_path
    if source is not None:
        image_name = frame.image_path.name if source.keeps_suffix else frame.image_path.stem
        label_path, depth_path = source.folder / f"{image_name}.png", None
    plain = create_frame(
        frame.image_path,
        name=f"{scene_id}/{frame.image_path.stem}",
        group=scene_id,
        label_path=label_path,
        table=LabelTable(len(source.class_names)) if source else None,
        depth_path=depth_path,
    )
    return replace(
        plain,
        load_image=partial(_load_image, frame),
        load_labels=plain.load_labels and partial(_load_map, frame, plain.load_labels, IGNORE_INDEX),
        load_depth=plain.load_depth and partial(_load_map, frame, plain.load_depth, 0),
        files=(*plain.files, *((frame.mask_path,) if frame.mask_path else ())),
    )


def _load_image(frame: Frame) -> UInt8[Tensor, "height width 3"]:
    image, undistortion = load_image(frame.image_path), _compute_undistortion(frame)
    size = (undistortion.lens.width, undistortion.lens.height)
    if (image.shape[1], image.shape[0]) != size:
        image = torch.from_numpy(cv2.resize(image.numpy(), size, interpolation=cv2.INTER_CUBIC))
    return undistortion.apply_to_image(image)


def _load_map(
    frame: Frame, load: Callable[[], Shaped[Tensor, "height width"]], fill: int
) -> Shaped[Tensor, "new_height new_width"]:
    """Labels or depth on the undistorted image; `fill` is what does not count."""
    undistortion, values = _compute_undistortion(frame), load()
    moved = undistortion.apply_to_depth(_reduce(values.float(), undistortion))
    return torch.where(_load_valid_mask(frame, undistortion), moved, fill).to(values.dtype)


def _load_valid_mask(frame: Frame, undistortion: Undistortion) -> Bool[Tensor, "height width"]:
    if frame.mask_path is None:
        return undistortion.inside
    return undistortion.apply_to_mask(_reduce(load_mask(frame.mask_path).float(), undistortion) > 0.5)


def _reduce(values: Float[Tensor, "height width"], undistortion: Undistortion) -> Float[Tensor, "new_height new_width"]:
    """To the size that is probed, by nearest neighbour, because classes and depths must not be mixed."""
    size = (undistortion.lens.width, undistortion.lens.height)
    if values.shape == size[::-1]:
        return values
    return torch.from_numpy(cv2.resize(values.numpy(), size, interpolation=cv2.INTER_NEAREST_EXACT))


def _compute_undistortion(frame: Frame) -> Undistortion:
    lens = frame.lens
    if lens.width > HALVED_FROM_WIDTH:
        lens = resize_lens(lens, lens.width // 2, lens.height // 2)
    return compute_undistortion(lens)
