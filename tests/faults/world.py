"""A small world for the fault campaigns: captures, splats, scenes and a run; and the commands that write in it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation

from fit3d_ns.features import create_token_model
from fit3d_ns.synthetic.synthesize import SynthesisConfig, synthesize_scenes
from tests.faults.harness import call_main, call_ns_train
from tests.finetuning.finetuning_scene import BACKBONE, save_new_scene
from tests.lift_capture import write_capture, write_gaussians
from tests.report.report_records import write_probe

__all__ = ["CANARY", "COMMANDS", "RUN", "Command", "build", "build_foreign", "collect_results", "find_differences"]

CANARY = "code-ran"
"""A file that strangers' code would make."""

TRAIN = [
    "fit3d-features", "--data", "captures/a", "--output-dir", "outputs", "--experiment-name", "a",
    "--timestamp", "latest", "--vis", "tensorboard", "--max-num-iterations", "8", "--steps-per-save", "4",
    "--pipeline.datamanager.backbone", BACKBONE, "--pipeline.model.feature-dim", "4",
    "--pipeline.datamanager.feature-cache", "cache", "--machine.device-type", "cpu",
]  # fmt: skip
RUN = "outputs/a/fit3d-features/latest"


@dataclass(frozen=True)
class Command:
    """A command that writes, and what it needs."""

    name: str
    """For messages."""
    function: Callable[..., None]
    """Called in a child."""
    arguments: list[Any]
    """Its arguments."""
    results: str
    """Folder of what it makes, below the work folder."""
    again: list[Any] | None = None
    """Arguments that go on after an interruption, where they are others."""
    needs: tuple[str, ...] = field(default=())
    """Commands whose results have to be there."""


def _lift(*arguments: str) -> list[Any]:
    common = [
        "--feature-dim",
        "4",
        "--max-passes",
        "3",
        "--feature-cache",
        "cache",
        "--seconds-per-checkpoint",
        "0",
        "--device",
        "cpu",
    ]
    return ["fit3d_ns.cli.lift", [*arguments, "--backbone", BACKBONE, *common]]


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "ns-train", call_ns_train, [TRAIN], "outputs", again=[[*TRAIN, "--load-dir", f"{RUN}/nerfstudio_models"]]
        ),
        Command(
            "fit3d-export",
            call_main,
            ["fit3d_ns.cli.export", ["--load-config", f"{RUN}/config.yml", "--output-path", "exported/a.safetensors"]],
            "exported",
            needs=("ns-train",),
        ),
        Command(
            "fit3d-lift",
            call_main,
            _lift("--ply", "captures/a.ply", "--data", "captures/a", "--output-path", "lifted/a.safetensors"),
            "lifted",
        ),
        Command(
            "fit3d-lift of two",
            call_main,
            _lift("--scene", "scenes/lift_a.safetensors", "scenes/lift_b.safetensors", "--output-path", "many"),
            "many",
        ),
        Command(
            "fit3d-lift --shared-decoder",
            call_main,
            _lift(
                "--scene",
                "scenes/lift_a.safetensors",
                "scenes/lift_b.safetensors",
                "--output-path",
                "shared",
                "--shared-decoder",
            ),  # fmt: skip
            "shared",
        ),
        Command(
            "fit3d-finetune",
            call_main,
            [
                "fit3d_ns.cli.finetune",
                [
                    "--ckpts",
                    "scenes/room.safetensors",
                    "--output-dir",
                    "vit",
                    "--max-steps",
                    "4",
                    "--steps-per-checkpoint",
                    "2",
                    "--max-validation-views",
                    "2",
                    "--device",
                    "cpu",
                    "--seed",
                    "1",
                ],
            ],  # fmt: skip
            "vit",
        ),
        Command(
            "fit3d-probe",
            call_main,
            [
                "fit3d_ns.cli.probe",
                [
                    "consistency",
                    "--test",
                    "scenes/room.safetensors",
                    "--backbone",
                    BACKBONE,
                    "--device",
                    "cpu",
                    "--output-path",
                    "probed/consistency.json",
                    "--seeds",
                    "0",
                    "1",
                ],
            ],  # fmt: skip
            "probed",
        ),
        Command(
            "fit3d-report",
            call_main,
            ["fit3d_ns.cli.report", ["records", "--output-dir", "report"]],
            "report",
        ),
        Command(
            "fit3d-synthesize",
            call_main,
            [
                "fit3d_ns.cli.synthesize",
                ["--output-dir", "rooms", "--num-scenes", "1", "--num-frames", "3", "--width", "32", "--height", "24"],
            ],
            "rooms",
        ),
    )
}


def build(folder: Path) -> None:
    """Everything that commands read. Runs in a child: it computes."""
    folder = Path(folder)
    raw = write_capture(folder / "captures" / "a", num_frames=12)
    write_gaussians(folder / "captures" / "a.ply", raw)
    save_new_scene(folder, "room", num_frames=4)
    (folder / "records").mkdir()
    write_probe(folder / "records" / "probe.json", {0: {"miou": 0.5}})
    write_colmap(folder / "captures" / "a", folder / "captures" / "colmap")
    for name, seed in (("b", 6),):
        write_gaussians(folder / "captures" / f"{name}.ply", write_capture(folder / "captures" / name, 12, seed))
    for name in ("a", "b"):
        module, arguments = _lift(
            "--ply", f"captures/{name}.ply", "--data", f"captures/{name}",
            "--output-path", f"scenes/lift_{name}.safetensors",
        )  # fmt: skip
        call_main(module, arguments)


def build_foreign(folder: Path) -> None:
    """What others write: a room with sensor depth, masks and labels, meshes, pickled weights."""
    import trimesh

    folder = Path(folder)
    synthesize_scenes(SynthesisConfig(folder / "rooms", num_scenes=1, num_frames=6, width=64, height=48))
    for suffix in ("obj", "glb", "ply"):
        trimesh.creation.box((4, 4, 3)).export(folder / f"mesh.{suffix}")
    torch.save(create_token_model(BACKBONE).model.state_dict(), folder / "weights.pth")


def write_colmap(capture: Path, folder: Path) -> None:
    """The same capture as a binary COLMAP model; poses by the conventions that `transforms.json` states."""
    import pycolmap

    shutil.copytree(capture / "images", folder / "images")
    text, binary = folder / "text", folder / "sparse" / "0"
    text.mkdir(parents=True)
    binary.mkdir(parents=True)
    content = json.loads((capture / "transforms.json").read_text())
    size = [content[key] for key in ("w", "h", "fl_x", "fl_y", "cx", "cy")]
    (text / "cameras.txt").write_text("1 PINHOLE " + " ".join(map(str, size)) + "\n")
    lines = []
    to_dataset = np.vstack([content["applied_transform"], [0, 0, 0, 1]])
    for number, frame in enumerate(content["frames"], start=1):
        # OpenGL camera-to-world in the dataset's world -> OpenCV world-to-camera in COLMAP's.
        pose = np.linalg.inv(to_dataset) @ np.array(frame["transform_matrix"]) @ np.diag([1.0, -1.0, -1.0, 1.0])
        viewmat = np.linalg.inv(pose)
        x, y, z, w = Rotation.from_matrix(viewmat[:3, :3]).as_quat()
        numbers = [w, x, y, z, *viewmat[:3, 3]]
        lines += [f"{number} {' '.join(map(str, numbers))} 1 {Path(frame['file_path']).name}", "10 10 1"]
    (text / "images.txt").write_text("\n".join(lines) + "\n")
    (text / "points3D.txt").write_text("1 1 2 3 9 8 7 0.5 1 0 2 0\n")
    pycolmap.Reconstruction(str(text)).write_binary(str(binary))
    shutil.rmtree(text)


def collect_results(folder: Path) -> dict[str, Any]:
    """What a command made: tensors to the bit, and the names of all files; times of day and durations are left out."""
    results: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or "tensorboard" in name or "events.out.tfevents" in name:
            continue
        results[name] = None
        if path.suffix == ".safetensors":
            results[name] = {key: _bits(value) for key, value in load_file(path).items()}
        if path.suffix == ".ckpt":
            state = torch.load(path, weights_only=True)["pipeline"]
            results[name] = {key: _bits(value) for key, value in state.items()}
        if path.suffix == ".json":
            results[name] = _without_times(json.loads(path.read_text()))
    return results


def find_differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what one of two results has differently, or not at all."""
    return sorted(key for key in {*expected, *found} if expected.get(key, ...) != found.get(key, ...))


def _bits(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _without_times(value: Any) -> Any:
    """Numbers that say how the metrics came out; what depends on clock, machine or folder is dropped."""
    clocks = (
        "seconds",
        "memory",
        "megabytes",
        "lift_hash",
        "per_second",
        "num_scene_loads",
        "num_targets_rendered",
        "num_scenes_averaged",
        "resumed",
    )
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if not any(word in key for word in clocks)}
    return [_without_times(item) for item in value] if isinstance(value, list) else value
