"""The result: a folder that timm loads, with a model card, and optionally the state dict as FiT3D publishes it.

    FOLDER / config.json          architecture, model_args, pretrained_cfg with the mean and deviation that were used
             model.safetensors    the weights, under timm's names
             adapter.safetensors  where an adapter was trained: what stands behind the (unchanged) backbone
             README.md            the model card
             fit3d.pth            `--format fit3d`: the plain state dict

`timm.create_model("local-dir:FOLDER", pretrained=True)` needs no other argument. Without `pretrained=True` timm builds
random weights and says nothing; `load_finetuned` always loads.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fit3d_ns.features import TokenModel, create_token_model
from fit3d_ns.features.adapters import ADAPTER_KEY, ADAPTER_NAME, AdaptedTokenModel
from fit3d_ns.features.sources import find_backbone_folder
from fit3d_ns.utils.files import read_json, write_atomically, write_json

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
FIT3D_NAME = "fit3d.pth"

_KEPT_CONFIG = ("input_size", "interpolation", "crop_pct", "crop_mode", "first_conv")
"""What stays of timm's description of the original checkpoint; where it was downloaded from does not."""


def save_finetuned(
    folder: Path, token_model: TokenModel, weights: dict[str, Tensor], card: str, *, add_fit3d: bool = False
) -> None:
    """Writes the folder; each file is whole or not there, the configuration last.

    Args:
        folder: Made if it is missing.
        token_model: The backbone, for its architecture and preprocessing.
        weights: timm's state dict.
        card: Text of the model card.
        add_fit3d: Also write the plain state dict.

    Raises:
        ValueError: The disk is full.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with write_atomically(folder / WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    if isinstance(token_model, AdaptedTokenModel):
        adapter = {name: value.detach().cpu().contiguous() for name, value in token_model.adapter.state_dict().items()}
        with write_atomically(folder / ADAPTER_NAME) as temporary:
            save_file(adapter, temporary)
    if add_fit3d:
        with write_atomically(folder / FIT3D_NAME) as temporary:
            torch.save(tensors, temporary)
    with write_atomically(folder / CARD_NAME) as temporary:
        temporary.write_text(card, encoding="utf-8")
    write_json(folder / CONFIG_NAME, describe_folder(token_model))


def describe_folder(token_model: TokenModel) -> dict[str, Any]:
    """The content of `config.json`."""
    description = token_model.description
    published = dict(token_model.model.pretrained_cfg)
    kept = {key: published[key] for key in _KEPT_CONFIG if published.get(key) is not None}
    licence = find_licence(token_model)
    if licence is not None:
        kept["license"] = licence
    adapter = {ADAPTER_KEY: token_model.config} if isinstance(token_model, AdaptedTokenModel) else {}
    return {
        **adapter,
        "architecture": description.architecture.split(".")[0],
        "num_classes": 0,
        "num_features": description.embed_dim,
        "model_args": {**dict(description.model_args), "num_classes": 0, "dynamic_img_size": True},
        "pretrained_cfg": {
            **kept,
            "mean": list(description.mean),
            "std": list(description.std),
            "num_classes": 0,
            "fixed_input_size": False,
            "tag": "fit3d",
            "custom_load": False,
        },
    }


def find_licence(token_model: TokenModel) -> str | None:
    """The licence of the weights a backbone was made with, or None where it is not known.

    timm knows its own downloads', and a fine-tuned folder names its original's; any other file may hold anything.
    """
    description = token_model.description
    folder = find_backbone_folder(description.backbone)
    if folder is not None and description.weights == folder / WEIGHTS_NAME:
        return read_json(folder / CONFIG_NAME).get("pretrained_cfg", {}).get("license")
    if description.weights is not None or description.is_random:
        return None
    return token_model.model.pretrained_cfg.get("license")


def load_finetuned(folder: Path | str) -> nn.Module:
    """The timm model of a fine-tuned folder, with its weights, in evaluation mode.

    Its `pretrained_cfg` names the mean and deviation to normalise images with.

    Raises:
        ValueError: The folder holds no fine-tuned backbone, or one with an adapter, which timm does not know.
    """
    token_model = create_token_model(f"local-dir:{folder}")
    if isinstance(token_model, AdaptedTokenModel):
        raise ValueError(
            f"{folder} holds a backbone with an adapter, which is no timm model; "
            "use fit3d_ns.features.create_extractor with this folder."
        )
    model = token_model.model
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "mean": token_model.description.mean,
        "std": token_model.description.std,
    }
    return model.eval()
