"""Reads labelled pictures from a plain folder.

    <root>/
      images/*.jpg               or images/train/*.jpg and images/test/*.jpg
      labels/*.png               8-bit class indices, 255 = does not count; same path and stem as the image
      depths/*.png               16-bit millimetres, 0 = no measurement; same path and stem as the image
      classes.json               {"classes": ["sky", ...], "ignore_index": 255}

`labels/` with `classes.json` is needed for segmentation, `depths/` for depth. Folders may be nested; those below
`images/` (after `train` or `test`) are the groups, scenes or videos for example.
"""

from pathlib import Path

from fit3d_ns.data.images import list_images
from fit3d_ns.probing.datasets.files import LabelTable, create_frame
from fit3d_ns.probing.datasets.frames import (
    IGNORE_INDEX,
    DepthConvention,
    LabelledFrame,
    LabelledSet,
    LabelledSplit,
    ProbeTask,
)
from fit3d_ns.utils.files import read_json

DEFAULT_DEPTH_SCALE = 1000.0
"""Units per metre of 16-bit depth maps, where nothing else is said."""


def read_folder(
    root: Path,
    split: LabelledSplit,
    task: ProbeTask,
    *,
    depth_scale: float = DEFAULT_DEPTH_SCALE,
    max_depth: float | None = None,
) -> LabelledSet:
    """Reads one split; a folder without `train` and `test` below `images/` gives all its frames to either.

    Args:
        root: The folder drawn above.
        split: Which part.
        task: Decides whether labels or depth are needed.
        depth_scale: Units of the depth maps per metre.
        max_depth: Depth from here on does not count, metres; 10 by default.

    Raises:
        ValueError: A piece is missing; the message names it.
    """
    images = root / "images"
    if not images.is_dir():
        raise ValueError(f"{root} has no folder images/; a labelled folder has images/, labels/ or depths/.")
    has_splits = (images / "train").is_dir() or (images / "test").is_dir()
    top = images / split if has_splits else images
    if not top.is_dir():
        raise ValueError(f"{root} has no images/{split}/ beside its other split; add it or give another folder.")
    paths = list_images(top)
    if not paths:
        raise ValueError(f"{top} holds no images (jpg, png, bmp, webp); the {split} split is empty.")
    kind = "labels" if task == "segmentation" else "depths"
    if not (root / kind).is_dir():
        raise ValueError(f"{root} has no folder {kind}/, which a {task} probe needs.")
    class_names = read_class_names(root / "classes.json") if task == "segmentation" else ()
    table = LabelTable(len(class_names))
    frames: list[LabelledFrame] = []
    for path in paths:
        relative = path.relative_to(images).with_suffix(".png")
        target = root / kind / relative
        if not target.is_file():
            raise ValueError(f"Image {path} has no {kind[:-1]} map {target}; add it or remove the image.")
        frames.append(
            create_frame(
                path,
                name=relative.with_suffix("").as_posix(),
                group=path.parent.relative_to(top).as_posix(),
                label_path=target if kind == "labels" else None,
                table=table,
                depth_path=target if kind == "depths" else None,
                depth_scale=depth_scale,
            )
        )
    # 20 m is ScanNet++'s range, 10 m that of hand-held sensors.
    convention = DepthConvention(max_depth=max_depth or 10.0)
    return LabelledSet(root.name, frames, class_names, depth=convention)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Names of the classes out of `classes.json`: `{"classes": [...]}` or a bare list.

    Raises:
        ValueError: The file is missing, or is no list of different names.
    """
    if not path.is_file():
        raise ValueError(f'No class list {path}; write {{"classes": ["name of class 0", ...]}}.')
    content = read_json(path)
    names = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has no list `classes` of names; correct the file.")
    if len(names) > IGNORE_INDEX:
        raise ValueError(f"{path} lists {len(names)} classes; 8-bit label maps hold at most {IGNORE_INDEX}.")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path} lists the class {twice!r} twice; correct the file.")
    if isinstance(content, dict) and content.get("ignore_index", IGNORE_INDEX) != IGNORE_INDEX:
        raise ValueError(f"{path} has ignore_index {content['ignore_index']}, expected {IGNORE_INDEX}.")
    return tuple(names)
