"""`fit3d-info`: what this machine offers and what is missing, for bug reports; whether files are whole (`--verify`)."""

import ctypes
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fit3d_ns.cli.command import create_main
from fit3d_ns.rasterization import available_backends
from fit3d_ns.rasterization.kernels import find_kernels
from fit3d_ns.scene import load_scene
from fit3d_ns.scene.scene_file import HEADER_KEY
from fit3d_ns.utils.files import read_json, write_json
from fit3d_ns.utils.package_files import read_table
from fit3d_ns.utils.progress import track
from fit3d_ns.utils.results import collect_versions
from fit3d_ns.utils.tensor_files import open_tensors

_VERIFIED_SUFFIXES = ".safetensors .lift-state .token-sums .decoder-sums .shared-basis .shared-decoder .json".split()
_WHOLE = "whole"


@dataclass(frozen=True)
class InfoConfig:
    """What is asked, and where the answer goes."""

    verify: tuple[Path, ...] = ()
    """Only read these files whole, and all scene, weight, target and JSON files below these folders, and say
    which are damaged; the exit status is 1 if any is."""
    json: bool = False
    """Print JSON, for programs, instead of a table."""
    output_path: Path | None = None
    """Also write everything as JSON to this file."""


def collect_info() -> dict[str, Any]:
    """Versions, devices, backends, plugin registration, weight folders and missing system parts."""
    folders = {
        "timm's downloads": Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub",
        "torchvision's downloads (LPIPS)": Path(torch.hub.get_dir()) / "checkpoints",
    }
    absent = [part for part in read_table(Path(__file__).with_name("system_parts.csv")) if not _is_there(**part)]
    return {
        "versions": collect_versions(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "rasterization_backends": available_backends(),
        "cuda_kernels": find_kernels().describe(),
        "methods_registered": _list_registered("nerfstudio.method_configs"),
        "dataparsers_registered": _list_registered("nerfstudio.dataparser_configs"),
        "listed_by_ns_train": _is_listed(),
        "weights": {name: f"{at} ({'exists' if at.is_dir() else 'empty'})" for name, at in folders.items()},
        "missing": [f"{part['name']}: needed by {part['user']}; {part['source']}" for part in absent],
    }


def info(config: InfoConfig) -> None:
    """Prints a table, and writes the JSON if asked to.

    ValueError where, of the files to verify, one is damaged or missing.
    """
    content = verify_files(config.verify) if config.verify else collect_info()
    if config.json:
        print(json.dumps(content, indent=2))
    else:
        _print_table(content)
    if config.output_path is not None:
        write_json(config.output_path, content)
        if not config.json:
            print(f"Written to {config.output_path}")
    damaged = [path for path, found in content.items() if config.verify and not found.startswith(_WHOLE)]
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(content)} files are not whole: {', '.join(damaged)}.")


def verify_files(paths: Sequence[Path]) -> dict[str, str]:
    """Reads files, and all of the known kinds below folders, whole and compares them with the checksums they carry.

    For each path: "whole" and what that means, or what is wrong.
    """
    files: list[Path] = []
    for root in paths:
        below = (path for path in root.rglob("*") if path.suffix in _VERIFIED_SUFFIXES and path.is_file())
        files += sorted(below) if root.is_dir() else [root]
    if not files:
        raise ValueError(f"Below {', '.join(map(str, paths))} lie no {', '.join(_VERIFIED_SUFFIXES)} files to verify.")
    return {str(path): _verify(path) for path in track(files, "Verifying files")}


def _verify(path: Path) -> str:
    try:
        if path.suffix == ".json":
            read_json(path)
            return f"{_WHOLE}: JSON"
        if path.suffix not in _VERIFIED_SUFFIXES:
            return f"nothing is known of {path.suffix or 'such'} files, only of {', '.join(_VERIFIED_SUFFIXES)}"
        file = open_tensors(path)
        file.check()
        if HEADER_KEY in file.metadata:
            load_scene(path)
    except ValueError as error:
        return str(error)
    kind = "scene, " if HEADER_KEY in file.metadata else ""
    has = "all checksums right" if file.checksums is not None else "all finite, but it carries no checksums"
    return f"{_WHOLE}: {kind}{len(file.tensors)} tensors, {has}"


def _print_table(content: dict[str, Any]) -> None:
    table = Table(Column(overflow="fold"), Column(overflow="fold"), title="fit3d-info", show_header=False)
    for name, value in content.items():
        # Without this, rich reads the `[demo]` of `pip install '.[demo]'` as markup.
        table.add_row(escape(name if os.sep in name else name.replace("_", " ")), escape(_spell(value)))
    Console(soft_wrap=True).print(table)


def _spell(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name}: {_spell(item)}" for name, item in value.items()]
    return "\n".join(map(_spell, value)) or "none" if isinstance(value, list) else str(value)


def _list_registered(group: str) -> list[str]:
    return sorted(point.name for point in metadata.entry_points(group=group) if point.value.startswith("fit3d_ns."))


def _is_listed() -> bool | str:
    """Whether `ns-train` would show our methods, or why not."""
    if importlib.util.find_spec("nerfstudio") is None:
        return "nerfstudio is not installed"
    try:
        from fit3d_ns.plugin.method import is_listed_by_ns_train

        return is_listed_by_ns_train()
    except Exception as error:
        # Whatever breaks the plugin is what the reader wants to see here.
        return f"{type(error).__name__}: {error}"


def _is_there(kind: str, name: str, **_: str) -> bool:
    if kind == "program":
        return shutil.which(name) is not None
    if kind == "module":
        return importlib.util.find_spec(name) is not None
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


main = create_main("fit3d-info", InfoConfig, info)
