"""`BatchOrder`: which sample is seen when, from a seed alone, so that any number of processes sees the same batches."""

from dataclasses import dataclass, field

import torch

from fit3d_ns.utils.seeds import create_generator


@dataclass(frozen=True)
class Draw:
    """One place in the endless row of training samples."""

    position: int
    """Counted from 0 over all iterations; augmentation is seeded by it."""
    index: int
    """Which sample of the set."""


@dataclass
class BatchOrder:
    """Every sample once per epoch, in a new order each epoch; batches may reach over the end of an epoch."""

    num_samples: int
    """Samples in the set, at least 1."""
    batch_size: int
    """Samples per iteration, over all processes."""
    seed: int
    """Seed of the orders."""
    _epochs: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def list_draws(self, iteration: int, process: int = 0, num_processes: int = 1) -> list[Draw]:
        """This process's share of a batch: consecutive samples, the same number for each process."""
        share = self.batch_size // num_processes
        start = iteration * self.batch_size + process * share
        return [Draw(position, self._find(position)) for position in range(start, start + share)]

    def _find(self, position: int) -> int:
        epoch, place = divmod(position, self.num_samples)
        if epoch not in self._epochs:
            # Only the current epoch and the one before it are asked for.
            self._epochs = {key: order for key, order in self._epochs.items() if key >= epoch - 1}
            generator = create_generator(self.seed, "probe order", epoch)
            self._epochs[epoch] = torch.randperm(self.num_samples, generator=generator).tolist()
        return self._epochs[epoch][place]


def check_batch(batch_size: int, num_processes: int, images_per_group: int = 1) -> None:
    """Raises ValueError unless a batch splits evenly over the processes, in whole loss groups."""
    if batch_size < 1 or batch_size % (num_processes * images_per_group):
        groups = f" in groups of {images_per_group} images" if images_per_group > 1 else ""
        raise ValueError(
            f"A batch of {batch_size} cannot be split over {num_processes} processes{groups}; "
            f"give --batch-size a multiple of {num_processes * images_per_group}."
        )
