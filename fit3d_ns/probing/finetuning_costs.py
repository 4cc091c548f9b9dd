"""What a fine-tuned backbone has cost, read from what fit3d-finetune left beside it (Tables 5, 6 and 8 show it)."""

from pathlib import Path
from typing import Any

from fit3d_ns.probing.assembly import list_parts
from fit3d_ns.probing.frozen_backbones import BackboneConfig
from fit3d_ns.scene import load_scene
from fit3d_ns.scene.scene_costs import SceneCosts, read_scene_costs
from fit3d_ns.utils.files import read_json
from fit3d_ns.utils.progress import SECONDS_PER_HOUR

_TAKEN = (
    "steps",
    "epochs",
    "seconds",
    "loss_first",
    "loss_last",
    "num_images",
    "num_trained_parameters",
    "settings",
    "versions",
)


def is_finetuned_from_random(config: BackboneConfig) -> bool:
    """True if a fine-tuned folder takes part whose report says that it began with random weights."""
    report = _read_report(config)
    return bool(report and report.get("is_random", False))


def read_costs(config: BackboneConfig) -> dict[str, Any]:
    """Hours and settings of stage II, and what the scenes it learned from have cost, as far as it is known.

    Returns:
        `{"finetuning": {...}}`, or nothing where no fine-tuned folder takes part or it has no report. `hours` are stage
        II's, `stage1_hours` and `scene_file_mb` means over scenes, `feature_dim` that of all scenes.
    """
    report = _read_report(config)
    if report is None:
        return {}
    costs: dict[str, Any] = {name: report[name] for name in _TAKEN if name in report}
    if isinstance(report.get("seconds"), (int, float)):
        costs["hours"] = report["seconds"] / SECONDS_PER_HOUR
    scenes = [Path(name) for name in report.get("scenes", []) if isinstance(name, str)]
    costs["scenes"] = [scene.stem for scene in scenes]
    return {"finetuning": {**costs, **_summarise_scenes(_list_scene_costs(report, scenes))}}


def _list_scene_costs(report: dict[str, Any], scenes: list[Path]) -> list[SceneCosts]:
    """What the report recorded; reports of earlier versions did not, then of the scenes that are still there."""
    if isinstance(report.get("scene_costs"), list):
        return [SceneCosts(**entry) for entry in report["scene_costs"]]
    return [read_scene_costs(load_scene(scene), scene) for scene in scenes if scene.is_file()]


def _summarise_scenes(costs: list[SceneCosts]) -> dict[str, Any]:
    if not costs:
        return {}
    summary: dict[str, Any] = {"scene_file_mb": sum(cost.file_mb for cost in costs) / len(costs)}
    hours = [cost.stage1_hours for cost in costs if cost.stage1_hours is not None]
    if len(hours) == len(costs):
        summary["stage1_hours"] = sum(hours) / len(hours)
    if len({cost.feature_dim for cost in costs}) == 1:
        summary["feature_dim"] = costs[0].feature_dim
    return summary


def _read_report(config: BackboneConfig) -> dict[str, Any] | None:
    folder = config.finetuned
    if folder is None or "finetuned" not in list_parts(config.assembly) or not (folder / "report.json").is_file():
        return None
    report = read_json(folder / "report.json")
    return report if isinstance(report, dict) else None
