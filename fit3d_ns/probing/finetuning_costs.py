"""What a fine-tuned backbone has cost, read from what fit3d-finetune left beside it (Tables 5, 6 and 8 show it)."""

from pathlib import Path
from typing import Any

from fit3d_ns.probing.assembly import list_parts
from fit3d_ns.probing.frozen_backbones import BackboneConfig
from fit3d_ns.scene import load_scene
from fit3d_ns.utils.files import read_json

_TAKEN = ("steps", "seconds", "loss_first", "loss_last", "num_images", "num_trained_parameters", "settings", "versions")
_SECONDS_PER_HOUR = 3600.0


def is_finetuned_from_random(config: BackboneConfig) -> bool:
    """True if a fine-tuned folder takes part whose report says that it began with random weights."""
    report = _read_report(config)
    return bool(report and report.get("is_random", False))


def read_costs(config: BackboneConfig) -> dict[str, Any]:
    """Hours and settings of stage II, and size and hours of the scenes it learned from, as far as they are known.

    Returns:
        `{"finetuning": {...}}`, or nothing where no fine-tuned folder takes part or it has no report.
    """
    report = _read_report(config)
    if report is None:
        return {}
    costs: dict[str, Any] = {name: report[name] for name in _TAKEN if name in report}
    if isinstance(report.get("seconds"), (int, float)):
        costs["hours"] = report["seconds"] / _SECONDS_PER_HOUR
    scenes = [Path(name) for name in report.get("scenes", []) if isinstance(name, str)]
    costs["scenes"] = [scene.stem for scene in scenes]
    present = [scene for scene in scenes if scene.is_file()]
    if present:
        costs["scene_file_mb"] = sum(scene.stat().st_size for scene in present) / len(present) / 1e6
        costs["scene_figures"] = {scene.stem: load_scene(scene).figures for scene in present}
    return {"finetuning": costs}


def _read_report(config: BackboneConfig) -> dict[str, Any] | None:
    folder = config.finetuned
    if folder is None or "finetuned" not in list_parts(config.assembly) or not (folder / "report.json").is_file():
        return None
    report = read_json(folder / "report.json")
    return report if isinstance(report, dict) else None
