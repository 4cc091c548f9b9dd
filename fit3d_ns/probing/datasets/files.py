"""Label maps and depth maps as they lie on disk, for the readers of labelled sets; every error names the file."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from fit3d_ns.data.images import load_depth, load_image, read_image_header
from fit3d_ns.probing.datasets.frames import IGNORE_INDEX, LabelledFrame


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
            raise ValueError(
                f"{source} has label {value} at {int(wrong.sum())} pixels, outside the {self.num_classes} classes; "
                f"correct the class list, or write {IGNORE_INDEX} where pixels must not count."
            )
        return labels.to(torch.uint8)


def create_zero_ignoring_table(num_classes: int) -> LabelTable:
    """Files that count classes from 1 and write 0 where there is no label (`reduce_zero_label` of mmsegmentation)."""
    return LabelTable(num_classes, {0: IGNORE_INDEX, **{number: number - 1 for number in range(1, num_classes + 1)}})


def load_label_map(path: Path, table: LabelTable) -> UInt8[Tensor, "height width"]:
    """Reads an index map: 8-bit grey, palette (its indices count) or 16-bit grey."""
    header = read_image_header(path, "Label map")
    if header.mode not in ("L", "P", "1", "F") and not header.mode.startswith("I"):
        raise ValueError(
            f"Label map {path} is a colour picture ({header.mode}), expected one index per pixel; "
            "convert colours to class indices first."
        )
    try:
        with Image.open(path) as image:
            return table.apply(torch.from_numpy(np.array(image).astype(np.int64)), path)
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"Label map {path} is truncated or damaged ({error}); copy the file again.") from error


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
        if (header.width, header.height) != (image.width, image.height):
            if not resize_image:
                raise ValueError(
                    f"{what} {path} is {header.width}x{header.height}, its image {image_path} is "
                    f"{image.width}x{image.height}; they must have one size."
                )
            size = (header.width, header.height)
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
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} lists nothing; {hint}.")
    return lines


def _load_image(path: Path, size: tuple[int, int] | None) -> UInt8[Tensor, "height width 3"]:
    image = load_image(path)
    return image if size is None else torch.from_numpy(cv2.resize(image.numpy(), size, interpolation=cv2.INTER_AREA))
