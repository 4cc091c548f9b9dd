"""Records as fit3d-probe and fit3d-finetune write them, with figures typed by hand."""

from pathlib import Path
from typing import Any

from fit3d_ns.probing.result_records import ResultFile
from fit3d_ns.utils.files import write_json

DINOV2_S = "vit_small_patch14_dinov2.lvd142m"


def describe_backbone(architecture: str = DINOV2_S, is_random: bool = False, weights_hash: str = "a") -> dict[str, Any]:
    return {
        "backbone": architecture,
        "architecture": architecture,
        "normalization": "timm",
        "weights_hash": weights_hash,
        "is_random": is_random,
    }


def describe_finetuning(**changes: Any) -> dict[str, Any]:
    """What `read_costs` adds; names of `settings` are dotted."""
    settings: dict[str, Any] = {
        "trainable": {"train": changes.pop("train", "all")},
        "targets": {"leave_one_out": changes.pop("leave_one_out", False)},
        "anchors": {"l2_sp": changes.pop("l2_sp", 0.0)},
    }
    known = {"feature_dim": 64, "scene_file_mb": 170.25, "stage1_hours": 0.5, "epochs": 1.0, "hours": 2.25}
    return {**known, "steps": 100, "scenes": ["a", "b"], "settings": settings, **changes}


def write_probe(
    path: Path,
    per_seed: dict[int, dict[str, Any]],
    *,
    task: str = "segmentation",
    assembly: str = "original",
    data: tuple[str, int, int, int] = ("nyu13", 13, 795, 654),
    backbone: dict[str, Any] | None = None,
    finetuning: dict[str, Any] | None = None,
    data_hash: str = "d",
    config: dict[str, Any] | None = None,
) -> Path:
    """A record: name of the data, its classes, and its train and test frames are `data`."""
    name, num_classes, num_train, num_test = data
    backbone = backbone or describe_backbone()
    settings = {
        "task": task,
        "assembly": assembly,
        "backbones": {"original": backbone},
        "patch_fit": "pad",
        "train": {"name": name, "num_frames": num_train, "num_classes": num_classes, "data_hash": "t"},
        "test": {"name": name, "num_frames": num_test, "num_classes": num_classes, "data_hash": data_hash},
        "config": config or {"num_iterations": 40},
        "run": {"cache": "auto"},
        "finetuning_identity": repr(finetuning),
    }
    file = ResultFile(path, f"probe/{task}", settings, backbone["is_random"])
    file.save(per_seed, {} if finetuning is None else {"finetuning": finetuning})
    return path


def write_finetune_report(folder: Path, cosine: float, *, is_random: bool = False, **changes: Any) -> Path:
    figures = {
        "original": {"centred_cosine": 0.25, "recall_10px": 0.125},
        "finetuned": {"centred_cosine": cosine, "recall_10px": 0.5},
    }
    report = {
        "kind": "finetune",
        "is_random": is_random,
        "steps": 40,
        "seconds": 1800.0,
        "epochs": 2.0,
        "scenes": ["scenes/a.safetensors"],
        "scene_costs": [{"scene_id": "a", "feature_dim": 32, "file_mb": 1.5, "stage1_hours": 0.25}],
        "backbone": describe_backbone(is_random=is_random),
        "consistency": {"views": "4 views", **figures},
        "validation": {"original": {"feature_cosine": 0.5}, "finetuned": {"feature_cosine": 0.75}},
        "settings": {"trainable": {"train": "all"}},
        "versions": {"torch": "2.4"},
        **changes,
    }
    write_json(folder / "report.json", report)
    return folder / "report.json"
