"""Reads Pascal VOC 2012 as VOCtrainval_11-May-2012.tar unpacks.

VOCdevkit/VOC2012/
  JPEGImages/*.jpg
  SegmentationClass/*.png                     palette: 0 = background, 1 .. 20, 255 = does not count
  ImageSets/Segmentation/{train,val}.txt      stems; the paper trains on train.txt, not on the augmented list
"""

from pathlib import Path

from fit3d_ns.probing.datasets.files import LabelTable, create_frame, read_lines
from fit3d_ns.probing.datasets.frames import LabelledSet, LabelledSplit, ProbeTask

CLASS_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def find_voc(root: Path) -> Path | None:
    """The VOC2012 folder at or below `root`, or None."""
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    return None


def read_voc(root: Path, split: LabelledSplit, task: ProbeTask) -> LabelledSet:
    """Reads `train` or, for testing, `val`; background is a class.

    Raises:
        ValueError: A piece is missing, or another task than segmentation.
    """
    if task != "segmentation":
        raise ValueError(f"Pascal VOC is read for segmentation, not for {task}; give another data set.")
    folder = find_voc(root)
    if folder is None or not (folder / "SegmentationClass").is_dir():
        raise ValueError(
            f"{root} is no Pascal VOC folder: JPEGImages/ or SegmentationClass/ is missing; "
            "unpack VOCtrainval_11-May-2012.tar."
        )
    part = "train" if split == "train" else "val"
    stems = read_lines(
        folder / "ImageSets" / "Segmentation" / f"{part}.txt", "it comes with VOCtrainval_11-May-2012.tar"
    )
    table = LabelTable(len(CLASS_NAMES))
    frames = [
        create_frame(
            folder / "JPEGImages" / f"{stem}.jpg",
            name=stem,
            label_path=folder / "SegmentationClass" / f"{stem}.png",
            table=table,
        )
        for stem in stems
    ]
    return LabelledSet("voc2012", frames, CLASS_NAMES)
