"""Prediction figures (the paper's figures 5 to 7): input, each head's prediction, the truth, and errors of depth.

Segmentation: one colour per class, black where the truth does not count. Depth: near to far as the truth of each row
goes, black where nothing is measured; errors are |prediction - truth| on one scale for the whole figure, grey where
nothing is measured.
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.pictures import compose_panel, save_picture
from fit3d_ns.report.legends import LegendEntry, append_legend
from fit3d_ns.report.prediction_files import PredictionFolder, label_predictions
from fit3d_ns.utils.files import write_json
from fit3d_ns.utils.results import collect_versions

IGNORED = 255
_DEPTH_MAP = "viridis"
_ERROR_MAP = "magma"
_UNMEASURED = 0.6
"""Grey of error maps where nothing is measured."""
Cell = Float[Tensor, "height width 3"] | None


def save_prediction_figure(
    folders: Sequence[PredictionFolder], path: Path, *, max_frames: int = 4, column_width: int = 320
) -> dict[str, Any]:
    """Writes the PNG and, beside it, a JSON with each frame's figures; returns the JSON's content.

    Args:
        folders: Of `read_predictions`.
        path: The PNG.
        max_frames: At most so many frames, evenly spread.
        column_width: Width of each picture in pixels.

    Raises:
        ValueError: Numbers out of range.
    """
    if max_frames < 1 or column_width < 16:
        raise ValueError(f"{max_frames} frames of {column_width} pixels; take at least one frame of 16 pixels.")
    total = len(folders[0].frames)
    chosen = sorted({round(index) for index in np.linspace(0, total - 1, min(max_frames, total))})
    draw = _draw_segmentation if folders[0].task == "segmentation" else _draw_depth
    panel, figures = draw(folders, chosen, column_width)
    content = {
        "kind": "report/predictions",
        "task": folders[0].task,
        "columns": label_predictions(folders),
        "frames": figures,
        "is_random": folders[0].is_random,
        "versions": collect_versions(),
    }
    save_picture(panel, path)
    write_json(path.with_suffix(".json"), content)
    return content


def colour_classes(num_classes: int) -> Float[Tensor, "classes 3"]:
    """A colour per class: hues apart by the golden ratio, in turn light, dark and pale, so that many stay apart."""
    palette = [
        colorsys.hsv_to_rgb(index * 0.618034 % 1.0, (0.75, 0.85, 0.45)[index % 3], (0.95, 0.6, 0.85)[index % 3])
        for index in range(num_classes)
    ]
    return torch.tensor(palette)


def colour_values(values: Float[Tensor, "*shape"], low: float, high: float, name: str) -> Float[Tensor, "*shape 3"]:
    """Values from `low` to `high` in the colours of a matplotlib map."""
    import matplotlib

    shares = ((values - low) / max(high - low, 1e-9)).clamp(0.0, 1.0)
    return torch.from_numpy(matplotlib.colormaps[name](shares.numpy())[..., :3].astype(np.float32))


def compute_accuracy(prediction: UInt8[Tensor, "height width"], truth: UInt8[Tensor, "height width"]) -> float:
    """Share of pixels that count whose class is right; NaN where none counts."""
    counts = truth != IGNORED
    return float((prediction[counts] == truth[counts]).double().mean())


def compute_errors(
    prediction: Float[Tensor, "height width"], truth: Float[Tensor, "height width"]
) -> tuple[Float[Tensor, "height width"], Bool[Tensor, "height width"]]:
    """|prediction - truth| in metres, and where both have a value."""
    is_measured = (truth > 0) & (prediction > 0)
    return torch.where(is_measured, (prediction - truth).abs(), 0.0), is_measured


def _draw_segmentation(
    folders: Sequence[PredictionFolder], chosen: Sequence[int], width: int
) -> tuple[Image.Image, list[dict[str, Any]]]:
    labels = label_predictions(folders)
    names = folders[0].class_names
    # The last colour, black, is for what does not count.
    palette = torch.cat([colour_classes(len(names)), torch.zeros(1, 3)])
    rows: list[list[Cell]] = []
    row_labels, figures, seen = [], [], set()
    for index in chosen:
        truth = folders[0].load_labels(index, "truth")
        predictions = [folder.load_labels(index, "prediction") for folder in folders]
        accuracy = [compute_accuracy(prediction, truth) for prediction in predictions]
        pictures = [palette[labelled.long().clamp(max=len(names))] for labelled in (*predictions, truth)]
        image = folders[0].load_image(index).float() / 255.0
        rows.append([_fit(image, width, "area"), *(_fit(picture, width) for picture in pictures)])
        row_labels.append(_say(folders[0].frames[index], "right pixels", labels, accuracy))
        figures.append({"frame": folders[0].frames[index], "accuracy": dict(zip(labels, accuracy, strict=True))})
        seen |= {int(value) for labelled in (*predictions, truth) for value in labelled.unique()}
    entries = [LegendEntry(palette[[index]], names[index]) for index in sorted(seen - {IGNORED})]
    if IGNORED in seen:
        entries.append(LegendEntry(palette[[-1]], "does not count"))
    return append_legend(compose_panel(rows, ["input", *labels, "ground truth"], row_labels), entries), figures


def _draw_depth(
    folders: Sequence[PredictionFolder], chosen: Sequence[int], width: int
) -> tuple[Image.Image, list[dict[str, Any]]]:
    labels = label_predictions(folders)
    truths = {index: folders[0].load_depth(index, "truth") for index in chosen}
    predictions = {index: [folder.load_depth(index, "prediction") for folder in folders] for index in chosen}
    errors = {index: [compute_errors(depth, truths[index]) for depth in predictions[index]] for index in chosen}
    measured = torch.cat([error[where] for pairs in errors.values() for error, where in pairs])
    largest = _find_rank(measured, 0.95, otherwise=1.0)
    rows: list[list[Cell]] = []
    row_labels, figures = [], []
    for index in chosen:
        truth = truths[index]
        low, high = _find_range(truth)
        depths = [colour_values(depth, low, high, _DEPTH_MAP) for depth in (*predictions[index], truth)]
        depths[-1] = depths[-1] * (truth > 0)[..., None]
        maps = [
            torch.where(where[..., None], colour_values(error, 0.0, largest, _ERROR_MAP), _UNMEASURED)
            for error, where in errors[index]
        ]
        rmse = [float(error[where].square().mean().sqrt()) for error, where in errors[index]]
        image = folders[0].load_image(index).float() / 255.0
        rows.append([_fit(image, width, "area"), *(_fit(picture, width) for picture in (*depths, *maps))])
        name = f"{folders[0].frames[index]}, {low:.2f} to {high:.2f} m"
        row_labels.append(_say(name, "RMSE in m", labels, rmse))
        figures.append({"frame": folders[0].frames[index], "rmse": dict(zip(labels, rmse, strict=True))})
    columns = ["input", *labels, "ground truth", *(f"error of {label}" for label in labels)]
    steps = torch.linspace(0.0, 1.0, 160)
    entries = [
        LegendEntry(colour_values(steps, 0.0, 1.0, _DEPTH_MAP), "depth, near to far of each row; black: not measured"),
        LegendEntry(
            colour_values(steps, 0.0, 1.0, _ERROR_MAP), f"error, 0 to {largest:.2f} m and more; grey: not measured"
        ),
    ]
    return append_legend(compose_panel(rows, columns, row_labels), entries), figures


def _find_range(depth: Float[Tensor, "height width"]) -> tuple[float, float]:
    """Second and 98th percentile of what is measured."""
    measured = depth[depth > 0]
    return _find_rank(measured, 0.02, otherwise=0.0), _find_rank(measured, 0.98, otherwise=1.0)


def _find_rank(values: Float[Tensor, " n"], share: float, otherwise: float) -> float:
    """The value that a share of all values does not exceed; sorting has no limit on how many, as quantiles have."""
    return float(values.sort().values[int(share * (len(values) - 1))]) if len(values) else otherwise


def _fit(
    picture: Float[Tensor, "height width 3"], width: int, mode: Literal["nearest-exact", "area"] = "nearest-exact"
) -> Float[Tensor, "new_height new_width 3"]:
    """Resizes to a width; labels and depth are never mixed."""
    height = max(round(picture.shape[0] * width / picture.shape[1]), 1)
    return F.interpolate(picture.permute(2, 0, 1)[None], size=(height, width), mode=mode)[0].permute(1, 2, 0)


def _say(name: str, metric: str, labels: Sequence[str], values: Sequence[float]) -> str:
    return f"{name}: {metric} " + ", ".join(f"{label} {value:.3f}" for label, value in zip(labels, values, strict=True))
