"""`select_evenly`: the one rule by which a few views, frames or scenes stand for many."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def select_evenly(items: Sequence[Item], count: int | None) -> list[Item]:
    """Chooses `count` (1 and above) items at even distances, in order: the middle one of each of `count` equal parts.

    None, or a count no smaller than the number of items, takes all.
    """
    if count is None or count >= len(items):
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]
