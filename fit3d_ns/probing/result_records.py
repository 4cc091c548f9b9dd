"""One `ResultRecord` per probe: metrics of every seed, their means and spreads, and a key that names the settings.

metrics:  the means by name (`miou`, `rmse`, ...), nested metrics alike
          spread      standard deviation over seeds (n - 1 in the denominator), absent for one seed
          per_seed    {"0": {...}, "1": {...}}
settings: what the metrics depend on, `key` (a hash of that), `seeds`, and facts about training and fine-tuning
"""

import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fit3d_ns.probing.frozen_features import BackboneConfig, list_parts
from fit3d_ns.utils.files import hash_bytes, read_json, wait_for_folder
from fit3d_ns.utils.progress import SECONDS_PER_HOUR, notice
from fit3d_ns.utils.results import ResultRecord, average_scene_costs, check_report, load_result, save_result

UNCOUNTED = ("per_scene",)
"""Metrics that are kept per seed but not averaged."""
_COSTS = "steps epochs seconds loss_first loss_last num_images num_trained_parameters settings versions".split()
"""Entries of fit3d-finetune's report that records repeat."""


@dataclass
class ResultFile:
    """The record of one cell of a table, at one path."""

    path: Path
    kind: str
    """For example `probe/depth`."""
    settings: dict[str, Any]
    """Everything the metrics depend on, except the seeds; plain JSON values."""
    is_random: bool

    @property
    def key(self) -> str:
        return compute_settings_key(self.kind, self.settings)

    def load_seeds(self) -> dict[int, dict[str, Any]]:
        """Metrics of finished seeds; a file with other settings is renamed after its key, with a notice."""
        if not self.path.is_file():
            return {}
        record = load_result(self.path)
        if record.settings.get("key") != self.key:
            other = self.path.with_name(f"{self.path.stem}.{record.settings.get('key', 'earlier')}{self.path.suffix}")
            # Another process of the same run may be faster.
            with suppress(FileNotFoundError):
                self.path.rename(other)
                notice(f"{self.path} held metrics of other settings; they are now in {other.name}.")
            return {}
        return {int(seed): metrics for seed, metrics in record.metrics.get("per_seed", {}).items()}

    def save(self, per_seed: dict[int, dict[str, Any]], training: dict[str, Any], is_main: bool = True) -> ResultRecord:
        """Writes the metrics of the finished seeds beside those that other processes have finished since; a process
        that is not the main one of its run only returns its own."""
        if not is_main:
            return ResultRecord(self.kind, summarise_seeds(per_seed), {**self.settings, **training}, self.is_random)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with wait_for_folder(self.path.parent):
            per_seed = {**self.load_seeds(), **per_seed}
            if self.path.is_file() and "training" in training:
                held = load_result(self.path).settings.get("training", {})
                training = {**training, "training": {**held, **training["training"]}}
            settings = {**self.settings, "key": self.key, "seeds": sorted(per_seed), **training}
            record = ResultRecord(self.kind, summarise_seeds(per_seed), settings, self.is_random)
            save_result(record, self.path)
        return record


def compute_settings_key(kind: str, settings: dict[str, Any]) -> str:
    """Hash of kind and settings, independent of the order of their entries."""
    return hash_bytes(kind.encode(), repr(_sorted(settings)).encode())


def summarise_seeds(per_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Means of every metric over seeds, with spreads; one seed's metrics are their own means."""
    by_seed = {str(seed): per_seed[seed] for seed in sorted(per_seed)}
    items = list(by_seed.values())
    summary = _combine(items, _mean)
    if len(items) > 1:
        summary["spread"] = _combine(items, lambda values: statistics.stdev(values) if len(values) > 1 else None)
    return {**summary, "per_seed": by_seed}


def read_costs(config: BackboneConfig) -> dict[str, Any]:
    """`{"finetuning": {...}}`: what a fine-tuned backbone has cost by its report, if it has one (Tables 5, 6 and 8).

    `hours` are stage II's, `stage1_hours` and `scene_file_mb` means over scenes, `feature_dim` that of all scenes.
    """
    report = read_report(config)
    if report is None:
        return {}
    costs: dict[str, Any] = {name: report[name] for name in _COSTS if name in report}
    if isinstance(report.get("seconds"), (int, float)):
        costs["hours"] = report["seconds"] / SECONDS_PER_HOUR
    costs["scenes"] = [Path(name).stem for name in report.get("scenes", []) if isinstance(name, str)]
    return {"finetuning": {**costs, **average_scene_costs(report.get("scene_costs") or [])}}


def read_report(config: BackboneConfig) -> dict[str, Any] | None:
    """What fit3d-finetune reports of the fine-tuned folder that takes part; None where there is no such report."""
    folder = config.finetuned
    if folder is None or "finetuned" not in list_parts(config.assembly) or not (folder / "report.json").is_file():
        return None
    report = read_json(folder / "report.json")
    if not isinstance(report, dict):
        return None
    check_report(report, folder / "report.json")
    return report


def _combine(items: Sequence[dict[str, Any]], function: Any) -> dict[str, Any]:
    combined: dict[str, Any] = {}
    for name, value in items[0].items():
        if name in UNCOUNTED:
            continue
        values = [item.get(name) for item in items]
        if isinstance(value, dict):
            combined[name] = _combine([item if isinstance(item, dict) else {} for item in values], function)
        elif isinstance(value, (int, float)) or value is None:
            combined[name] = function([number for number in values if number is not None and math.isfinite(number)])
    return combined


def _mean(values: Sequence[float | int]) -> float | int | None:
    """The mean, if there are any values; whole numbers that agree stay whole."""
    if not values:
        return None
    if all(isinstance(value, int) for value in values) and len(set(values)) == 1:
        return values[0]
    return sum(values) / len(values)


def _sorted(value: Any) -> Any:
    """Plain values in an order that does not depend on insertion; lists and tuples are alike, as JSON has them."""
    if isinstance(value, dict):
        return sorted((str(key), _sorted(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_sorted(item) for item in value]
    return str(value) if isinstance(value, Path) else value
