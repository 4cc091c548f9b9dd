"""Photographs of random patches, a lifted scene that holds them, and backbones in folders, for figures."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from fit3d_ns.data.frames import CaptureFiles, Frame
from fit3d_ns.features import create_extractor, describe_backbone
from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.scene import (
    FeatureDecoder,
    FeatureScene,
    Gaussians,
    create_posed_capture,
    save_scene,
)

WIDTH, HEIGHT = 64, 48
BACKBONE = "random:test_vit"
"""timm's model of width 64, patch 16, untrained: a grid of 3 x 4 tokens."""


def write_photographs(folder: Path, count: int = 2, shift: int = 4) -> list[Path]:
    """Photographs of one texture that moves to the left."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, HEIGHT // 8, WIDTH // 8 + 8, generator=generator)
    texture = torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic")[0].clamp(0, 1)
    paths = []
    for index in range(count):
        pixels = (texture[:, :, index * shift : index * shift + WIDTH] * 255).to(torch.uint8).permute(1, 2, 0)
        paths.append(folder / f"{index:03d}.png")
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return paths


def write_finetuned(folder: Path, change: float = 0.02, architecture: str = "test_vit") -> Path:
    """A folder like fit3d-finetune's: the random weights, slightly changed."""
    model = create_extractor(f"random:{architecture}").model
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    weights = {
        name: (tensor + change * torch.randn(tensor.shape, generator=generator)).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "model_args": {"num_classes": 0, "dynamic_img_size": True},
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_scene(path: Path, photographs: list[Path], backbone: str = BACKBONE) -> Path:
    """Opaque Gaussians in front of the left half of every camera, with features of the backbone's width."""
    description = describe_backbone(backbone)
    lens = Lens(fx=50.0, fy=50.0, cx=WIDTH / 2, cy=HEIGHT / 2, width=WIDTH, height=HEIGHT)
    frames = [Frame(photograph, lens, torch.eye(4)[:3]) for photograph in photographs]
    root = photographs[0].parent
    generator = torch.Generator().manual_seed(1)
    count, dim = 40, 4
    means = torch.rand(count, 3, generator=generator) * torch.tensor([0.6, 1.0, 0.1])
    gaussians = Gaussians.from_raw(
        means=means + torch.tensor([-0.65, -0.5, -1.0]),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(count, 4),
        log_scales=torch.full((count, 3), -2.5),
        opacity_logits=torch.full((count, 1), 4.0),
        sh_dc=torch.zeros(count, 3),
        features=torch.randn(count, dim, generator=generator),
        blend_weight=torch.ones(count),
        num_views=torch.ones(count, dtype=torch.int32),
        feature_variance=torch.zeros(count),
    )
    torch.manual_seed(0)
    scene = FeatureScene(
        gaussians=gaussians,
        decoder=FeatureDecoder(dim, description.embed_dim),
        posed_capture=create_posed_capture(CaptureFiles(root, "nerfstudio", "made by a test", frames, None, True)),
        backbone=description,
    )
    save_scene(scene, path)
    return path
