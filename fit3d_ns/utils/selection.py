"""`select_evenly`: the one rule by which a few views, frames or scenes stand for many."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def select_evenly(items: Sequence[Item], count: int | None) -> list[Item]:
    """Chooses `count` items at even distances, in order: the middle one of each of `count` equal parts.

    Args:
        items: What is chosen from.
        count: How many, at least 1; None, or no fewer than there are, takes all.
    """
    if count is None or count >= len(items):
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]
