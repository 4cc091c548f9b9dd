"""`create_finetune_tables`: reports of fit3d-finetune become tables, original beside fine-tuned."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fit3d_ns.report.columns import COST_COLUMNS, FINETUNE_COLUMNS, Column
from fit3d_ns.report.paper_values import name_backbone
from fit3d_ns.report.result_files import FinetuneResult
from fit3d_ns.report.settings_text import describe_settings, describe_versions, find_differences, flatten
from fit3d_ns.report.table import NOTHING, RANDOM_TITLE, Cell, Table, create_header, mark_best
from fit3d_ns.utils.progress import SECONDS_PER_HOUR

_PARTS = {"original": "original", "finetuned": "fine-tuned"}


def create_finetune_tables(results: Sequence[FinetuneResult]) -> list[Table]:
    """One table for each backbone and set of validation views, runs of random weights last."""
    groups: dict[tuple[Any, ...], list[FinetuneResult]] = {}
    for result in results:
        report = result.report
        views = str(report["consistency"].get("views", ""))
        scenes = tuple(_name_scenes(report, "validation_scenes") or _name_scenes(report, "scenes"))
        key = (bool(report.get("is_random")), _name(report), views, scenes)
        groups.setdefault(key, []).append(result)
    return [_create_table(groups[key], *key[:3]) for key in sorted(groups)]


def _create_table(group: Sequence[FinetuneResult], is_random: bool, backbone: str, views: str) -> Table:
    reports = [result.report for result in group]
    settings = [flatten(report["settings"]) for report in reports]
    differing = find_differences(settings)
    header = ["Run", "Scenes", "Steps"]
    columns = [
        [Cell(result.name) for result in group],
        [Cell(str(count := len(report.get("scenes", ()))), value=count) for report in reports],
        [Cell(str(report["steps"]), value=report["steps"]) for report in reports],
    ]
    if differing:
        header.append("Settings")
        columns.append([Cell(describe_settings(item, differing) or NOTHING) for item in settings])
    costs = [_read_costs(report) for report in reports]
    for column in COST_COLUMNS:
        values = [column.find(item) for item in costs]
        if any(value is not None for value in values):
            header.append(create_header(column))
            columns.append([_create_cell(column, value, False) for value in values])
    for template in FINETUNE_COLUMNS:
        for part, word in _PARTS.items():
            column = Column(
                template.name.format(part=part), f"{template.title}, {word}", template.direction, template.scale,
                template.digits,
            )  # fmt: skip
            values = [column.find(report) for report in reports]
            # The original is the same in every row; only fine-tuned ones compete.
            best = mark_best(column, values) if part == "finetuned" else [False] * len(values)
            if any(value is not None for value in values):
                header.append(create_header(column))
                columns.append([_create_cell(column, *pair) for pair in zip(values, best, strict=True)])
    shared = {name: value for name, value in settings[0].items() if name not in differing and value not in (None, [])}
    notes = [
        f"Measured on {views or 'unknown views'}: target cosine against the rendered scene, centred cosine and recall "
        "between views.",
        f"Settings: {describe_settings(shared, list(shared))}.",
        f"Versions: {describe_versions([report.get('versions', {}) for report in reports])}.",
    ]
    title = (RANDOM_TITLE if is_random else "") + f"Fine-tuning (stage II) of {backbone}"
    return Table(title, header, [list(row) for row in zip(*columns, strict=True)], notes, is_random)


def _create_cell(column: Column, value: float | None, is_best: bool) -> Cell:
    return Cell() if value is None else Cell(column.show(value), is_best, value)


def _read_costs(report: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of the cost columns; means over scenes."""
    costs: dict[str, Any] = {"epochs": report.get("epochs")}
    if isinstance(report.get("seconds"), (int, float)):
        costs["finetune_hours"] = report["seconds"] / SECONDS_PER_HOUR
    scenes = report.get("scene_costs") or []
    for name, known in (("feature_dim", "feature_dim"), ("scene_file_mb", "file_mb"), ("stage1_hours", "stage1_hours")):
        values = [scene.get(known) for scene in scenes]
        if values and all(isinstance(value, (int, float)) for value in values):
            costs[name] = sum(values) / len(values)
    return costs


def _name(report: Mapping[str, Any]) -> str:
    return name_backbone(report.get("backbone") or {})


def _name_scenes(report: Mapping[str, Any], key: str) -> list[str]:
    return [PurePath(str(path)).stem for path in report.get(key) or ()]
