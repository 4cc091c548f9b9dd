"""A capture small enough to lift in a second: coloured Gaussians, photographed by our rasterizer from a ring."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fit3d_ns.geometry.cameras import create_K, viewmats_from_camera_to_worlds
from fit3d_ns.rasterization import rasterization
from fit3d_ns.scene import Gaussians
from fit3d_ns.scene.ply import write_ply

WIDTH, HEIGHT, FOCAL, NUM_GAUSSIANS = 64, 48, 40.0, 40
BACKBONE = "toy_rooms_vit"
COLMAP_TO_WORLD = [[0.0, 1.0, 0.0, 0.3], [1.0, 0.0, 0.0, -0.2], [0.0, 0.0, -1.0, 0.5]]


def write_capture(root: Path, num_frames: int = 12, seed: int = 5) -> dict[str, torch.Tensor]:
    """Writes photographs and a transforms.json; returns the Gaussians, raw, in the dataset's world."""
    generator = torch.Generator().manual_seed(seed)
    (root / "images").mkdir(parents=True)
    # A shell around the cameras: every picture is full, as indoors.
    directions = torch.nn.functional.normalize(torch.randn(NUM_GAUSSIANS, 3, generator=generator), dim=1)
    raw = {
        "means": 3.0 * directions,
        "quats": torch.randn(NUM_GAUSSIANS, 4, generator=generator),
        "log_scales": torch.log(0.5 + 0.3 * torch.rand(NUM_GAUSSIANS, 3, generator=generator)),
        "opacity_logits": torch.full((NUM_GAUSSIANS,), 3.0),
        "sh_dc": 1.6 * (2 * torch.rand(NUM_GAUSSIANS, 3, generator=generator) - 1),
    }
    frames = []
    for index in range(num_frames):
        pose = create_pose(2 * math.pi * index / num_frames)
        image = render(raw, pose)
        name = f"images/{index:03d}.png"
        Image.fromarray((image * 255).round().byte().numpy()).save(root / name)
        frames.append({"file_path": name, "transform_matrix": [*pose.tolist(), [0.0, 0.0, 0.0, 1.0]]})
    names = [frame["file_path"] for frame in frames]
    # Two test views, each between two train views.
    test = [names[3], names[9]]
    content = {
        "camera_model": "PINHOLE", "fl_x": FOCAL, "fl_y": FOCAL, "cx": 33.5, "cy": 23.0, "w": WIDTH, "h": HEIGHT,
        "frames": frames, "applied_transform": COLMAP_TO_WORLD,
        "train_filenames": [name for name in names if name not in test], "test_filenames": test,
    }  # fmt: skip
    (root / "transforms.json").write_text(json.dumps(content))
    return raw


def render(raw: dict[str, torch.Tensor], pose: torch.Tensor) -> torch.Tensor:
    rendered, _, _ = rasterization(
        raw["means"], raw["quats"], raw["log_scales"].exp(), raw["opacity_logits"].sigmoid(), raw["sh_dc"][:, None],
        viewmats_from_camera_to_worlds(pose[None]), create_K(FOCAL, FOCAL, 33.5, 23.0)[None], WIDTH, HEIGHT,
        sh_degree=0,
    )  # fmt: skip
    return rendered[0].clamp(0, 1)


def create_pose(angle: float) -> torch.Tensor:
    """OpenGL pose [3, 4] near the origin, turned about the vertical z axis, looking outwards."""
    forward = torch.tensor([math.cos(angle), math.sin(angle), 0.0])
    up = torch.tensor([0.0, 0.0, 1.0])
    right = torch.linalg.cross(forward, up)
    return torch.stack([right, up, -forward, 0.3 * forward], dim=1)


def write_gaussians(path: Path, raw: dict[str, torch.Tensor]) -> Path:
    write_ply(Gaussians.from_raw(**raw), path)
    return path


def move_gaussians(raw: dict[str, torch.Tensor], rotation: np.ndarray, translation: np.ndarray, scale: float):
    """The same Gaussians after x -> (rotation x + translation) * scale; quaternions by scipy."""
    from scipy.spatial.transform import Rotation

    quats = raw["quats"].double().numpy()
    turned = Rotation.from_matrix(rotation) * Rotation.from_quat(quats[:, [1, 2, 3, 0]])
    means = (raw["means"].double().numpy() @ rotation.T + translation) * scale
    return {
        **raw,
        "means": torch.from_numpy(means).float(),
        "quats": torch.from_numpy(turned.as_quat()[:, [3, 0, 1, 2]]).float(),
        "log_scales": raw["log_scales"] + math.log(scale),
    }
