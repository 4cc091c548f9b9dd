"""Tables, and their Markdown, LaTeX and HTML: columns say how metrics look, rows hold texts with marks."""

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fit3d_ns.utils.tables import read_table


@dataclass(frozen=True)
class Column:
    """One metric."""

    name: str
    """Key in our records; `by_angle/0-15/recall_10px` is one of nested keys."""
    title: str
    direction: str = "none"
    """Whether larger (`up`) or smaller (`down`) is better; `none` has no best."""
    scale: float = 1.0
    """What the record's value is multiplied by to be shown."""
    digits: int = 2
    """Decimals."""

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
        column = Column(row["name"], row["title"], row["direction"], float(row["scale"]), int(row["digits"]))
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
    parts = []
    for package in dict.fromkeys(name for item in versions for name in item):
        found = sorted({item[package] for item in versions if package in item})
        parts.append(f"{package} {' and '.join(found)}")
    return ", ".join(parts)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}


def write_markdown(tables: Sequence[Table], title: str) -> str:
    """A page of pipe tables with their notes below."""
    lines = [f"# {_escape_markdown(title)}", ""]
    for table in tables:
        lines += [f"## {_escape_markdown(table.title)}", ""]
        lines.append(_join(map(_escape_markdown, table.header)))
        lines.append("|" + " --- |" * len(table.header))
        lines += [_join(_mark(cell, _escape_markdown, "**", "**") for cell in row) for row in table.rows]
        lines += ["", *(f"- {_escape_markdown(note)}" for note in table.notes), ""]
    return "\n".join(lines).rstrip() + "\n"


def write_latex(tables: Sequence[Table], title: str) -> str:
    """`table` environments to input; they need booktabs and graphicx."""
    lines = [f"% {title}", r"% \usepackage{booktabs,graphicx}", ""]
    for table in tables:
        notes = " ".join(table.notes)
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{_escape_latex(table.title)}.}}"]
        # Wide tables shrink to the page, narrow ones keep their size.
        lines += [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
        lines += [rf"\begin{{tabular}}{{{'l' * len(table.header)}}}", r"\toprule"]
        lines += [" & ".join(map(_escape_latex, table.header)) + r" \\", r"\midrule"]
        lines += [
            " & ".join(_mark(cell, _escape_latex, r"\textbf{", "}") for cell in row) + r" \\" for row in table.rows
        ]
        lines += [r"\bottomrule", r"\end{tabular}}", r"\par\smallskip", rf"{{\footnotesize {_escape_latex(notes)}}}"]
        lines += [r"\end{table}", ""]
    return "\n".join(lines)


def write_html(tables: Sequence[Table], title: str) -> str:
    """A page that needs no other file."""
    style = Path(__file__).with_name("tables.css").read_text(encoding="utf-8")
    parts = ["<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">']
    parts += [f"<title>{html.escape(title)}</title>", f"<style>\n{style}</style>", "</head>", "<body>"]
    parts.append(f"<h1>{html.escape(title)}</h1>")
    for table in tables:
        names = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
        parts += ['<div class="wide">', '<table class="random">' if table.is_random else "<table>"]
        parts += [f"<caption>{html.escape(table.title)}</caption>", f"<thead><tr>{names}</tr></thead>", "<tbody>"]
        for row in table.rows:
            cells = [_mark(cell, html.escape, "<strong>", "</strong>") for cell in row]
            parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        parts += ["</tbody>", "</table>", "</div>", '<ul class="notes">']
        parts += [*(f"<li>{html.escape(note)}</li>" for note in table.notes), "</ul>"]
    return "\n".join([*parts, "</body>", "</html>"]) + "\n"


def _join(texts: Iterable[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _mark(cell: Cell, escape: Callable[[str], str], start: str, end: str) -> str:
    return f"{start}{escape(cell.text)}{end}" if cell.is_best else escape(cell.text)


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[])", r"\\\1", text)


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
