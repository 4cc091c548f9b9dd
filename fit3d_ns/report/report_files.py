"""`write_report`: results become tables in four files: Markdown, LaTeX, HTML, JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path

from fit3d_ns.report.finetune_tables import create_finetune_tables
from fit3d_ns.report.markup import write_html, write_latex, write_markdown
from fit3d_ns.report.probe_tables import create_probe_tables
from fit3d_ns.report.result_files import Results
from fit3d_ns.report.table import Table
from fit3d_ns.utils.files import write_atomically, write_json

STEM = "tables"
"""Name of the files without suffix."""


@dataclass(frozen=True)
class Report:
    """What was written."""

    tables: list[Table]
    """Those of random weights last."""
    markdown: str
    """Content of the Markdown file."""
    files: list[Path]
    """All files."""


def write_report(results: Results, folder: Path, title: str) -> Report:
    """Writes the tables of all results.

    Raises:
        ValueError: Results that must not stand in one table.
    """
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
