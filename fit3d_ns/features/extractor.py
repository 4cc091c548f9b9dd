"""`create_extractor`: images in, tokens out; and `TokenModel`, the same as a module that can be trained.

Images are [B, 3, H, W] in [0, 1]; (h, w) = (H // p, W // p) is the patch grid, tokens are in row-major order of it.
"""

import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.features.backbones import (
    RANDOM_PREFIX,
    RANDOM_SEED,
    BackboneDescription,
    Normalization,
    create_timm_model,
    describe_backbone,
)
from fit3d_ns.features.preprocessing import ResizeRule, compute_patch_grid, fit_to_patch_grid, normalize_images
from fit3d_ns.features.weights import load_weights
from fit3d_ns.utils.seeds import derive_seed


@dataclass(frozen=True)
class Tokens:
    """What a vision transformer says about a batch of images."""

    patch_tokens: Float[Tensor, "batch patches embed"]
    """One token per patch, rows first: token `i * w + j` belongs to row i, column j."""
    prefix_tokens: Float[Tensor, "batch prefix embed"]
    """Class token first, then registers; `prefix` may be 0."""
    patch_grid: tuple[int, int]
    """Rows h and columns w; `patches` is h * w."""

    @property
    def maps(self) -> Float[Tensor, "batch h w embed"]:
        """The patch tokens as a map."""
        # (b, h*w, e) -> (b, h, w, e)
        return self.patch_tokens.unflatten(1, self.patch_grid)


class TokenModel(nn.Module):
    """A vision transformer from images in [0, 1] to tokens, with gradients; stage II wraps and trains it.

    Parameters that no token passes through (classifiers' norms, attention pooling; the final norm if it is not applied)
    are frozen, because distributed training fails on parameters that the loss cannot reach. `model` is timm's own
    module, so its state dict is what timm loads.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, description: BackboneDescription) -> None:
        super().__init__()
        self.model: Any = model
        self.description = description
        self.register_buffer("mean", torch.tensor(description.mean), persistent=False)
        self.register_buffer("std", torch.tensor(description.std), persistent=False)
        unused = [getattr(model, name, None) for name in ("fc_norm", "attn_pool", "head", "head_dist")]
        if not description.norm:
            unused.append(getattr(model, "norm", None))
        for module in unused:
            if isinstance(module, nn.Module):
                module.requires_grad_(False)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Tokens:
        """Tokens of the last block, after the final norm if the description says so.

        Raises:
            ValueError: The images are smaller than one patch.
        """
        return self.forward_layers(images, [self.description.num_blocks - 1])[0]

    def forward_layers(self, images: Float[Tensor, "batch 3 height width"], layers: Sequence[int]) -> list[Tokens]:
        """Tokens of several blocks, counted from 0, in the order of the blocks; the norm is treated as in `forward`."""
        return [self.apply_norm(tokens) if self.description.norm else tokens for tokens in self._run(images, layers)]

    def apply_norm(self, tokens: Tokens) -> Tokens:
        """Applies the backbone's final norm to tokens that were made without it."""
        return Tokens(self.model.norm(tokens.patch_tokens), self.model.norm(tokens.prefix_tokens), tokens.patch_grid)

    def _run(self, images: Tensor, layers: Sequence[int]) -> list[Tokens]:
        description = self.description
        patch_grid = compute_patch_grid(images.shape[-2], images.shape[-1], description.patch_size)
        fitted = fit_to_patch_grid(images, description.patch_size, description.resize_rule)
        has_prefix = description.num_prefix_tokens > 0
        outputs = self.model.forward_intermediates(
            normalize_images(fitted, self.mean, self.std),
            indices=sorted(layers),
            return_prefix_tokens=has_prefix,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if has_prefix:
            return [Tokens(patches, prefix, patch_grid) for patches, prefix in outputs]
        return [Tokens(patches, patches[:, :0], patch_grid) for patches in outputs]


class FeatureExtractor:
    """A frozen backbone with its preprocessing; made by `create_extractor`."""

    def __init__(self, token_model: TokenModel, device: torch.device | str, dtype: torch.dtype) -> None:
        self.token_model = token_model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.description = token_model.description
        self.device = torch.device(device)
        self.dtype = dtype

    def __call__(self, images: Float[Tensor, "batch 3 height width"]) -> Tokens:
        """Extracts tokens.

        Args:
            images: RGB in [0, 1], any size from one patch on; resized to the patch grid here.

        Returns:
            Tokens on the images' device, float32 (float64 if that is the extractor's type), without gradient.
        """
        return self.extract_layers(images, [self.description.num_blocks - 1])[0]

    def extract_layers(self, images: Float[Tensor, "batch 3 height width"], layers: Sequence[int]) -> list[Tokens]:
        """Tokens of several blocks, counted from 0, in the order of the blocks."""
        out_dtype = torch.promote_types(self.dtype, torch.float32)
        with torch.no_grad():
            outputs = self.token_model.forward_layers(images.to(self.device, self.dtype), layers)
        return [
            Tokens(
                tokens.patch_tokens.to(images.device, out_dtype),
                tokens.prefix_tokens.to(images.device, out_dtype),
                tokens.patch_grid,
            )
            for tokens in outputs
        ]

    @property
    def model(self) -> nn.Module:
        """timm's module."""
        return self.token_model.model

    @property
    def backbone(self) -> str:
        """The name as the user gave it."""
        return self.description.backbone

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.description.patch_size

    @property
    def embed_dim(self) -> int:
        """Length of a token."""
        return self.description.embed_dim

    @property
    def mean(self) -> tuple[float, float, float]:
        """Subtracted from images in [0, 1]."""
        return self.description.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Divides images after that."""
        return self.description.std

    @property
    def weights_hash(self) -> str:
        """Names the weights; see `BackboneDescription`."""
        return self.description.weights_hash

    @property
    def is_random(self) -> bool:
        """True for untrained weights."""
        return self.description.is_random


def create_extractor(
    backbone: str | BackboneDescription,
    weights: Path | str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    normalization: Normalization = "timm",
    norm: bool = True,
    resize_rule: ResizeRule = "bilinear",
) -> FeatureExtractor:
    """Builds a frozen backbone and loads its weights.

    Args:
        backbone: A name (`backbones.py` lists the kinds), or a description, whose settings then replace those below.
        weights: A file with weights; None: timm's download, the folder's or, if the name says so, random ones.
        device: Where the backbone runs.
        dtype: In which type it runs.
        normalization: `timm`: the model's own mean and deviation; `imagenet`: ImageNet's, as the paper's code.
        norm: False gives tokens before the final norm.
        resize_rule: How images are resized to the patch grid.

    Raises:
        ValueError: Unknown backbone, weights that are missing or do not fit, or a download that failed.
    """
    return FeatureExtractor(
        create_token_model(backbone, weights, normalization=normalization, norm=norm, resize_rule=resize_rule),
        device,
        dtype,
    )


def create_token_model(
    backbone: str | BackboneDescription,
    weights: Path | str | None = None,
    *,
    normalization: Normalization = "timm",
    norm: bool = True,
    resize_rule: ResizeRule = "bilinear",
) -> TokenModel:
    """Builds a backbone with its weights for training, on the CPU, in float32; arguments as in `create_extractor`.

    Raises:
        ValueError: As `create_extractor`; also if a described weights file has changed since.
    """
    if isinstance(backbone, BackboneDescription):
        description = backbone
        now = describe_backbone(
            description.backbone,
            description.weights,
            description.normalization,
            norm=description.norm,
            resize_rule=description.resize_rule,
        )
        if now.identity != description.identity:
            raise ValueError(
                f"The weights of {description.backbone} changed while they were in use; start the command again."
            )
    else:
        description = describe_backbone(backbone, weights, normalization, norm=norm, resize_rule=resize_rule)
    with _isolated_random_state(derive_seed(RANDOM_SEED, "weights", description.architecture)):
        if description.is_random:
            model = create_timm_model(description.architecture, description.model_args)
        elif description.weights is not None:
            model = create_timm_model(description.architecture, description.model_args)
            load_weights(model, description.weights)
        else:
            model = _download_timm_model(description)
    return TokenModel(model, description)


@contextmanager
def _isolated_random_state(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator inside the block and restores it after, so that building a model draws nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _download_timm_model(description: BackboneDescription) -> nn.Module:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(description.architecture)
    overlay: dict[str, Any] = {}
    if config is not None and config.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(config.hf_hub_id, "model.safetensors")
        if isinstance(cached, str):
            # A cached file is taken as it is: asking the hub first costs most of a minute where there is no network.
            overlay = {"file": cached}
    problem = "" if overlay else _find_network_problem()
    if not problem:
        try:
            return create_timm_model(
                description.architecture, description.model_args, pretrained=True, pretrained_cfg_overlay=overlay
            )
        except (OSError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            cause: BaseException | None = error
    else:
        cause = None
    raise ValueError(
        f"The weights of {description.architecture} are not on this machine and cannot be downloaded ({problem}); "
        f"give --backbone-weights FILE, or {RANDOM_PREFIX}{description.backbone} to go on with random weights."
    ) from cause


def _find_network_problem() -> str:
    """Empty if the hub answers or may be reached through a proxy; the hub's client itself retries for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url = urllib.parse.urlparse(constants.ENDPOINT)
    if urllib.request.getproxies():
        return ""
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=10):
            return ""
    except OSError as error:
        return f"no connection to {url.hostname}: {error}"
