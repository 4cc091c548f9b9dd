"""What every labelled set is read into: photographs with class labels, depth or a class of the whole picture.

Labels are class indices 0 .. num_classes - 1 and `IGNORE_INDEX` where a pixel must never count. Depth is z-depth in
metres, 0 where there is no measurement. Pixels are loaded when asked for; frames can be sent to loader workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fit3d_ns.utils.files import hash_bytes
from fit3d_ns.utils.progress import notice

IGNORE_INDEX = 255
"""Label of pixels that never count."""

ProbeTask = Literal["segmentation", "depth", "classification"]
LabelledSplit = Literal["train", "test"]
EvaluationWindow = Literal["none", "eigen", "garg"]
"""Which part of a depth map counts: all of it, Eigen's window of NYU (rows 45-471, columns 41-601 of 480x640), or
Garg's of KITTI, which is relative to the size."""


@dataclass(frozen=True)
class LabelledFrame:
    """One photograph with what is known about it; loaders raise ValueError naming the file they cannot use."""

    name: str
    """Unique in its set, the same on every machine."""
    load_image: Callable[[], UInt8[Tensor, "height width 3"]]
    """The photograph, RGB."""
    load_labels: Callable[[], UInt8[Tensor, "height width"]] | None = None
    """Class index of each pixel, of the photograph's size."""
    load_depth: Callable[[], Float[Tensor, "height width"]] | None = None
    """z-depth in metres, of the photograph's size, 0 = no measurement."""
    class_index: int | None = None
    """Class of the whole picture."""
    group: str = ""
    """Scene or video the photograph belongs to; neighbours in a group look alike."""
    files: tuple[Path, ...] = ()
    """Files it is made from, for `compute_data_hash`."""


@dataclass(frozen=True)
class DepthConvention:
    """How a depth set is trained and evaluated on (FACTS "Linear depth probe")."""

    min_depth: float = 0.001
    """Metres; only depth above it counts."""
    max_depth: float = 10.0
    """Metres; only depth below it counts."""
    evaluation_window: EvaluationWindow = "none"
    """Part of a test image that counts."""
    train_crop: tuple[int, int, int, int] | None = None
    """First and past-the-last row, first and past-the-last column that are trained on; None: the whole picture."""
    bottom_crop: tuple[int, int] | None = None
    """Height and width of the part that is seen at all, centred in x and at the bottom in y (KITTI benchmark crop)."""
    brightness_range: tuple[float, float] = (0.75, 1.25)
    """Factors of the brightness augmentation."""


@dataclass(frozen=True)
class LabelledSet:
    """One split of a data set."""

    name: str
    """Which data set, for example `ade20k`; results carry it."""
    frames: list[LabelledFrame]
    """Never empty."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of their indices; empty where there are no labels."""
    depth: DepthConvention = field(default_factory=DepthConvention)
    """Depth range and crops."""
    is_sequence: bool = False
    """True where neighbouring frames of a group are neighbours in time, so that they must not be split at random."""

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError(f"The set {self.name} is empty; check the folder and the split.")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def select(self, frames: Sequence[LabelledFrame]) -> "LabelledSet":
        """The same set with some of its frames."""
        return replace(self, frames=list(frames))


def join_sets(sets: Sequence[LabelledSet]) -> LabelledSet:
    """One set out of several, for example scenes that are trained on together.

    Raises:
        ValueError: Their classes differ, or the depth ranges of sets without classes.
    """
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
        differing = next(
            (
                f"class {index} is {a!r} and {b!r}"
                for index, (a, b) in enumerate(zip(first.class_names, other.class_names, strict=False))
                if a != b
            ),
            f"{first.num_classes} and {other.num_classes} classes",
        )
        raise ValueError(f"{first.name} and {other.name} have other classes ({differing}); use sets of one class list.")
    if not first.class_names and first.depth.max_depth != other.depth.max_depth:
        raise ValueError(
            f"{first.name} reads depth up to {first.depth.max_depth} m, {other.name} up to {other.depth.max_depth} m; "
            "give --max-depth."
        )


def split_validation(labelled_set: LabelledSet, fraction: float) -> tuple[LabelledSet, LabelledSet]:
    """Takes a validation part out of training data, in a way that leaks little.

    Five groups or more: whole groups are held out. Fewer groups of a sequence: the last part of each, because frames
    next to each other look alike. Otherwise every k-th frame in the order of names.

    Args:
        labelled_set: The training data.
        fraction: Share of the frames to hold out, in (0, 0.5].

    Returns:
        The training part and the validation part, both non-empty.

    Raises:
        ValueError: Fewer than two frames.
    """
    frames = labelled_set.frames
    if len(frames) < 2:
        raise ValueError(
            f"{labelled_set.name} has one training frame, which cannot give a validation part; use --selection last."
        )
    groups: dict[str, list[LabelledFrame]] = {}
    for frame in sorted(frames, key=lambda frame: frame.name):
        groups.setdefault(frame.group, []).append(frame)
    held: set[str] = set()
    if len(groups) >= 5:
        every = max(round(1 / fraction), 2)
        for index, members in enumerate(groups.values()):
            if index % every == every - 1:
                held.update(frame.name for frame in members)
    if not held and labelled_set.is_sequence:
        for members in groups.values():
            count = round(len(members) * fraction)
            held.update(frame.name for frame in members[len(members) - count :])
    if not held:
        every = min(max(round(1 / fraction), 2), len(frames))
        held = {frame.name for frame in sorted(frames, key=lambda frame: frame.name)[every - 1 :: every]}
    kept = [frame for frame in frames if frame.name not in held]
    return labelled_set.select(kept), labelled_set.select([frame for frame in frames if frame.name in held])


def compute_data_hash(labelled_set: LabelledSet) -> str:
    """Names a version of the data: frame names, sizes of their files, classes and depth range; no pixel is read."""
    lines = [repr(labelled_set.class_names), repr(labelled_set.depth)]
    for frame in sorted(labelled_set.frames, key=lambda frame: frame.name):
        sizes = [path.stat().st_size for path in frame.files if path.is_file()]
        lines.append(f"{frame.name} {frame.class_index} {sizes}")
    return hash_bytes(*(line.encode() for line in lines))


def measure_median_depth(labelled_set: LabelledSet, num_frames: int = 8) -> float:
    """Median of the measured depth of a few frames spread over the set, in metres; 0 where nothing is measured."""
    frames = [frame for frame in labelled_set.frames if frame.load_depth is not None]
    values = []
    for frame in frames[:: max(len(frames) // num_frames, 1)][:num_frames]:
        assert frame.load_depth is not None
        depth = frame.load_depth()
        values.append(depth[depth > 0][::17])
    joined = torch.cat(values) if values else torch.zeros(0)
    return float(joined.median()) if len(joined) else 0.0


def warn_about_depth_unit(labelled_set: LabelledSet) -> str | None:
    """Says so if depth looks as if its unit were another one, with the factor it looks like; returns the sentence.

    Raises:
        ValueError: No frame has any measured depth.
    """
    median = measure_median_depth(labelled_set)
    convention = labelled_set.depth
    if median == 0.0:
        raise ValueError(f"{labelled_set.name} has no measured depth; check its depth maps (0 means no measurement).")
    # Medians of real sets lie at a tenth to a half of the range (NYU 2.5 of 10 m, KITTI 15 of 80 m, ScanNet++ 2 of 20).
    low, high = convention.max_depth / 100, convention.max_depth
    if low <= median <= high:
        return None
    center = convention.max_depth / 5
    factor = min(_UNIT_FACTORS, key=lambda factor: abs(torch.tensor(median * factor / center).log()))
    sentence = (
        f"Depth of {labelled_set.name} has a median of {median:.4g} m, outside {low:.4g} to {high:.4g} m; "
        f"it looks as if it had to be multiplied by {factor:.6g} (check --depth-scale and --max-depth)."
    )
    notice(sentence)
    return sentence


def check_labels(
    labels: Int[Tensor, "height width"], num_classes: int, source: Path | str
) -> UInt8[Tensor, "height width"]:
    """Labels as 8-bit indices.

    Raises:
        ValueError: A value is neither a class nor `IGNORE_INDEX`; the message names value and file.
    """
    wrong = (labels != IGNORE_INDEX) & ((labels >= num_classes) | (labels < 0))
    if wrong.any():
        value = int(labels[wrong][0])
        raise ValueError(
            f"{source} has label {value} at {int(wrong.sum())} pixels, outside the {num_classes} classes; "
            f"correct the class list, or write {IGNORE_INDEX} where pixels must not count."
        )
    return labels.to(torch.uint8)


_UNIT_FACTORS = (1000.0, 256.0, 100.0, 10.0, 5.0, 0.2, 0.1, 0.01, 1 / 256, 0.001, 1e-4, 1e-6)
"""Between millimetres, centimetres, 1/256 m, 1/5000 m and metres."""
