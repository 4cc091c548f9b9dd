"""Metrics of semantic segmentation from one confusion matrix over all test pixels.

iou_c = n_cc / (row_c + column_c - n_cc), acc_c = n_cc / row_c with n[truth, prediction]; miou and macc average over the
classes that some label has, aacc is the share of pixels that are right.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from fit3d_ns.probing.datasets.frames import IGNORE_INDEX


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
