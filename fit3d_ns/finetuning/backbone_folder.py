"""The result: a folder that timm loads, with a model card, and optionally the state dict as FiT3D publishes it.

    FOLDER / config.json          architecture, model_args, pretrained_cfg with the mean and deviation that were used
             model.safetensors    the weights, under timm's names
             adapter.safetensors  where an adapter was trained: what stands behind the (unchanged) backbone
             README.md            the model card
             fit3d.pth            `--format fit3d`: the plain state dict

`timm.create_model("local-dir:FOLDER", pretrained=True)` needs no other argument (`num_classes=10` adds a classifier),
and `transformers.AutoModel.from_pretrained("FOLDER")` gives the same tokens. Without `pretrained=True` timm builds
random weights and says nothing; `load_finetuned` always loads.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fit3d_ns.features import BackboneDescription, TokenModel, create_token_model
from fit3d_ns.features.adapters import ADAPTER_KEY, ADAPTER_NAME, AdaptedTokenModel
from fit3d_ns.features.sources import TOY_BACKBONE, TOY_FOLDER, WEIGHTS_NAME, expand_architecture, find_backbone_folder
from fit3d_ns.utils.files import read_json, remove, write_atomically, write_json
from fit3d_ns.utils.package_files import fill_template
from fit3d_ns.utils.results import flatten
from fit3d_ns.utils.tensor_files import save_tensors

CONFIG_NAME = "config.json"

_KEPT_CONFIG = ("input_size", "interpolation", "crop_pct", "crop_mode", "first_conv", "classifier", "license")
"""What stays of timm's description of the original checkpoint; where it was downloaded from does not."""
UNKNOWN = "unknown"
"""The hub's name for a licence that nobody has stated."""
_LICENCES: dict[str, str] = {
    **dict.fromkeys("cc0-1.0 mit apache-2.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0".split(), ""),
    "dinov3-license": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
    "scannetpp-terms-of-use": "https://kaldir.vc.in.tum.de/scannetpp/static/scannetpp-terms-of-use.pdf",
}
"""From free to strict; those that the hub has no name for have an address. Others are stricter, an unknown one most."""


def save_finetuned(
    folder: Path, token_model: TokenModel, weights: dict[str, Tensor], card: str, licence: str, add_fit3d: bool = False
) -> None:
    """Writes the folder; each file is whole or not there, the configuration last.

    `weights` is timm's state dict, and `licence` theirs; architecture, preprocessing and adapter are those of
    `token_model`. ValueError where the disk is full.
    """
    for leftover in (ADAPTER_NAME, "fit3d.pth"):  # Of an earlier run in this folder.
        remove(folder / leftover)
    save_tensors(folder / WEIGHTS_NAME, weights, {"format": "pt"})
    if isinstance(token_model, AdaptedTokenModel):
        save_tensors(folder / ADAPTER_NAME, token_model.adapter.state_dict())
    if add_fit3d:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        with write_atomically(folder / "fit3d.pth") as temporary:
            torch.save(tensors, temporary)
    with write_atomically(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    write_json(folder / CONFIG_NAME, _describe_folder(token_model, licence))


def find_licence(token_model: TokenModel) -> str | None:
    """The licence of the weights a backbone was made with, or None where it is not known.

    timm knows its own downloads', and a fine-tuned folder names its original's; any other file may hold anything.
    """
    description = token_model.description
    folder = TOY_FOLDER if description.backbone == TOY_BACKBONE else find_backbone_folder(description.backbone)
    if folder is not None and description.weights == folder / WEIGHTS_NAME:
        return read_json(folder / CONFIG_NAME).get("pretrained_cfg", {}).get("license")
    if description.weights is not None or description.is_random:
        return None
    return token_model.model.pretrained_cfg.get("license")


def list_licences(original: TokenModel, layouts: Collection[str], stated: str | None) -> list[str]:
    """The licences that fine-tuned weights come under: first the original's, then those of the captures.

    ScanNet++'s captures are known by their layout; `stated` is what the user says of all others.
    """
    data = ["scannetpp-terms-of-use"] if "scannetpp" in layouts else []
    if stated or set(layouts) != {"scannetpp"}:
        data.append(stated or UNKNOWN)
    return [find_licence(original) or UNKNOWN, *data]


def find_strictest(licences: list[str]) -> str:
    order = [*_LICENCES, *licences, UNKNOWN]
    return max(licences, key=lambda name: order.index(name) if name != UNKNOWN else len(order))


def load_finetuned(folder: Path | str) -> nn.Module:
    """The timm model of a fine-tuned folder, with its weights, in evaluation mode.

    Its `pretrained_cfg` names the mean and deviation to normalise images with. ValueError where the folder holds no
    fine-tuned backbone, or one with an adapter, which timm does not know.
    """
    return create_token_model(f"local-dir:{folder}").to_timm().eval()


def write_card(
    description: BackboneDescription, report: dict[str, Any], licences: list[str], scenes: list[str], share: float = 1.0
) -> str:
    """The model card: Markdown with the front matter that model hubs read.

    The description is that of the original backbone, `report` the content of `report.json`, `licences` are those of
    `list_licences`, and `scenes` names the training scenes. A share below 1 is that of the fine-tuned weights in a
    mixture with the original ones.
    """
    consistency = report.get("consistency") or {"original": {}, "finetuned": {}}
    before, after = consistency["original"], consistency["finetuned"]
    keys = ("centred_cosine", "recall_10px", "effective_rank")
    return fill_template(
        Path(__file__).with_name("model_card.md"),
        description=description,
        report=report,
        licence=find_strictest(licences),
        licences=licences,
        links=_LICENCES,
        share=share,
        settings=flatten(report["settings"]),
        before=before,
        after=after,
        fell=[key.replace("_", " ") for key in keys if (after.get(key) or 0.0) < (before.get(key) or 0.0)],
        scenes=scenes,
    )


def _describe_folder(token_model: TokenModel, licence: str) -> dict[str, Any]:
    """The content of `config.json`."""
    description, adapter = token_model.description, getattr(token_model, "adapter", None)
    architecture, model_args = expand_architecture(description.architecture, description.model_args)
    published = {**token_model.model.pretrained_cfg, "license": None if licence == UNKNOWN else licence}
    return {
        **({ADAPTER_KEY: {"window_size": adapter.window_size}} if adapter else {}),
        "architecture": architecture.split(".")[0],
        "num_classes": 0,
        "num_features": description.embed_dim,
        # Of positions; timm's default for a folder is not what it builds the architecture with.
        "model_args": {"img_size": token_model.model.patch_embed.img_size, **model_args, "dynamic_img_size": True},
        "pretrained_cfg": {
            **{key: published[key] for key in _KEPT_CONFIG if published.get(key) is not None},
            "mean": list(description.mean),
            "std": list(description.std),
            "num_classes": 0,
            "fixed_input_size": False,
            "tag": "fit3d",
            "custom_load": False,
        },
    }
