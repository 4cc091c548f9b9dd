"""What a finished run reports: figures, time per phase, memory, size; as a table and as `results.json`."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fit3d_ns.utils.progress import measure_peak_memory_mb
from fit3d_ns.utils.results import ResultRecord, load_result, save_result

SUMMARY_NAME = "results.json"
"""File beside config.yml."""


def write_run_summary(trainer: Any, figures: dict[str, float]) -> Path:
    """Writes the record of a run and prints it.

    Args:
        trainer: A `FeatureTrainer` whose run has ended.
        figures: Means over the held-out frames, with `_std` entries.

    Returns:
        Where the record lies.
    """
    config, model, datamanager = trainer.config, trainer.pipeline.model, trainer.pipeline.datamanager
    backbone = datamanager.tokens.description.to_metadata() if datamanager.tokens is not None else None
    num_steps = trainer.step + 1
    seconds = {name: round(value, 3) for name, value in trainer.timer.seconds.items()}
    metrics: dict[str, Any] = {key: value for key, value in figures.items() if not key.startswith(("fps", "num_rays"))}
    metrics |= {
        "num_gaussians": int(model.num_points),
        "num_train_views": len(datamanager.train_dataset),
        "num_eval_views": len(datamanager.eval_dataset),
        "seconds": seconds,
        "milliseconds_per_step": 1000 * trainer.timer.seconds.get("colour", 0.0) / max(num_steps, 1),
        "peak_memory_mb": round(measure_peak_memory_mb(), 1),
    }
    if torch.cuda.is_available():
        metrics["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    record = ResultRecord(
        kind="stage1",
        metrics=metrics,
        settings={
            "method": config.method_name,
            "scene": datamanager.train_dataset.metadata.get("scene_id", Path(config.data or ".").name),
            "max_num_iterations": config.max_num_iterations,
            "feature_dim": config.pipeline.model.feature_dim,
            "feature_schedule": config.pipeline.model.feature_schedule,
            "device": str(model.device),
            "backbone": backbone,
        },
        is_random=bool(backbone and backbone["is_random"]),
    )
    path = trainer.base_dir / SUMMARY_NAME
    save_result(record, path)
    _print_summary(record, path, trainer)
    return path


def read_run_figures(config_path: Path) -> dict[str, Any]:
    """The figures of a run by its config.yml; none where it did not finish, or is nerfstudio's own."""
    path = config_path.parent / SUMMARY_NAME
    try:
        return dict(load_result(path).metrics) if path.is_file() else {}
    except ValueError:
        # Other programs also write a `results.json`; ours is the only one that is known here.
        return {}


def _print_summary(record: ResultRecord, path: Path, trainer: Any) -> None:
    title = "fit3d-features" + (" (RANDOM weights: no measure of quality)" if record.is_random else "")
    table = Table(title=title, show_header=False)
    for name, value in record.metrics.items():
        if name == "seconds":
            table.add_row("seconds", ", ".join(f"{phase} {spent:.1f}" for phase, spent in value.items()))
        elif not name.endswith("_std"):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    table.add_row("figures", str(path))
    table.add_row("config", str(trainer.base_dir / "config.yml"))
    Console(soft_wrap=True).print(table)
