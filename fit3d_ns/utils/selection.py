"""Which item comes when, and which few stand for many (`select_evenly`).

Epochs are one endless sequence that depends on nothing but seed and position. Step k takes the positions
[k G, (k + 1) G), where G counts the items of all processes and accumulated batches. So a run that resumes needs no more
than its number of steps, and two processes see what one with twice the batch sees.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Place(Generic[Item]):
    """An item with its epoch and its index in the epoch, both counted from 0."""

    epoch: int
    index: int
    item: Item


class EpochSequence(Generic[Item]):
    """The endless sequence of items; any position may be asked for, so it has no state worth saving.

    `create_order` gives the `num_items` items of an epoch in their order, as a function of the epoch's number.
    """

    def __init__(self, num_items: int, create_order: Callable[[int], Sequence[Item]]):
        self.num_items = num_items
        self.create_order = create_order
        self._orders: dict[int, Sequence[Item]] = {}

    def __getitem__(self, position: int) -> Place[Item]:
        epoch, index = divmod(position, self.num_items)
        if epoch not in self._orders:
            # Besides an epoch, only the one before it is still asked for.
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = self.create_order(epoch)
        return Place(epoch, index, self._orders[epoch][index])


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
    with ThreadPoolExecutor(max_workers=num_workers) as executor:
        waiting: list[Future[Loaded]] = []
        try:
            for item in items:
                waiting.append(executor.submit(load, item))
                if len(waiting) > depth:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def select_evenly(items: Sequence[Item], count: int | None) -> list[Item]:
    """Chooses `count` (1 and above) items at even distances, in order: the middle one of each of `count` equal parts.

    None, or a count no smaller than the number of items, takes all.
    """
    if count is None or count >= len(items):
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]
