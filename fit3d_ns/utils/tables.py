"""`read_table`: tables of the package that lie as CSV files beside the module that reads them."""

import csv
from pathlib import Path


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by the names in its first line."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
