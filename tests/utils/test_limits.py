"""Options outside of the limits of their annotations."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from fit3d_ns.utils.limits import Limited, Limits


@dataclass(frozen=True)
class Options(Limited):
    share: Annotated[float, Limits(above=0, at_most=1)] = 0.5
    views: Annotated[int | None, Limits(at_least=2)] = None
    shares: Annotated[tuple[float, ...], Limits(at_least=0, below=1)] = ()
    free: float = -1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0}, "share is 0.0; it must be above 0 and at most 1"),
        ({"share": float("nan")}, "share is nan; it must be above 0 and at most 1"),
        ({"views": 1}, "views is 1; it must be at least 2"),
        ({"shares": (0.0, 0.5, 1.0)}, "shares is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_limited__refuses_what_is_outside(values, message):
    with pytest.raises(ValueError, match=message):
        Options(**values)


def test_limited__takes_what_is_inside_and_what_has_no_limits():
    assert Options(1.0, 2, (0.0, 0.99), -7.0).views == 2
    assert Options().views is None
