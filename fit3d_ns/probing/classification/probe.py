"""The image classification probe (Table 11): linear layers on the class token beside the mean patch token.

As in DINOv2's evaluation, one linear layer for each of a range of learning rates is trained on the same features by
SGD, and the best of them on the selection data counts.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fit3d_ns.probing.assembly import Assembler, Assembly, ClassTokenSource, FrozenFeatures
from fit3d_ns.probing.augmentation import compute_size, draw_resized_window
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet
from fit3d_ns.probing.depth.losses import LossSum
from fit3d_ns.probing.feature_memory import FeatureMemory, Picture, RememberedFeatures, stack_features
from fit3d_ns.probing.frozen_backbones import FrozenBackbones
from fit3d_ns.probing.head_trainer import OptimizationConfig, train_head
from fit3d_ns.probing.protocol import (
    ProbeSets,
    RunConfig,
    SeedOutcome,
    resolve_cache,
    resolve_iterations,
    summarise_training,
)
from fit3d_ns.probing.sample_streams import AugmentedStream, RememberedStream
from fit3d_ns.probing.schedules import Schedule
from fit3d_ns.probing.segmentation.pictures import name_frame, to_image
from fit3d_ns.utils.seeds import derive_seed

PUBLISHED_ITERATIONS = 12_500
REFERENCE_BATCH = 256
"""Learning rates are given for this many images and scale with the batch."""
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""DINOv2's range."""


@dataclass(frozen=True)
class ClassificationConfig:
    """Values of the classification probe; those of the paper are `PAPER_CLASSIFICATION`."""

    num_iterations: int | None = None
    """None: 12,500 as published, or 60 epochs (at least 800 iterations) if that is less."""
    batch_size: int = 128
    """Images per iteration over all devices (the paper: one GPU)."""
    learning_rates: tuple[float, ...] = LEARNING_RATES
    """Each trains a layer of its own; for batches of 256."""
    resize_side: int = 256
    """Shorter side of test images before the crop."""
    crop_side: int = 224
    """Side of the square that is seen."""
    weight_decay: float = 0.0
    """SGD's."""


PAPER_CLASSIFICATION = ClassificationConfig(num_iterations=PUBLISHED_ITERATIONS)
"""The paper's iterations with DINOv2's values."""


@dataclass(frozen=True)
class RateFigures:
    """Figures of every learning rate on one set."""

    top1: list[float]
    """Share of images whose class is the first guess."""
    top5: list[float]
    """Share of images whose class is among the first five guesses."""
    losses: list[float]
    """Mean cross-entropy."""

    def choose(self) -> int:
        """The rate with the best first guesses; of equals, which small sets have many, that with the lowest loss."""
        return max(range(len(self.top1)), key=lambda index: (self.top1[index], -self.losses[index]))


class PooledBackbones(FrozenBackbones):
    """The same backbones, whose maps are averaged to one token: a hundredth of the memory."""

    def __call__(self, images: Float[Tensor, "batch 3 height width"]) -> FrozenFeatures:
        """Features with maps of one row and one column."""
        features = super().__call__(images)
        return FrozenFeatures(features.maps.mean(dim=(3, 4), keepdim=True), features.class_tokens)


class ClassificationHeads(nn.Module):
    """One linear layer per learning rate on the same input."""

    def __init__(self, assembler: Assembler, num_classes: int, learning_rates: tuple[float, ...]) -> None:
        super().__init__()
        self.assembler = assembler
        dim = assembler.out_dim * (2 if assembler.class_dim else 1)
        self.layers = nn.ModuleList(nn.Linear(dim, num_classes) for _ in learning_rates)
        self.learning_rates = learning_rates
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def list_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters with the rate of each; the fusion layer takes the middle one."""
        rates = [(list(layer.parameters()), rate) for layer, rate in zip(self.layers, self.learning_rates, strict=True)]
        fusion = list(self.assembler.parameters())
        middle = sorted(self.learning_rates)[len(self.learning_rates) // 2]
        return [*rates, (fusion, middle)] if fusion else rates

    def forward(self, features: FrozenFeatures) -> Float[Tensor, "batch rates classes"]:
        """Logits of every layer."""
        # (b, c, 1, 1) -> (b, c)
        vectors = [self.assembler(features)[:, :, 0, 0]]
        if self.assembler.class_dim:
            vectors.insert(0, self.assembler.assemble(features.class_tokens[:, :, -1]))
        joined = torch.cat(vectors, dim=1)
        return torch.stack([layer(joined) for layer in self.layers], dim=1)


class ClassificationProbe:
    """One data set and one assembly; seeds share the features."""

    def __init__(
        self,
        config: ClassificationConfig,
        run: RunConfig,
        sets: ProbeSets,
        backbones: FrozenBackbones,
        assembly: Assembly,
        accelerator: Any,
    ) -> None:
        self.config, self.run, self.sets = config, run, sets
        self.backbones = PooledBackbones(backbones.extractors, backbones.layers, backbones.patch_fit)
        self.assembly, self.accelerator = assembly, accelerator
        self.memory = FeatureMemory(self.backbones, run.cache_gb)
        frames = sets.train.frames
        self.num_iterations = resolve_iterations(
            config.num_iterations, PUBLISHED_ITERATIONS, len(frames), config.batch_size
        )
        needed = 2 * len(frames) * 2 * len(backbones.extractors) * 2 * backbones.embed_dim / 1e9
        self.is_cached = resolve_cache(run.cache, needed, run.cache_gb, "central crops and their mirror images")

    def describe(self) -> dict[str, Any]:
        """The values that were chosen, for the record."""
        return {"num_iterations": self.num_iterations, "features_cached": self.is_cached}

    def run_seed(self, seed: int) -> SeedOutcome:
        """Trains the layers and measures the selected one on the test data."""
        torch.manual_seed(derive_seed(seed, "classification head"))
        source: ClassTokenSource = "auto" if self.backbones.has_class_token else "none"
        assembler = Assembler(self.assembly, self.backbones.embed_dim, source)
        heads = ClassificationHeads(assembler, self.sets.train.num_classes, self.config.learning_rates)
        selection = self.sets.selection
        stream = self._create_stream(seed)
        try:
            trained = train_head(
                heads,
                len(self.sets.train.frames),
                stream.load,
                _compute_loss,
                self._create_optimization(),
                accelerator=self.accelerator,
                seed=seed,
                compute_score=None if selection is None else lambda head: max(self.measure(head, selection).top1),
                iterations_per_evaluation=max(self.num_iterations // self.run.num_evaluations, 1),
                title=f"Classification, {self.assembly}, seed {seed}",
            )
        finally:
            stream.close()
        # Without selection data the learning rate is chosen by what was learned.
        chosen = self.measure(trained.head, selection or self.sets.train).choose()
        figures = self.measure(trained.head, self.sets.test)
        metrics = {
            "accuracy": figures.top1[chosen],
            "accuracy_top5": figures.top5[chosen],
            "learning_rate": self.config.learning_rates[chosen],
            "num_images": len(self.sets.test.frames),
        }
        return summarise_training(seed, trained, metrics)

    @torch.no_grad()
    def measure(self, heads: nn.Module, labelled_set: LabelledSet) -> RateFigures:
        """Figures on a set; every process takes its share of the images."""
        counts = torch.zeros(3, len(self.config.learning_rates), dtype=torch.float64)
        share = labelled_set.frames[self.accelerator.process_index :: self.accelerator.num_processes]
        starts = range(0, len(share), self.config.batch_size)
        for start in starts:
            part = share[start : start + self.config.batch_size]
            features, classes = stack_features(self._fetch(part))
            logits = heads(features.to(self.accelerator.device)).float().cpu()
            ranks = logits.argsort(dim=-1, descending=True)[..., :5] == classes[:, None, None]
            counts[0] += ranks[..., 0].double().sum(dim=0)
            counts[1] += ranks.any(dim=-1).double().sum(dim=0)
            chances = logits.double().log_softmax(dim=-1)
            counts[2] -= chances.gather(-1, classes[:, None, None].expand(-1, logits.shape[1], 1))[..., 0].sum(dim=0)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts.to(self.accelerator.device), reduction="sum").cpu()
        shares = counts / len(labelled_set.frames)
        return RateFigures(shares[0].tolist(), shares[1].tolist(), shares[2].tolist())

    def _fetch(self, frames: list[LabelledFrame]) -> list[RememberedFeatures]:
        by_key: dict[Hashable, LabelledFrame] = {("central", name_frame(frame), False): frame for frame in frames}
        return self.memory.fetch(list(by_key), lambda key: self._load(by_key[key], key))

    def _create_stream(self, seed: int) -> RememberedStream | AugmentedStream:
        device, frames = self.accelerator.device, self.sets.train.frames
        if not self.is_cached:
            return AugmentedStream(
                self.backbones,
                lambda index, generator: _augment(frames[index], self.config.crop_side, generator),
                device,
                seed,
                self.run.num_threads,
            )
        return RememberedStream(
            self.memory,
            lambda index, generator: ("central", name_frame(frames[index]), bool(generator.integers(2))),
            lambda index, key: self._load(frames[index], key),
            device,
            seed,
        )

    def _load(self, frame: LabelledFrame, key: Hashable) -> Picture:
        assert isinstance(key, tuple)
        image = frame.load_image().numpy()
        height, width = compute_size(
            image.shape[0], image.shape[1], float(self.config.resize_side), max(image.shape) * 1e4
        )
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        side = min(self.config.crop_side, height, width)
        top, left = (height - side) // 2, (width - side) // 2
        crop = resized[top : top + side, left : left + side]
        return Picture(to_image(crop[:, ::-1] if key[2] else crop), torch.tensor(frame.class_index))

    def _create_optimization(self) -> OptimizationConfig:
        return OptimizationConfig(
            Schedule("cosine", self.num_iterations),
            self.config.batch_size,
            self.config.batch_size / REFERENCE_BATCH,
            self.config.weight_decay,
            optimizer="sgd",
        )


def _compute_loss(logits: Float[Tensor, "batch rates classes"], classes: Tensor, iteration: int) -> LossSum:
    """Sum over layers, which share nothing, so that each is trained as if alone."""
    flat = F.cross_entropy(logits.flatten(0, 1), classes.repeat_interleave(logits.shape[1]), reduction="sum")
    return LossSum(flat, flat.new_tensor(float(len(classes))))


def _augment(frame: LabelledFrame, side: int, generator: np.random.Generator) -> Picture:
    """A random part of the picture at the size that is seen, every other one mirrored."""
    image = frame.load_image().numpy()
    window = draw_resized_window(image.shape[0], image.shape[1], generator)
    interpolation = cv2.INTER_AREA if window.height > side else cv2.INTER_CUBIC
    crop = cv2.resize(image[window.slices], (side, side), interpolation=interpolation)
    return Picture(to_image(crop[:, ::-1] if generator.integers(2) else crop), torch.tensor(frame.class_index))
