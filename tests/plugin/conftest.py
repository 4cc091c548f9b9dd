"""A capture small enough to train in seconds: a ball of coloured Gaussians, photographed from a ring of cameras."""

import copy
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fit3d_ns.geometry.cameras import viewmats_from_camera_to_worlds
from fit3d_ns.rasterization import rasterization

WIDTH, HEIGHT, FOCAL = 64, 48, 60.0
NUM_FRAMES, NUM_TEST, NUM_POINTS = 8, 2, 60
BACKBONE = "random:vit_tiny_patch16_224"


@pytest.fixture(scope="session")
def mini_capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in nerfstudio's layout: 6 training and 2 test photographs of 64x48, and 60 seed points.

    In `depth` lie maps in millimetres of what is covered, which its transforms.json does not name.
    """
    root = tmp_path_factory.mktemp("captures") / "mini_scene"
    (root / "images").mkdir(parents=True)
    (root / "depth").mkdir()
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(NUM_POINTS, 3, generator=generator) * 0.5
    colors = torch.rand(NUM_POINTS, 3, generator=generator)
    quats = torch.randn(NUM_POINTS, 4, generator=generator)
    scales = 0.1 + 0.1 * torch.rand(NUM_POINTS, 3, generator=generator)
    K = torch.tensor([[FOCAL, 0, WIDTH / 2 + 1.5], [0, FOCAL, HEIGHT / 2 - 1.0], [0, 0, 1]])
    frames = []
    for index in range(NUM_FRAMES):
        pose = look_at_origin(2 * math.pi * index / NUM_FRAMES)
        image, alpha, _ = rasterization(
            means, quats, scales, torch.full((NUM_POINTS,), 0.9), colors,
            viewmats_from_camera_to_worlds(pose[None]), K[None], WIDTH, HEIGHT, render_mode="RGB+ED",
        )  # fmt: skip
        name = f"images/frame_{index:03d}.png"
        Image.fromarray((image[0, ..., :3].clamp(0, 1).numpy() * 255).astype(np.uint8)).save(root / name)
        depth = torch.where(alpha[0, ..., 0] > 0.9, 1000.0 * image[0, ..., 3], 0.0)
        Image.fromarray(depth.numpy().astype(np.uint16)).save(root / "depth" / f"frame_{index:03d}.png")
        matrix = torch.cat([pose, torch.tensor([[0.0, 0.0, 0.0, 1.0]])])
        frames.append({"file_path": name, "transform_matrix": matrix.tolist()})
    points = ["ply", "format ascii 1.0", f"element vertex {NUM_POINTS}"]
    points += [f"property float {axis}" for axis in "xyz"]
    points += [f"property uchar {color}" for color in ("red", "green", "blue")] + ["end_header"]
    for mean, color in zip(means, (colors * 255).byte(), strict=True):
        points.append(" ".join([*(f"{v:.6f}" for v in mean), *(str(int(v)) for v in color)]))
    (root / "points.ply").write_text("\n".join(points) + "\n")
    names = [frame["file_path"] for frame in frames]
    content = {
        "camera_model": "PINHOLE", "fl_x": FOCAL, "fl_y": FOCAL, "cx": float(K[0, 2]), "cy": float(K[1, 2]),
        "w": WIDTH, "h": HEIGHT, "frames": frames, "ply_file_path": "points.ply",
        "train_filenames": names[NUM_TEST:], "test_filenames": names[:NUM_TEST],
    }  # fmt: skip
    (root / "transforms.json").write_text(json.dumps(content))
    return root


def look_at_origin(angle: float, distance: float = 3.0) -> torch.Tensor:
    """OpenGL pose [3, 4] on a ring around the z axis, looking at the origin."""
    position = torch.tensor([distance * math.cos(angle), distance * math.sin(angle), 0.6])
    back = position / position.norm()
    right = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]), back)
    right = right / right.norm()
    up = torch.linalg.cross(back, right)
    return torch.stack([right, up, back, position], dim=1)


@pytest.fixture
def make_config(mini_capture: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes resolved trainer configs on the mini capture; keyword arguments go to the model's options."""

    def make(name: str = "run", steps: int = 30, paper: bool = False, **model: Any) -> Any:
        from fit3d_ns.plugin.method import fit3d_features, fit3d_features_paper

        config = copy.deepcopy((fit3d_features_paper if paper else fit3d_features).config)
        config.output_dir, config.timestamp, config.experiment_name = tmp_path / "outputs", name, "mini"
        config.max_num_iterations, config.vis = steps, "tensorboard"
        config.machine.device_type = "cpu"
        config.logging.local_writer.enable = False
        config.pipeline.datamanager.data = mini_capture
        config.pipeline.datamanager.backbone = BACKBONE
        config.pipeline.datamanager.feature_cache = tmp_path_factory.getbasetemp() / "feature-cache"
        config.pipeline.model.feature_dim = 8
        for key, value in model.items():
            setattr(config.pipeline.model, key, value)
        return config

    return make


@pytest.fixture
def train() -> Callable[..., Any]:
    """Runs a config as `ns-train` does, from seeding to the final figures."""

    def run(config: Any, stop_after: int | None = None) -> Any:
        from nerfstudio.scripts.train import _set_random_seed

        config.set_timestamp()
        config.save_config()
        _set_random_seed(config.machine.seed)
        trainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        if stop_after is not None:
            solve = trainer.pipeline.solve_features_if_due

            def solve_then_interrupt(step: int, total: int) -> None:
                solve(step, total)
                if step + 1 == stop_after:
                    signal.raise_signal(signal.SIGINT)

            trainer.pipeline.solve_features_if_due = solve_then_interrupt
        trainer.train()
        return trainer

    return run
