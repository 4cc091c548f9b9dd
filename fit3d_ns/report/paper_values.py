"""Metrics of the paper (Yue et al., ECCV 2024), from `paper_values.csv`, with the numbers of the tables they stand in.

Accuracies and IoU are shares as in our records (the paper prints percents), depth errors in metres, memory in 1e6 bytes
per scene, `stage1_hours` per scene, `finetune_hours` of the whole stage II. All are of one seed. A row that stands in
two tables is kept once, with the more precise of its values. In the text of Table 5 the digits of the first two rows
are interleaved; they separate in one way only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fit3d_ns.utils.package_files import read_table

_BACKBONES = Path(__file__).parents[1] / "features" / "paper_backbones.csv"
PRETTY_BACKBONES = {row["model"]: row["short"] for row in read_table(_BACKBONES)}
"""The paper's backbones by timm's names."""


@dataclass(frozen=True)
class PaperRow:
    """One row of one table, or the same row of several."""

    tables: tuple[int, ...]
    task: str
    data: str
    """The name that `find_paper_data` gives it."""
    values: Mapping[str, float]
    """Metrics by the names of our records."""
    assembly: str = "concat"
    """`+Ours` of the paper is `concat`."""
    backbone: str = "vit_small_patch14_dinov2.lvd142m"
    """timm's name of the architecture with its tag."""
    feature_dim: int = 64
    """Numbers per Gaussian."""
    epochs: int = 1
    """Epochs of stage II."""
    train: str = "all"
    """What stage II trained: `all` or `adapter`."""
    head: str = "linear"


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
    for row in PAPER_ROWS:
        if (row.task, row.data, row.backbone, row.assembly, row.head) != (task, data, backbone, assembly, head):
            continue
        wanted = {"feature_dim": row.feature_dim, "epochs": row.epochs, "train": row.train}
        if not uses_finetuned or all(_agree(finetuning.get(name), value) for name, value in wanted.items()):
            return row
    return None


def _agree(ours: Any, papers: Any) -> bool:
    if isinstance(ours, float) and isinstance(papers, int):
        # The last images of an epoch fill no batch, so a whole epoch may count a little less.
        return abs(ours - papers) < 0.05
    return ours is None or ours == papers


_DATA = read_table(Path(__file__).with_name("paper_data.csv"))
"""Number of classes, and of train and test frames, where official lists fix them."""


def _read_rows() -> tuple[PaperRow, ...]:
    readers: dict[str, Any] = {"tables": lambda text: tuple(map(int, text.split())), "feature_dim": int, "epochs": int}
    names = [field.name for field in fields(PaperRow) if field.name != "values"]
    return tuple(
        PaperRow(
            values={name: float(text) for name, text in line.items() if name not in names and text},
            **{name: readers.get(name, str)(line[name]) for name in names},
        )
        for line in read_table(Path(__file__).with_suffix(".csv"))
    )


PAPER_ROWS = _read_rows()
"""Everything that Tables 1 to 13 say."""
