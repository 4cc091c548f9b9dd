"""Reads KITTI depth with Eigen's split.

    <root>/
      2011_09_26/<drive>/image_02/data/*.png          raw data (may also lie below raw/ or input/)
      data_depth_annotated/{train,val}/<drive>/proj_depth/groundtruth/image_02/*.png
                                                      16-bit, metres x 256 (may also lie below gt_depth/<drive>/)
      kitti_eigen_train.txt, kitti_eigen_test.txt     IMAGE DEPTH FOCAL per line

The lists name images relative to the raw data and depth relative to the annotated depth, `None` where an image has no
depth: such lines are left out, as published. Images and depth are seen in the lower 352x1216 pixels; Garg's window
counts.
"""

from pathlib import Path

from fit3d_ns.probing.datasets.files import create_frame, read_lines
from fit3d_ns.probing.datasets.frames import DepthConvention, LabelledFrame, LabelledSet, LabelledSplit, ProbeTask

DEPTH_SCALE = 256.0
CONVENTION = DepthConvention(
    max_depth=80.0, evaluation_window="garg", bottom_crop=(352, 1216), brightness_range=(0.9, 1.1)
)
_IMAGE_ROOTS = ("", "raw", "input", "raw_data")
_DEPTH_ROOTS = ("data_depth_annotated/train", "data_depth_annotated/val", "gt_depth", "")


def is_kitti(root: Path) -> bool:
    """True where Eigen's lists or KITTI's depth folder lie."""
    return any((root / name).exists() for name in ("kitti_eigen_train.txt", "kitti_eigen_test.txt"))


def read_kitti(root: Path, split: LabelledSplit, task: ProbeTask) -> LabelledSet:
    """Reads Eigen's train or test part.

    Raises:
        ValueError: A piece is missing, or another task than depth.
    """
    if task != "depth":
        raise ValueError(f"KITTI is read for depth, not for {task}; give another data set.")
    listing = root / f"kitti_eigen_{split}.txt"
    lines = read_lines(listing, "Eigen's lists name an image, its depth map and the focal length on each line")
    frames: list[LabelledFrame] = []
    for line in lines:
        parts = line.split()
        if len(parts) < 2:
            raise ValueError(f"{listing} has the line {line!r}, expected IMAGE DEPTH FOCAL.")
        if parts[1] == "None":
            continue
        image = _find(root, _IMAGE_ROOTS, parts[0], listing, "raw image")
        depth = _find(root, _DEPTH_ROOTS, parts[1], listing, "depth map")
        drive = next((part for part in Path(parts[0]).parts if "_drive_" in part), "")
        frames.append(
            create_frame(
                image,
                name=Path(parts[0]).with_suffix("").as_posix(),
                group=drive,
                depth_path=depth,
                depth_scale=DEPTH_SCALE,
            )
        )
    if not frames:
        raise ValueError(f"{listing} lists no image with depth; get the list again.")
    return LabelledSet("kitti", frames, depth=CONVENTION, is_sequence=True)


def _find(root: Path, folders: tuple[str, ...], name: str, listing: Path, what: str) -> Path:
    # Some lists begin with a slash, or with the date twice.
    relative = Path(name.lstrip("/"))
    for folder in folders:
        for candidate in (root / folder / relative, root / folder / Path(*relative.parts[1:])):
            if candidate.is_file():
                return candidate
    raise ValueError(
        f"{listing} names the {what} {name}, which is not below {root} "
        f"({', '.join(folder + '/' for folder in folders if folder)} were looked into); "
        "download KITTI's raw data and its annotated depth maps."
    )
