"""What every labelled set is read into: photographs with class labels, depth, or one class for the whole picture.

Labels are class indices 0 .. num_classes - 1, and `IGNORE_INDEX` where a pixel never counts. Depth is z-depth in
metres, 0 where nothing was measured. Pixels are loaded when asked for; every error names the file.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fit3d_ns.data.images import IGNORE_INDEX, load_depth, load_image, open_image, read_image_header
from fit3d_ns.utils.errors import reading
from fit3d_ns.utils.files import hash_bytes, read_json
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.selection import select_evenly

LabelledTask = Literal["segmentation", "depth", "classification"]
"""What a set is labelled for: a class or a depth for each pixel, or a class for the whole picture."""
LabelledSplit = Literal["train", "test"]
EvaluationWindow = Literal["none", "eigen", "garg"]
"""Which part of a depth map counts: all of it, Eigen's window of NYU (rows 45-471, columns 41-601 of 480x640), or
Garg's of KITTI, which is relative to the size."""
CLASS_NAMES = {name: tuple(names) for name, names in read_json(Path(__file__).with_name("class_names.json")).items()}
"""Classes of official sets in the order of their ids; `nyu13` are those of the paper's NYUv2 results."""


@dataclass(frozen=True)
class LabelledFrame:
    """One photograph with what is known about it; loaders raise ValueError naming the file they cannot use."""

    name: str
    """Unique in its set, the same on every machine."""
    load_image: Callable[[], UInt8[Tensor, "height width 3"]]
    load_labels: Callable[[], UInt8[Tensor, "height width"]] | None = None
    """Labels and depth have the photograph's size."""
    load_depth: Callable[[], Float[Tensor, "height width"]] | None = None
    class_index: int | None = None
    """Class of the whole picture."""
    group: str = ""
    """Scene or video the photograph belongs to; neighbours in a group look alike."""
    files: tuple[Path, ...] = ()
    """Files it is made from, for `compute_data_hash`."""
    camera_to_world: Float[Tensor, "3 4"] | None = field(default=None, compare=False)
    """Pose, where it is known; all of a `world` share that and the directions of a camera's axes."""
    world: Path | None = field(default=None, compare=False)
    """Folder of the scene that poses are relative to, whatever the group is called where sets are joined."""

    @cached_property
    def key(self) -> Hashable:
        """Names the frame across sets, however they were named; joined ones have the sets' names before their own."""
        return tuple(path.resolve() for path in self.files), self.name.rpartition("/")[2]


@dataclass(frozen=True)
class DepthConvention:
    """How a depth set is trained and evaluated on. Its `repr` is part of `compute_data_hash`."""

    min_depth: float = 0.001
    """Metres; only depth above it counts."""
    max_depth: float = 10.0
    """Metres; only depth below it counts."""
    evaluation_window: EvaluationWindow = "none"
    train_crop: tuple[int, int, int, int] | None = None
    """First and past-the-last row, first and past-the-last column that are trained on; None: the whole picture."""
    bottom_crop: tuple[int, int] | None = None
    """Height and width of the part that is seen at all, centred in x and at the bottom in y (KITTI benchmark crop)."""
    brightness_range: tuple[float, float] = (0.75, 1.25)
    """Factors of the brightness augmentation."""


@dataclass(frozen=True)
class LabelledSet:
    """One split of a data set; results carry its name, for example `ade20k`."""

    name: str
    frames: list[LabelledFrame]
    """Never empty."""
    class_names: tuple[str, ...] = ()
    """In the order of their indices; empty where there are no labels."""
    depth: DepthConvention = field(default_factory=DepthConvention)
    is_sequence: bool = False
    """True where neighbouring frames of a group are neighbours in time, so that they must not be split at random."""

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError(f"The set {self.name} is empty; check the folder and the split.")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, eq=False)
class LabelTable:
    """From the numbers in a label file to class indices."""

    num_classes: int
    mapping: Mapping[int, int] | None = None
    """Number in the file to class index or 255; None: the numbers are class indices already."""

    def apply(self, raw: Int[Tensor, "height width"], source: Path | str) -> UInt8[Tensor, "height width"]:
        """Translates and checks; raises ValueError with the number and the `source` where a number is not a class."""
        labels = raw
        if self.mapping is not None:
            # Numbers without a translation become negative.
            table = torch.full((max(*self.mapping, int(raw.max()), IGNORE_INDEX) + 1,), -1, dtype=torch.int64)
            table[IGNORE_INDEX] = IGNORE_INDEX
            table[list(self.mapping)] = torch.tensor(list(self.mapping.values()))
            labels = table[raw.long()]
            if (labels < 0).any():
                value = int(raw[labels < 0][0])
                raise ValueError(f"{source} has label {value}, which the class list does not know; check its version.")
        wrong = (labels != IGNORE_INDEX) & ((labels >= self.num_classes) | (labels < 0))
        if wrong.any():
            value = int(labels[wrong][0])
            problem = f"{source} has label {value} at {int(wrong.sum())} pixels, outside the {self.num_classes} classes"
            raise ValueError(f"{problem}; correct the class list, or write {IGNORE_INDEX} where pixels must not count.")
        return labels.to(torch.uint8)


def create_zero_ignoring_table(num_classes: int) -> LabelTable:
    """Files that count classes from 1 and write 0 where there is no label (`reduce_zero_label` of mmsegmentation)."""
    return LabelTable(num_classes, {0: IGNORE_INDEX, **{number: number - 1 for number in range(1, num_classes + 1)}})


def load_label_map(path: Path, table: LabelTable) -> UInt8[Tensor, "height width"]:
    """Reads an index map: 8-bit grey, palette (its indices count) or 16-bit grey."""
    with open_image(path, "Label map") as image:
        if image.mode not in ("L", "P", "1", "F") and not image.mode.startswith("I"):
            problem = f"Label map {path} is a colour picture ({image.mode}), expected one index per pixel"
            raise ValueError(f"{problem}; convert colours to class indices first.")
        numbers = np.array(image).astype(np.int64)
    return table.apply(torch.from_numpy(numbers), path)


def create_frame(
    image_path: Path,
    *,
    name: str,
    group: str = "",
    label_path: Path | None = None,
    table: LabelTable | None = None,
    depth_path: Path | None = None,
    depth_scale: float = 1000.0,
    resize_image: bool = False,
) -> LabelledFrame:
    """A frame out of files; sizes are compared now, pixels are read later.

    A label map comes with the `table` that reads it, `depth_scale` is the depth map's units per metre. Sizes must be
    equal, unless `resize_image` brings photographs that are larger by design (ScanNet) to the size of their maps.
    """
    image = read_image_header(image_path)
    size: tuple[int, int] | None = None
    for path, what in ((label_path, "Label map"), (depth_path, "Depth map")):
        if path is None:
            continue
        header = read_image_header(path, what)
        if header.size != image.size:
            if not resize_image:
                raise ValueError(
                    f"{what} {path} is {header.width}x{header.height}, its image {image_path} is "
                    f"{image.width}x{image.height}; they must have one size."
                )
            size = header.size
    return LabelledFrame(
        name,
        load_image=partial(_load_image, image_path, size),
        load_labels=None if label_path is None or table is None else partial(load_label_map, label_path, table),
        load_depth=None if depth_path is None else partial(load_depth, depth_path, depth_scale),
        group=group,
        files=tuple(path for path in (image_path, label_path, depth_path) if path is not None),
    )


def read_lines(path: Path, hint: str) -> list[str]:
    """Non-empty lines of a text file; where it is missing or empty, `hint` tells the user where to get it."""
    if not path.is_file():
        raise ValueError(f"No such file: {path}; {hint}.")
    with reading(path):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} lists nothing; {hint}.")
    return lines


def join_sets(sets: Sequence[LabelledSet]) -> LabelledSet:
    """One set out of several, for example scenes that are trained on together; they must be of the same kind."""
    first = sets[0]
    if len(sets) == 1:
        return first
    for other in sets[1:]:
        check_same_kind(first, other)
    names = sorted({labelled_set.name for labelled_set in sets})
    frames = [
        replace(frame, name=f"{labelled_set.name}/{frame.name}", group=f"{labelled_set.name}/{frame.group}")
        for labelled_set in sets
        for frame in labelled_set.frames
    ]
    return replace(first, name="+".join(names), frames=frames, is_sequence=any(item.is_sequence for item in sets))


def check_same_kind(first: LabelledSet, other: LabelledSet) -> None:
    """Raises ValueError unless a probe trained on `first` can be tested on `other`."""
    if first.class_names != other.class_names:
        pairs = enumerate(zip_longest(first.class_names, other.class_names))
        differing = next(f"class {index} is {a!r} and {b!r}" for index, (a, b) in pairs if a != b)
        raise ValueError(f"{first.name} and {other.name} have other classes ({differing}); use sets of one class list.")
    if not first.class_names and first.depth.max_depth != other.depth.max_depth:
        problem = f"{first.name} reads depth up to {first.depth.max_depth} m"
        raise ValueError(f"{problem}, {other.name} up to {other.depth.max_depth} m; give --max-depth.")


def split_validation(labelled_set: LabelledSet, fraction: float) -> tuple[LabelledSet, LabelledSet]:
    """Splits at least two frames into a training and a validation part, a `fraction` in (0, 0.5] of them.

    Five groups or more: whole groups are held out. Fewer groups of a sequence: the last part of each, because frames
    next to each other look alike. Otherwise every k-th frame in the order of names.
    """
    frames = labelled_set.frames
    if len(frames) < 2:
        raise ValueError(f"{labelled_set.name} has one training frame, none to validate with; use --selection last.")
    ordered = sorted(frames, key=lambda frame: frame.name)
    by_group: dict[str, list[str]] = {}
    for frame in ordered:
        by_group.setdefault(frame.group, []).append(frame.name)
    groups = list(by_group.values())
    every = max(round(1 / fraction), 2)
    held: set[str] = set()
    if len(groups) >= 5:
        held = {name for names in groups[every - 1 :: every] for name in names}
    if not held and labelled_set.is_sequence:
        held = {name for names in groups for name in names[len(names) - round(len(names) * fraction) :]}
    if not held:
        every = min(every, len(frames))
        held = {frame.name for frame in ordered[every - 1 :: every]}
    kept, validation = ([frame for frame in frames if (frame.name in held) == is_held] for is_held in (False, True))
    return replace(labelled_set, frames=kept), replace(labelled_set, frames=validation)


def compute_data_hash(labelled_set: LabelledSet) -> str:
    """Names a version of the data: frame names, sizes of their files, classes and depth range; no pixel is read."""
    lines = [repr(labelled_set.class_names), repr(labelled_set.depth)]
    for frame in sorted(labelled_set.frames, key=lambda frame: frame.name):
        sizes = [path.stat().st_size for path in frame.files if path.is_file()]
        lines.append(f"{frame.name} {frame.class_index} {sizes}")
    return hash_bytes(*lines)


def warn_about_depth_unit(labelled_set: LabelledSet) -> None:
    """Prints a warning if the median depth of a few frames looks as if it had another unit."""
    loaders = [frame.load_depth for frame in labelled_set.frames if frame.load_depth is not None]
    depths = [load() for load in select_evenly(loaders, 8)]
    measured = torch.cat([torch.zeros(0), *(depth[depth > 0][::17] for depth in depths)])
    if len(measured) == 0:
        raise ValueError(f"{labelled_set.name} has no measured depth; check its depth maps (0 means no measurement).")
    median = float(measured.median())
    # Medians of real sets lie at a tenth to a half of the range (NYU 2.5 of 10 m, KITTI 15 of 80 m, ScanNet++ 2 of 20).
    high = labelled_set.depth.max_depth
    if not high / 100 <= median <= high:
        factor = min(_UNIT_FACTORS, key=lambda factor: abs(torch.tensor(median * factor / (high / 5)).log()))
        found = f"a median of {median:.4g} m, outside {high / 100:.4g} to {high:.4g} m"
        wanted = f"it looks as if it had to be multiplied by {factor:.6g} (check --depth-scale and --max-depth)"
        notice(f"Depth of {labelled_set.name} has {found}; {wanted}.")


_UNIT_FACTORS = (1000.0, 256.0, 100.0, 10.0, 5.0, 0.2, 0.1, 0.01, 1 / 256, 0.001, 1e-4, 1e-6)
"""Factors between millimetres, centimetres, 1/256 m, 1/5000 m and metres."""


def _load_image(path: Path, size: tuple[int, int] | None) -> UInt8[Tensor, "height width 3"]:
    image = load_image(path)
    return image if size is None else torch.from_numpy(cv2.resize(image.numpy(), size, interpolation=cv2.INTER_AREA))
