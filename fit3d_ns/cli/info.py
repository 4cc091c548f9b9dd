"""`fit3d-info`: what this machine offers and what is missing; the first thing a bug report needs."""

import ctypes
import importlib.util
import json
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fit3d_ns.cli.command import run_command
from fit3d_ns.rasterization import available_backends
from fit3d_ns.utils.files import write_json
from fit3d_ns.utils.results import collect_versions

_PROGRAMS = (
    ("ffmpeg", "ns-render", "Debian package ffmpeg"),
    ("colmap", "ns-process-data", "Debian package colmap"),
    ("c++", "compiling gsplat's CUDA kernels", "Debian package g++"),
    ("nvcc", "compiling gsplat's CUDA kernels", "the CUDA toolkit"),
)
"""Name, what needs it, and where it comes from; likewise below."""
_MODULES = (
    ("peft", "fit3d-finetune --train lora", "pip install '.[lora]'"),
    ("gradio", "fit3d-demo", "pip install '.[demo]'"),
    ("h5py", "the labelled NYUv2 file", "pip install '.[nyu]'"),
)
_LIBRARIES = (
    ("libGL.so.1", "opencv-python, if that replaced the headless build", "Debian package libgl1"),
    ("libusb-1.0.so.0", "open3d (ns-export, nerfstudio-data with a ply)", "Debian package libusb-1.0-0"),
)


@dataclass(frozen=True)
class InfoConfig:
    """Where the answer goes."""

    output_path: Path | None = None
    """Also write everything as JSON to this file."""


def collect_info() -> dict[str, Any]:
    """Versions, devices, backends, plugin registration, weight folders and missing system parts."""
    return {
        "versions": collect_versions(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "rasterization_backends": available_backends(),
        "methods_registered": _list_registered("nerfstudio.method_configs"),
        "dataparsers_registered": _list_registered("nerfstudio.dataparser_configs"),
        "listed_by_ns_train": _is_listed(),
        "weights": _describe_weight_folders(),
        "missing": _find_missing(),
    }


def info(config: InfoConfig) -> None:
    """Prints a table, and writes the JSON if asked to."""
    content = collect_info()
    table = Table(title="fit3d-info", show_header=False)
    for name, value in content.items():
        text = value if isinstance(value, str) else json.dumps(value, indent=1)
        # Without this, rich reads the `[demo]` of `pip install '.[demo]'` as markup.
        table.add_row(name.replace("_", " "), escape(text))
    Console(soft_wrap=True).print(table)
    if config.output_path is not None:
        write_json(config.output_path, content)
        print(f"Written to {config.output_path}")


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


def _describe_weight_folders() -> dict[str, str]:
    folders = {
        "timm's downloads": Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "hub",
        "torchvision's downloads (LPIPS)": Path(torch.hub.get_dir()) / "checkpoints",
    }
    return {name: f"{folder} ({'exists' if folder.is_dir() else 'empty'})" for name, folder in folders.items()}


def _find_missing() -> list[str]:
    """What is absent, what needs it, and where it comes from."""
    absent = [part for part in _PROGRAMS if shutil.which(part[0]) is None]
    absent += [part for part in _MODULES if importlib.util.find_spec(part[0]) is None]
    for library in _LIBRARIES:
        try:
            ctypes.CDLL(library[0])
        except OSError:
            absent.append(library)
    return [f"{name}: needed by {user}; {source}" for name, user, source in absent]


def main() -> None:
    """Entry point."""
    run_command(InfoConfig, info, prog="fit3d-info", description="Prints what this machine offers and what is missing.")


if __name__ == "__main__":
    main()
