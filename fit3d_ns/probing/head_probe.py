"""`HeadProbe`: what the probes that train heads share: data, kept features, length of the training, learning rate."""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from fit3d_ns.data.images import save_image
from fit3d_ns.probing import samples
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet, LabelledTask, split_validation
from fit3d_ns.probing.frozen_features import Assembly, FrozenBackbones
from fit3d_ns.probing.head_trainer import LossSum, OptimizationConfig, TrainedHead, train_head
from fit3d_ns.probing.samples import Batch, FeatureMemory, Inputs
from fit3d_ns.utils.files import write_json
from fit3d_ns.utils.limits import Limited, Limits
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.selection import derive_seed, select_evenly

CacheRule = Literal["auto", "always", "never"]
"""`always`: pictures have a few fixed variants (windows, mirror images), whose features are computed once and kept;
`never`: the published random augmentation, every picture through the backbones every time; `auto`: `always` where all
variants fit into `cache_gb`."""
Selection = Literal["validation", "last", "test"]
"""Which checkpoint counts: the best on a part of the training data, the last, or the best on the test data (paper)."""
MIN_ITERATIONS = 800
EPOCHS_OF_SMALL_SETS = 60
"""Sets that the published number of iterations would see more often are trained for this many epochs."""
LARGEST_STEP = 4.0
"""Largest product of learning rate and width, which is a logit's largest step where tokens are of the order of one."""

Config = TypeVar("Config")


@dataclass(frozen=True)
class PublishedTraining:
    """How the public code trains a linear head on original and fine-tuned small backbones, `width` inputs in all."""

    num_iterations: int
    learning_rate: float
    width: int


@dataclass(frozen=True)
class RunConfig(Limited):
    """Choices that every probe has."""

    cache: CacheRule = "auto"
    cache_gb: float = 4.0
    """Largest memory for kept features, 1e9 bytes."""
    selection: Selection = "validation"
    validation_fraction: Annotated[float, Limits(above=0, at_most=0.5)] = 0.1
    """Share of the training frames that selects the checkpoint, in (0, 0.5]."""
    num_evaluations: Annotated[int, Limits(at_least=1)] = 5
    """How often a checkpoint is scored during training."""
    num_threads: Annotated[int, Limits(at_least=1)] = 4
    """Threads that load pictures ahead."""


@dataclass(frozen=True)
class ProbeSets:
    """What heads are trained on, measured on and selected by; without selection data the last checkpoint counts."""

    train: LabelledSet
    test: LabelledSet
    selection: LabelledSet | None


class HeadProbe(ABC, Generic[Config]):
    """One data set and one assembly; a head is trained for each seed, and all seeds share the frozen features."""

    task: ClassVar[str]
    labels: ClassVar[LabelledTask]
    """The labels of a set that heads are trained on."""
    has_norm: ClassVar[bool] = True
    """Whether tokens are read behind the backbone's final norm."""
    published_iterations: ClassVar[int]
    inputs: Inputs
    is_cached: bool

    def __init__(
        self,
        config: Config,
        run: RunConfig,
        sets: ProbeSets,
        backbones: FrozenBackbones,
        assembly: Assembly,
        accelerator: Any,
    ) -> None:
        self.config, self.run, self.sets = config, run, sets
        self.backbones, self.assembly, self.accelerator = backbones, assembly, accelerator
        self.memory = FeatureMemory(backbones, run.cache_gb)
        values: Any = config
        self.num_iterations = resolve_iterations(
            values.num_iterations, self.published_iterations, len(sets.train.frames), values.batch_size
        )

    def describe(self) -> dict[str, Any]:
        """The values that were chosen, for the record."""
        return {"num_iterations": self.num_iterations, "features_cached": self.is_cached}

    @abstractmethod
    def run_seed(self, seed: int) -> TrainedHead:
        """Trains a head and measures it on the test data."""

    @abstractmethod
    def compute_score(self, head: nn.Module, labelled_set: LabelledSet) -> float:
        """By which checkpoints are compared, larger is better; every process takes its share of the set."""

    @abstractmethod
    def compute_loss(self, predictions: Tensor, targets: Tensor, iteration: int) -> LossSum:
        """Loss on this process's share of a batch."""

    def train(self, seed: int, head: nn.Module, optimization: OptimizationConfig, note: str = "") -> TrainedHead:
        """Trains a head, scored on the selection data; `note` ends its title."""
        selection = self.sets.selection
        with closing(self._iterate_batches(seed, optimization.batch_size)) as batches:
            return train_head(
                head,
                batches,
                self.compute_loss,
                optimization,
                accelerator=self.accelerator,
                compute_score=None if selection is None else lambda module: self.compute_score(module, selection),
                iterations_per_evaluation=max(self.num_iterations // self.run.num_evaluations, 1),
                title=f"{self.task.capitalize()}, {self.assembly}, seed {seed}{note}",
            )

    def seed_head(self, seed: int) -> None:
        """Seeds torch's global generator, from which heads draw their first weights."""
        torch.manual_seed(derive_seed(seed, f"{self.task} head"))

    def share(self, labelled_set: LabelledSet) -> list[LabelledFrame]:
        """The frames that this process measures."""
        return labelled_set.frames[self.accelerator.process_index :: self.accelerator.num_processes]

    def _iterate_batches(self, seed: int, batch_size: int) -> Generator[Batch, None, None]:
        """This process's share of each batch: of fixed pictures, through the memory, or of new ones."""
        number, process, frames = self.accelerator.num_processes, self.accelerator.process_index, self.sets.train.frames
        draws = samples.iterate_draws(len(frames), batch_size, self.num_iterations, seed, process, number)
        if not self.is_cached:
            share, threads = batch_size // number, self.run.num_threads
            yield from samples.iterate_augmented(draws, frames, self.inputs, self.backbones, seed, threads, share)
            return
        for batch in draws:
            chosen = [frames[index] for _, index in batch]
            generators = [samples.create_numpy_generator(seed, position) for position, _ in batch]
            keys = [self.inputs.choose_key(*pair) for pair in zip(chosen, generators, strict=True)]
            yield samples.stack_features(self.memory.fetch(keys, chosen, self.inputs), self.inputs.fill)


class MapProbe(HeadProbe[Config]):
    """A probe that predicts something for each pixel, which can be looked at."""

    @abstractmethod
    def evaluate(self, head: nn.Module, labelled_set: LabelledSet) -> dict[str, Any]:
        """Metrics of a head on a set; every process takes its share of the frames."""

    @abstractmethod
    def save_prediction(self, head: nn.Module, frame: LabelledFrame, prefix: Path, units: float) -> Tensor:
        """Writes truth and prediction of a frame and returns its photograph; see `save_predictions`."""

    def save_predictions(self, trained: TrainedHead, seed: int, folder: Path, num_frames: int = 8) -> None:
        """Writes what a head predicts for some test frames, evenly spread, as pictures for comparisons.

        FOLDER/predictions.json      task, assembly, seed, backbones, class names or depth range, the frames; comes last
               000_image.png         the photograph
               000_truth.png         labels (8-bit indices, 255 = does not count) or depth (16-bit, 0 = none)
               000_prediction.png    the same for the prediction
        """
        folder.mkdir(parents=True, exist_ok=True)
        test = self.sets.test
        units = choose_depth_units(test.depth.max_depth)
        frames = select_evenly(test.frames, num_frames)
        for number, frame in enumerate(frames):
            image = self.save_prediction(trained.head, frame, folder / f"{number:03d}", units)
            save_image(image, folder / f"{number:03d}_image.png")
        described = [extractor.description.to_metadata() for extractor in self.backbones.extractors]
        content: dict[str, Any] = {
            **{"task": self.task, "assembly": self.assembly, "seed": seed, "backbones": described},
            "is_random": any(backbone["is_random"] for backbone in described),
            **{"class_names": list(test.class_names), "max_depth": test.depth.max_depth},
            **{"depth_units_per_metre": units, "frames": [frame.name for frame in frames]},
        }
        write_json(folder / "predictions.json", content)


def create_sets(train: LabelledSet, test: LabelledSet, config: RunConfig) -> ProbeSets:
    """Splits what the selection rule needs off the training data."""
    if config.selection == "validation":
        kept, validation = split_validation(train, config.validation_fraction)
        return ProbeSets(kept, test, validation)
    return ProbeSets(train, test, test if config.selection == "test" else None)


def resolve_iterations(num_iterations: int | None, published: int, num_frames: int, batch_size: int) -> int:
    """The given number, or the published one cut down for small sets."""
    if num_iterations is None:
        return min(published, max(math.ceil(EPOCHS_OF_SMALL_SETS * num_frames / batch_size), MIN_ITERATIONS))
    if num_iterations < 1:
        raise ValueError(f"{num_iterations} iterations are asked for, expected at least 1.")
    return num_iterations


def resolve_learning_rate(published: PublishedTraining, num_iterations: int, width: int) -> float:
    """The rate at which a shorter training of a head of another width gets as far as the published one.

    Adam moves each weight by about the rate per iteration, and so a logit by rate x width x iterations. Keeping this
    product lets small sets converge in their few iterations, and takes an advantage away from wider heads that has
    nothing to do with their features: `duplicate` would learn twice as fast as `original`.
    """
    travel = published.learning_rate * published.num_iterations * published.width
    return min(travel / (num_iterations * width), LARGEST_STEP / width)


def resolve_cache(run: RunConfig, needed_gb: float, instead: str) -> bool:
    """True if features, `needed_gb` in all, are kept; says that then `instead` replaces the random augmentation."""
    if run.cache == "never" or (run.cache == "auto" and needed_gb > run.cache_gb):
        return False
    notice(
        f"Frozen features are computed once and kept (about {needed_gb:.2f} GB): {instead} instead of the published "
        "random augmentation; --cache never (or --paper) trains with it."
    )
    return True


def choose_depth_units(max_depth: float) -> float:
    """Units per metre of 16-bit depth maps: millimetres, or KITTI's 1/256 m where depths reach beyond 65 m."""
    return 1000.0 if max_depth <= 65.0 else 256.0
