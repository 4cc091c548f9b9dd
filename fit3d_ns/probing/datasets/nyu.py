"""Reads NYUv2: 1,449 labelled frames for segmentation, and the list of 24,000 frames that depth papers train on.

    <root>/                                 labels (13 or 40 classes), depth of the same frames
      nyu_depth_v2_labeled.mat              images, labels, depths
      splits.mat                            trainNdxs (795), testNdxs (654), counted from 1
      classMapping40.mat                    from 894 names to 40 classes
      class13Mapping.mat                    from 40 to 13 classes; only for 13

    <root>/                                 depth as published
      nyu_train.txt, nyu_test.txt           IMAGE DEPTH FOCAL per line, relative to the root
      <scene>/rgb_*.jpg, <scene>/sync_depth_*.png     16-bit millimetres

The two `Mapping` files come from the "nyuv2-meta-data" collection. Depth is trained inside rows 45-471, columns 43-607
and evaluated inside Eigen's window.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.probing.datasets.files import LabelTable, create_frame, read_lines
from fit3d_ns.probing.datasets.frames import (
    IGNORE_INDEX,
    DepthConvention,
    LabelledFrame,
    LabelledSet,
    LabelledSplit,
    ProbeTask,
)
from fit3d_ns.probing.datasets.scannet import NYU40_NAMES

LABELLED_FILE = "nyu_depth_v2_labeled.mat"
NYU13_NAMES = tuple("bed,books,ceiling,chair,floor,furniture,objects,painting,sofa,table,tv,wall,window".split(","))
"""The 13 classes of the paper's NYUv2 figures, in the order of their ids."""
CONVENTION = DepthConvention(max_depth=10.0, evaluation_window="eigen", train_crop=(45, 472, 43, 608))


def is_nyu(root: Path) -> bool:
    """True where one of the two layouts begins."""
    return any((root / name).is_file() for name in (LABELLED_FILE, "nyu_train.txt", "nyu_test.txt"))


def read_nyu(root: Path, split: LabelledSplit, task: ProbeTask, *, num_classes: Literal[13, 40] = 13) -> LabelledSet:
    """Reads one official split; for depth the published list wins where both layouts are there.

    Args:
        root: The folder drawn above.
        split: Which part.
        task: Segmentation or depth.
        num_classes: The paper's figures are about 13.

    Raises:
        ValueError: A piece is missing; the message names it.
    """
    if task == "classification":
        raise ValueError("NYUv2 has no classes of whole pictures; probe segmentation or depth.")
    if task == "depth" and (root / f"nyu_{split}.txt").is_file():
        return _read_depth_list(root, split)
    path = root / LABELLED_FILE
    if not path.is_file():
        raise ValueError(f"{root} has no {LABELLED_FILE}; download the labelled NYUv2 set (2.8 GB).")
    numbers = _read_numbers(root / "splits.mat", "trainNdxs" if split == "train" else "testNdxs")
    count = _count_frames(path)
    if numbers.min() < 1 or numbers.max() > count:
        raise ValueError(f"{root / 'splits.mat'} names frame {numbers.max()}, {path} has {count}; download both again.")
    table, names = (_read_table(root, num_classes)) if task == "segmentation" else (None, ())
    frames = [_create(path, int(number) - 1, table) for number in numbers]
    name = f"nyu{num_classes}" if task == "segmentation" else "nyu-labelled"
    return LabelledSet(name, frames, names, depth=CONVENTION)


def _read_depth_list(root: Path, split: LabelledSplit) -> LabelledSet:
    listing = root / f"nyu_{split}.txt"
    frames: list[LabelledFrame] = []
    for line in read_lines(listing, "it lists IMAGE DEPTH FOCAL"):
        parts = line.split()
        if len(parts) < 2:
            raise ValueError(f"{listing} has the line {line!r}, expected IMAGE DEPTH FOCAL.")
        image, depth = (root / part.lstrip("/") for part in parts[:2])
        name = Path(parts[0].lstrip("/"))
        frames.append(
            create_frame(image, name=name.with_suffix("").as_posix(), group=name.parent.as_posix(), depth_path=depth)
        )
    return LabelledSet("nyu", frames, depth=CONVENTION, is_sequence=True)


def _create(path: Path, index: int, table: LabelTable | None) -> LabelledFrame:
    return LabelledFrame(
        name=f"{index + 1:04d}",
        load_image=partial(_load_image, path, index),
        load_labels=None if table is None else partial(_load_labels, path, index, table),
        load_depth=partial(_load_depth, path, index),
        files=(path,),
    )


# MATLAB stores columns first, so pictures lie [channels, width, height] in the file.


def _load_image(path: Path, index: int) -> UInt8[Tensor, "height width 3"]:
    # (3, w, h) -> (h, w, 3)
    return torch.from_numpy(_read_entry(path, "images", index).transpose(2, 1, 0).astype(np.uint8))


def _load_labels(path: Path, index: int, table: LabelTable) -> UInt8[Tensor, "height width"]:
    raw = torch.from_numpy(_read_entry(path, "labels", index).T.astype(np.int64))
    return table.apply(raw, f"{path} (frame {index + 1})")


def _load_depth(path: Path, index: int) -> Float[Tensor, "height width"]:
    return torch.from_numpy(_read_entry(path, "depths", index).T.astype(np.float32))


def _read_entry(path: Path, key: str, index: int) -> np.ndarray:
    with _open(path) as file:
        if key not in file:
            raise ValueError(f"{path} has no `{key}`; download it again.")
        return np.asarray(file[key][index])


def _count_frames(path: Path) -> int:
    with _open(path) as file:
        if "images" not in file:
            raise ValueError(f"{path} has no `images`; download it again.")
        return int(file["images"].shape[0])


def _open(path: Path) -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} is an HDF5 file; install h5py to read it (pip install h5py).") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again.") from error


def _read_table(root: Path, num_classes: int) -> tuple[LabelTable, tuple[str, ...]]:
    to_40 = _read_numbers(root / "classMapping40.mat", "mapClass")
    if num_classes == 40:
        mapping = {0: IGNORE_INDEX, **{number + 1: int(target) - 1 for number, target in enumerate(to_40)}}
        return LabelTable(40, mapping), NYU40_NAMES
    to_13 = _read_numbers(root / "class13Mapping.mat", "classMapping13")
    mapping = {0: IGNORE_INDEX}
    for number, target in enumerate(to_40):
        index = int(to_13[int(target) - 1]) if target > 0 else 0
        mapping[number + 1] = index - 1 if index > 0 else IGNORE_INDEX
    return LabelTable(13, mapping), NYU13_NAMES


def _read_numbers(path: Path, key: str) -> np.ndarray:
    """A list of numbers out of a MATLAB file, structs opened up to their first field."""
    if not path.is_file():
        raise ValueError(f"No {path}; it comes with the NYUv2 meta data, beside {LABELLED_FILE}.")
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(str(path))
    # scipy answers MATLAB 7.3 files with NotImplementedError, and files that are cut short with one of the others.
    except (OSError, ValueError, IndexError, NotImplementedError, MatReadError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again.") from error
    if key not in content:
        raise ValueError(f"{path} has no `{key}`; download it again.")
    values = content[key]
    while values.dtype.names or values.dtype == object:
        values = values.reshape(-1)[0]
        if isinstance(values, np.void):
            values = values[0]
    return np.asarray(values).reshape(-1).astype(np.int64)
