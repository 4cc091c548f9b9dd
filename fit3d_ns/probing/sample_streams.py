"""Where a head's training batches come from: features that are kept, or pictures that change every time.

A *sample stream* turns draws into features and targets. `RememberedStream` has a few fixed variants of every picture
and passes each through the backbones once; `AugmentedStream` makes a new picture for every draw and loads ahead in
threads. Both depend on nothing but (seed, position), whichever process asks.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fit3d_ns.probing.assembly import FrozenFeatures
from fit3d_ns.probing.batch_order import Draw
from fit3d_ns.probing.feature_memory import FeatureMemory, Picture, stack_features
from fit3d_ns.probing.frozen_backbones import FrozenBackbones
from fit3d_ns.utils.seeds import derive_seed

ChooseVariant = Callable[[int, np.random.Generator], Hashable]
"""The key of a variant of sample `index`, chosen by the generator."""
CreatePicture = Callable[[int, np.random.Generator], Picture]
"""A new picture of sample `index`, made with the generator."""


class RememberedStream:
    """Fixed variants of each sample, through a `FeatureMemory`."""

    def __init__(
        self,
        memory: FeatureMemory,
        choose_variant: ChooseVariant,
        load_picture: Callable[[int, Hashable], Picture],
        device: torch.device | str,
        seed: int,
        fill: int | float = 0,
    ) -> None:
        """Args:
        memory: Keeps the features.
        choose_variant: As `ChooseVariant`.
        load_picture: The picture of a sample's variant.
        device: Where batches go.
        seed: Of the variants' choice.
        fill: The target that does not count; see `stack_features`.
        """
        self.memory = memory
        self.choose_variant = choose_variant
        self.load_picture = load_picture
        self.device = device
        self.seed = seed
        self.fill = fill

    def load(self, draws: list[Draw], upcoming: list[Draw]) -> tuple[FrozenFeatures, Tensor]:
        """A batch on the training device."""
        keys = [self.choose_variant(draw.index, create_numpy_generator(self.seed, draw.position)) for draw in draws]
        indices = {key: draw.index for key, draw in zip(keys, draws, strict=True)}
        entries = self.memory.fetch(keys, lambda key: self.load_picture(indices[key], key))
        features, targets = stack_features(entries, self.fill)
        return features.to(self.device), targets.to(self.device)

    def close(self) -> None:
        """Nothing to end; the twin has threads."""


class AugmentedStream:
    """A new picture for every draw; close it to end its threads."""

    def __init__(
        self,
        backbones: FrozenBackbones,
        create_picture: CreatePicture,
        device: torch.device | str,
        seed: int,
        num_threads: int = 4,
    ) -> None:
        self.backbones = backbones
        self.create_picture = create_picture
        self.device = device
        self.seed = seed
        self._executor = ThreadPoolExecutor(max_workers=max(num_threads, 1))
        self._pending: dict[int, Future[Picture]] = {}

    def load(self, draws: list[Draw], upcoming: list[Draw]) -> tuple[FrozenFeatures, Tensor]:
        """A batch on the training device; what comes next is loaded meanwhile."""
        for draw in [*draws, *upcoming]:
            if draw.position not in self._pending:
                self._pending[draw.position] = self._executor.submit(self._create, draw)
        pictures = [self._pending.pop(draw.position).result() for draw in draws]
        features = self.backbones(torch.stack([picture.image for picture in pictures]))
        targets = torch.stack([picture.target for picture in pictures])
        return features.to(self.device), targets.to(self.device)

    def close(self) -> None:
        """Ends the threads; what they still had to load is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _create(self, draw: Draw) -> Picture:
        return self.create_picture(draw.index, create_numpy_generator(self.seed, draw.position))


def create_numpy_generator(seed: int, position: int) -> np.random.Generator:
    """The randomness of one training sample."""
    return np.random.default_rng(derive_seed(seed, "probe augmentation", position))
