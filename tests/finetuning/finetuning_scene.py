"""Tiny lifted scenes with photographs on disk, and a vision transformer of width 16 that timm knows by name."""

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.models import generate_default_cfgs, register_model, vision_transformer
from timm.models._builder import build_model_with_cfg

from fit3d_ns.data.frames import CaptureFiles, Frame
from fit3d_ns.features import describe_backbone
from fit3d_ns.finetuning.scene_bank import SceneAverages
from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.scene import (
    FeatureDecoder,
    FeatureScene,
    Gaussians,
    create_posed_capture,
    save_scene,
)
from fit3d_ns.utils.tensor_files import TensorStore

__all__: list[str] = []

default_cfgs = generate_default_cfgs(
    {
        "finetuning_vit.test": {
            "hf_hub_id": "nobody/finetuning_vit",
            "num_classes": 5,
            "input_size": (3, 32, 32),
            "mean": (0.4, 0.5, 0.6),
            "std": (0.2, 0.25, 0.3),
            "classifier": "head",
            "first_conv": "patch_embed.proj",
            "license": "apache-2.0",
        }
    }
)


@register_model
def finetuning_vit(pretrained: bool = False, **kwargs: Any) -> Any:
    """Patch 8, width 16, two blocks, class token."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, **kwargs}
    filter_fn = vision_transformer.checkpoint_filter_fn
    return build_model_with_cfg(
        vision_transformer.VisionTransformer, "finetuning_vit", pretrained, pretrained_filter_fn=filter_fn, **arguments
    )


assert sys.modules[__name__].__all__, "timm adds registered models to `__all__`"

BACKBONE = "random:finetuning_vit"
WIDTH, HEIGHT, PATCH, EMBED, DIM = 40, 32, 8, 16, 4
DISTORTED = Lens(35.0, 36.0, 19.3, 16.8, WIDTH, HEIGHT, "opencv", (-0.08, 0.01, 0.001, -0.002))


def create_lens(width: int = WIDTH, height: int = HEIGHT) -> Lens:
    return Lens(fx=35.0, fy=36.0, cx=width / 2 - 0.7, cy=height / 2 + 0.8, width=width, height=height)


def create_scene(
    folder: Path,
    name: str = "room",
    *,
    num_frames: int = 6,
    lens: Lens | None = None,
    seed: int = 0,
    bias: bool = True,
    num_gaussians: int = 40,
    num_test: int = 1,
) -> FeatureScene:
    """A scene of random Gaussians; its photographs are noise, the first rows of them are masked."""
    root = folder / "data" / name
    (root / "images").mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    lens = lens or create_lens()
    frames = []
    for index in range(num_frames):
        pixels = torch.randint(0, 256, (lens.height, lens.width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / "images" / f"{index}.png")
        mask = torch.full((lens.height, lens.width), 255, dtype=torch.uint8)
        mask[: 3 + index] = 0
        Image.fromarray(mask.numpy()).save(root / "images" / f"mask_{index}.png")
        camera_to_world = torch.eye(4)[:3].clone()
        camera_to_world[:, 3] = torch.tensor([0.1 * index - 0.2, 0.05, 2.0])
        frames.append(
            Frame(
                image_path=root / "images" / f"{index}.png",
                lens=lens,
                camera_to_world=camera_to_world,
                split="test" if index >= num_frames - num_test else "train",
                mask_path=root / "images" / f"mask_{index}.png",
            )
        )

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gaussians = Gaussians.from_raw(
        means=draw(num_gaussians, 3) * 0.6,
        quats=draw(num_gaussians, 4),
        log_scales=draw(num_gaussians, 3) * 0.3 - 1.7,
        opacity_logits=draw(num_gaussians, 1) + 1.0,
        sh_dc=draw(num_gaussians, 3),
        features=draw(num_gaussians, DIM),
        blend_weight=torch.rand(num_gaussians, generator=generator) + 0.1,
        num_views=torch.full((num_gaussians,), num_frames),
        feature_variance=torch.rand(num_gaussians, generator=generator),
    )
    return FeatureScene(
        gaussians=gaussians,
        decoder=FeatureDecoder.from_weights(draw(EMBED, DIM, 3, 3) * 0.3, draw(EMBED) * 0.3 if bias else None),
        posed_capture=create_posed_capture(
            CaptureFiles(root, "nerfstudio", "made by a test", frames, None, True, name)
        ),
        backbone=describe_backbone(BACKBONE),
    )


def save_new_scene(folder: Path, name: str = "room", **settings: Any) -> Path:
    path = folder / "scenes" / f"{name}.safetensors"
    save_scene(create_scene(folder, name, **settings), path)
    return path


def average_lifted_views(scene: FeatureScene, data_root: Path | None = None) -> FeatureScene:
    """The scene as targets are rendered from it."""
    return SceneAverages([scene], TensorStore(0.0, None), data_root).apply(0, scene)
