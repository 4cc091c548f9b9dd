"""What a fine-tuned backbone has cost, read from what fit3d-finetune left beside it (Tables 5, 6 and 8 show it)."""

from pathlib import Path
from typing import Any

from fit3d_ns.probing.assembly import list_parts
from fit3d_ns.probing.frozen_backbones import BackboneConfig
from fit3d_ns.scene import load_scene
from fit3d_ns.utils.files import read_json

_TAKEN = ("steps", "seconds", "loss_first", "loss_last", "num_images", "num_trained_parameters", "settings", "versions")
_SECONDS_PER_HOUR = 3600.0


def read_costs(config: BackboneConfig) -> dict[str, Any]:
    """Hours and settings of stage II, and size and hours of the scenes it learned from, as far as they are known.

    Returns:
        `{"finetuning": {...}}`, or nothing where no fine-tuned folder takes part or it has no report.
    """
    folder = config.finetuned
    if folder is None or "finetuned" not in list_parts(config.assembly):
        return {}
    if not (folder / "report.json").is_file():
        return {}
    report = read_json(folder / "report.json")
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
