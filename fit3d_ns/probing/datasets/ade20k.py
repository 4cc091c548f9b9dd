"""Reads ADE20K as the scene parsing challenge hands it out (ADEChallengeData2016.zip).

ADEChallengeData2016/
  images/{training,validation}/*.jpg
  annotations/{training,validation}/*.png     0 = no class, 1 .. 150
  objectInfo150.txt                           tab-separated, the last column names the class
"""

from pathlib import Path

from fit3d_ns.data.images import list_images
from fit3d_ns.probing.datasets.files import create_frame, create_zero_ignoring_table, read_lines
from fit3d_ns.probing.datasets.frames import LabelledSet, LabelledSplit, ProbeTask

NUM_CLASSES = 150


def find_ade20k(root: Path) -> Path | None:
    """The challenge folder at or below `root`, or None."""
    for folder in (root, root / "ADEChallengeData2016"):
        if (folder / "annotations").is_dir() and (folder / "objectInfo150.txt").is_file():
            return folder
    return None


def read_ade20k(root: Path, split: LabelledSplit, task: ProbeTask) -> LabelledSet:
    """Reads `training` or `validation`; label 0 does not count.

    Raises:
        ValueError: A piece is missing, or another task than segmentation.
    """
    if task != "segmentation":
        raise ValueError(f"ADE20K has labels only, no {task}; give another data set.")
    folder = find_ade20k(root)
    if folder is None:
        raise ValueError(
            f"{root} is no ADE20K challenge folder: annotations/ or objectInfo150.txt is missing; "
            "unpack ADEChallengeData2016.zip."
        )
    lines = read_lines(folder / "objectInfo150.txt", "it comes with ADEChallengeData2016.zip")
    names = tuple(line.split("\t")[-1].strip() for line in lines if line.split("\t")[0].strip().isdigit())
    if len(names) != NUM_CLASSES:
        raise ValueError(f"{folder / 'objectInfo150.txt'} names {len(names)} classes, expected {NUM_CLASSES}.")
    part = "training" if split == "train" else "validation"
    images = list_images(folder / "images" / part)
    if not images:
        raise ValueError(f"{folder / 'images' / part} holds no images; unpack ADEChallengeData2016.zip again.")
    table = create_zero_ignoring_table(NUM_CLASSES)
    frames = [
        create_frame(path, name=path.stem, label_path=folder / "annotations" / part / f"{path.stem}.png", table=table)
        for path in images
    ]
    return LabelledSet("ade20k", frames, names)
