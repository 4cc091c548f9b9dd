"""`ResultRecord`: one measured result, with everything needed to trust it or to make it again."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from fit3d_ns.utils.files import hash_bytes, hash_file, read_json, write_json

SCHEMA_VERSION = 1
_KINDS = {"kind": str, "metrics": dict, "settings": dict, "is_random": bool, "versions": dict, "schema_version": int}


@dataclass(frozen=True)
class ResultRecord:
    """Metrics of one run of one command."""

    kind: str
    """What was measured, for example `stage1`, `finetune`, `probe/depth`."""
    metrics: dict[str, Any]
    """Metric name to value; names are the field's (`psnr`, `miou`, `rmse`), units SI."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the metrics depend on: data, backbone, options."""
    is_random: bool = False
    """True if a random-weight backbone took part: such metrics say nothing about quality."""
    versions: dict[str, str] = field(default_factory=lambda: collect_versions())
    """Versions of the packages that computed the metrics."""
    schema_version: int = SCHEMA_VERSION


def save_result(record: ResultRecord, path: Path) -> None:
    write_json(path, asdict(record))


def load_result(path: Path) -> ResultRecord:
    """Reads a record; ValueError if the file is not one, or one of a newer version."""
    content = read_json(path)
    if not isinstance(content, dict) or "kind" not in content or "metrics" not in content:
        raise ValueError(f"{path} is not a result file: it has no `kind` and `metrics`.")
    for name, kind in _KINDS.items():
        if not isinstance(content.get(name, kind()), kind):
            raise ValueError(f"{path} is damaged: `{name}` is {content[name]!r:.40}; restore it or measure again.")
    if content.get("schema_version", 1) > SCHEMA_VERSION:
        raise ValueError(f"{path} has schema {content['schema_version']}, above {SCHEMA_VERSION}; update fit3d-ns.")
    return ResultRecord(**{key: content[key] for key in ResultRecord.__dataclass_fields__ if key in content})


def check_report(report: dict[str, Any], path: Path) -> None:
    """Raises ValueError if a `report.json` of fit3d-finetune is about other weights than those next to it."""
    recorded = report.get("finetuned_weights_hash")
    weights, adapter = path.parent / "model.safetensors", path.parent / "adapter.safetensors"
    if recorded is None or not weights.is_file():
        return
    found = hash_file(weights)
    if adapter.is_file():
        # As the identity of a folder with an adapter is made: the backbone's weights are the original's.
        found = hash_bytes(found.encode(), hash_file(adapter).encode())
    if found != recorded:
        raise ValueError(f"{path} describes other weights than those next to it; run fit3d-finetune to its end again.")


def write_facts(picture: Path, kind: str, is_random: bool, **content: Any) -> dict[str, Any]:
    """Writes what a picture or video shows into a JSON file next to it, and returns that file's content."""
    content = {"kind": kind, **content, "is_random": is_random, "versions": collect_versions()}
    write_json(picture.with_suffix(".json"), content)
    return content


def average_scene_costs(scenes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Costs of scenes (`read_scene_costs`) by the names of the report's columns; what is not known of all is left out.

    Megabytes and hours are means, the number of features is that of all.
    """
    costs: dict[str, Any] = {}
    for name, known in (("scene_file_mb", "file_mb"), ("stage1_hours", "stage1_hours")):
        values = [value for scene in scenes if isinstance(value := scene.get(known), (int, float))]
        if values and len(values) == len(scenes):
            costs[name] = sum(values) / len(values)
    dims = {scene.get("feature_dim") for scene in scenes}
    return costs | {"feature_dim": dims.pop()} if len(dims) == 1 else costs


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the packages whose numerics matter; absent packages are left out."""
    versions = {"python": platform.python_version()}
    for package in ("fit3d-ns", "torch", "torchvision", "timm", "numba", "gsplat", "nerfstudio", "accelerate"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
