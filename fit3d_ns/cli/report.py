"""`fit3d-report`: tables out of results, without waiting for torch; `figures.py` has the commands that draw."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fit3d_ns.cli.command import run_named
from fit3d_ns.report.result_files import read_results
from fit3d_ns.report.result_tables import write_report


@dataclass(frozen=True)
class ReportCommand:
    """Which results, and where the tables go."""

    results: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Records of fit3d-probe and report.json files of fit3d-finetune: files, folders (everything below), globs."""
    output_dir: Path = Path("report")
    """Folder for tables.md, .tex, .html and .json, and angles.png where errors are known by viewing angle."""
    title: str = "Results"
    """Title of the report."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the command; the first word chooses between tables and figures."""
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments[:1] in (["features"], ["predictions"]):
        from fit3d_ns.cli import figures

        figures.main(arguments)
    else:
        run_named("fit3d-report", ReportCommand, report, arguments)


def report(command: ReportCommand) -> None:
    _, files = write_report(*read_results(command.results), command.output_dir, command.title)
    print(files[0].read_text(encoding="utf-8"))
    print("Report: " + ", ".join(map(str, files)))


if __name__ == "__main__":
    main()
