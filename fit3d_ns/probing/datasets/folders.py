"""Reads plain folders: photographs with label or depth maps, or pictures sorted into one folder per class.

docs/datasets.md draws them.
"""

from functools import partial
from pathlib import Path
from typing import Any

from fit3d_ns.data.images import IGNORE_INDEX, MILLIMETRES_PER_METRE, is_hidden, list_images, load_image
from fit3d_ns.probing.datasets import frames as labelled
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet, LabelledSplit, LabelledTask
from fit3d_ns.utils.files import read_json


def read_folder(
    root: Path, split: LabelledSplit, task: LabelledTask, depth_scale: float | None, max_depth: float | None
) -> LabelledSet:
    """Reads one split of the first layout, with labels or depth, whichever the task needs.

    A folder without `train` and `test` below `images/` gives all its frames to either. Depth maps have `depth_scale`
    units per metre (None: 1000); from `max_depth` metres on depth does not count (None: 10, as of hand-held sensors).
    """
    images = root / "images"
    has_splits = (images / "train").is_dir() or (images / "test").is_dir()
    top = images / split if has_splits else images
    paths = list_images(top)
    if not paths:
        raise ValueError(f"{top} holds no images (jpg, png, bmp, webp); the {split} split is empty.")
    kind = "labels" if task == "segmentation" else "depths"
    if not (root / kind).is_dir():
        raise ValueError(f"{root} has no folder {kind}/, which a {task} probe needs.")
    class_names = read_class_names(root / "classes.json") if task == "segmentation" else ()
    table = labelled.LabelTable(len(class_names))
    scale = depth_scale or MILLIMETRES_PER_METRE
    frames: list[LabelledFrame] = []
    for path in paths:
        relative = path.relative_to(images).with_suffix(".png")
        target = root / kind / relative
        if not target.is_file():
            raise ValueError(f"Image {path} has no {kind[:-1]} map {target}; add it or remove the image.")
        given: dict[str, Any] = {"label_path" if kind == "labels" else "depth_path": target}
        given |= {"name": relative.with_suffix("").as_posix(), "group": path.parent.relative_to(top).as_posix()}
        frames.append(labelled.create_frame(path, table=table, depth_scale=scale, **given))
    return LabelledSet(root.name, frames, class_names, depth=labelled.DepthConvention(max_depth=max_depth or 10.0))


def read_class_names(path: Path) -> tuple[str, ...]:
    """Names of the classes out of `classes.json`: `{"classes": [...]}` or a bare list of different names."""
    if not path.is_file():
        raise ValueError(f'No class list {path}; write {{"classes": ["name of class 0", ...]}}.')
    content = read_json(path)
    names = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has no list `classes` of names; correct the file.")
    check_class_names(names, path)
    if isinstance(content, dict) and content.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
        raise ValueError(f"{path} has ignore_index {content['ignore_index']}, expected {IGNORE_INDEX}.")
    return tuple(names)


def check_class_names(names: list[str], path: Path) -> None:
    """Raises ValueError unless the names, which stand in a file, can be the classes of 8-bit label maps."""
    if len(names) > IGNORE_INDEX:
        raise ValueError(f"{path} lists {len(names)} classes; 8-bit label maps hold at most {IGNORE_INDEX}.")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path} lists the class {twice!r} twice; correct the file.")


def read_image_folder(root: Path, split: LabelledSplit) -> LabelledSet:
    """Reads one part of the second layout; a root whose folders are classes gives all its pictures to either."""
    parts = ("train",) if split == "train" else ("val", "test")
    top = next((root / part for part in parts if (root / part).is_dir()), root)
    if top == root and any((root / part).is_dir() for part in ("train", "val", "test")):
        raise ValueError(f"{root} has no {' or '.join(part + '/' for part in parts)} next to its other part; add it.")
    children = top.iterdir() if top.is_dir() else ()
    classes = sorted(child.name for child in children if child.is_dir() and not is_hidden(child.name))
    if not classes:
        raise ValueError(f"{top} has no folders; expected one folder of pictures per class.")
    frames: list[LabelledFrame] = []
    for index, name in enumerate(classes):
        paths = list_images(top / name)
        if not paths:
            raise ValueError(f"Class folder {top / name} holds no pictures; remove it or fill it.")
        for path in paths:
            relative = path.relative_to(top).as_posix()
            load = partial(load_image, path, upright=True)
            frames.append(LabelledFrame(relative, load, class_index=index, files=(path,)))
    return LabelledSet(root.name, frames, tuple(classes))
