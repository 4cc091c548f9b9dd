"""The monocular depth probe (paper section 3.3, Table 12; FACTS "Linear depth probe").

`DepthProbe` trains one head per seed on frozen pre-norm features and measures it on whole images; two, of which one is
kept, where the use of the class token is validated. Its twin is `segmentation_probe.py`.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.probing.assembly import Assembler, Assembly, ClassTokenSource
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet, warn_about_depth_unit
from fit3d_ns.probing.depth.bins import NUM_BINS, BinNormalization, DepthBins
from fit3d_ns.probing.depth.dpt_head import DPTDepthHead
from fit3d_ns.probing.depth.head import UPSAMPLING, LinearDepthHead
from fit3d_ns.probing.depth.losses import LossSum, compute_gradient_loss, compute_sig_loss
from fit3d_ns.probing.depth.metrics import DepthMetrics
from fit3d_ns.probing.depth.pictures import DEPTHS_PER_TOKEN, DepthPictures, ImageKey, choose_crop_size
from fit3d_ns.probing.feature_memory import FeatureMemory, Picture
from fit3d_ns.probing.frozen_backbones import FrozenBackbones
from fit3d_ns.probing.head_trainer import OptimizationConfig, TrainedHead, train_head
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
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.seeds import derive_seed

PUBLISHED = PublishedTraining(num_iterations=38_400, learning_rate=1e-4, width=1152)
ClassTokenChoice = Literal["auto", "original", "finetuned", "none", "validated"]
"""Whose class token is put beside the patch tokens, see `ClassTokenSource`; or `validated`: a head with (`auto`) and
one without (`none`) are trained, and the one that is better on the validation part of the training data is kept."""
VALIDATED_SOURCES: tuple[ClassTokenSource, ...] = ("auto", "none")
LARGEST_DPT_RATE = 5e-4
"""probe3d's for its DPT heads, whose convolutions do not bear a linear layer's rates."""


@dataclass(frozen=True)
class DepthConfig:
    """Values of the depth probe; those of the public code are `PAPER_DEPTH`."""

    head: Literal["linear", "dpt"] = "linear"
    """`dpt` is Table 12's; it reads four layers."""
    short_side: int | None = None
    """Images are resized to this shorter side, pixels; None keeps their own size (published)."""
    crop_size: tuple[int, int] | None = None
    """Height and width of random crops; None: 352x704 for KITTI, 416x544 elsewhere, cut down to smaller images."""
    num_iterations: int | None = None
    """None: 38,400 as published, or 60 epochs (at least 800 iterations) if that is less."""
    batch_size: int = 16
    """Images per iteration over all devices (published: 8 GPUs of 2)."""
    learning_rate: float | None = None
    """Peak, AdamW. None: the published 1e-4 for a width of 1152, times published iterations and width over ours; see
    `resolve_learning_rate`."""
    weight_decay: float = 0.01
    """AdamW's."""
    warmup_share: float = 1 / 3
    """Share of the iterations with a linear warm-up (12,800 of 38,400)."""
    loss_warmup_iterations: int = 100
    """Iterations in which the loss is that of the mean alone."""
    gradient_loss_weight: float = 0.0
    """Weight of the loss of neighbouring pixels. The public code has 0.5, on a term that an indexing slip keeps at
    zero; here it works."""
    images_per_group: int = 2
    """Images that share one value of the scale-invariant loss (2 per device in the public code)."""
    class_token: ClassTokenChoice = "auto"
    """Whose class token stands beside the patch tokens (published: the original's, which `auto` takes); `validated`
    trains two heads and keeps the better one."""
    num_bins: int = NUM_BINS
    """Depth bins."""
    bin_normalization: BinNormalization = "linear"
    """How logits become shares of the bins."""
    is_flip_averaged: bool = True
    """Predictions of an image and its mirror image are averaged."""


PAPER_DEPTH = DepthConfig(num_iterations=PUBLISHED.num_iterations, learning_rate=PUBLISHED.learning_rate)
"""The public code's values. Its gradient term is zero at two images per device, so it is left out."""


class DepthProbe:
    """One data set and one assembly; seeds share the features."""

    def __init__(
        self,
        config: DepthConfig,
        run: RunConfig,
        sets: ProbeSets,
        backbones: FrozenBackbones,
        assembly: Assembly,
        accelerator: Any,
    ) -> None:
        self.config, self.run, self.sets = config, run, sets
        self.backbones, self.assembly, self.accelerator = backbones, assembly, accelerator
        self.memory = FeatureMemory(backbones, run.cache_gb)
        convention = sets.train.depth
        crop_size = config.crop_size or choose_crop_size(sets.train, config.short_side)
        self.pictures = DepthPictures(backbones, convention, config.short_side, crop_size)
        frames = sets.train.frames
        self.num_iterations = resolve_iterations(
            config.num_iterations, PUBLISHED.num_iterations, len(frames), config.batch_size
        )
        self.sources = self._list_sources()
        self.learning_rates = {
            source: config.learning_rate or self._choose_learning_rate(source) for source in self.sources
        }
        needed = estimate_memory(backbones, *self.pictures.compute_size(frames[0]), 2 * len(frames))
        self.is_cached = resolve_cache(run.cache, needed, run.cache_gb, "whole images and their mirror images")
        for labelled_set in (sets.train, sets.test):
            warn_about_depth_unit(labelled_set)

    @property
    def learning_rate(self) -> float:
        """Peak rate, of the head with the class token where two are trained."""
        return self.learning_rates[self.sources[0]]

    def describe(self) -> dict[str, Any]:
        """The values that were chosen, for the record."""
        return {
            "num_iterations": self.num_iterations,
            "learning_rate": self.learning_rate if len(self.sources) == 1 else dict(self.learning_rates),
            "crop_size": list(self.pictures.crop_size),
            "features_cached": self.is_cached,
        }

    def run_seed(self, seed: int) -> SeedOutcome:
        """Trains a head, or one for each way to use the class token, and measures the best on the test data."""
        candidates = {source: self._train(seed, source) for source in self.sources}
        if self.config.class_token != "validated":
            trained = candidates[self.sources[0]]
            return summarise_training(seed, trained, self.evaluate(trained.head, self.sets.test))
        scores = {source: max(trained.scores.values()) for source, trained in candidates.items()}
        chosen = max(self.sources, key=lambda source: scores[source])
        trained = candidates[chosen]
        errors = ", ".join(f"{source} {-score:.4f}" for source, score in scores.items())
        notice(f"Class token of seed {seed}: {chosen} is kept, by AbsRel on the validation part: {errors}.")
        outcome = summarise_training(seed, trained, self.evaluate(trained.head, self.sets.test))
        return replace(outcome, choices={"class_token": chosen, "class_token_scores": dict(scores)})

    def create_head(self, source: ClassTokenSource | None = None) -> nn.Module:
        """A new head, from torch's global generator; it reads the first of the class tokens by default."""
        config, convention = self.config, self.sets.train.depth
        assembler = self._create_assembler(source or self.sources[0])
        bins = DepthBins(convention.min_depth, convention.max_depth, config.num_bins, config.bin_normalization)
        if config.head == "dpt":
            return DPTDepthHead(assembler, bins)
        # Where features are kept, so are the targets, at fewer places: the same map is read there and nowhere else.
        return LinearDepthHead(assembler, bins, DEPTHS_PER_TOKEN if self.is_cached else UPSAMPLING)

    def _train(self, seed: int, source: ClassTokenSource) -> TrainedHead:
        # Each candidate starts as it would alone, so that `validated` keeps exactly what that setting gives.
        torch.manual_seed(derive_seed(seed, "depth head"))
        head = self.create_head(source)
        stream = self._create_stream(seed)
        selection = self.sets.selection
        try:
            return train_head(
                head,
                len(self.sets.train.frames),
                stream.load,
                self._compute_loss,
                self._create_optimization(source),
                accelerator=self.accelerator,
                seed=seed,
                compute_score=None
                if selection is None
                else lambda module: -self.evaluate(module, selection)["abs_rel"],
                iterations_per_evaluation=max(self.num_iterations // self.run.num_evaluations, 1),
                title=f"Depth, {self.assembly}, seed {seed}" + (f", {source}" if len(self.sources) > 1 else ""),
            )
        finally:
            stream.close()

    @torch.no_grad()
    def evaluate(self, head: nn.Module, labelled_set: LabelledSet) -> dict[str, Any]:
        """Figures of a head on a set; every process takes its share of the frames."""
        convention = labelled_set.depth
        metrics = DepthMetrics(convention.min_depth, convention.max_depth, convention.evaluation_window)
        share = labelled_set.frames[self.accelerator.process_index :: self.accelerator.num_processes]
        for frame in share:
            depth = self.pictures.load_depth(frame)
            metrics.update(self.predict(head, frame, (depth.shape[0], depth.shape[1])).cpu(), depth)
        if self.accelerator.num_processes > 1:
            device = self.accelerator.device
            metrics.sums = self.accelerator.reduce(metrics.sums.to(device), reduction="sum").cpu()
            metrics.per_image = self.accelerator.reduce(metrics.per_image.to(device), reduction="sum").cpu()
        return metrics.compute()

    @torch.no_grad()
    def predict(self, head: nn.Module, frame: LabelledFrame, size: tuple[int, int]) -> Float[Tensor, "height width"]:
        """Depth of each pixel of a frame at a size (height, width), in metres."""
        keys = self.pictures.list_keys(frame, self.config.is_flip_averaged)
        remembered = self.memory.fetch(keys, lambda key: self._load(frame, key))
        convention = self.sets.train.depth
        fit = self.backbones.create_fit(*self.pictures.compute_size(frame))
        maps = []
        for key, entry in zip(keys, remembered, strict=True):
            depth = head(entry.features.to(self.accelerator.device)).float()
            restored = fit.restore(depth[:, None])[0, 0].clamp(convention.min_depth, convention.max_depth)
            maps.append(restored.flip(-1) if isinstance(key, ImageKey) and key.is_flipped else restored)
        return resize_map(torch.stack(maps).mean(dim=0)[None, None], size)[0, 0]

    def _list_sources(self) -> tuple[ClassTokenSource, ...]:
        choice = self.config.class_token
        if choice == "validated" and self.run.selection != "validation":
            raise ValueError(
                "Whether the class token helps is validated on a part of the training data, never on the test data; "
                f"with --selection {self.run.selection} name it with --class-token, or use --selection validation."
            )
        if not self.backbones.has_class_token:
            return ("none",)
        return VALIDATED_SOURCES if choice == "validated" else (choice,)

    def _create_assembler(self, source: ClassTokenSource) -> Assembler:
        return Assembler(self.assembly, self.backbones.embed_dim, source)

    def _choose_learning_rate(self, source: ClassTokenSource) -> float:
        assembler = self._create_assembler(source)
        rate = resolve_learning_rate(PUBLISHED, self.num_iterations, assembler.width + assembler.class_dim)
        return min(rate, LARGEST_DPT_RATE) if self.config.head == "dpt" else rate

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
        )

    def _load(self, frame: LabelledFrame, key: Hashable) -> Picture:
        assert isinstance(key, ImageKey)
        return self.pictures.load_whole(frame, key)

    def _create_optimization(self, source: ClassTokenSource) -> OptimizationConfig:
        warmup = round(self.config.warmup_share * self.num_iterations)
        return OptimizationConfig(
            Schedule("cosine", self.num_iterations, warmup, warmup_ratio=1e-3, min_ratio=1e-8),
            self.config.batch_size,
            self.learning_rates[source],
            self.config.weight_decay,
            max_gradient_norm=35.0,
            has_one_cycle_momentum=True,
            images_per_group=self.config.images_per_group,
        )

    def _compute_loss(self, predictions: Tensor, depth: Float[Tensor, "batch height width"], iteration: int) -> LossSum:
        convention = self.sets.train.depth
        restored = resize_map(predictions[:, None], (depth.shape[1], depth.shape[2]))[:, 0].float()
        valid = (depth > convention.min_depth) & (depth < convention.max_depth)
        group = self.config.images_per_group
        is_warming_up = iteration < self.config.loss_warmup_iterations
        loss = compute_sig_loss(restored, depth, valid, images_per_group=group, is_warming_up=is_warming_up)
        if self.config.gradient_loss_weight == 0.0:
            return loss
        gradient = compute_gradient_loss(restored, depth, valid, images_per_group=group)
        return LossSum(loss.total + self.config.gradient_loss_weight * gradient.total, loss.count)
