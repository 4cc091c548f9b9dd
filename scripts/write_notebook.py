"""Writes docs/examples/fit3d_in_100_lines.ipynb from the Python file beside it: the same code, a cell for each step.

python scripts/write_notebook.py
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "fit3d_in_100_lines.py"
PICTURE = "![photograph, original, fine-tuned, lifted](fit3d_in_100_lines/fit3d.png)\n\nOnce the cells above have run."


def create_notebook(source: str) -> dict[str, Any]:
    """The notebook of a file with a docstring and steps that begin with a comment `# 1. ...`; without outputs."""
    body = ast.parse(source).body
    lines = source.splitlines()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    # Lines before the comment that a step begins with belong to the step before.
    starts = [number for number, line in enumerate(lines) if re.match(r"# \d+\. ", line)]
    cells = [
        _create_cell("markdown", docstring),
        _create_cell("code", "\n".join(lines[body[0].end_lineno : starts[0]])),
    ]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        cells.append(_create_cell("markdown", "## " + lines[start].removeprefix("# ")))
        cells.append(_create_cell("code", "\n".join(lines[start + 1 : end])))
    cells.append(_create_cell("markdown", PICTURE))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _create_cell(kind: str, text: str) -> dict[str, Any]:
    cell = {"cell_type": kind, "metadata": {}, "source": text.strip("\n").splitlines(keepends=True)}
    return cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": []}


def format_notebook(source: str) -> str:
    return json.dumps(create_notebook(source), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    EXAMPLE.with_suffix(".ipynb").write_text(format_notebook(EXAMPLE.read_text(encoding="utf-8")), encoding="utf-8")
