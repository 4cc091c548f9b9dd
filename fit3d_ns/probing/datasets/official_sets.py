"""Reads NYUv2 (labels and depth), KITTI with Eigen's split (depth), and two outdoor label sets: ADE20K as the scene
parsing challenge hands it out, and Pascal VOC 2012. docs/datasets.md draws them.

NYU's depth is trained inside rows 45-471, columns 43-607 and evaluated inside Eigen's window. KITTI's images and depth
are seen in the lower 352x1216 pixels; Garg's window counts.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from fit3d_ns.data.images import IGNORE_INDEX, list_images
from fit3d_ns.probing.datasets import frames as labelled
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet, LabelledSplit, LabelledTask, create_frame
from fit3d_ns.utils.errors import reading

NUM_ADE20K_CLASSES = 150
LABELLED_FILE = "nyu_depth_v2_labeled.mat"
NYU_CONVENTION = labelled.DepthConvention(max_depth=10.0, evaluation_window="eigen", train_crop=(45, 472, 43, 608))
KITTI_CONVENTION = labelled.DepthConvention(
    max_depth=80.0, evaluation_window="garg", bottom_crop=(352, 1216), brightness_range=(0.9, 1.1)
)
KITTI_DEPTH_SCALE = 256.0
_KITTI_IMAGE_ROOTS = ("", "raw", "input", "raw_data")
_KITTI_DEPTH_ROOTS = ("data_depth_annotated/train", "data_depth_annotated/val", "gt_depth", "")


def is_nyu(root: Path) -> bool:
    """True for the official file, published lists of depth, or the authors' evaluation folder, told by its name."""
    is_authors = "nyu" in root.absolute().name.lower() and (root / "annotations").is_dir()
    return is_authors or any((root / name).is_file() for name in (LABELLED_FILE, "nyu_train.txt", "nyu_test.txt"))


def read_nyu(root: Path, split: LabelledSplit, task: LabelledTask, num_classes: int = 13) -> LabelledSet:
    """Reads one official split, with 13 classes (the paper's) or 40; lists of depth and the authors' labels win."""
    if task == "depth" and (root / f"nyu_{split}.txt").is_file():
        return read_listed_depth(root, f"nyu_{split}.txt", "nyu", NYU_CONVENTION)
    name, path = f"nyu{num_classes}", root / LABELLED_FILE
    if task == "segmentation" and (root / "annotations").is_dir():
        return read_annotations(root, split, name, labelled.CLASS_NAMES[name])
    if not path.is_file():
        raise ValueError(f"{root} has no {LABELLED_FILE}; download the labelled NYUv2 set (2.8 GB).")
    numbers = _read_numbers(root / "splits.mat", "trainNdxs" if split == "train" else "testNdxs")
    with reading(path), _open_hdf5(path) as file:
        count = int(file["images"].shape[0])
    if numbers.min() < 1 or numbers.max() > count:
        raise ValueError(f"{root / 'splits.mat'} names frame {numbers.max()}, {path} has {count}; download both again.")
    table, names = _read_table(root, num_classes) if task == "segmentation" else (None, ())
    frames = [
        LabelledFrame(
            name=f"{number:04d}",
            load_image=partial(_load_entry, path, "images", int(number) - 1, np.uint8),
            load_labels=None if table is None else partial(_load_labels, path, int(number) - 1, table),
            load_depth=partial(_load_entry, path, "depths", int(number) - 1, np.float32),
            files=(path,),
        )
        for number in numbers
    ]
    return LabelledSet(name if names else "nyu-labelled", frames, names, depth=NYU_CONVENTION)


def read_kitti(root: Path, split: LabelledSplit) -> LabelledSet:
    """Reads Eigen's train or test part."""
    listing = root / f"kitti_eigen_{split}.txt"
    frames: list[LabelledFrame] = []
    for image_name, depth_name in _read_depth_list(listing):
        image = _find(root, _KITTI_IMAGE_ROOTS, image_name, listing, "raw image")
        depth = _find(root, _KITTI_DEPTH_ROOTS, depth_name, listing, "depth map")
        drive = next((part for part in Path(image_name).parts if "_drive_" in part), "")
        name = Path(image_name).with_suffix("").as_posix()
        frames.append(create_frame(image, name=name, group=drive, depth_path=depth, depth_scale=KITTI_DEPTH_SCALE))
    if not frames:
        raise ValueError(f"{listing} lists no image with depth; get the list again.")
    return LabelledSet("kitti", frames, depth=KITTI_CONVENTION, is_sequence=True)


def find_ade20k(root: Path) -> Path | None:
    """The challenge folder at or below `root`, or None."""
    folders = (root, root / "ADEChallengeData2016")
    return next((at for at in folders if (at / "annotations").is_dir() and (at / "objectInfo150.txt").is_file()), None)


def read_ade20k(root: Path, split: LabelledSplit) -> LabelledSet:
    """Reads `training` or `validation`; label 0 does not count."""
    folder = find_ade20k(root)
    if folder is None:
        problem = f"{root} is not an ADE20K challenge folder: annotations/ or objectInfo150.txt is missing"
        raise ValueError(f"{problem}; unpack ADEChallengeData2016.zip.")
    lines = labelled.read_lines(folder / "objectInfo150.txt", "it comes with ADEChallengeData2016.zip")
    names = tuple(line.split("\t")[-1].strip() for line in lines if line.split("\t")[0].strip().isdigit())
    if len(names) != NUM_ADE20K_CLASSES:
        raise ValueError(f"{folder / 'objectInfo150.txt'} names {len(names)} classes, expected {NUM_ADE20K_CLASSES}.")
    return read_annotations(folder, split, "ade20k", names)


def read_annotations(root: Path, split: LabelledSplit, name: str, class_names: tuple[str, ...]) -> LabelledSet:
    """Reads `images/` with labels in `annotations/`, both with `training` and `validation`; label 0 does not count."""
    part = "training" if split == "train" else "validation"
    images, labels = root / "images" / part, root / "annotations" / part
    table = labelled.create_zero_ignoring_table(len(class_names))
    frames: list[LabelledFrame] = []
    for path in list_images(images):
        stem = path.relative_to(images).with_suffix("")
        title, group = stem.as_posix(), "/".join(stem.parts[:-1])
        frames.append(create_frame(path, name=title, group=group, label_path=labels / f"{stem}.png", table=table))
    if not frames:
        raise ValueError(f"{images} holds no images; unpack the archive again.")
    return LabelledSet(name, frames, class_names)


def read_listed_depth(root: Path, listing: str, name: str, convention: labelled.DepthConvention) -> LabelledSet:
    """Reads the images and depth maps of a list, whose names are relative to `root`; `None` is no depth map."""
    frames: list[LabelledFrame] = []
    for names in _read_depth_list(root / listing):
        image, depth = (Path(name.lstrip("/")) for name in names)
        title, group = image.with_suffix("").as_posix(), image.parent.as_posix()
        frames.append(create_frame(root / image, name=title, group=group, depth_path=root / depth))
    return LabelledSet(name, frames, depth=convention, is_sequence=True)


def find_voc(root: Path) -> Path | None:
    """The VOC2012 folder at or below `root`, or None."""
    folders = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    return next((folder for folder in folders if (folder / "JPEGImages").is_dir()), None)


def read_voc(root: Path, split: LabelledSplit) -> LabelledSet:
    """Reads `train` or, for testing, `val`; background is a class."""
    folder = find_voc(root)
    if folder is None or not (folder / "SegmentationClass").is_dir():
        problem = f"{root} is not a Pascal VOC folder: JPEGImages/ or SegmentationClass/ is missing"
        raise ValueError(f"{problem}; unpack VOCtrainval_11-May-2012.tar.")
    listing = folder / "ImageSets" / "Segmentation" / ("train.txt" if split == "train" else "val.txt")
    stems = labelled.read_lines(listing, "it comes with VOCtrainval_11-May-2012.tar")
    images = [folder / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    names = labelled.CLASS_NAMES["voc2012"]
    table = labelled.LabelTable(len(names))
    labels = folder / "SegmentationClass"
    frames = [
        create_frame(image, name=image.stem, label_path=labels / f"{image.stem}.png", table=table) for image in images
    ]
    return LabelledSet("voc2012", frames, names)


def _read_depth_list(listing: Path) -> list[tuple[str, str]]:
    """Names of images and of their depth maps, of those that have one."""
    pairs = []
    for line in labelled.read_lines(listing, "it names an image, its depth map and the focal length on each line"):
        if len(line.split()) < 2:
            raise ValueError(f"{listing} has the line {line!r}, expected IMAGE DEPTH FOCAL.")
        image, depth, *_ = line.split()
        pairs += [(image, depth)] if Path(depth).name != "None" else []
    return pairs


def _find(root: Path, folders: tuple[str, ...], name: str, listing: Path, what: str) -> Path:
    # Some lists begin with a slash, or with the date twice.
    relative = Path(name.lstrip("/"))
    for folder in folders:
        for candidate in (root / folder / relative, root / folder / Path(*relative.parts[1:])):
            if candidate.is_file():
                return candidate
    raise ValueError(
        f"{listing} names the {what} {name}, which is not below {root} "
        f"({', '.join(folder + '/' for folder in folders if folder)} were searched); "
        "download KITTI's raw data and its annotated depth maps."
    )


def _load_labels(path: Path, index: int, table: labelled.LabelTable) -> UInt8[Tensor, "height width"]:
    return table.apply(_load_entry(path, "labels", index, np.int64), f"{path} (frame {index + 1})")


def _load_entry(path: Path, key: str, index: int, dtype: type) -> Shaped[Tensor, "height width *channels"]:
    with reading(path), _open_hdf5(path) as file:
        # MATLAB stores columns first: (3, w, h) -> (h, w, 3), or (w, h) -> (h, w)
        return torch.from_numpy(np.asarray(file[key][index]).T.astype(dtype))


def _open_hdf5(path: Path) -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} is an HDF5 file; install h5py to read it (pip install h5py).") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again.") from error


def _read_table(root: Path, num_classes: int) -> tuple[labelled.LabelTable, tuple[str, ...]]:
    # From raw ids, which count from 1, to classes that count from 1; 0 is no class.
    targets = _read_numbers(root / "classMapping40.mat", "mapClass").tolist()
    if num_classes == 13:
        to_13 = [0, *_read_numbers(root / "class13Mapping.mat", "classMapping13").tolist()]
        with reading(f"The class tables in {root}"):
            targets = [to_13[target] for target in targets]
    mapping = {number: target - 1 if target > 0 else IGNORE_INDEX for number, target in enumerate([0, *targets])}
    return labelled.LabelTable(num_classes, mapping), labelled.CLASS_NAMES[f"nyu{num_classes}"]


def _read_numbers(path: Path, key: str) -> np.ndarray:
    """A list of numbers out of a MATLAB file; structs are opened up to their first field."""
    if not path.is_file():
        raise ValueError(f"No {path}; it comes with the NYUv2 meta data and belongs next to {LABELLED_FILE}.")
    from scipy.io import loadmat

    try:
        content = loadmat(str(path))
    except Exception as error:
        # Of any type: scipy refuses MATLAB 7.3 by one, damage by others, zlib's own among them.
        raise ValueError(f"{path} cannot be read ({error}); download it again.") from error
    with reading(path):
        values = content[key]
        while values.dtype.names or values.dtype == object:
            values = values.reshape(-1)[0]
            if isinstance(values, np.void):
                values = values[0]
    return np.asarray(values).reshape(-1).astype(np.int64)
