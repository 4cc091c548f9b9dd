"""Tables (`read_table`) and texts with gaps (`fill_template`) that lie beside the module that uses them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by the names in its first line."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fill_template(path: Path, escape: Callable[[str], str] = str, **values: Any) -> str:
    """A text by Jinja's rules, with `[[ value ]]` and `[% if ... %]`, for LaTeX needs the braces; ends with a newline.

    `escape` is its filter of that name, for what is shown as it is.
    """
    import jinja2

    marks = {"variable_start_string": "[[", "variable_end_string": "]]", "block_start_string": "[%"}
    lines = {"block_end_string": "%]", "trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    options: dict[str, Any] = {**marks, **lines, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(path.parent), **options)
    environment.filters["escape"] = escape
    return environment.get_template(path.name).render(values).rstrip() + "\n"
