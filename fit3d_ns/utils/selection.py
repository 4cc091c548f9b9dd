"""Choices that can be made again: random numbers, which item comes when, and which few stand for many.

Random numbers depend on a seed and on what they are for, never on who drew before (`derive_seed`).

Epochs are one endless sequence that depends on nothing but seed and position. Step k takes the positions
[k G, (k + 1) G), where G counts the items of all processes and accumulated batches. So a run that resumes needs no more
than its number of steps, and two processes see what one with twice the batch sees.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy's legacy generator and torch; libraries below us draw from these."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - nerfstudio draws from the legacy generator.
    torch.manual_seed(seed)


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, for example `derive_seed(42, "flip", epoch, frame)`."""
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def create_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A torch generator of its own for one purpose; drawing from it leaves the global state alone."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def capture_random_states() -> dict[str, Any]:
    """The states of Python's, numpy's legacy and torch's generators, as tensors and plain values."""
    version, keys, gauss = random.getstate()
    state: Any = np.random.get_state()  # noqa: NPY002 - nerfstudio draws from the legacy generator.
    _, numpy_keys, position, has_gauss, cached = state
    states: dict[str, Any] = {
        "python": [version, list(keys), gauss],
        "numpy": [torch.from_numpy(numpy_keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Puts back what `capture_random_states` took; checkpoints of older versions of stage II hold torch's alone."""
    if "python" in states:
        version, keys, gauss = states["python"]
        random.setstate((version, tuple(keys), gauss))
        numpy_keys, position, has_gauss, cached = states["numpy"]
        state = ("MT19937", numpy_keys.numpy().astype(np.uint32), position, has_gauss, cached)
        np.random.set_state(state)  # noqa: NPY002 - nerfstudio draws from the legacy generator.
    torch.set_rng_state(states["torch"] if "torch" in states else states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        # A run may go on with fewer devices than it began with.
        for index, cuda_state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)


class EpochSequence(Generic[Item]):
    """The endless sequence of items, each with its epoch and its index in the epoch, both counted from 0.

    Any position may be asked for, so it has no state worth saving.
    `create_order` gives the `num_items` items of an epoch in their order, as a function of the epoch's number.
    """

    def __init__(self, num_items: int, create_order: Callable[[int], Sequence[Item]]):
        self.num_items = num_items
        # Besides an epoch, only the one before it is still asked for.
        self._get_order = lru_cache(maxsize=2)(create_order)

    def __getitem__(self, position: int) -> tuple[int, int, Item]:
        epoch, index = divmod(position, self.num_items)
        return epoch, index, self._get_order(epoch)[index]


def list_positions(step: int, batch_size: int, process: int, num_processes: int, num_batches: int = 1) -> list[int]:
    """The positions that a process takes in one step of `num_batches` accumulated batches; all count from 0.

    `num_processes` share each batch, with `batch_size` items each.
    """
    starts = [((step * num_batches + batch) * num_processes + process) * batch_size for batch in range(num_batches)]
    return [position for start in starts for position in range(start, start + batch_size)]


def load_ahead(items: Iterable[Item], load: Callable[[Item], Loaded], num_workers: int, depth: int) -> Iterator[Loaded]:
    """Loads items in their order, by threads, up to `depth` items ahead; an error ends it, in its turn.

    Decoding and resizing images release Python's lock, so threads are enough, and a rasterizer's thread pool is never
    forked. The items may be endless; without workers they are loaded in the caller.
    """
    if num_workers == 0:
        yield from map(load, items)
        return
    executor, waiting = ThreadPoolExecutor(num_workers), deque[Future[Loaded]]()
    try:
        for item in items:
            waiting.append(executor.submit(load, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def draw_some(number: int, most: int | None, seed: int, *purpose: str | int) -> torch.Tensor:
    """Numbers [n], ascending, of at most `most` of some items, drawn at random; of all where there are no more."""
    if most is None or number <= most:
        return torch.arange(number)
    return torch.randperm(number, generator=create_generator(seed, *purpose))[:most].sort().values


def select_evenly(items: Sequence[Item], count: int | None) -> list[Item]:
    """Chooses `count` (1 and above) items at even distances, in order: the middle one of each of `count` equal parts.

    None, or a count no smaller than the number of items, takes all.
    """
    if count is None or count >= len(items):
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]
