"""Reads the two outdoor label sets: ADE20K as the scene parsing challenge hands it out, and Pascal VOC 2012.

docs/datasets.md draws them.
"""

from pathlib import Path

from fit3d_ns.data.images import list_images
from fit3d_ns.probing.datasets.frames import (
    LabelledFrame,
    LabelledSet,
    LabelledSplit,
    LabelTable,
    create_frame,
    create_zero_ignoring_table,
    read_lines,
)

NUM_ADE20K_CLASSES = 150
VOC_NAMES = tuple(
    "background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,"
    "pottedplant,sheep,sofa,train,tvmonitor".split(",")
)


def find_ade20k(root: Path) -> Path | None:
    """The challenge folder at or below `root`, or None."""
    folders = (root, root / "ADEChallengeData2016")
    return next((at for at in folders if (at / "annotations").is_dir() and (at / "objectInfo150.txt").is_file()), None)


def read_ade20k(root: Path, split: LabelledSplit) -> LabelledSet:
    """Reads `training` or `validation`; label 0 does not count."""
    folder = find_ade20k(root)
    if folder is None:
        raise ValueError(
            f"{root} is not an ADE20K challenge folder: annotations/ or objectInfo150.txt is missing; "
            "unpack ADEChallengeData2016.zip."
        )
    lines = read_lines(folder / "objectInfo150.txt", "it comes with ADEChallengeData2016.zip")
    names = tuple(line.split("\t")[-1].strip() for line in lines if line.split("\t")[0].strip().isdigit())
    if len(names) != NUM_ADE20K_CLASSES:
        raise ValueError(f"{folder / 'objectInfo150.txt'} names {len(names)} classes, expected {NUM_ADE20K_CLASSES}.")
    part = "training" if split == "train" else "validation"
    images = list_images(folder / "images" / part)
    if not images:
        raise ValueError(f"{folder / 'images' / part} holds no images; unpack ADEChallengeData2016.zip again.")
    table = create_zero_ignoring_table(NUM_ADE20K_CLASSES)
    return LabelledSet("ade20k", _create_frames(images, folder / "annotations" / part, table), names)


def find_voc(root: Path) -> Path | None:
    """The VOC2012 folder at or below `root`, or None."""
    folders = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    return next((folder for folder in folders if (folder / "JPEGImages").is_dir()), None)


def read_voc(root: Path, split: LabelledSplit) -> LabelledSet:
    """Reads `train` or, for testing, `val`; background is a class."""
    folder = find_voc(root)
    if folder is None or not (folder / "SegmentationClass").is_dir():
        raise ValueError(
            f"{root} is not a Pascal VOC folder: JPEGImages/ or SegmentationClass/ is missing; "
            "unpack VOCtrainval_11-May-2012.tar."
        )
    listing = folder / "ImageSets" / "Segmentation" / ("train.txt" if split == "train" else "val.txt")
    stems = read_lines(listing, "it comes with VOCtrainval_11-May-2012.tar")
    images = [folder / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    frames = _create_frames(images, folder / "SegmentationClass", LabelTable(len(VOC_NAMES)))
    return LabelledSet("voc2012", frames, VOC_NAMES)


def _create_frames(images: list[Path], labels: Path, table: LabelTable) -> list[LabelledFrame]:
    return [create_frame(path, name=path.stem, label_path=labels / f"{path.stem}.png", table=table) for path in images]
