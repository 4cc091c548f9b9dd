"""The semantic segmentation probe (paper section 3.3; FACTS "Linear segmentation probe").

`SegmentationProbe` trains one head per seed on frozen features and measures it by slide inference. Its twin is
`depth_probe.py`.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from fit3d_ns.probing.assembly import Assembler, Assembly
from fit3d_ns.probing.datasets.frames import IGNORE_INDEX, LabelledFrame, LabelledSet
from fit3d_ns.probing.depth.losses import LossSum
from fit3d_ns.probing.feature_memory import FeatureMemory, Picture
from fit3d_ns.probing.frozen_backbones import FrozenBackbones
from fit3d_ns.probing.head_trainer import OptimizationConfig, train_head
from fit3d_ns.probing.patch_fit import resize_map
from fit3d_ns.probing.protocol import (
    ProbeSets,
    PublishedTraining,
    RunConfig,
    SeedOutcome,
    estimate_memory,
    resolve_cache,
    resolve_iterations,
    resolve_learning_rate,
    summarise_training,
)
from fit3d_ns.probing.sample_streams import AugmentedStream, RememberedStream
from fit3d_ns.probing.schedules import Schedule
from fit3d_ns.probing.segmentation.head import SegmentationHead
from fit3d_ns.probing.segmentation.metrics import SegmentationMetrics
from fit3d_ns.probing.segmentation.pictures import (
    PUBLISHED_SHORT_SIDE,
    SegmentationPictures,
    WindowKey,
    choose_short_side,
)
from fit3d_ns.probing.segmentation.slide_windows import average_windows
from fit3d_ns.utils.seeds import derive_seed

PUBLISHED = PublishedTraining(num_iterations=40_000, learning_rate=1e-3, width=768)


@dataclass(frozen=True)
class SegmentationConfig:
    """Values of the segmentation probe; those of the public code are `PAPER_SEGMENTATION`."""

    short_side: int | None = None
    """Images are resized to this shorter side, pixels; None: 512, or twice the images' own if that is smaller."""
    crop_side: int | None = None
    """Side of training crops and sliding windows; None: the shorter side, at most 512."""
    stride: int | None = None
    """Between sliding windows; None: two thirds of their side (341 for 512)."""
    num_iterations: int | None = None
    """None: 40,000 as published, or 60 epochs (at least 800 iterations) if that is less."""
    batch_size: int = 16
    """Images per iteration over all devices (published: 8 GPUs of 2)."""
    learning_rate: float | None = None
    """Peak, AdamW. None: the published 1e-3 for a width of 768, times published iterations and width over ours, at most
    4 over the width; see `resolve_learning_rate`."""
    weight_decay: float = 1e-4
    """AdamW's."""
    warmup_share: float = 1500 / PUBLISHED.num_iterations
    """Share of the iterations with a linear warm-up."""
    loss_average: Literal["counted", "all"] = "counted"
    """Whether the loss is averaged over labelled pixels, or over all, ignored ones being zero (public code)."""
    max_class_share: float = 0.75
    """Random crops dominated by one class beyond this are drawn again."""


PAPER_SEGMENTATION = SegmentationConfig(
    short_side=PUBLISHED_SHORT_SIDE,
    crop_side=512,
    stride=341,
    num_iterations=PUBLISHED.num_iterations,
    learning_rate=PUBLISHED.learning_rate,
    loss_average="all",
)
"""The public code's values."""


class SegmentationProbe:
    """One data set and one assembly; seeds share the features."""

    def __init__(
        self,
        config: SegmentationConfig,
        run: RunConfig,
        sets: ProbeSets,
        backbones: FrozenBackbones,
        assembly: Assembly,
        accelerator: Any,
    ) -> None:
        self.config, self.run, self.sets = config, run, sets
        self.backbones, self.assembly, self.accelerator = backbones, assembly, accelerator
        self.memory = FeatureMemory(backbones, run.cache_gb)
        patch_size = backbones.description.patch_size
        short_side = config.short_side or choose_short_side(sets.train, patch_size)
        crop_side = config.crop_side or min(short_side, PUBLISHED_SHORT_SIDE)
        stride = config.stride or max(crop_side * 2 // 3, 1)
        self.pictures = SegmentationPictures(backbones, short_side, crop_side, stride, config.max_class_share)
        frames = sets.train.frames
        self.num_iterations = resolve_iterations(
            config.num_iterations, PUBLISHED.num_iterations, len(frames), config.batch_size
        )
        width = self._create_assembler().width
        self.learning_rate = config.learning_rate or resolve_learning_rate(PUBLISHED, self.num_iterations, width)
        needed = estimate_memory(
            backbones, crop_side, crop_side, 2 * len(frames) * len(self.pictures.list_keys(frames[0]))
        )
        variants = f"fixed windows of {crop_side} pixels and their mirror images"
        self.is_cached = resolve_cache(run.cache, needed, run.cache_gb, variants)

    def describe(self) -> dict[str, Any]:
        """The values that were chosen, for the record."""
        return {
            "short_side": self.pictures.short_side,
            "crop_side": self.pictures.crop_side,
            "stride": self.pictures.stride,
            "num_iterations": self.num_iterations,
            "learning_rate": self.learning_rate,
            "features_cached": self.is_cached,
        }

    def run_seed(self, seed: int) -> SeedOutcome:
        """Trains a head and measures it on the test data."""
        torch.manual_seed(derive_seed(seed, "segmentation head"))
        head = SegmentationHead(self._create_assembler(), self.sets.train.num_classes)
        stream = self._create_stream(seed)
        selection = self.sets.selection
        try:
            trained = train_head(
                head,
                len(self.sets.train.frames),
                stream.load,
                self._compute_loss,
                self._create_optimization(),
                accelerator=self.accelerator,
                seed=seed,
                compute_score=None if selection is None else lambda module: self.evaluate(module, selection)["miou"],
                iterations_per_evaluation=max(self.num_iterations // self.run.num_evaluations, 1),
                title=f"Segmentation, {self.assembly}, seed {seed}",
            )
        finally:
            stream.close()
        return summarise_training(seed, trained, self.evaluate(trained.head, self.sets.test))

    @torch.no_grad()
    def evaluate(self, head: nn.Module, labelled_set: LabelledSet) -> dict[str, Any]:
        """Figures of a head on a set; every process takes its share of the frames."""
        metrics = SegmentationMetrics(labelled_set.num_classes)
        share = labelled_set.frames[self.accelerator.process_index :: self.accelerator.num_processes]
        for frame in share:
            assert frame.load_labels is not None
            labels = frame.load_labels()
            logits = self.predict_logits(head, frame, (labels.shape[0], labels.shape[1]))
            metrics.update(logits.argmax(dim=0).cpu(), labels)
        if self.accelerator.num_processes > 1:
            confusion = metrics.confusion.to(self.accelerator.device)
            metrics.confusion = self.accelerator.reduce(confusion, reduction="sum").cpu()
        return metrics.compute(labelled_set.class_names)

    @torch.no_grad()
    def predict_logits(
        self, head: nn.Module, frame: LabelledFrame, size: tuple[int, int]
    ) -> Float[Tensor, "classes height width"]:
        """Logits of each pixel of a frame at a size (height, width), by slide inference."""
        windows = self.pictures.list_windows(frame)
        remembered = self.memory.fetch(self.pictures.list_keys(frame), lambda key: self._load(frame, key))
        maps = []
        for window, entry in zip(windows, remembered, strict=True):
            logits = head(entry.features.to(self.accelerator.device))
            maps.append(self.backbones.create_fit(window.height, window.width).restore(logits)[0])
        height, width = windows[-1].top + windows[-1].height, windows[-1].left + windows[-1].width
        return resize_map(average_windows(maps, windows, height, width)[None], size)[0]

    def _create_assembler(self) -> Assembler:
        return Assembler(self.assembly, self.backbones.embed_dim, "none")

    def _create_stream(self, seed: int) -> RememberedStream | AugmentedStream:
        device, frames = self.accelerator.device, self.sets.train.frames
        if not self.is_cached:
            return AugmentedStream(
                self.backbones,
                lambda index, generator: self.pictures.augment(frames[index], generator),
                device,
                seed,
                self.run.num_threads,
            )
        return RememberedStream(
            self.memory,
            lambda index, generator: self.pictures.choose_key(frames[index], generator),
            lambda index, key: self._load(frames[index], key),
            device,
            seed,
            IGNORE_INDEX,
        )

    def _load(self, frame: LabelledFrame, key: Hashable) -> Picture:
        assert isinstance(key, WindowKey)
        return self.pictures.load_window(frame, key)

    def _create_optimization(self) -> OptimizationConfig:
        return OptimizationConfig(
            Schedule("poly", self.num_iterations, round(self.config.warmup_share * self.num_iterations)),
            self.config.batch_size,
            self.learning_rate,
            self.config.weight_decay,
        )

    def _compute_loss(self, logits: Tensor, labels: Integer[Tensor, "batch height width"], iteration: int) -> LossSum:
        restored = resize_map(logits, (labels.shape[1], labels.shape[2])).float()
        total = F.cross_entropy(restored, labels.long(), ignore_index=IGNORE_INDEX, reduction="sum")
        counted = labels.numel() if self.config.loss_average == "all" else int((labels != IGNORE_INDEX).sum())
        return LossSum(total, total.new_tensor(float(counted)))
