"""Vision transformers of width 16 that stand for the families people use: registered with timm, never downloaded."""

import sys
from typing import Any

import pytest
from timm.models import eva, generate_default_cfgs, register_model, vision_transformer
from timm.models._builder import build_model_with_cfg

__all__: list[str] = []

default_cfgs = generate_default_cfgs(
    {
        f"{name}.test": {
            "hf_hub_id": f"nobody/{name}",
            "num_classes": 5,
            "input_size": (3, size, size),
            "mean": (0.4, 0.5, 0.6),
            "std": (0.2, 0.25, 0.3),
            "classifier": "head",
            "first_conv": "patch_embed.proj",
        }
        for name, size in (("tiny_plain16", 64), ("tiny_dinov2", 70), ("tiny_dinov2_reg", 70), ("tiny_dinov3", 32))
    }
)
default_cfgs["tiny_unpublished"] = generate_default_cfgs({"tiny_unpublished.test": {"num_classes": 5}})[
    "tiny_unpublished"
]


def _create(model: type, filter_fn: Any, variant: str, pretrained: bool, **kwargs: Any) -> Any:
    return build_model_with_cfg(model, variant, pretrained, pretrained_filter_fn=filter_fn, **kwargs)


@register_model
def tiny_plain16(pretrained: bool = False, **kwargs: Any) -> Any:
    """The original ViT: patch 16, class token, position embedding."""
    arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, **kwargs}
    vit = vision_transformer
    return _create(vit.VisionTransformer, vit.checkpoint_filter_fn, "tiny_plain16", pretrained, **arguments)


@register_model
def tiny_unpublished(pretrained: bool = False, **kwargs: Any) -> Any:
    """An architecture without published weights."""
    arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, **kwargs}
    vit = vision_transformer
    return _create(vit.VisionTransformer, vit.checkpoint_filter_fn, "tiny_unpublished", pretrained, **arguments)


@register_model
def tiny_dinov2(pretrained: bool = False, **kwargs: Any) -> Any:
    """DINOv2: patch 14, LayerScale."""
    arguments = {"img_size": 70, "patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.5}
    vit = vision_transformer
    return _create(
        vit.VisionTransformer, vit.checkpoint_filter_fn, "tiny_dinov2", pretrained, **{**arguments, **kwargs}
    )


@register_model
def tiny_dinov2_reg(pretrained: bool = False, **kwargs: Any) -> Any:
    """DINOv2 with registers: four of them, no position embedding for prefix tokens."""
    arguments = {"img_size": 70, "patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.5}
    arguments |= {"reg_tokens": 4, "no_embed_class": True}
    vit = vision_transformer
    return _create(
        vit.VisionTransformer, vit.checkpoint_filter_fn, "tiny_dinov2_reg", pretrained, **{**arguments, **kwargs}
    )


@register_model
def tiny_dinov3(pretrained: bool = False, **kwargs: Any) -> Any:
    """DINOv3: timm's Eva with rotary embeddings, patch 8 here, four registers."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.5}
    arguments |= {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "num_reg_tokens": 4}
    arguments |= {"qkv_bias": False, "use_fc_norm": False}
    return _create(eva.Eva, eva.checkpoint_filter_fn, "tiny_dinov3", pretrained, **{**arguments, **kwargs})


assert sys.modules[__name__].__all__, "timm adds registered models to `__all__`"

TINY_BACKBONES = ["tiny_plain16", "tiny_dinov2", "tiny_dinov2_reg", "tiny_dinov3"]


@pytest.fixture(params=TINY_BACKBONES)
def tiny_backbone(request: pytest.FixtureRequest) -> str:
    """Each family in turn, with random weights."""
    return f"random:{request.param}"
