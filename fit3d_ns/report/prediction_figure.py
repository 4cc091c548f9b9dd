"""Prediction figures (the paper's figures 5 to 7): input, each head's prediction, the truth, and errors of depth.

They are drawn from the folders of fit3d-probe --predictions (`probing/head_probe.py` writes them). Segmentation: one
colour per class, black where the truth does not count. Depth: near to far as the truth of each row goes, black where
nothing is measured; errors are |prediction - truth| on one scale for the whole figure, grey where nothing is measured.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image
from torch import Tensor

from fit3d_ns.analysis.pictures import LegendEntry, append_legend, compose_panel, save_picture, upscale
from fit3d_ns.analysis.similarity import map_clusters_to_colours
from fit3d_ns.data.images import IGNORE_INDEX, load_depth, load_image, read_image_header
from fit3d_ns.utils.errors import reading
from fit3d_ns.utils.files import read_json
from fit3d_ns.utils.results import write_facts
from fit3d_ns.utils.selection import select_evenly

DepthMap = Float[Tensor, "height width"]
LISTING_NAME = "predictions.json"
_PARTS: tuple[Literal["image", "truth", "prediction"], ...] = ("image", "truth", "prediction")
_DEPTH_MAP = "viridis"
_ERROR_MAP = "magma"
_UNMEASURED = 0.6
"""Grey of error maps where nothing is measured."""
_METRICS = {"segmentation": ("accuracy", "right pixels"), "depth": ("rmse", "RMSE in m")}
"""What the numbers are called in JSON and in pictures."""


@dataclass(frozen=True)
class PredictionFolder:
    """Predictions of one head for some test frames."""

    folder: Path
    task: Literal["segmentation", "depth"]
    assembly: str
    frames: tuple[str, ...]
    class_names: tuple[str, ...]
    """Empty for depth."""
    is_random: bool
    """True if a backbone has random weights."""
    depth_units_per_metre: float

    def load_map(self, index: int, part: Literal["truth", "prediction"]) -> Shaped[Tensor, "height width"]:
        """Class indices, 255 = does not count, or z-depth in metres, 0 = none."""
        if self.task == "depth":
            return load_depth(self.get_path(index, part), self.depth_units_per_metre)
        with Image.open(self.get_path(index, part)) as image:
            return torch.from_numpy(np.array(image, dtype=np.uint8))

    def get_path(self, index: int, part: Literal["image", "truth", "prediction"]) -> Path:
        return self.folder / f"{index:03d}_{part}.png"


def read_predictions(folders: Sequence[Path]) -> list[PredictionFolder]:
    """Reads folders that can stand in one figure, in the order given.

    ValueError for a folder without predictions or with a file missing, for different tasks, frames, classes or truths,
    and for random weights next to trained ones.
    """
    if not folders:
        raise ValueError("No predictions to compare; give folders that fit3d-probe --predictions wrote.")
    read = [_read_folder(Path(folder)) for folder in folders]
    first = read[0]
    for other in read[1:]:
        for what, name in (("tasks", "task"), ("frames", "frames"), ("classes", "class_names")):
            if getattr(first, name) != getattr(other, name):
                problem = f"{first.folder} and {other.folder} have different {what}"
                raise ValueError(f"{problem}; compare probes of one task that were tested on the same frames.")
        if first.is_random != other.is_random:
            random = first if first.is_random else other
            raise ValueError(f"{random.folder} is of random weights; it is not shown next to trained ones.")
        for index in range(len(first.frames)):
            if first.get_path(index, "truth").read_bytes() != other.get_path(index, "truth").read_bytes():
                problem = f"{first.folder} and {other.folder} have another truth for {first.frames[index]}"
                raise ValueError(f"{problem}; run both probes on the same version of the data.")
    return read


def label_predictions(folders: Sequence[PredictionFolder]) -> list[str]:
    """A short name for each: the assembly, and the folder's name where assemblies repeat."""
    counts, labels = Counter(folder.assembly for folder in folders), []
    for folder in folders:
        place = f" ({folder.folder.name})" if counts[folder.assembly] > 1 else ""
        labels.append(f"{folder.assembly}{place}{', random' if folder.is_random else ''}")
    return labels


def save_prediction_figure(
    folders: Sequence[PredictionFolder], path: Path, *, max_frames: int = 4, column_width: int = 320
) -> dict[str, Any]:
    """Writes the PNG and, next to it, a JSON with each frame's metrics; returns the JSON's content.

    There are at most `max_frames` frames, evenly spread, of pictures `column_width` pixels wide.
    """
    first, labels = folders[0], label_predictions(folders)
    chosen = select_evenly(range(len(first.frames)), max_frames)
    truths = [first.load_map(index, "truth") for index in chosen]
    predictions = [[folder.load_map(index, "prediction") for folder in folders] for index in chosen]
    is_depth = first.task == "depth"
    draw = _draw_depth if is_depth else partial(_draw_labels, first.class_names)
    pictures, values, notes, legend = draw(truths, predictions)
    rows, row_labels, metrics = [], [], []
    key, metric = _METRICS[first.task]
    for index, drawn, numbers, note in zip(chosen, pictures, values, notes, strict=True):
        # Labels and depth are never mixed.
        size = max(round(drawn[0].shape[0] * column_width / drawn[0].shape[1]), 1), column_width
        image = upscale(load_image(first.get_path(index, "image")).float() / 255.0, size, "area")
        rows.append([image, *(upscale(picture, size) for picture in drawn)])
        named = dict(zip(labels, numbers, strict=True))
        said = ", ".join(f"{label} {value:.3f}" for label, value in named.items())
        row_labels.append(f"{first.frames[index]}{note}: {metric} {said}")
        metrics.append({"frame": first.frames[index], key: named})
    errors = [f"error of {label}" for label in labels] if is_depth else []
    panel = compose_panel(rows, ["input", *labels, "ground truth", *errors], row_labels)
    save_picture(append_legend(panel, legend), path)
    return write_facts(path, "report/predictions", first.is_random, task=first.task, columns=labels, frames=metrics)


def colour_values(values: Float[Tensor, "*shape"], low: float, high: float, name: str) -> Float[Tensor, "*shape 3"]:
    """Values from `low` to `high` in the colours of a matplotlib map."""
    import matplotlib

    shares = ((values - low) / max(high - low, 1e-9)).clamp(0.0, 1.0)
    return torch.from_numpy(matplotlib.colormaps[name](shares.numpy())[..., :3].astype(np.float32))


def compute_accuracy(prediction: UInt8[Tensor, "height width"], truth: UInt8[Tensor, "height width"]) -> float:
    """Share of pixels that count whose class is right; NaN where none counts."""
    counts = truth != IGNORE_INDEX
    return float((prediction[counts] == truth[counts]).double().mean())


def compute_errors(prediction: DepthMap, truth: DepthMap) -> tuple[DepthMap, Bool[Tensor, "height width"]]:
    """|prediction - truth| in metres, and where both have a value."""
    is_measured = (truth > 0) & (prediction > 0)
    return torch.where(is_measured, (prediction - truth).abs(), 0.0), is_measured


def _read_folder(folder: Path) -> PredictionFolder:
    path = folder / LISTING_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no predictions ({LISTING_NAME} is missing); run fit3d-probe --predictions.")
    content: Any = read_json(path)
    with reading(path):
        read = PredictionFolder(
            *(folder, content["task"], str(content["assembly"])),
            *(tuple(content["frames"]), tuple(content["class_names"])),
            is_random=bool(content.get("is_random", False)),
            depth_units_per_metre=content.get("depth_units_per_metre", 1000.0),
        )
    if read.task not in ("segmentation", "depth"):
        raise ValueError(f"{path} is about {read.task!r}; predictions are of segmentation or depth.")
    for index, frame in enumerate(read.frames):
        _, truth, prediction = (read_image_header(read.get_path(index, part), "Prediction picture") for part in _PARTS)
        # Photographs of some sets are larger than their labels; truth and prediction never differ.
        if truth.size != prediction.size:
            raise ValueError(f"{folder}: truth and prediction of {frame} differ in size; probe again.")
    return read


_Drawn = tuple[list[list[Float[Tensor, "height width 3"]]], list[list[float]], list[str], list[LegendEntry]]
"""What a task shows: of each frame the pictures after the photograph, a number for each head and a note; the legend."""


def _draw_labels(names: Sequence[str], truths: list[Tensor], predictions: list[list[Tensor]]) -> _Drawn:
    # The last colour, black, is for what does not count.
    palette = torch.cat([map_clusters_to_colours(torch.arange(len(names)), len(names)), torch.zeros(1, 3)])
    maps = [[*own, truth] for own, truth in zip(predictions, truths, strict=True)]
    pictures = [[palette[labelled.long().clamp(max=len(names))] for labelled in row] for row in maps]
    accuracy = [[compute_accuracy(one, truth) for one in own] for own, truth in zip(predictions, truths, strict=True)]
    seen = {int(value) for row in maps for labelled in row for value in labelled.unique()}
    legend = [(palette[[index]], names[index]) for index in sorted(seen - {IGNORE_INDEX})]
    if IGNORE_INDEX in seen:
        legend.append((palette[[-1]], "does not count"))
    return pictures, accuracy, [""] * len(truths), legend


def _draw_depth(truths: list[Tensor], predictions: list[list[Tensor]]) -> _Drawn:
    errors = [[compute_errors(one, truth) for one in own] for own, truth in zip(predictions, truths, strict=True)]
    largest = _find_rank(torch.cat([error[where] for row in errors for error, where in row]), 0.95, otherwise=1.0)
    pictures, notes = [], []
    for truth, own, row in zip(truths, predictions, errors, strict=True):
        measured = truth[truth > 0]
        low, high = _find_rank(measured, 0.02, otherwise=0.0), _find_rank(measured, 0.98, otherwise=1.0)
        depths = [colour_values(depth, low, high, _DEPTH_MAP) for depth in (*own, truth)]
        depths[-1] = depths[-1] * (truth > 0)[..., None]
        painted = [(colour_values(error, 0.0, largest, _ERROR_MAP), where[..., None]) for error, where in row]
        pictures.append([*depths, *(torch.where(where, colours, _UNMEASURED) for colours, where in painted)])
        notes.append(f", {low:.2f} to {high:.2f} m")
    rmse = [[float(error[where].square().mean().sqrt()) for error, where in row] for row in errors]
    steps = torch.linspace(0.0, 1.0, 160)
    legend = [
        (colour_values(steps, 0.0, 1.0, _DEPTH_MAP), "depth, near to far of each row; black: not measured"),
        (colour_values(steps, 0.0, 1.0, _ERROR_MAP), f"error, 0 to {largest:.2f} m; grey: not measured"),
    ]
    return pictures, rmse, notes, legend


def _find_rank(values: Float[Tensor, " n"], share: float, otherwise: float) -> float:
    """The value that a share of all values does not exceed; sorting has no limit on how many, as quantiles have."""
    return float(values.sort().values[int(share * (len(values) - 1))]) if len(values) else otherwise
