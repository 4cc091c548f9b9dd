"""The semantic segmentation probe (paper section 3.3): one linear head per seed, measured by slide inference.

Metrics over all test pixels, n[truth, prediction] being the confusion matrix: iou_c = n_cc / (row_c + column_c - n_cc),
acc_c = n_cc / row_c; miou and macc average over the classes that some label has, aacc is the share of right pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from fit3d_ns.data.images import save_index_map
from fit3d_ns.probing.datasets.frames import IGNORE_INDEX, LabelledFrame, LabelledSet
from fit3d_ns.probing.frozen_features import Assembler
from fit3d_ns.probing.head_probe import MapProbe, PublishedTraining, resolve_cache, resolve_learning_rate
from fit3d_ns.probing.head_trainer import LossSum, OptimizationConfig, Schedule, TrainedHead, sum_over_processes
from fit3d_ns.probing.heads import SegmentationHead
from fit3d_ns.probing.inputs import PUBLISHED_SHORT_SIDE, SegmentationInputs, average_windows, choose_short_side
from fit3d_ns.probing.pictures import resize_map
from fit3d_ns.probing.samples import estimate_memory
from fit3d_ns.utils.progress import notice_once

PUBLISHED = PublishedTraining(num_iterations=40_000, learning_rate=1e-3, width=768)


@dataclass(frozen=True)
class SegmentationConfig:
    """Values of the segmentation probe; those of the public code are `PAPER_SEGMENTATION`."""

    short_side: int | None = None
    """Images are resized to this shorter side, pixels; None: 512, or twice the images' own if that is smaller."""
    crop_side: int | None = None
    """Side of training crops and sliding windows, pixels; None: the shorter side, at most 512."""
    stride: int | None = None
    """Pixels between sliding windows; None: two thirds of their side (341 for 512)."""
    num_iterations: int | None = None
    """Training iterations; None: 40,000 as published, or 60 epochs (at least 800 iterations) if that is less."""
    batch_size: int = 16
    """Images per iteration over all devices (published: 8 GPUs of 2)."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; None: `resolve_learning_rate` of the published 1e-3 for a width of 768."""
    weight_decay: float = 1e-4
    warmup_share: float = 1500 / PUBLISHED.num_iterations
    """Share of the iterations with a linear warm-up."""
    loss_average: Literal["counted", "all"] = "counted"
    """Whether the loss is averaged over labelled pixels, or over all, ignored ones being zero (public code)."""
    max_class_share: float = 0.75
    """Random crops in which one class has this share or more are drawn again."""


PAPER_SEGMENTATION = SegmentationConfig(
    short_side=PUBLISHED_SHORT_SIDE,
    crop_side=512,
    stride=341,
    num_iterations=PUBLISHED.num_iterations,
    learning_rate=PUBLISHED.learning_rate,
    loss_average="all",
)
"""The public code's values."""
DINOV3_SEGMENTATION = replace(PAPER_SEGMENTATION, weight_decay=1e-3, loss_average="counted")
"""DINOv3's values."""


class SegmentationProbe(MapProbe[SegmentationConfig]):
    """Class of each pixel."""

    task = labels = "segmentation"
    published_iterations = PUBLISHED.num_iterations

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config, frames = self.config, self.sets.train.frames
        short_side = config.short_side or choose_short_side(self.sets.train, self.backbones.description.patch_size)
        crop_side = config.crop_side or min(short_side, PUBLISHED_SHORT_SIDE)
        stride = config.stride or max(crop_side * 2 // 3, 1)
        sides = short_side, crop_side, stride
        self.inputs: SegmentationInputs = SegmentationInputs(self.backbones, *sides, config.max_class_share)
        width = self._create_assembler().width
        self.learning_rate = config.learning_rate or resolve_learning_rate(PUBLISHED, self.num_iterations, width)
        num_pictures = 2 * len(frames) * len(self.inputs.list_keys(frames[0]))
        needed_gb = estimate_memory(self.backbones, crop_side, crop_side, num_pictures)
        variants = f"fixed windows of {crop_side} pixels and their mirror images"
        self.is_cached = resolve_cache(self.run, needed_gb, variants)

    def describe(self) -> dict[str, Any]:
        sizes = {name: getattr(self.inputs, name) for name in ("short_side", "crop_side", "stride")}
        return {**sizes, **super().describe(), "learning_rate": self.learning_rate}

    def run_seed(self, seed: int) -> TrainedHead:
        self.seed_head(seed)
        head = SegmentationHead(self._create_assembler(), self.sets.train.num_classes)
        trained = self.train(seed, head, self.create_optimization())
        trained.metrics = self.evaluate(head, self.sets.test)
        return trained

    def create_optimization(self) -> OptimizationConfig:
        config, iterations = self.config, self.num_iterations
        schedule = Schedule("poly", iterations, round(config.warmup_share * iterations))
        return OptimizationConfig(schedule, config.batch_size, self.learning_rate, config.weight_decay)

    def compute_loss(self, predictions: Tensor, targets: Integer[Tensor, "batch h w"], iteration: int) -> LossSum:
        """Cross-entropy over labelled pixels."""
        restored = resize_map(predictions, (targets.shape[1], targets.shape[2])).float()
        total = F.cross_entropy(restored, targets.long(), ignore_index=IGNORE_INDEX, reduction="sum")
        counted = targets.numel() if self.config.loss_average == "all" else int((targets != IGNORE_INDEX).sum())
        return LossSum(total, total.new_tensor(float(counted)))

    def compute_score(self, head: nn.Module, labelled_set: LabelledSet) -> float:
        return self.evaluate(head, labelled_set)["miou"]

    @torch.no_grad()
    def evaluate(self, head: nn.Module, labelled_set: LabelledSet) -> dict[str, Any]:
        num_classes = labelled_set.num_classes
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        for frame in self.share(labelled_set):
            confusion += count_pixels(*self._predict(head, frame), num_classes)
        confusion = sum_over_processes(confusion, self.accelerator)
        occurs = confusion.sum(dim=1) > 0
        absent = [name for name, found in zip(labelled_set.class_names, occurs.tolist(), strict=True) if not found]
        if absent and self.accelerator.is_main_process:
            named, name = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else ""), labelled_set.name
            said = f"No label of {name} is {named}: such classes do not count in miou ({IGNORE_INDEX} in a label map"
            notice_once(f"absent classes of {name}", f"{said} means that a pixel does not count).")
        return summarise_pixels(confusion, labelled_set.class_names)

    @torch.no_grad()
    def predict_logits(
        self, head: nn.Module, frame: LabelledFrame, size: tuple[int, int]
    ) -> Float[Tensor, "classes height width"]:
        """Logits of each pixel of a frame at a size (height, width), by slide inference."""
        windows = self.inputs.list_windows(frame)
        kept = self.memory.fetch(self.inputs.list_keys(frame), [frame] * len(windows), self.inputs)
        maps = []
        for window, (features, _) in zip(windows, kept, strict=True):
            logits = head(features.to(self.accelerator.device))
            maps.append(self.backbones.create_fit(window.height, window.width).restore(logits)[0])
        height, width = windows[-1].top + windows[-1].height, windows[-1].left + windows[-1].width
        return resize_map(average_windows(maps, windows, height, width)[None], size)[0]

    def save_prediction(self, head: nn.Module, frame: LabelledFrame, prefix: Path, units: float) -> Tensor:
        predicted, labels = self._predict(head, frame)
        save_index_map(labels, Path(f"{prefix}_truth.png"))
        save_index_map(predicted, Path(f"{prefix}_prediction.png"))
        return frame.load_image()

    def _predict(self, head: nn.Module, frame: LabelledFrame) -> tuple[UInt8[Tensor, "h w"], UInt8[Tensor, "h w"]]:
        """Predicted and true classes of a frame."""
        assert frame.load_labels is not None
        labels = frame.load_labels()
        logits = self.predict_logits(head, frame, (labels.shape[0], labels.shape[1]))
        return logits.argmax(dim=0).to("cpu", torch.uint8), labels

    def _create_assembler(self) -> Assembler:
        return Assembler(self.assembly, self.backbones.embed_dim, "none")


def count_pixels(
    predicted: Integer[Tensor, "height width"], labels: Integer[Tensor, "height width"], num_classes: int
) -> Int[Tensor, "classes classes"]:
    """Pixels by true class (rows) and predicted class; those labelled `IGNORE_INDEX` never count."""
    counted = labels != IGNORE_INDEX
    pairs = labels[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def summarise_pixels(confusion: Int[Tensor, "classes classes"], class_names: Sequence[str]) -> dict[str, Any]:
    """The metrics of what `count_pixels` counted, in [0, 1], with IoU by class name; ValueError without any pixel."""
    total = int(confusion.sum())
    if total == 0:
        raise ValueError("No test pixel has a label that counts; check the label maps.")
    right, rows, columns = confusion.diagonal().double(), confusion.sum(1).double(), confusion.sum(0).double()
    # Classes that no label has become NaN and are left out.
    iou = torch.where(rows > 0, right / (rows + columns - right), torch.nan)
    return {
        "miou": float(iou.nanmean()),
        "macc": float((right / rows).nanmean()),
        "aacc": float(right.sum() / total),
        "iou_by_class": dict(zip(class_names, iou.tolist(), strict=True)),
    }
