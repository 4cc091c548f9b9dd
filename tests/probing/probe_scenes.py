"""Miniature captures of a slanted wall, and backbones in folders, for whole runs of the probes."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fit3d_ns.data.frames import PointCloud
from fit3d_ns.data.scannetpp import SceneFrame, write_scannetpp
from fit3d_ns.features import create_extractor
from fit3d_ns.geometry.cameras import Lens

WIDTH, HEIGHT = 48, 32
BACKBONE = "random:test_vit"
"""timm's model of six blocks and width 64, patch 16, untrained."""


def create_scene(folder: Path, seed: int, num_frames: int = 5) -> Path:
    """A wall two metres away, seen by a camera that moves sideways by a tenth of a metre per frame.

    The wall has a checkerboard texture of the scene's own colours; its left half is class 0, its right half class 1.
    """
    generator = torch.Generator().manual_seed(seed)
    texture = torch.randint(0, 256, (8, 16, 3), generator=generator, dtype=torch.uint8)
    focal, depth = 40.0, 2.0
    frames = []
    for index in range(num_frames):
        offset = 0.1 * index
        x = (torch.arange(WIDTH) + 0.5 - WIDTH / 2) / focal * depth + offset
        y = (torch.arange(HEIGHT) + 0.5 - HEIGHT / 2) / focal * depth
        columns, rows = ((x + 2.0) / 0.3).long().clamp(0, 15), ((y + 1.0) / 0.3).long().clamp(0, 7)
        pose = torch.eye(4)[:3].clone()
        pose[0, 3] = offset
        frames.append(
            SceneFrame(
                camera_to_world=pose,
                image=texture[rows[:, None], columns],
                depth=torch.full((HEIGHT, WIDTH), depth),
                labels=(x > 0.2).to(torch.uint8).expand(HEIGHT, WIDTH).contiguous(),
                is_test=index == num_frames - 1,
            )
        )
    lens = Lens(focal, focal, WIDTH / 2, HEIGHT / 2, WIDTH, HEIGHT)
    points = PointCloud(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.uint8))
    write_scannetpp(folder, lens, frames, points, ["left", "right"])
    return folder


def create_finetuned(folder: Path, architecture: str = "test_vit", change: float = 0.02) -> Path:
    """A folder like fit3d-finetune's, with the random weights of an architecture slightly changed."""
    model = create_extractor(f"random:{architecture}").model
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (tensor + change * torch.randn(tensor.shape, generator=generator)).contiguous()
        for name, tensor in model.state_dict().items()
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "model_args": {"num_classes": 0, "dynamic_img_size": True},
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    report = {
        "kind": "finetune",
        "steps": 12,
        "seconds": 7200.0,
        "scenes": ["scenes/a.safetensors"],
        "settings": {},
        "is_random": True,
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder
