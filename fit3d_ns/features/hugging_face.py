"""Key names of vision transformers of Hugging Face's `transformers`, translated to those of their original files.

Known are ViT (also MAE, which shares its names), DINOv2 without and with registers, and DINOv3. Queries, keys and
values, which `transformers` keeps apart, become one matrix; where only some have a bias, that of the others is 0.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_PATCHES = ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.weight")
_UNUSED = re.compile(r"pooler\.|classifier\.|cls_classifier\.|distillation_classifier\.|decoder\.|rope_embeddings\.")
"""Parts that no token passes through, or that timm computes."""
_BLOCK = re.compile(r"(?:encoder\.|model\.)*layers?\.(\d+)\.(.+)")
_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "layernorm": "norm",
    "norm": "norm",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
}
_BLOCK_NAMES = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_GATED_NAMES = {"mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3"}
_ATTENTION = re.compile(r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)")


def find_prefix(state_dict: Mapping[str, Tensor]) -> str | None:
    """The prefix (`vit.`, `dinov2.`, none) of a vision transformer of `transformers`; None where there is none."""
    for key in state_dict:
        for patches in _PATCHES:
            if key.endswith(patches) and (key == patches or key.removesuffix(patches).endswith(".")):
                return key.removesuffix(patches)
    return None


def translate(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights under the original names; keys that are not known stay as they are, for the error that names them."""
    inner = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    # DINOv3 keeps positions in its rotations and calls its register tokens storage tokens.
    is_dinov3 = "embeddings.position_embeddings" not in inner
    is_gated = any(".mlp.gate_proj." in key for key in inner)
    block_names = {**_BLOCK_NAMES, **(_GATED_NAMES if is_gated else {})}
    translated: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for key, value in inner.items():
        if _UNUSED.match(key):
            continue
        name, suffix = _split(key)
        block = _BLOCK.fullmatch(name)
        if block is None:
            found = _NAMES.get(name)
            if found == "register_tokens" and is_dinov3:
                found = "storage_tokens"
            translated[key if found is None else found + suffix] = value
            continue
        number, inside = block.groups()
        part = _ATTENTION.fullmatch(inside)
        if part is not None:
            attention.setdefault(f"blocks.{number}.attn.qkv{suffix}", {})[part.group(1)[0]] = value
        else:
            found = block_names.get(inside)
            translated[key if found is None else f"blocks.{number}.{found}{suffix}"] = value
    for key, parts in attention.items():
        like = next(iter(parts.values()))
        translated[key] = torch.cat([parts.get(letter, torch.zeros_like(like)) for letter in "qkv"])
    if is_dinov3 and "mask_token" in translated:
        del translated["mask_token"]
    return translated


def _split(key: str) -> tuple[str, str]:
    """A key without and with only its `.weight` or `.bias`."""
    for suffix in (".weight", ".bias"):
        if key.endswith(suffix):
            return key.removesuffix(suffix), suffix
    return key, ""
