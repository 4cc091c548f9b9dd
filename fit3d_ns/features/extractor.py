"""`create_extractor`: a frozen vision transformer with its preprocessing; images in, tokens out."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features import backbones
from fit3d_ns.features.adapters import attach_adapter
from fit3d_ns.features.backbones import BackboneDescription, Normalization
from fit3d_ns.features.sources import ADAPTER_NAME, RANDOM_SEED, find_backbone_folder
from fit3d_ns.features.tokens import TokenModel, Tokens
from fit3d_ns.features.weights import load_weights
from fit3d_ns.utils.device import fast_matmul
from fit3d_ns.utils.selection import derive_seed


class FeatureExtractor:
    """A frozen backbone with its preprocessing; made by `create_extractor`.

    `model` is timm's module; the other attributes mean what they mean in `BackboneDescription`.
    """

    def __init__(self, token_model: TokenModel, device: torch.device | str, dtype: torch.dtype) -> None:
        self.token_model = token_model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.model = token_model.model
        self.description = description = token_model.description
        self.backbone, self.weights_hash = description.backbone, description.weights_hash
        self.patch_size, self.embed_dim = description.patch_size, description.embed_dim
        self.mean, self.std = description.mean, description.std
        self.is_random = description.is_random
        self.device = torch.device(device)
        self.dtype = dtype

    def __call__(self, images: Float[Tensor, "batch 3 height width"]) -> Tokens:
        """Tokens of RGB images in [0, 1], which are resized to the patch grid here and may be as small as one patch.

        They are on the images' device, float32 (float64 if that is the extractor's type), without gradient.
        """
        return self.extract_layers(images, [self.description.num_blocks - 1])[0]

    def extract_layers(self, images: Float[Tensor, "batch 3 height width"], layers: Sequence[int]) -> list[Tokens]:
        """Tokens of several blocks, counted from 0, in the order of the blocks."""
        out_dtype = torch.promote_types(self.dtype, torch.float32)
        if not images.is_floating_point():
            raise ValueError(f"Images are {images.dtype}, expected floating point in [0, 1]; divide 8-bit ones by 255.")
        with torch.no_grad(), fast_matmul(self.device):
            outputs = self.token_model.forward_layers(images.to(self.device, out_dtype), layers)
        return [tokens.to(images.device, out_dtype) for tokens in outputs]


def create_extractor(
    backbone: str | BackboneDescription,
    weights: Path | str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    normalization: Normalization = "timm",
    norm: bool = True,
) -> FeatureExtractor:
    """Builds a frozen backbone and loads its weights; ValueError where it is unknown or they are missing or others.

    Args:
        backbone: A name (`sources.py` lists the kinds), or a description, whose settings then replace those below.
        weights: A file with weights; None: timm's download, the folder's or, if the name says so, random ones.
        norm: False gives tokens before the final norm.
    """
    model = create_token_model(backbone, weights, normalization=normalization, norm=norm)
    return FeatureExtractor(model, device, dtype)


def create_token_model(
    backbone: str | BackboneDescription,
    weights: Path | str | None = None,
    *,
    normalization: Normalization = "timm",
    norm: bool = True,
) -> TokenModel:
    """Builds a backbone with its weights for training, on the CPU, in float32; arguments as in `create_extractor`.

    ValueError as there, and where a described weights file has changed since.
    """
    if isinstance(backbone, BackboneDescription):
        description = backbone
        if description.with_weights(description.weights).identity != description.identity:
            raise ValueError(f"The weights of {description.backbone} changed while in use; start the command again.")
    else:
        description = backbones.describe_backbone(backbone, weights, normalization, norm=norm)
    # Building a model must not draw from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(RANDOM_SEED, "weights", description.architecture))
        if description.weights is None and not description.is_random:
            model = backbones.download_timm_model(description)
        else:
            model = backbones.create_timm_model(description.architecture, description.model_args)
            if description.weights is not None:
                load_weights(model, description.weights)
    token_model = TokenModel(model, description)
    folder = find_backbone_folder(description.backbone)
    if folder is not None and (folder / ADAPTER_NAME).is_file():
        return attach_adapter(token_model, folder)
    return token_model
