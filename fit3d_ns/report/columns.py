"""How figures look in a table: `Column`, and the columns of every kind of result."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["up", "down", "none"]


@dataclass(frozen=True)
class Column:
    """One figure."""

    name: str
    """In our records; `by_angle/0-15/recall_10px` descends."""
    title: str
    """In the header, without the arrow."""
    direction: Direction = "none"
    """Whether larger or smaller is better; `none` has no best."""
    scale: float = 1.0
    """What the record's figure is multiplied by to be shown."""
    digits: int = 2
    """Decimals."""

    def find(self, metrics: Mapping[str, Any]) -> float | None:
        """The figure in a record's metrics, in the record's unit; None where there is none."""
        value: Any = metrics
        for part in self.name.split("/"):
            value = value.get(part) if isinstance(value, Mapping) else None
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def show(self, value: float) -> str:
        """A figure in the record's unit, as text; what would be rounded to 0 keeps one digit."""
        text = f"{value * self.scale:.{self.digits}f}"
        return f"{value * self.scale:.1g}" if value and not float(text) else text


def _percent(name: str, title: str) -> Column:
    return Column(name, title, "up", 100.0, 2)


def _error(name: str, title: str, digits: int = 4) -> Column:
    return Column(name, title, "down", 1.0, digits)


COST_COLUMNS = (
    Column("feature_dim", "Features per Gaussian", digits=0),
    Column("scene_file_mb", "Scene (MB)", digits=1),
    Column("stage1_hours", "Stage I (h/scene)", digits=2),
    Column("epochs", "Epochs", digits=2),
    Column("finetune_hours", "Stage II (h)", digits=2),
)
"""What a fine-tuned backbone took, as Tables 5 and 8 have it."""

TASK_COLUMNS: dict[str, tuple[Column, ...]] = {
    "segmentation": (_percent("miou", "mIoU (%)"), _percent("macc", "mAcc (%)"), _percent("aacc", "aAcc (%)")),
    "depth": (
        _error("rmse", "RMSE (m)"),
        _error("abs_rel", "Rel"),
        _error("log10", "log10"),
        _error("silog", "SILog", 2),
        _percent("d1", "d1 (%)"),
        _percent("d2", "d2 (%)"),
        _percent("d3", "d3 (%)"),
    ),
    "classification": (_percent("accuracy", "Acc. (%)"), _percent("accuracy_top5", "Top-5 (%)")),
    "consistency": (
        Column("mean_cosine", "Cosine", "up", digits=4),
        Column("centred_cosine", "Centred cosine", "up", digits=4),
        _percent("recall_10px", "Recall 10 px (%)"),
        Column("effective_rank", "Effective rank", digits=1),
    ),
    "correspondence": (
        _percent("recall_5px", "Recall 5 px (%)"),
        _percent("recall_10px", "Recall 10 px (%)"),
        _percent("recall_20px", "Recall 20 px (%)"),
        _percent("recall_2cm", "Recall 2 cm (%)"),
        _percent("ratio_recall_20px", "Ratio test, 20 px (%)"),
        _percent("ratio_recall_40px", "Ratio test, 40 px (%)"),
        _percent("ratio_recall_80px", "Ratio test, 80 px (%)"),
        _percent("ratio_recall_2cm", "Ratio test, 2 cm (%)"),
        _percent("by_angle/0-15/recall_10px", "10 px, 0-15 deg (%)"),
        _percent("by_angle/15-30/recall_10px", "10 px, 15-30 deg (%)"),
        _percent("by_angle/30-60/recall_10px", "10 px, 30-60 deg (%)"),
        _percent("by_angle/60-180/recall_10px", "10 px, 60-180 deg (%)"),
    ),
}
"""Figures by task, the paper's first."""

FINETUNE_COLUMNS = (
    Column("validation/{part}/feature_cosine", "Target cosine", "up", digits=4),
    Column("consistency/{part}/centred_cosine", "Centred cosine", "up", digits=4),
    _percent("consistency/{part}/recall_10px", "Recall 10 px (%)"),
)
"""Figures of a report of stage II, for `original` and for `finetuned`."""
