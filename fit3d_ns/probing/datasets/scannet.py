"""Reads ScanNet's 25k frames (scannet_frames_25k.zip), which the paper's ScanNet results are about.

    <root>/
      scannet_frames_25k/scene0000_00/            the folder itself may be given, too
        color/000000.jpg                          1296x968
        label/000000.png                          8-bit NYU40 ids, 0 = no class
        depth/000000.png                          640x480, 16-bit millimetres
      scannetv2_train.txt, scannetv2_val.txt      scene names; in the root or beside the scenes
      scannetv2-labels.combined.tsv               only where labels are 16-bit raw ids (label-filt/)

Photographs are reduced to the depth maps' 640x480 for depth, as published.
"""

import csv
from pathlib import Path

from fit3d_ns.probing.datasets.files import LabelTable, create_frame, create_zero_ignoring_table, read_lines
from fit3d_ns.probing.datasets.frames import (
    IGNORE_INDEX,
    DepthConvention,
    LabelledFrame,
    LabelledSet,
    LabelledSplit,
    ProbeTask,
)

NYU40_NAMES = tuple(
    "wall,floor,cabinet,bed,chair,sofa,table,door,window,bookshelf,picture,counter,blinds,desk,shelves,curtain,"
    "dresser,pillow,mirror,floor mat,clothes,ceiling,books,refrigerator,television,paper,towel,shower curtain,box,"
    "whiteboard,person,night stand,toilet,sink,lamp,bathtub,bag,otherstructure,otherfurniture,otherprop".split(",")
)
"""The 40 classes of NYUv2 in the order of their ids, which ScanNet uses too."""

CONVENTION = DepthConvention(max_depth=10.0, evaluation_window="eigen")
"""The public configuration evaluates ScanNet inside NYU's window."""


def find_scannet(root: Path) -> Path | None:
    """The folder with the scenes at or below `root`, or None."""
    for folder in (root, root / "scannet_frames_25k"):
        if folder.is_dir() and any((scene / "color").is_dir() for scene in folder.glob("scene*_*")):
            return folder
    return None


def read_scannet(root: Path, split: LabelledSplit, task: ProbeTask) -> LabelledSet:
    """Reads the scenes of the official train or validation list."""
    if task == "classification":
        raise ValueError("ScanNet has no classes of whole pictures; probe segmentation or depth.")
    folder = find_scannet(root)
    if folder is None:
        raise ValueError(f"{root} holds no scene*_*/color/ folders; unpack scannet_frames_25k.zip.")
    listing = f"scannetv2_{'train' if split == 'train' else 'val'}.txt"
    path = next((place / listing for place in (root, folder, folder.parent) if (place / listing).is_file()), None)
    scenes = read_lines(path or root / listing, "it is in Tasks/Benchmark of the ScanNet repository")
    frames: list[LabelledFrame] = []
    tables: dict[str, LabelTable] = {}
    for scene in scenes:
        if not (folder / scene / "color").is_dir():
            raise ValueError(f"{path} names {scene}, which has no color/ below {folder}; download the scene.")
        for image in sorted((folder / scene / "color").glob("*.jpg")):
            frames.append(_create(root, folder / scene, image, task, tables))
    names = NYU40_NAMES if task == "segmentation" else ()
    return LabelledSet("scannet", frames, names, depth=CONVENTION, is_sequence=True)


def _create(root: Path, scene: Path, image: Path, task: ProbeTask, tables: dict[str, LabelTable]) -> LabelledFrame:
    name = f"{scene.name}/{image.stem}"
    if task == "depth":
        depth_path = scene / "depth" / f"{image.stem}.png"
        return create_frame(image, name=name, group=scene.name, depth_path=depth_path, resize_image=True)
    kind = "label" if (scene / "label").is_dir() else "label-filt"
    if kind not in tables:
        tables[kind] = create_zero_ignoring_table(len(NYU40_NAMES)) if kind == "label" else _read_table(root)
    label_path, table = scene / kind / f"{image.stem}.png", tables[kind]
    return create_frame(image, name=name, group=scene.name, label_path=label_path, table=table, resize_image=True)


def _read_table(root: Path) -> LabelTable:
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
    return LabelTable(len(NYU40_NAMES), mapping)
