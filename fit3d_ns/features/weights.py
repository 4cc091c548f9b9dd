"""Reads the weights of a vision transformer from the files in which people publish them.

Understood: safetensors; timm checkpoints; FiT3D's `{"model": ...}` and bare state dicts; Splat-and-Distill's, which
keep DINOv2's own key names with LoRA merged; DINOv2's, DINOv3's and MAE's original files; those of `transformers` for
ViT, DINOv2 and DINOv3. All may be half precision, wrapped in `state_dict`, `model`, `teacher` and the like, or prefixed
by DDP, torch.compile or a surrounding module.
timm's own filters rename keys and resample position embeddings to the model's grid; here the result is compared with
the model key by key, so that nothing is left untrained in silence.

Key names of Hugging Face's `transformers` are translated to those of the original files. Known are ViT (also MAE,
which shares its names), DINOv2 without and with registers, and DINOv3. Queries, keys and values, which `transformers`
keeps apart, become one matrix; where only some have a bias, that of the others is 0.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fit3d_ns.utils.errors import first_line
from fit3d_ns.utils.files import refuse_lfs_pointer
from fit3d_ns.utils.package_files import read_table
from fit3d_ns.utils.tensor_files import load_torch_file, open_tensors

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "teacher")
"""Where checkpoints keep the weights, best first: averaged weights are what their authors evaluate."""
_UNREAD = ("head.", "head_dist.", "fc_norm.", "lm_head.", "mask_token", "decoder_", "projectors.", "pre_logits.")
"""Parts of published checkpoints that no token passes through: classifiers and what pretraining alone needs."""
_EMBEDDING = "patch_embed.proj.weight"
_MAX_NAMED = 3


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Loads a file into a timm `VisionTransformer` or `Eva`; every parameter of the model must be in it.

    ValueError where it cannot be read, or is of another architecture: the first keys that differ are named.
    """
    path = Path(path)
    state_dict = select_backbone(read_state_dict(path), path)
    kernel, expected = state_dict.get(_EMBEDDING), model.state_dict()[_EMBEDDING]
    # timm would resample the kernel to any size: a backbone of another patch size is another backbone.
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-2:] != expected.shape[-2:]:
        raise ValueError(_describe_mismatch(path, model, [_name_shapes(_EMBEDDING, kernel, expected)]))
    converted = _convert(state_dict, model)
    targets, mismatches = model.state_dict(), []
    for key in dict.fromkeys([*targets, *converted]):
        in_file, in_model = converted.get(key), targets.get(key)
        if in_file is None or in_model is None or in_file.shape != in_model.shape:
            mismatches.append(_name_shapes(key, in_file, in_model))
    if mismatches:
        raise ValueError(_describe_mismatch(path, model, mismatches))
    for key, tensor in converted.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"Weights file {path} holds NaN or infinite values in `{key}`; get the file again.")
    model.load_state_dict({key: converted[key].to(target.dtype) for key, target in targets.items()})


def read_state_dict(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without running code from it, and takes the weights out of its wrappers.

    ValueError where the file is damaged, holds code, or holds no weights.
    """
    refuse_lfs_pointer(path)
    content = inner = _read_file(path)
    while isinstance(inner, Mapping):
        content, found = inner, [inner.get(key) for key in _WRAPPERS]
        inner = next((value for value in found if isinstance(value, Mapping)), None)
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"Weights file {path} holds no tensors by name; give a state dict of a vision transformer.")
    state_dict = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for key, value in state_dict.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ValueError(f"Weights file {path} holds no plain numbers in `{key}`; save it as .safetensors.")
    return state_dict


def select_backbone(state_dict: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Drops the prefix (`module.`, `backbone.`, ...) under which a checkpoint keeps the vision transformer.

    ValueError where it holds two, or LoRA matrices that are not merged.
    """
    if any(".lora_A." in key or ".lora_B." in key for key in state_dict):
        raise ValueError(f"Weights file {path} has unmerged LoRA matrices; merge them (peft: merge_and_unload) first.")
    found = next(filter(None, map(_PATCHES.fullmatch, state_dict)), None)
    if found is not None:
        return _translate_transformers(state_dict, found.group(1))
    prefixes = [key.removesuffix(_EMBEDDING) for key in state_dict if f".{key}".endswith(f".{_EMBEDDING}")]
    if not prefixes or "" in prefixes:
        return state_dict
    if len(prefixes) > 1:
        problem = f"Weights file {path} holds several backbones ({', '.join(sorted(prefixes))})"
        raise ValueError(f"{problem}; save the one you mean alone.")
    [prefix] = prefixes
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            file = open_tensors(path)
            file.check(finite=False)
            return file.tensors
        # Training scripts put their command line next to the weights; a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return load_torch_file(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Weights file {path} is not a plain checkpoint (damaged, or with Python objects that loading would run); "
            "save its state dict as .safetensors."
        ) from error
    except Exception as error:
        # A flipped bit stops torch's reader with an exception of any type.
        raise ValueError(f"Weights file {path} cannot be read ({first_line(error)}); get the file again.") from error


def _convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    from timm.models import eva, vision_transformer

    state_dict = dict(state_dict)
    if "register_tokens" in state_dict and "mask_token" not in state_dict:
        # timm knows DINOv2's own naming by the mask token, which some drop from their files.
        state_dict["mask_token"] = torch.zeros(1)
    try:
        if isinstance(model, eva.Eva):
            converted = eva.checkpoint_filter_fn(state_dict, model)
        else:
            converted = vision_transformer.checkpoint_filter_fn(state_dict, model, adapt_layer_scale=True)
    except (RuntimeError, KeyError, ValueError, AttributeError):
        # The filter fails on weights of another architecture; the comparison below names what differs.
        converted = state_dict
    targets = model.state_dict()
    _refuse_lost_biases(state_dict, targets)
    return {key: tensor for key, tensor in converted.items() if key in targets or not key.startswith(_UNREAD)}


def _refuse_lost_biases(state_dict: dict[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """timm drops biases of the attention that its model has no place for; those of 0 may go."""
    for key, value in state_dict.items():
        place = key.removesuffix("qkv.bias")
        has_place = key in targets or f"{place}q_bias" in targets or f"{place}qkv.weight" not in targets
        if place != key and not has_place and bool(value.any()):
            raise ValueError(f"The weights have a bias `{key}` that the backbone lacks; give its variant `..._qkvb`.")


def _name_shapes(key: str, in_file: Tensor | None, in_model: Tensor | None) -> str:
    file_shape = f"{list(in_file.shape)} in the file" if in_file is not None else "missing in the file"
    model_shape = f"{list(in_model.shape)} in the model" if in_model is not None else "absent from the model"
    return f"`{key}` is {file_shape}, {model_shape}"


def _describe_mismatch(path: Path, model: Any, mismatches: list[str]) -> str:
    name = model.pretrained_cfg.get("architecture", type(model).__name__)
    named = "; ".join(mismatches[:_MAX_NAMED])
    more = f"; and {len(mismatches) - _MAX_NAMED} more" if len(mismatches) > _MAX_NAMED else ""
    return f"Weights file {path} does not fit backbone {name}: {named}{more}; give the backbone of these weights."


_PATCHES = re.compile(r"((?:.*\.)?)embeddings\.patch_embeddings\.(?:projection\.)?weight")
"""Every vision transformer of `transformers` has this key, behind a prefix (`vit.`, `dinov2.`) or none."""
_UNUSED = re.compile(r"pooler\.|classifier\.|cls_classifier\.|distillation_classifier\.|decoder\.|rope_embeddings\.")
"""Parts that no token passes through, or that timm computes."""
_KEY = re.compile(r"(?:(?:encoder\.|model\.)*layers?\.(\d+)\.)?(.+?)(\.weight|\.bias)?")
"""Number of a block, if it is in one; name in the block; suffix."""
_ATTENTION = re.compile(r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)")


def _translate_transformers(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights under the original names; keys that are not known stay as they are, for the error that names them."""
    inner = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    # DINOv3 keeps positions in its rotations and calls its register tokens storage tokens.
    is_dinov3 = "embeddings.position_embeddings" not in inner
    is_gated = any(".mlp.gate_proj." in key for key in inner)
    parts = ("around", "block", "gated block") if is_gated else ("around", "block")
    table = read_table(Path(__file__).with_name("transformers_keys.csv"))
    names = {row["transformers"]: row["original"] for row in table if row["part"] in parts}
    if is_dinov3:
        names["embeddings.register_tokens"] = "storage_tokens"
    translated: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for key, value in inner.items():
        if _UNUSED.match(key):
            continue
        number, inside, suffix = _KEY.fullmatch(key).groups("")  # type: ignore[union-attr]
        block = f"blocks.{number}." if number else ""
        if part := _ATTENTION.fullmatch(inside):
            attention.setdefault(f"{block}attn.qkv{suffix}", {})[part.group(1)[0]] = value
        else:
            translated[block + names[inside] + suffix if inside in names else key] = value
    for key, found in attention.items():
        like = next(iter(found.values()))
        translated[key] = torch.cat([found.get(letter, torch.zeros_like(like)) for letter in "qkv"])
    if is_dinov3:
        translated.pop("mask_token", None)
    return translated
