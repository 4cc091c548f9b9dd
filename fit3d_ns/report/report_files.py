"""`write_report`: tables as Markdown, LaTeX, HTML and JSON."""

import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fit3d_ns.report.result_files import Results
from fit3d_ns.report.result_tables import create_finetune_tables, create_probe_tables
from fit3d_ns.report.table import Cell, Table
from fit3d_ns.utils.errors import reading
from fit3d_ns.utils.files import write_atomically, write_json

STEM = "tables"
"""Name of the files without suffix."""


@dataclass(frozen=True)
class Report:
    """What was written: the tables, those of random weights last, as Markdown, and the names of all files."""

    tables: list[Table]
    markdown: str
    files: list[Path]


def write_report(results: Results, folder: Path, title: str) -> Report:
    """Writes the tables of all results; ValueError where two must not stand in one table."""
    for probe in results.probes:
        with reading(probe.path):
            create_probe_tables([probe])
    for finetuning in results.finetunings:
        with reading(finetuning.path):
            create_finetune_tables([finetuning])
    tables = create_probe_tables(results.probes) + create_finetune_tables(results.finetunings)
    tables.sort(key=lambda table: table.is_random)
    markdown = write_markdown(tables, title)
    texts = {".md": markdown, ".tex": write_latex(tables, title), ".html": write_html(tables, title)}
    files = [folder / f"{STEM}{suffix}" for suffix in texts]
    for path, text in zip(files, texts.values(), strict=True):
        with write_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    files.append(folder / f"{STEM}.json")
    sources = [str(probe.path) for probe in results.probes] + [str(run.path) for run in results.finetunings]
    write_json(files[-1], {"title": title, "tables": [asdict(table) for table in tables], "sources": sources})
    return Report(tables, markdown, files)


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 2rem 0 0.5rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.4rem 0; }
th, td { padding: 0.25rem 0.8rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
td { white-space: nowrap; }
.wide { overflow-x: auto; }
thead th { border-bottom: 2px solid #444; }
ul.notes { margin: 0 0 2rem; padding-left: 1.2rem; color: #555; font-size: 13px; overflow-wrap: anywhere; }
.random { background: #fff3f0; }
"""


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
    parts = ["<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">']
    parts += [f"<title>{html.escape(title)}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>"]
    parts.append(f"<h1>{html.escape(title)}</h1>")
    for table in tables:
        parts.append('<div class="wide">')
        parts.append('<table class="random">' if table.is_random else "<table>")
        parts.append(f"<caption>{html.escape(table.title)}</caption>")
        names = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
        parts.append(f"<thead><tr>{names}</tr></thead>")
        parts.append("<tbody>")
        for row in table.rows:
            cells = [_mark(cell, html.escape, "<strong>", "</strong>") for cell in row]
            parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        parts += ["</tbody>", "</table>", "</div>", '<ul class="notes">']
        parts += [f"<li>{html.escape(note)}</li>" for note in table.notes]
        parts.append("</ul>")
    return "\n".join([*parts, "</body>", "</html>"]) + "\n"


def _join(texts: Iterable[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _mark(cell: Cell, escape: Callable[[str], str], start: str, end: str) -> str:
    return f"{start}{escape(cell.text)}{end}" if cell.is_best else escape(cell.text)


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[])", r"\\\1", text)


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
