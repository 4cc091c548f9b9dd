"""What the probes of every task share: choices of a run, what one seed gives, how long small sets are trained on."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet, split_validation
from fit3d_ns.probing.feature_memory import BYTES_PER_GB
from fit3d_ns.probing.frozen_backbones import FrozenBackbones
from fit3d_ns.probing.head_trainer import Selection, TrainedHead
from fit3d_ns.utils.progress import notice

CacheRule = Literal["auto", "always", "never"]
"""`always`: pictures have a few fixed variants (windows, mirror images), whose features are computed once and kept;
`never`: the published random augmentation, every picture through the backbones every time; `auto`: `always` where all
variants fit into `cache_gb`."""

MIN_ITERATIONS = 800
EPOCHS_OF_SMALL_SETS = 60
"""Sets that the published number of iterations would see more often are trained for this many epochs."""


LARGEST_STEP = 4.0
"""Largest product of learning rate and width: about the largest step of a logit per iteration, since tokens are of the
order of one."""


@dataclass(frozen=True)
class PublishedTraining:
    """How the public code trains a linear head."""

    num_iterations: int
    """Iterations."""
    learning_rate: float
    """Peak, AdamW."""
    width: int
    """Inputs of the linear layer: original and fine-tuned small backbones side by side."""


@dataclass(frozen=True)
class RunConfig:
    """Choices that every probe has."""

    cache: CacheRule = "auto"
    """Whether frozen features are computed once."""
    cache_gb: float = 4.0
    """Largest memory for kept features, 1e9 bytes."""
    selection: Selection = "validation"
    """Which checkpoint counts."""
    validation_fraction: float = 0.1
    """Share of the training frames that selects the checkpoint, in (0, 0.5]."""
    num_evaluations: int = 5
    """How often a checkpoint is scored during training."""
    num_threads: int = 4
    """Threads that load pictures ahead."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction <= 0.5:
            raise ValueError(f"Validation fraction {self.validation_fraction} is outside (0, 0.5].")
        if self.num_evaluations < 1 or self.num_threads < 1:
            raise ValueError("Evaluations and threads must be at least 1.")


@dataclass(frozen=True)
class ProbeSets:
    """The data of one probe."""

    train: LabelledSet
    """What heads are trained on."""
    test: LabelledSet
    """What figures are about."""
    selection: LabelledSet | None
    """What chooses the checkpoint; None for the last one."""


@dataclass(frozen=True)
class SeedOutcome:
    """Figures of one seed."""

    seed: int
    """The seed."""
    metrics: dict[str, Any]
    """Figures on the test data."""
    iteration: int
    """Iterations after which the selected checkpoint was taken."""
    num_iterations: int
    """Iterations that were trained."""
    loss_first: float
    """Mean loss of the first tenth of the iterations."""
    loss_last: float
    """Mean loss of the last tenth."""
    scores: dict[int, float] = field(default_factory=dict)
    """Selection scores by iteration."""
    choices: dict[str, Any] = field(default_factory=dict)
    """What else was chosen on the selection data, for the record."""
    head: nn.Module | None = None
    """The trained head; not part of records."""


def create_sets(train: LabelledSet, test: LabelledSet, config: RunConfig) -> ProbeSets:
    """Splits what the selection rule needs off the training data."""
    if config.selection == "validation":
        kept, validation = split_validation(train, config.validation_fraction)
        return ProbeSets(kept, test, validation)
    return ProbeSets(train, test, test if config.selection == "test" else None)


def resolve_iterations(num_iterations: int | None, published: int, num_frames: int, batch_size: int) -> int:
    """The given number, or the published one cut down for small sets."""
    if num_iterations is not None:
        if num_iterations < 1:
            raise ValueError(f"{num_iterations} iterations are asked for, expected at least 1.")
        return num_iterations
    small = max(math.ceil(EPOCHS_OF_SMALL_SETS * num_frames / batch_size), MIN_ITERATIONS)
    return min(published, small)


def resolve_learning_rate(published: PublishedTraining, num_iterations: int, width: int) -> float:
    """The rate at which a shorter training of a head of another width gets as far as the published one.

    Adam moves each weight by about the rate per iteration, and so a logit by rate x width x iterations. Keeping this
    product lets small sets converge in their few iterations, and takes an advantage away from wider heads that has
    nothing to do with their features: `duplicate` would learn twice as fast as `original`.
    """
    travel = published.learning_rate * published.num_iterations * published.width
    return min(travel / (num_iterations * width), LARGEST_STEP / width)


def resolve_cache(rule: CacheRule, needed_gb: float, budget_gb: float, instead: str) -> bool:
    """True if features are kept; says what that changes.

    Args:
        rule: What the user asked for.
        needed_gb: Estimated memory of all variants.
        budget_gb: Largest memory.
        instead: What replaces the random augmentation.
    """
    if rule == "never" or (rule == "auto" and needed_gb > budget_gb):
        return False
    notice(
        f"Frozen features are computed once and kept (about {needed_gb:.2f} GB): {instead} instead of the published "
        "random augmentation; --cache never (or --paper) trains with it."
    )
    return True


def estimate_memory(backbones: FrozenBackbones, height: int, width: int, num_pictures: int) -> float:
    """Memory of the kept features of pictures of one size, in 1e9 bytes."""
    patch = backbones.description.patch_size
    tokens = -(-height // patch) * -(-width // patch)
    numbers = tokens * backbones.embed_dim * len(backbones.extractors) * len(backbones.layers)
    # Two bytes a number, and the targets at sixteen pixels a token.
    return num_pictures * (2 * numbers + 4 * 16 * tokens) / BYTES_PER_GB


def summarise_training(seed: int, trained: TrainedHead, metrics: dict[str, Any]) -> SeedOutcome:
    """A seed's record out of its training."""
    losses = trained.losses
    tenth = max(len(losses) // 10, 1)
    return SeedOutcome(
        seed=seed,
        metrics=metrics,
        iteration=trained.iteration,
        num_iterations=len(losses),
        loss_first=sum(losses[:tenth]) / tenth,
        loss_last=sum(losses[-tenth:]) / tenth,
        scores=trained.scores,
        head=trained.head,
    )


def spread_over(frames: list[LabelledFrame], count: int) -> list[LabelledFrame]:
    """A few frames at equal distances."""
    return frames[:: max(len(frames) // count, 1)][:count]
