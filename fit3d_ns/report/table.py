"""`Table`: rows of texts with marks, before any format."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fit3d_ns.report.columns import Column

RANDOM_TITLE = "RANDOM WEIGHTS, no measure of quality: "
"""In front of the title of tables about untrained backbones."""

NOTHING = "-"
"""Shown where there is no figure."""


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str = NOTHING
    """What is shown, plain Unicode."""
    is_best: bool = False
    """Shown in bold."""
    value: float | int | None = None
    """The figure in the record's unit, for JSON."""
    spread: float | None = None
    """Standard deviation over seeds, in the record's unit."""


@dataclass(frozen=True)
class Table:
    """One table of the report."""

    title: str
    """Without markup."""
    header: list[str]
    """Titles of the columns; arrows tell the better direction."""
    rows: list[list[Cell]]
    """As long as the header each."""
    notes: list[str] = field(default_factory=list)
    """Footnotes: settings, versions, sources."""
    is_random: bool = False
    """True if untrained backbones took part."""


def mark_best(column: Column, values: Sequence[float | None]) -> list[bool]:
    """Which of the figures of a column are the best as shown; none where there is nothing to compare."""
    present = [value for value in values if value is not None]
    if column.direction == "none" or len(present) < 2:
        return [False] * len(values)
    best = column.show(max(present) if column.direction == "up" else min(present))
    return [value is not None and column.show(value) == best for value in values]


def create_header(column: Column) -> str:
    """A column's title with its arrow."""
    return column.title + {"up": " ↑", "down": " ↓", "none": ""}[column.direction]


def mark_best_of_each(column: Column, values: Sequence[float | None], groups: Sequence[str]) -> list[bool]:
    """The best of each group of rows, for example of each backbone."""
    marks = [False] * len(values)
    for group in set(groups):
        places = [place for place, name in enumerate(groups) if name == group]
        for place, is_best in zip(places, mark_best(column, [values[place] for place in places]), strict=True):
            marks[place] = is_best
    return marks
