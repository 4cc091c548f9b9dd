"""`read_labelled_set`: looks at a folder, takes the labelled layout it finds and reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fit3d_ns.data.labelled_ade20k import find_ade20k, read_ade20k
from fit3d_ns.data.labelled_folder import DEFAULT_DEPTH_SCALE, read_folder
from fit3d_ns.data.labelled_frames import LabelledSet, LabelledSplit, ProbeTask
from fit3d_ns.data.labelled_images import read_image_folder
from fit3d_ns.data.labelled_kitti import is_kitti, read_kitti
from fit3d_ns.data.labelled_nyu import is_nyu, read_nyu
from fit3d_ns.data.labelled_scannet import find_scannet, read_scannet
from fit3d_ns.data.labelled_scannetpp import find_scannetpp_scenes, is_scannetpp_scene, read_scannetpp_labelled
from fit3d_ns.data.labelled_voc import find_voc, read_voc

LabelledLayout = Literal["scannetpp", "scannet", "nyu", "kitti", "ade20k", "voc", "folder", "imagefolder"]


@dataclass(frozen=True)
class LabelledOptions:
    """What a folder does not say about itself."""

    layout: LabelledLayout | Literal["auto"] = "auto"
    """Disk layout; `auto` looks at the folder."""
    nyu_classes: Literal[13, 40] = 13
    """Class list of NYUv2; the paper's figures are about 13."""
    depth_scale: float = DEFAULT_DEPTH_SCALE
    """Units per metre of the depth maps of plain folders, positive."""
    max_depth: float | None = None
    """Depth from here on does not count, in metres; None: 20 for ScanNet++ scenes, 10 for plain folders. Official sets
    keep their own."""

    def __post_init__(self) -> None:
        if not self.depth_scale > 0 or (self.max_depth is not None and not self.max_depth > 0):
            raise ValueError(f"Depth scale {self.depth_scale} and maximal depth {self.max_depth} must be positive.")


def find_labelled_layout(path: Path, task: ProbeTask) -> LabelledLayout:
    """The layout of a folder.

    Raises:
        ValueError: There is no such folder, or no layout is known in it.
    """
    if not path.is_dir():
        raise ValueError(f"No such data folder: {path}; check --train and --test.")
    if task == "classification":
        return "imagefolder"
    if is_scannetpp_scene(path) or find_scannetpp_scenes(path) is not None:
        return "scannetpp"
    if is_nyu(path):
        return "nyu"
    if is_kitti(path):
        return "kitti"
    if find_ade20k(path) is not None:
        return "ade20k"
    if find_voc(path) is not None:
        return "voc"
    if find_scannet(path) is not None:
        return "scannet"
    if (path / "images").is_dir():
        return "folder"
    raise ValueError(
        f"{path} holds no labelled set: no dslr/ (ScanNet++), scene*_*/color/ (ScanNet), nyu_depth_v2_labeled.mat or "
        "nyu_train.txt (NYU), kitti_eigen_train.txt (KITTI), objectInfo150.txt (ADE20K), JPEGImages/ (VOC) or images/ "
        "(plain folder); check the path."
    )


def read_labelled_set(
    path: Path,
    split: LabelledSplit | None,
    task: ProbeTask,
    options: LabelledOptions | None = None,
) -> LabelledSet:
    """Reads one split of a labelled set; headers are checked, pixels are loaded later.

    Args:
        path: A scene, a plain folder, or the root of an official data set.
        split: Which part; None takes all frames of a single ScanNet++ scene and means `train` elsewhere.
        task: What is probed.
        options: What the folder does not say about itself.

    Raises:
        ValueError: A piece is missing or wrong; the message names it.
    """
    path, options = Path(path), options or LabelledOptions()
    layout = find_labelled_layout(path, task) if options.layout == "auto" else options.layout
    if layout == "scannetpp":
        return read_scannetpp_labelled(path, split, task, max_depth=options.max_depth)
    part: LabelledSplit = split or "train"
    if layout == "folder":
        return read_folder(path, part, task, depth_scale=options.depth_scale, max_depth=options.max_depth)
    if layout == "nyu":
        return read_nyu(path, part, task, num_classes=options.nyu_classes)
    readers = {
        "scannet": read_scannet,
        "kitti": read_kitti,
        "ade20k": read_ade20k,
        "voc": read_voc,
        "imagefolder": read_image_folder,
    }
    return readers[layout](path, part, task)
