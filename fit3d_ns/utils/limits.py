"""`Limits`: which numbers an option takes, in its annotation; a `Limited` dataclass refuses others when it is made."""

import operator
from dataclasses import dataclass
from typing import get_type_hints


@dataclass(frozen=True)
class Limits:
    """A range of numbers; an end that is not given is open. It also holds for each number of a tuple, and not for None.

    For example `views: Annotated[int | None, Limits(at_least=1)]`.
    """

    at_least: int | float | None = None
    above: int | float | None = None
    at_most: int | float | None = None
    below: int | float | None = None

    def describe_miss(self, number: int | float) -> str:
        """What the number must be; empty if it is that."""
        holds = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
        ends = {name: end for name, end in vars(self).items() if end is not None}
        if all(holds[name](number, end) for name, end in ends.items()):
            return ""
        return " and ".join(f"{name.replace('_', ' ')} {end:g}" for name, end in ends.items())


class Limited:
    """A dataclass of options; a ValueError names the first that is outside of its limits."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if number is not None]
            for limits in getattr(hint, "__metadata__", ()):
                for number in numbers if isinstance(limits, Limits) else ():
                    if miss := limits.describe_miss(number):
                        raise ValueError(f"{name} is {number}; it must be {miss}.")
