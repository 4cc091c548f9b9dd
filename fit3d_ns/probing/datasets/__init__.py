"""`read_labelled_set` recognises the labelled layout of a folder and reads it; there is one reader per layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fit3d_ns.probing.datasets import folders, official_sets, scannet
from fit3d_ns.probing.datasets.frames import LabelledSet, LabelledSplit, LabelledTask
from fit3d_ns.utils.limits import Limited, Limits

LabelledLayout = Literal["scannetpp", "scannet", "nyu", "kitti", "ade20k", "voc", "capture", "folder", "imagefolder"]
_TASKS: dict[LabelledLayout, tuple[LabelledTask, ...]] = {
    **dict.fromkeys(("scannetpp", "scannet", "nyu", "folder"), ("segmentation", "depth")),
    **dict.fromkeys(("kitti", "capture"), ("depth",)),
    **{"ade20k": ("segmentation",), "voc": ("segmentation",), "imagefolder": ("classification",)},
}
"""What each layout has targets for."""


@dataclass(frozen=True)
class LabelledOptions(Limited):
    """What a folder does not say about itself; official sets keep their own unit and range of depth."""

    layout: LabelledLayout | Literal["auto"] = "auto"
    """Disk layout of the folders; `auto` looks at each folder."""
    nyu_classes: Literal[13, 40] | None = None
    """Class list of NYUv2 (segmentation); 13 by default, as in the paper. Refused where no NYUv2 is given."""
    depth_scale: Annotated[float | None, Limits(above=0)] = None
    """Units per metre of the depth maps of plain folders and captures, 1000 by default; official sets know theirs."""
    max_depth: Annotated[float | None, Limits(above=0)] = None
    """Depths of this many metres or more do not count; by default 20 for captures, 10 for plain folders."""


def find_labelled_layout(path: Path, task: LabelledTask) -> LabelledLayout:
    """The layout of a folder; ValueError if there is no such folder or no layout is recognised in it."""
    if not path.is_dir():
        raise ValueError(f"No such data folder: {path}; check --train and --test.")
    if task == "classification":
        return "imagefolder"
    layouts: dict[LabelledLayout, object] = {
        "scannetpp": scannet.is_scannetpp_scene(path)
        or scannet.is_scannetpp_evaluation(path)
        or scannet.find_scannetpp_scenes(path),
        "nyu": official_sets.is_nyu(path),
        "kitti": any((path / f"kitti_eigen_{split}.txt").is_file() for split in ("train", "test")),
        "ade20k": official_sets.find_ade20k(path),
        "voc": official_sets.find_voc(path),
        "scannet": scannet.find_scannet(path),
        "capture": scannet.is_capture(path),
        "folder": (path / "images").is_dir(),
    }
    found = next((layout for layout, is_there in layouts.items() if is_there), None)
    if found is not None:
        return found
    raise ValueError(
        f"{path} holds no labelled set: no dslr/ (ScanNet++), scene*_*/color/ (ScanNet), nyu_depth_v2_labeled.mat or "
        "nyu_train.txt (NYU), kitti_eigen_train.txt (KITTI), objectInfo150.txt (ADE20K), JPEGImages/ (VOC), "
        "transforms.json (a capture) or images/ (plain folder); check the path."
    )


def check_options(paths: Sequence[Path], task: str, options: LabelledOptions) -> None:
    """Raises ValueError for an option that none of the folders would read, so that none is ignored silently.

    One folder that reads an option is enough: a head may be trained on a plain folder and tested on an official set.
    """
    plain = "plain folders (images/ and depths/)"
    ranged: tuple[LabelledLayout, ...] = ("folder", "scannetpp", "capture")
    readers: tuple[tuple[str, Any, LabelledTask, tuple[LabelledLayout, ...], str], ...] = (
        ("--depth-scale", options.depth_scale, "depth", ("folder", "capture"), f"the unit of {plain} and captures"),
        ("--max-depth", options.max_depth, "depth", ranged, f"the range of {plain} and captures"),
        ("--nyu-classes", options.nyu_classes, "segmentation", ("nyu",), "the class list of NYUv2"),
    )
    for flag, value, only_task, layouts, meaning in readers:
        if value is None:
            continue
        if task not in (only_task, "retrieval"):
            raise ValueError(f"{flag} means nothing to the {task} probe; leave it out.")
        layout = None if options.layout == "auto" else options.layout
        found = {layout or find_labelled_layout(path, only_task) for path in paths}
        if found.isdisjoint(layouts):
            problem = f"{flag} sets {meaning}, but {paths[0]} is in the layout {', '.join(sorted(found))}"
            raise ValueError(f"{problem}, which has its own; leave it out.")


def read_labelled_set(
    path: Path, split: LabelledSplit | None, task: LabelledTask, options: LabelledOptions | None = None
) -> LabelledSet:
    """Reads one split of a scene, a plain folder or the root of an official set; pixels are loaded later.

    `split` None takes all frames of a single scene and means `train` elsewhere. ValueError names a piece that is
    missing or wrong, or a set that does not have this task.
    """
    path, options = Path(path), options or LabelledOptions()
    layout = find_labelled_layout(path, task) if options.layout == "auto" else options.layout
    if task not in _TASKS[layout]:
        raise ValueError(f"{path} is read as {layout}, which has no {task} but {' and '.join(_TASKS[layout])}.")
    if layout in ("scannetpp", "capture"):
        scale = options.depth_scale if layout == "capture" else None
        return scannet.read_scannetpp_labelled(path, split, task, options.max_depth, scale)
    part: LabelledSplit = split or "train"
    if layout == "folder":
        return folders.read_folder(path, part, task, options.depth_scale, options.max_depth)
    if layout == "nyu":
        return official_sets.read_nyu(path, part, task, options.nyu_classes or 13)
    if layout == "scannet":
        return scannet.read_scannet(path, part, task)
    readers = {
        "kitti": official_sets.read_kitti,
        "ade20k": official_sets.read_ade20k,
        "voc": official_sets.read_voc,
        "imagefolder": folders.read_image_folder,
    }
    return readers[layout](path, part)
