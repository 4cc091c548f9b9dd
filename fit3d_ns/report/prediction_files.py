"""Reads folders that `fit3d-probe --predictions` wrote and checks that they can stand in one figure.

`HeadProbe.save_predictions` of `probing/head_probe.py` draws their layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from fit3d_ns.data.images import load_depth, load_image, read_image_header
from fit3d_ns.utils.files import read_json

LISTING_NAME = "predictions.json"
_PARTS = ("image", "truth", "prediction")


@dataclass(frozen=True)
class PredictionFolder:
    """Predictions of one head."""

    folder: Path
    """Where they lie."""
    task: Literal["segmentation", "depth"]
    """What was predicted."""
    assembly: str
    """The features the head reads."""
    frames: tuple[str, ...]
    """Names of the test frames."""
    class_names: tuple[str, ...]
    """Of segmentation."""
    is_random: bool
    """True if a backbone has random weights."""
    seed: int
    """Of the head."""
    depth_units_per_metre: float = 1000.0
    """Of the depth maps."""

    def load_image(self, index: int) -> UInt8[Tensor, "height width 3"]:
        """The photograph."""
        return load_image(self._path(index, "image"))

    def load_labels(self, index: int, part: Literal["truth", "prediction"]) -> UInt8[Tensor, "height width"]:
        """Class indices, 255 = does not count."""
        with Image.open(self._path(index, part)) as image:
            return torch.from_numpy(np.array(image, dtype=np.uint8))

    def load_depth(self, index: int, part: Literal["truth", "prediction"]) -> Float[Tensor, "height width"]:
        """z-depth in metres, 0 = none."""
        return load_depth(self._path(index, part), self.depth_units_per_metre)

    def read_size(self, index: int, part: str) -> tuple[int, int]:
        """(width, height) of a file."""
        header = read_image_header(self._path(index, part), "Prediction picture")
        return header.width, header.height

    def _path(self, index: int, part: str) -> Path:
        return self.folder / f"{index:03d}_{part}.png"


def read_predictions(folders: Sequence[Path]) -> list[PredictionFolder]:
    """Reads folders that can stand in one figure, in the order given.

    Raises:
        ValueError: A folder without predictions or with a file missing; different tasks, frames, classes or truths;
            random weights beside trained ones.
    """
    if not folders:
        raise ValueError("No predictions to compare; give folders that fit3d-probe --predictions wrote.")
    read = [_read_folder(Path(folder)) for folder in folders]
    first = read[0]
    for other in read[1:]:
        for what, a, b in (
            ("tasks", first.task, other.task),
            ("frames", first.frames, other.frames),
            ("classes", first.class_names, other.class_names),
        ):
            if a != b:
                raise ValueError(
                    f"{first.folder} and {other.folder} have different {what}; compare probes of one task that were "
                    "tested on the same frames."
                )
        if first.is_random != other.is_random:
            random = first if first.is_random else other
            raise ValueError(f"{random.folder} is of random weights; it is not shown beside trained ones.")
        for index in range(len(first.frames)):
            truths = [folder._path(index, "truth").read_bytes() for folder in (first, other)]
            if truths[0] != truths[1]:
                raise ValueError(
                    f"{first.folder} and {other.folder} have another truth for {first.frames[index]}; "
                    "run both probes on the same version of the data."
                )
    return read


def label_predictions(folders: Sequence[PredictionFolder]) -> list[str]:
    """A short name for each: the assembly, and the folder's name where assemblies repeat."""
    assemblies = [folder.assembly for folder in folders]
    labels = [
        assembly if assemblies.count(assembly) == 1 else f"{assembly} ({folder.folder.name})"
        for assembly, folder in zip(assemblies, folders, strict=True)
    ]
    return [f"{label}, random" if folder.is_random else label for label, folder in zip(labels, folders, strict=True)]


def _read_folder(folder: Path) -> PredictionFolder:
    path = folder / LISTING_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no predictions ({LISTING_NAME} is missing); run fit3d-probe --predictions.")
    content: Any = read_json(path)
    try:
        read = PredictionFolder(
            folder=folder,
            task=content["task"],
            assembly=str(content["assembly"]),
            frames=tuple(content["frames"]),
            class_names=tuple(content["class_names"]),
            is_random=bool(content.get("is_random", False)),
            seed=int(content["seed"]),
            depth_units_per_metre=float(content.get("depth_units_per_metre", 1000.0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no list of predictions ({error!r}); run fit3d-probe --predictions anew."
        ) from error
    if read.task not in ("segmentation", "depth"):
        raise ValueError(f"{path} is about {read.task!r}; predictions are of segmentation or depth.")
    for index in range(len(read.frames)):
        sizes = {part: read.read_size(index, part) for part in _PARTS}
        # Photographs of some sets are larger than their labels; truth and prediction never differ.
        if sizes["truth"] != sizes["prediction"]:
            raise ValueError(f"{folder}: truth and prediction of {read.frames[index]} differ in size; probe anew.")
    return read
