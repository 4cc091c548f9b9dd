"""Metrics of the probes over all test pixels.

Segmentation, n[truth, prediction] being the confusion matrix: iou_c = n_cc / (row_c + column_c - n_cc),
acc_c = n_cc / row_c; miou and macc average over the classes that some label has, aacc is the share of right pixels.

Depth, p prediction, d target, in metres, over pixels with min < d < max: rmse = sqrt(mean (p - d)^2),
abs_rel = mean |p - d| / d, sq_rel = mean (p - d)^2 / d, log10 = mean |log10 p - log10 d|,
silog = 100 sqrt(var(log p - log d)) with n in the denominator, d1 d2 d3 = share of pixels with max(p / d, d / p) below
1.25, 1.25^2, 1.25^3; as means of per-image values (published) and over all pixels together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from fit3d_ns.probing.datasets.frames import IGNORE_INDEX, EvaluationWindow

METRIC_NAMES = ("rmse", "abs_rel", "sq_rel", "log10", "silog", "d1", "d2", "d3")
"""Of depth."""


class SegmentationMetrics:
    """Adds up images; `confusion` counts pixels by true class (rows) and predicted class, and may be summed."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion: Int[Tensor, "classes classes"] = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predicted: Integer[Tensor, "height width"], labels: Integer[Tensor, "height width"]) -> None:
        """Adds one image; pixels labelled `IGNORE_INDEX` never count."""
        counted = labels != IGNORE_INDEX
        pairs = labels[counted].long() * self.num_classes + predicted[counted].long()
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.confusion += counts.view(self.num_classes, self.num_classes).cpu()

    def compute(self, class_names: Sequence[str] = ()) -> dict[str, Any]:
        """The metrics, in [0, 1], with IoU by class name; ValueError if no pixel was counted."""
        total = int(self.confusion.sum())
        if total == 0:
            raise ValueError("No test pixel has a label that counts; check the label maps.")
        right = self.confusion.diagonal().double()
        rows, columns = self.confusion.sum(1).double(), self.confusion.sum(0).double()
        # Classes that no label has become NaN and are left out.
        iou = torch.where(rows > 0, right / (rows + columns - right), torch.nan)
        accuracy = right / rows
        names = class_names or [str(index) for index in range(self.num_classes)]
        return {
            "miou": float(iou.nanmean()),
            "macc": float(accuracy.nanmean()),
            "aacc": float(right.sum() / total),
            "iou_by_class": dict(zip(names, iou.tolist(), strict=True)),
        }


class DepthMetrics:
    """Adds up images: `sums` over all pixels, the pixel count last, and `per_image` values, the image count last.

    Targets outside the range (metres) or the window do not count; predictions are clamped to the range.
    """

    def __init__(self, min_depth: float = 0.001, max_depth: float = 10.0, window: EvaluationWindow = "none") -> None:
        self.min_depth, self.max_depth, self.window = min_depth, max_depth, window
        self.sums = torch.zeros(10, dtype=torch.float64)
        self.per_image = torch.zeros(len(METRIC_NAMES) + 1, dtype=torch.float64)

    def update(self, prediction: Float[Tensor, "height width"], target: Float[Tensor, "height width"]) -> None:
        """Adds one image; one without valid pixels does not count (nanmean)."""
        valid = (target > self.min_depth) & (target < self.max_depth) & create_window(self.window, *target.shape)
        if not valid.any():
            return
        sums = _sum_errors(prediction[valid].double().clamp(self.min_depth, self.max_depth), target[valid].double())
        self.sums += sums
        self.per_image += torch.cat([_finish(sums), torch.ones(1, dtype=torch.float64)])

    def compute(self) -> dict[str, Any]:
        """Means of per-image values under their names, over all pixels below `pooled`; ValueError without any."""
        if self.per_image[-1] == 0:
            raise ValueError(
                f"No test pixel has depth between {self.min_depth} and {self.max_depth} m; check unit and --max-depth."
            )
        means = dict(zip(METRIC_NAMES, (self.per_image[:-1] / self.per_image[-1]).tolist(), strict=True))
        pooled = dict(zip(METRIC_NAMES, _finish(self.sums).tolist(), strict=True))
        return {**means, "pooled": pooled, "num_images": int(self.per_image[-1])}


def create_window(window: EvaluationWindow, height: int, width: int) -> Bool[Tensor, "height width"]:
    """True inside the part that counts; Eigen's window is given for 480x640 and scales with the size, as Garg's."""
    inside = torch.zeros(height, width, dtype=torch.bool)
    if window == "eigen":
        top, bottom, left, right = 45 / 480, 471 / 480, 41 / 640, 601 / 640
    elif window == "garg":
        top, bottom, left, right = 0.40810811, 0.99189189, 0.03594771, 0.96405229
    else:
        return ~inside
    # The tolerance keeps 45 / 480 * 480 from becoming 44.
    rows = slice(int(top * height + 1e-6), int(bottom * height + 1e-6))
    inside[rows, int(left * width + 1e-6) : int(right * width + 1e-6)] = True
    return inside


def _sum_errors(prediction: Float[Tensor, " pixels"], target: Float[Tensor, " pixels"]) -> Float[Tensor, " sums"]:
    difference = prediction - target
    logs = prediction.log() - target.log()
    ratio = torch.maximum(prediction / target, target / prediction)
    return torch.stack(
        [
            difference.square().sum(),
            (difference.abs() / target).sum(),
            (difference.square() / target).sum(),
            (prediction.log10() - target.log10()).abs().sum(),
            logs.sum(),
            logs.square().sum(),
            *((ratio < 1.25**power).double().sum() for power in (1, 2, 3)),
            torch.tensor(float(len(target)), dtype=torch.float64, device=target.device),
        ]
    ).cpu()


def _finish(sums: Float[Tensor, " sums"]) -> Float[Tensor, " metrics"]:
    """From sums over pixels to the metrics, in the order of `METRIC_NAMES`."""
    squared, abs_rel, sq_rel, log10, log, log_squared, d1, d2, d3 = (sums[:-1] / sums[-1]).unbind()
    silog = 100.0 * (log_squared - log.square()).clamp_min(0.0).sqrt()
    return torch.stack([squared.sqrt(), abs_rel, sq_rel, log10, silog, d1, d2, d3])
