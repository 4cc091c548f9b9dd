"""One `ResultRecord` per probe: figures of every seed, their means and spreads, and a key that names the settings.

metrics:  the means by name (`miou`, `rmse`, ...), nested figures alike
          spread      standard deviation over seeds (n - 1 in the denominator), absent for one seed
          per_seed    {"0": {...}, "1": {...}}
settings: what the figures depend on, `key` (a hash of that), `seeds`, and what is said about the training
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fit3d_ns.utils.files import hash_bytes
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.results import ResultRecord, load_result, save_result

UNCOUNTED = ("per_scene",)
"""Figures that are kept per seed but not averaged."""


@dataclass
class ResultFile:
    """The record of one cell of a table, at one path."""

    path: Path
    """Where it is written."""
    kind: str
    """For example `probe/depth`."""
    settings: dict[str, Any]
    """Everything the figures depend on, besides the seeds; plain JSON values."""
    is_random: bool
    """True if random weights took part."""

    @property
    def key(self) -> str:
        """Names the settings."""
        return compute_settings_key(self.kind, self.settings)

    def load_seeds(self) -> dict[int, dict[str, Any]]:
        """Figures of the seeds that an earlier run with the same settings has finished.

        A file with other settings at the same path is put aside under the name of its key, and said so.
        """
        if not self.path.is_file():
            return {}
        record = load_result(self.path)
        if record.settings.get("key") != self.key:
            other = self.path.with_name(f"{self.path.stem}.{record.settings.get('key', 'earlier')}{self.path.suffix}")
            try:
                self.path.rename(other)
            except FileNotFoundError:
                # Another process of the same run was faster.
                return {}
            notice(f"{self.path} held figures of other settings; they are now in {other.name}.")
            return {}
        return {int(seed): figures for seed, figures in record.metrics.get("per_seed", {}).items()}

    def save(self, per_seed: dict[int, dict[str, Any]], training: dict[str, Any]) -> ResultRecord:
        """Writes the figures of the finished seeds, atomically."""
        record = ResultRecord(
            kind=self.kind,
            metrics=summarise_seeds(per_seed),
            settings={**self.settings, "key": self.key, "seeds": sorted(per_seed), **training},
            is_random=self.is_random,
        )
        save_result(record, self.path)
        return record


def compute_settings_key(kind: str, settings: dict[str, Any]) -> str:
    """Hash of kind and settings, independent of the order of their entries."""
    return hash_bytes(kind.encode(), repr(_sorted(settings)).encode())


def summarise_seeds(per_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Means of every figure over seeds, with spreads; one seed's figures are their own means."""
    items = [per_seed[seed] for seed in sorted(per_seed)]
    summary = _combine(items, _mean)
    if len(items) > 1:
        summary["spread"] = _combine(items, _deviation)
    summary["per_seed"] = {str(seed): per_seed[seed] for seed in sorted(per_seed)}
    return summary


def _combine(items: Sequence[dict[str, Any]], function: Any) -> dict[str, Any]:
    combined: dict[str, Any] = {}
    for name, value in items[0].items():
        if name in UNCOUNTED:
            continue
        values = [item.get(name) for item in items]
        if isinstance(value, dict):
            combined[name] = _combine([item if isinstance(item, dict) else {} for item in values], function)
        elif isinstance(value, (int, float)) or value is None:
            combined[name] = function(values)
    return combined


def _mean(values: Sequence[float | int | None]) -> float | int | None:
    """Mean of the values that are there; whole numbers that agree stay whole."""
    present = [value for value in values if value is not None and math.isfinite(value)]
    if not present:
        return None
    if all(isinstance(value, int) for value in present) and len(set(present)) == 1:
        return present[0]
    return sum(present) / len(present)


def _deviation(values: Sequence[float | int | None]) -> float | None:
    present = [value for value in values if value is not None and math.isfinite(value)]
    if len(present) < 2:
        return None
    mean = sum(present) / len(present)
    return math.sqrt(sum((value - mean) ** 2 for value in present) / (len(present) - 1))


def _sorted(value: Any) -> Any:
    """Plain values in an order that does not depend on insertion; lists and tuples are alike, as JSON has them."""
    if isinstance(value, dict):
        return sorted((str(key), _sorted(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_sorted(item) for item in value]
    return str(value) if isinstance(value, Path) else value
