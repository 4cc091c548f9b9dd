"""Tables, their Markdown, LaTeX, HTML, bars and curves: columns say how metrics look, rows hold texts with marks."""

import html
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Any

from fit3d_ns.utils.files import write_atomically
from fit3d_ns.utils.package_files import fill_template, read_table


@dataclass(frozen=True)
class Column:
    """One metric."""

    name: str
    """Key in our records; `by_angle/{angle}/recall_10px` is one of nested keys, for each bin of viewing angles."""
    title: str
    direction: str = "none"
    """Whether larger (`up`) or smaller (`down`) is better; `none` has no best."""
    scale: float = 1.0
    """What the record's value is multiplied by to be shown."""
    digits: int = 2
    """Decimals."""
    is_main: bool = False
    """Whether it stands for its task in a summary."""

    @property
    def header(self) -> str:
        """The title with an arrow in the better direction."""
        return self.title + {"up": " ↑", "down": " ↓", "none": ""}[self.direction]

    def find(self, metrics: Mapping[str, Any]) -> float | None:
        """The value in a record's metrics, in the record's unit; None where there is none."""
        value: Any = metrics
        for part in self.name.split("/"):
            value = value.get(part) if isinstance(value, Mapping) else None
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def show(self, value: float) -> str:
        """A value in the record's unit, as text; what would be rounded to 0 keeps one digit."""
        text = f"{value * self.scale:.{self.digits}f}"
        return f"{value * self.scale:.1g}" if value and not float(text) else text


def _read_columns() -> dict[str, tuple[Column, ...]]:
    columns: dict[str, tuple[Column, ...]] = {}
    for row in read_table(Path(__file__).with_name("columns.csv")):
        numbers = float(row["scale"]), int(row["digits"])
        column = Column(row["name"], row["title"], row["direction"], *numbers, bool(row["summary"]))
        columns[row["group"]] = (*columns.get(row["group"], ()), column)
    return columns


TASK_COLUMNS = _read_columns()
"""Metrics by task, the paper's first."""
COST_COLUMNS = TASK_COLUMNS.pop("costs")
"""What a fine-tuned backbone took, as Tables 5 and 8 have it."""
FINETUNE_COLUMNS = TASK_COLUMNS.pop("finetuning")
"""Metrics of a report of stage II, for `original` and for `finetuned`."""
RANDOM_TITLE = "RANDOM WEIGHTS, no measure of quality: "
"""In front of the title of tables about untrained backbones."""
NOTHING = "-"
"""Shown where there is no value."""


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str = NOTHING
    """What is shown, plain Unicode."""
    is_best: bool = False
    """Shown in bold."""
    value: float | int | None = None
    """The value in the record's unit, for JSON."""
    spread: float | None = None
    """Standard deviation over seeds, in the record's unit."""


@dataclass(frozen=True)
class Table:
    """One table of the report."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    """Footnotes: settings, versions, sources."""
    is_random: bool = False
    """True if untrained backbones took part."""
    curves: dict[str, dict[str, str]] = field(default_factory=dict)
    """Measures by viewing angle: for each bin, `15-30` degrees, the header of its column."""


def expand_columns(
    columns: Sequence[Column], metrics: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Column, str, str]]:
    """Columns with the measure they show; one by viewing angle becomes one for each bin of the metrics, named."""
    bins = dict.fromkeys(name for item in metrics for name in item.get("by_angle") or {})
    for column in columns:
        measure = column.title.replace(", {angle} deg", "")
        for angles in bins if "{angle}" in column.name else [""]:
            name, title = (text.format(angle=angles) for text in (column.name, column.title))
            yield replace(column, name=name, title=title), measure, angles


def mark_best(column: Column, values: Sequence[float | None], groups: Sequence[str]) -> list[bool]:
    """Which values are the best of their group of rows as shown; none where a group has nothing to compare."""
    best: dict[str, str] = {}
    for group in set(groups):
        present = [value for value, name in zip(values, groups, strict=True) if name == group and value is not None]
        if column.direction != "none" and len(present) > 1:
            best[group] = column.show(max(present) if column.direction == "up" else min(present))
    pairs = zip(values, groups, strict=True)
    return [value is not None and column.show(value) == best.get(group) for value, group in pairs]


def find_differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings in which those that have them differ, or that only some have."""
    names = dict.fromkeys(name for item in settings for name in item)
    return [name for name in names if len({repr(item.get(name)) for item in settings}) > 1]


def describe_settings(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """`name=value` of the chosen settings that are there."""
    return ", ".join(f"{name.split('.')[-1]}={_plain(settings[name])}" for name in names if name in settings)


def describe_versions(versions: Sequence[Mapping[str, str]]) -> str:
    """Packages with their versions; several where rows differ."""
    packages = dict.fromkeys(name for item in versions for name in item)
    found = {package: sorted({item[package] for item in versions if package in item}) for package in packages}
    return ", ".join(f"{package} {' and '.join(own)}" for package, own in found.items())


def save_bars(table: Table, path: Path) -> None:
    """Draws a panel for each column of values, with a bar and its spread for each row, the best ones orange."""
    from matplotlib.figure import Figure

    columns = [index for index in range(len(table.header)) if any(row[index].value is not None for row in table.rows)]
    lines, labels = -(-len(columns) // 4), [f"{row[0].text}, {row[1].text}" for row in table.rows]
    figure = Figure(figsize=(12, lines * (1 + 0.25 * len(labels))), layout="constrained")
    for number, index in enumerate(columns):
        cells, scale = [row[index] for row in table.rows], 100 if "%" in table.header[index] else 1
        values, spreads = ([scale * (getattr(cell, name) or 0.0) for cell in cells] for name in ("value", "spread"))
        panel = figure.add_subplot(lines, 4, number + 1)
        panel.barh(labels, values, xerr=spreads, color=["C1" if cell.is_best else "C0" for cell in cells])
        title = [line for part in table.header[index].split(": ") for line in wrap(part, 36)]
        panel.set_title("\n".join(title), fontsize=7)
        panel.tick_params(labelsize=7, labelleft=number % 4 == 0)
        panel.invert_yaxis()
    _save_figure(figure, path)


def save_curves(tables: Iterable[Table], path: Path) -> None:
    """Draws a panel for each measure by viewing angle: what it lacks to 1 over the bins' middles, with its spread."""
    from matplotlib.figure import Figure

    panels = [(table, *curve) for table in tables for curve in table.curves.items()]
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(12, 4 * lines), layout="constrained")
    for number, (table, name, bins) in enumerate(panels, 1):
        scale = 100 if "%" in name else 1
        panel = figure.add_subplot(lines, 2, number, xlabel="Angle between the views (degrees)")
        panel.set_title(table.title, fontsize=9)
        panel.set_ylabel(f"Error: {scale} - {name}")
        middles = [sum(map(float, angles.split("-"))) / 2 for angles in bins]
        for row in table.rows:
            cells = [row[table.header.index(header)] for header in bins.values()]
            errors = [math.nan if cell.value is None else scale * (1 - cell.value) for cell in cells]
            spreads = [scale * (cell.spread or 0.0) for cell in cells]
            panel.errorbar(middles, errors, spreads, marker="o", capsize=3, label=f"{row[0].text}, {row[1].text}")
        # Only now, when its upper end is known.
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7)
    _save_figure(figure, path)


def _save_figure(figure: Any, path: Path) -> None:
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


_LATEX: dict[str, Any] = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}
_ESCAPES: dict[str, Callable[[str], str]] = {
    ".md": partial(re.sub, r"([\\|*_`<\[])", r"\\\1"),
    ".tex": lambda text: text.translate(str.maketrans(_LATEX)),
    ".html": html.escape,
}
SUFFIXES = tuple(_ESCAPES)
"""Formats of a page: pipe tables, `table` environments to input (with booktabs and graphicx), a page of its own."""


def write_tables(tables: Sequence[Table], title: str, suffix: str, picture: str = "") -> str:
    """A page in one of the formats, with the notes of each table below it, and a picture's file beside it last."""
    template = Path(__file__).with_name(f"tables{suffix}.jinja")
    return fill_template(template, _ESCAPES[suffix], tables=tables, title=title, picture=picture)
