"""Metrics of the paper (Yue et al., ECCV 2024), from `paper_values.csv`, with the numbers of the tables they stand in.

Accuracies and IoU are shares as in our records (the paper prints percents), depth errors in metres, memory in 1e6 bytes
per scene, `stage1_hours` per scene, `finetune_hours` of the whole stage II. All are of one seed. A row that stands in
two tables is kept once, with the more precise of its values. In the text of Table 5 the digits of the first two rows
are interleaved; they separate in one way only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fit3d_ns.utils.package_files import read_table

_BACKBONES = Path(__file__).parents[1] / "features" / "paper_backbones.csv"
PRETTY_BACKBONES = {row["model"]: row["short"] for row in read_table(_BACKBONES)}
"""The paper's backbones by timm's names."""


PaperRow = Mapping[str, str]
"""One row of one table, or the same row of several, as the file has it: numbers of the `tables`, `task`, `data` (named
by `find_paper_data`), `backbone` (timm's name with its tag), `assembly` (`+Ours` of the paper is `concat`), `head`;
numbers per Gaussian (`feature_dim`); `epochs` of stage II and what it trained (`train`: `all` or `adapter`); then
metrics by the names of our records, empty where the paper has none."""
PAPER_ROWS: list[PaperRow] = [*read_table(Path(__file__).with_suffix(".csv"))]
"""Everything that Tables 1 to 13 say."""
CHOICES = ("feature_dim", "epochs", "train")
"""What of stage II a row is about."""


def name_backbone(backbone: Mapping[str, Any]) -> str:
    """A backbone's metadata as a short name, the paper's where it has one."""
    architecture = str(backbone.get("architecture", backbone.get("backbone", "?")))
    name = PRETTY_BACKBONES.get(architecture, architecture)
    return f"{name} (random)" if backbone.get("is_random") else name


def find_paper_data(task: str, train: Mapping[str, Any], test: Mapping[str, Any]) -> str | None:
    """Which of the paper's data sets (`paper_data.csv`) a record's training and test data are, or None.

    Name, number of classes and, where the official split fixes it, the number of frames have to agree.
    """
    name, same = ("imagenet", "num_classes") if task == "classification" else (test.get("name"), "name")
    row = next((row for row in _DATA if (row["task"], row["data"]) == (task, name)), None)
    if row is None or train.get(same) != test.get(same):
        return None
    sizes = {"classes": test.get("num_classes"), "train": train.get("num_frames"), "test": test.get("num_frames")}
    return row["data"] if all(row[key] in ("", str(size)) for key, size in sizes.items()) else None


def find_paper_row(
    task: str, data: str | None, backbone: str, assembly: str, head: str, finetuning: Mapping[str, Any]
) -> PaperRow | None:
    """The paper's row for a record, or None where the paper did something else.

    `data` is what `find_paper_data` found, `backbone` timm's name of the original. Of `feature_dim`, `epochs` and
    `train` in `finetuning` what is not known is taken to be as in the paper: published weights have no report.
    """
    if head == "dpt":
        # The public code has no configuration of it: widths, layers and rates of Table 12 are not known.
        return None
    uses_finetuned = assembly not in ("original", "duplicate")
    same = {"task": task, "data": data, "backbone": backbone, "assembly": assembly, "head": head}
    choices = CHOICES if uses_finetuned else ()
    for row in PAPER_ROWS:
        if same.items() <= row.items() and all(_agree(finetuning.get(name), row[name]) for name in choices):
            return row
    return None


def _agree(ours: Any, papers: str) -> bool:
    # The last images of an epoch fill no batch, so a whole epoch may count a little less.
    return ours is None or (abs(ours - int(papers)) < 0.05 if isinstance(ours, float) else str(ours) == papers)


_DATA = read_table(Path(__file__).with_name("paper_data.csv"))
"""Number of classes, and of train and test frames, where official lists fix them."""
