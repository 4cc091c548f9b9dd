"""Reads ScanNet's 25k frames, which the paper's ScanNet results are about, ScanNet++, and depth of other captures.

ScanNet's photographs are reduced to the depth maps' 640x480 for depth, as published. Distorted photographs of
ScanNet++, their depth and labels are undistorted together, those wider than 1600 pixels halved before, as the paper
does. Pixels that the anonymisation masks hide do not count.
"""

import csv
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from fit3d_ns.data.frames import Frame
from fit3d_ns.data.images import IGNORE_INDEX, MILLIMETRES_PER_METRE, load_image, load_mask
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.data.scannetpp import read_scannetpp
from fit3d_ns.geometry.undistortion import Undistortion, compute_undistortion, resize_lens
from fit3d_ns.probing.datasets import frames as labelled
from fit3d_ns.probing.datasets.folders import read_class_names
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet, LabelledSplit, LabelledTask, create_frame
from fit3d_ns.probing.datasets.official_sets import read_annotations, read_listed_depth
from fit3d_ns.utils.files import read_json

NYU40_NAMES = labelled.CLASS_NAMES["nyu40"]
"""ScanNet's too."""
CONVENTION = labelled.DepthConvention(max_depth=10.0, evaluation_window="eigen")
"""The public configuration evaluates ScanNet inside NYU's window."""
MAX_DEPTH = 20.0
"""Metres; the paper's range for ScanNet++, and that of other captures."""
HALVED_FROM_WIDTH = 1600
"""Wider photographs are halved (1752x1168 becomes 876x584)."""


def find_scannet(root: Path) -> Path | None:
    """The folder with the scenes at or below `root`, or None."""
    folders = (root, root / "scannet_frames_25k")
    return next((folder for folder in folders if any(map(Path.is_dir, folder.glob("scene*_*/color")))), None)


def read_scannet(root: Path, split: LabelledSplit, task: LabelledTask) -> LabelledSet:
    """Reads the scenes of the official train or validation list."""
    folder = find_scannet(root)
    if folder is None:
        raise ValueError(f"{root} holds no scene*_*/color/ folders; unpack scannet_frames_25k.zip.")
    listing = f"scannetv2_{'train' if split == 'train' else 'val'}.txt"
    path = next((place / listing for place in (root, folder, folder.parent) if (place / listing).is_file()), None)
    scenes = labelled.read_lines(path or root / listing, "it is in Tasks/Benchmark of the ScanNet repository")
    frames: list[LabelledFrame] = []
    nyu40 = labelled.create_zero_ignoring_table(len(NYU40_NAMES))
    get_raw_ids = cache(partial(_read_table, root))
    for scene in scenes:
        if not (folder / scene / "color").is_dir():
            raise ValueError(f"{path} names {scene}, which has no color/ below {folder}; download the scene.")
        kind, table = ("depth", None) if task == "depth" else ("label", nyu40)
        if task == "segmentation" and not (folder / scene / "label").is_dir():
            kind, table = "label-filt", get_raw_ids()
        for image in sorted((folder / scene / "color").glob("*.jpg")):
            target = folder / scene / kind / f"{image.stem}.png"
            maps = {"depth_path": target} if task == "depth" else {"label_path": target, "table": table}
            frame = create_frame(image, name=f"{scene}/{image.stem}", group=scene, resize_image=True, **maps)
            pose = _read_pose(folder / scene / "pose" / f"{image.stem}.txt")
            frames.append(replace(frame, camera_to_world=pose, world=(folder / scene).resolve()))
    names = NYU40_NAMES if task == "segmentation" else ()
    return LabelledSet("scannet", frames, names, depth=CONVENTION, is_sequence=True)


def _read_pose(path: Path) -> Float[Tensor, "3 4"] | None:
    """Camera to world; None where the file is missing or damaged, or where tracking was lost: not finite then."""
    try:
        values = np.array(path.read_text(encoding="utf-8").split(), dtype=float)
    except (OSError, ValueError):
        return None
    return torch.from_numpy(values[:12].reshape(3, 4)) if len(values) == 16 and np.isfinite(values).all() else None


def is_scannetpp_scene(path: Path) -> bool:
    """True for a scene folder or its `dslr` folder."""
    return (path / "dslr" / "nerfstudio").is_dir() or (path / "nerfstudio").is_dir()


def is_capture(path: Path) -> bool:
    """True for nerfstudio's layout, whose frames name their depth maps, unless a plain folder's maps are there."""
    return (path / "transforms.json").is_file() and not any((path / name).is_dir() for name in ("labels", "depths"))


def is_scannetpp_evaluation(path: Path) -> bool:
    """True for what FiT3D's authors evaluate on: halved, undistorted pictures with lists and 100 classes."""
    return any((path / f"scannetpp_{part}.txt").is_file() for part in ("train", "val"))


def find_scannetpp_scenes(root: Path) -> Path | None:
    """The folder whose children are scenes, or None."""
    return next((folder for folder in (root / "data", root) if any(map(Path.is_dir, folder.glob("*/dslr")))), None)


def read_scannetpp_labelled(
    path: Path,
    split: LabelledSplit | None,
    task: LabelledTask,
    max_depth: float | None = None,
    depth_scale: float | None = None,
) -> LabelledSet:
    """Reads a scene or capture, or the scenes of the official split list, with depth or labels, as the task needs.

    The split of a scene is its own train or test frames, or all for None; that of a root is `nvs_sem_train` or
    `nvs_sem_val`, whole scenes, and of the authors' evaluation folder the list of that name. From `max_depth` metres on
    (None: 20) depth does not count; a capture's maps have `depth_scale` units a metre (None: 1000).
    """
    convention = labelled.DepthConvention(max_depth=max_depth or MAX_DEPTH)
    if is_scannetpp_evaluation(path) and task == "depth":
        name = f"scannetpp_{'train' if split != 'test' else 'val'}.txt"
        return read_listed_depth(path, name, "scannetpp", convention)
    if is_scannetpp_evaluation(path):
        found = read_annotations(path, split or "train", "scannetpp", labelled.CLASS_NAMES["scannetpp"])
        return replace(found, is_sequence=True)
    if is_scannetpp_scene(path) or is_capture(path):
        frames, names = _read_scene(path, split, task, path, depth_scale or MILLIMETRES_PER_METRE)
        return LabelledSet(path.resolve().name, frames, names, depth=convention, is_sequence=True)
    folder = find_scannetpp_scenes(path)
    if folder is None:
        raise ValueError(f"{path} holds no ScanNet++ scenes: no data/<scene>/dslr/ and no <scene>/dslr/.")
    listing = path / "splits" / f"nvs_sem_{'train' if split != 'test' else 'val'}.txt"
    scenes = labelled.read_lines(listing, "download the splits folder of ScanNet++")
    frames, names = [], ()
    for scene in scenes:
        if not (folder / scene / "dslr").is_dir():
            raise ValueError(f"{listing} names {scene}, which has no dslr/ below {folder}; download the scene.")
        scene_frames, scene_names = _read_scene(folder / scene, None, task, path)
        if names and scene_names != names:
            raise ValueError(f"Scene {scene} has other classes than {scenes[0]}; use one class list for all scenes.")
        frames, names = [*frames, *scene_frames], scene_names
    return LabelledSet("scannetpp", frames, names, depth=convention, is_sequence=True)


def _read_table(root: Path) -> labelled.LabelTable:
    """From raw ids to NYU40 classes, by the table that comes with ScanNet."""
    path = root / "scannetv2-labels.combined.tsv"
    if not path.is_file():
        raise ValueError(f"No {path}, which says what the raw ids in label-filt/ mean; download it with ScanNet.")
    mapping = {0: IGNORE_INDEX}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if not (row.get("id") or "").isdigit() or not (row.get("nyu40id") or "").isdigit():
                raise ValueError(f"{path} has a row without the numbers `id` and `nyu40id`; download it again.")
            mapping[int(row["id"])] = int(row["nyu40id"]) - 1 if int(row["nyu40id"]) > 0 else IGNORE_INDEX
    return labelled.LabelTable(len(NYU40_NAMES), mapping)


def _read_scene(
    path: Path, split: LabelledSplit | None, task: LabelledTask, root: Path, depth_scale: float = MILLIMETRES_PER_METRE
) -> tuple[list[LabelledFrame], tuple[str, ...]]:
    dslr = path / "dslr" if (path / "dslr").is_dir() else path
    find_label, class_names, on_fisheye = _find_labels(dslr, root) if task == "segmentation" else (None, (), False)
    is_foreign = is_capture(path)
    capture = read_capture(path) if is_foreign else read_scannetpp(path, "fisheye" if on_fisheye else "auto")
    if task == "depth" and not is_foreign and not any(frame.depth_path for frame in capture.frames):
        if not (dslr / "render_depth").is_dir():
            raise ValueError(f"{path} has no dslr/render_depth/, which a depth probe needs; download or render it.")
        # Depth belongs to the distorted pictures; both are undistorted here.
        capture = read_scannetpp(path, variant="fisheye")
    frames = []
    for frame in capture.frames:
        if frame.is_bad or (split is not None and (frame.split == "test") != (split == "test")):
            continue
        if task == "depth" and frame.depth_path is None:
            raise ValueError(f"{frame.image_path} has no depth map (render_depth/, depth_file_path); add or mark it.")
        name = frame.image_path.relative_to(path).with_suffix("").as_posix() if is_foreign else frame.image_path.stem
        plain = create_frame(
            frame.image_path,
            name=f"{capture.scene_id}/{name}",
            group=capture.scene_id,
            label_path=find_label and find_label(frame.image_path),
            table=labelled.LabelTable(len(class_names)),
            depth_path=None if find_label else frame.depth_path,
            depth_scale=depth_scale,
        )
        masks = (frame.mask_path,) if frame.mask_path else ()
        read = replace(
            plain,
            files=(*plain.files, *masks),
            camera_to_world=frame.camera_to_world,
            world=path.resolve(),
            load_image=partial(_load_image, frame),
            load_labels=plain.load_labels and partial(_load_map, frame, plain.load_labels, IGNORE_INDEX),
            load_depth=plain.load_depth and partial(_load_map, frame, plain.load_depth, 0),
        )
        frames.append(read)
    if not frames:
        raise ValueError(f"{path} has no {split or 'usable'} frames; see its train and test lists.")
    return frames, class_names


def _find_labels(dslr: Path, root: Path) -> tuple[Callable[[Path], Path], tuple[str, ...], bool]:
    """From photographs to label maps, the names of the classes, and whether maps belong to the distorted pictures."""
    scene = dslr.resolve().parent
    if (dslr / "labels").is_dir():
        places = (scene, dslr, dslr / "labels", scene.parent)
        listing = next((place / "classes.json" for place in places if (place / "classes.json").is_file()), None)
        if listing is None:
            raise ValueError(f"{dslr / 'labels'} comes without classes.json; write it into {scene}.")
        names, content = read_class_names(listing), read_json(listing)
        on_fisheye = isinstance(content, dict) and content.get("variant") == "fisheye"
        return lambda image: dslr / "labels" / f"{image.stem}.png", names, on_fisheye
    folder = root / "semantics" / scene.name
    if not folder.is_dir():
        problem = f"Scene {scene} has no labels: neither dslr/labels/ nor {folder} exists"
        raise ValueError(f"{problem}; write them with the ScanNet++ toolkit (semantics_2d) first.")
    listing = root / "metadata" / "semantic_benchmark" / "top100.txt"
    names = tuple(labelled.read_lines(listing, "download the metadata folder of ScanNet++"))
    # The toolkit appends to the whole name: DSC00001.JPG.png.
    return lambda image: folder / f"{image.name}.png", names, False


def _load_image(frame: Frame) -> UInt8[Tensor, "height width 3"]:
    undistortion = _compute_undistortion(frame)
    return undistortion.apply_to_image(_resize(load_image(frame.image_path), undistortion, cv2.INTER_CUBIC))


def _load_map(
    frame: Frame, load: Callable[[], Shaped[Tensor, "height width"]], fill: int
) -> Shaped[Tensor, "new_height new_width"]:
    """Labels or depth on the undistorted image; `fill` is what does not count."""
    undistortion, values = _compute_undistortion(frame), load()
    # By nearest neighbour, because classes and depths must not be mixed.
    moved = undistortion.apply_to_depth(_resize(values.float(), undistortion, cv2.INTER_NEAREST_EXACT))
    valid = undistortion.inside
    if frame.mask_path is not None:
        mask = _resize(load_mask(frame.mask_path).float(), undistortion, cv2.INTER_NEAREST_EXACT)
        valid = undistortion.apply_to_mask(mask > 0.5)
    return torch.where(valid, moved, fill).to(values.dtype)


def _resize(
    picture: Shaped[Tensor, "height width *channels"], undistortion: Undistortion, interpolation: int
) -> Shaped[Tensor, "new_height new_width *channels"]:
    """Resizes a picture to the size that is probed."""
    size = (undistortion.lens.width, undistortion.lens.height)
    return torch.from_numpy(cv2.resize(picture.numpy(), size, interpolation=interpolation))


def _compute_undistortion(frame: Frame) -> Undistortion:
    lens = frame.lens
    if lens.width > HALVED_FROM_WIDTH:
        lens = resize_lens(lens, lens.width // 2, lens.height // 2)
    return compute_undistortion(lens)
