"""Where a head's training batches come from: features that are kept, or pictures that change every time.

A frozen backbone gives the same features for the same picture every time. So with a few fixed variants per frame (a
window, its mirror image), each passes the backbones once and `FeatureMemory` keeps its features, in half precision up
to a budget, for every epoch, seed and evaluation. `iterate_augmented` makes a new picture for every draw instead and
loads ahead in threads. Batches depend on nothing but (seed, position), whichever process asks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.probing.datasets.frames import LabelledFrame
from fit3d_ns.probing.frozen_features import FrozenBackbones, FrozenFeatures
from fit3d_ns.probing.pictures import Picture, PictureKey
from fit3d_ns.utils.selection import EpochSequence, create_generator, derive_seed, list_positions, load_ahead
from fit3d_ns.utils.tensor_files import BoundedMemory, count_bytes

BYTES_PER_GB = 1e9
_FLOAT16_MAX = 6e4

Batch = tuple[FrozenFeatures, Tensor]
"""Features, and targets to train on; of one picture, its own target has no batch axis."""
Draw = tuple[int, int]
"""A position, counted from 0 over all iterations, which seeds augmentation; and the number of the sample seen there."""


class Inputs(ABC):
    """How a task makes pictures of labelled frames."""

    fill: ClassVar[int] = 0
    """The target that does not count."""

    @abstractmethod
    def choose_key(self, frame: LabelledFrame, generator: np.random.Generator) -> PictureKey:
        """One of a frame's fixed pictures, by chance."""

    @abstractmethod
    def load(self, frame: LabelledFrame, key: PictureKey) -> Picture:
        """A fixed picture."""

    @abstractmethod
    def augment(self, frame: LabelledFrame, generator: np.random.Generator) -> Picture:
        """A new picture, by the published random augmentation."""


def iterate_draws(
    num_samples: int, batch_size: int, num_iterations: int, seed: int, process: int = 0, num_processes: int = 1
) -> Iterator[list[Draw]]:
    """This process's share of each batch: every sample once per epoch, in a new order each epoch."""

    def create_order(epoch: int) -> list[int]:
        return torch.randperm(num_samples, generator=create_generator(seed, "probe order", epoch)).tolist()

    sequence = EpochSequence(num_samples, create_order)
    for iteration in range(num_iterations):
        positions = list_positions(iteration, batch_size // num_processes, process, num_processes)
        yield [(position, sequence[position][-1]) for position in positions]


def check_batch(batch_size: int, num_processes: int, images_per_group: int = 1) -> None:
    """Raises ValueError unless a batch splits evenly over the processes, in whole loss groups."""
    if batch_size < 1 or batch_size % (num_processes * images_per_group):
        groups = f" in groups of {images_per_group} images" if images_per_group > 1 else ""
        problem = f"A batch of {batch_size} cannot be split over {num_processes} processes{groups}"
        raise ValueError(f"{problem}; give --batch-size a multiple of {num_processes * images_per_group}.")


class FeatureMemory:
    """Keeps what fits into `budget_gb` (1e9 bytes); the rest is computed again whenever it is asked for."""

    def __init__(self, backbones: FrozenBackbones, budget_gb: float) -> None:
        self.backbones = backbones
        self._memory: BoundedMemory[Batch] = BoundedMemory(int(budget_gb * BYTES_PER_GB))

    def fetch(self, keys: Sequence[PictureKey], frames: Sequence[LabelledFrame], inputs: Inputs) -> list[Batch]:
        """Features, as a batch of one, of a picture of each frame; those that are not there are loaded and computed."""
        asked = dict(zip(keys, frames, strict=True))
        found = {key: entry for key in asked if (entry := self._memory.get(key)) is not None}
        pictures = {key: inputs.load(frame, key) for key, frame in asked.items() if key not in found}
        by_size: dict[torch.Size, list[PictureKey]] = {}
        for key, picture in pictures.items():
            by_size.setdefault(picture.image.shape, []).append(key)
        for group in by_size.values():
            features = self.backbones(torch.stack([pictures[key].image for key in group]))
            for row, key in enumerate(group):
                # Copies, because a slice would keep the whole batch alive.
                maps, class_tokens = features.maps[row : row + 1].clone(), features.class_tokens[row : row + 1].clone()
                dtype = torch.float32 if maps.abs().max() > _FLOAT16_MAX else torch.float16
                halved = FrozenFeatures(maps, class_tokens).to("cpu", dtype)
                # What does not fit is returned as if it had been kept, so that metrics do not depend on the budget.
                found[key] = halved, pictures[key].target.cpu()
                self._memory.keep(key, found[key], count_bytes(halved.maps, halved.class_tokens, found[key][1]))
        return [found[key] for key in keys]


def estimate_memory(backbones: FrozenBackbones, height: int, width: int, num_pictures: int) -> float:
    """Memory of the kept features of pictures of one size, in 1e9 bytes."""
    patch = backbones.description.patch_size
    tokens = -(-height // patch) * -(-width // patch)
    numbers = tokens * backbones.embed_dim * len(backbones.extractors) * len(backbones.layers)
    # Two bytes a number, and the targets at sixteen pixels a token.
    return num_pictures * (2 * numbers + 4 * 16 * tokens) / BYTES_PER_GB


def iterate_augmented(
    draws: Iterable[list[Draw]],
    frames: Sequence[LabelledFrame],
    inputs: Inputs,
    backbones: FrozenBackbones,
    seed: int,
    num_threads: int,
    batch_size: int,
) -> Iterator[Batch]:
    """Batches of new pictures; `batch_size` of them are loaded ahead."""

    def create(draw: Draw) -> Picture:
        position, index = draw
        return inputs.augment(frames[index], create_numpy_generator(seed, position))

    loaded = load_ahead((draw for batch in draws for draw in batch), create, num_threads, batch_size)
    while pictures := list(islice(loaded, batch_size)):
        features = backbones(torch.stack([picture.image for picture in pictures]))
        yield features, torch.stack([picture.target for picture in pictures])


def stack_features(entries: Sequence[Batch], fill: int | float = 0) -> Batch:
    """A batch out of entries, whose pictures may have several sizes: smaller maps are continued right and below.

    Tokens at the edge are repeated, which is what bilinear upsampling reads beyond the edge anyway, so that a linear
    head predicts for each picture what it predicts for it alone. Targets there are `fill`, which does not count.
    """
    sizes = [features.maps.shape[3:5] for features, _ in entries]
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    all_maps, targets = [], []
    for (features, target), (h, w) in zip(entries, sizes, strict=True):
        maps = features.maps
        if (h, w) != (height, width):
            # (1, parts, layers, h, w, e): each row and column, then the last one again.
            rows, columns = torch.arange(height).clamp_max(h - 1), torch.arange(width).clamp_max(w - 1)
            maps = maps[:, :, :, rows[:, None], columns]
            # As many targets per token and axis as the others have.
            below, right = target.shape[0] // h * (height - h), target.shape[1] // w * (width - w)
            target = F.pad(target, (0, right, 0, below), value=fill)
        all_maps.append(maps)
        targets.append(target)
    class_tokens = torch.cat([features.class_tokens for features, _ in entries])
    return FrozenFeatures(torch.cat(all_maps), class_tokens), torch.stack(targets)


def create_numpy_generator(seed: int, position: int) -> np.random.Generator:
    """The randomness of one training sample."""
    return np.random.default_rng(derive_seed(seed, "probe augmentation", position))
