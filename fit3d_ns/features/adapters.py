"""Ways to change a backbone's tokens without training all of it: LoRA matrices, and a block behind the frozen backbone.

LoRA (Hu et al., ICLR 2022) adds low-rank matrices to the attention's projections, through `peft`; merging them gives
the architecture back. The adapter is one Swin Transformer block without shift on the map of normed patch tokens (paper,
Table 6); its last layers start at zero, so training starts from the backbone's own tokens. timm does not know it: it
lies next to the backbone's weights in `adapter.safetensors`, and `create_token_model` puts it back in.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.features.sources import ADAPTER_KEY, ADAPTER_NAME
from fit3d_ns.features.tokens import TokenModel, Tokens
from fit3d_ns.utils.errors import first_line
from fit3d_ns.utils.files import read_json
from fit3d_ns.utils.tensor_files import open_tensors

_LORA_MODULES = r"blocks\.\d+\.attn\.(qkv|q_proj|k_proj|v_proj|proj)"
_HEAD_DIM = 32


class SwinAdapter(nn.Module):
    """One Swin Transformer block on a token map; the identity until it is trained."""

    def __init__(self, embed_dim: int, window_size: int = 7):
        """Heads are 32 wide as in Swin, or one head where that does not divide `embed_dim`; the window is in tokens."""
        from timm.models.swin_transformer import SwinTransformerBlock

        super().__init__()
        self.window_size = window_size
        self.block: Any = SwinTransformerBlock(
            dim=embed_dim,
            # Windows do not shrink with the map, whose size is known at the call only.
            input_resolution=(window_size, window_size),
            always_partition=True,
            num_heads=embed_dim // _HEAD_DIM if embed_dim % _HEAD_DIM == 0 else 1,
            window_size=window_size,
        )
        last: list[Any] = [self.block.attn.proj, self.block.mlp.fc2]
        for layer in last:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Float[Tensor, "batch h w embed"]) -> Float[Tensor, "batch h w embed"]:
        return self.block(maps)


class AdaptedTokenModel(TokenModel):
    """A frozen backbone with an adapter behind its final norm; prefix tokens pass by."""

    def __init__(self, token_model: TokenModel, adapter: SwinAdapter):
        """Freezes the backbone; ValueError where its description leaves the final norm out."""
        if not token_model.description.norm:
            raise ValueError("The adapter works on normed tokens; use a backbone with its final norm.")
        super().__init__(token_model.model, token_model.description)
        self.model.requires_grad_(False)
        self.adapter = adapter

    def to_timm(self) -> nn.Module:
        raise ValueError(f"{self.description.backbone} has an adapter, which timm does not know; use create_extractor.")

    def apply_norm(self, tokens: Tokens) -> Tokens:
        """The backbone's final norm, then the adapter on the patch tokens."""
        normed = super().apply_norm(tokens)
        # (b, h, w, e) -> (b, h*w, e)
        return Tokens(self.adapter(normed.maps).flatten(1, 2), normed.prefix_tokens, normed.patch_grid)


def add_adapter(token_model: TokenModel, window_size: int = 7) -> AdaptedTokenModel:
    """The backbone, frozen, with a fresh adapter; attention is initialised from torch's global generator."""
    adapter = SwinAdapter(token_model.description.embed_dim, window_size).to(next(token_model.parameters()))
    return AdaptedTokenModel(token_model, adapter)


def attach_adapter(token_model: TokenModel, folder: Path) -> AdaptedTokenModel:
    """The backbone of a folder with the adapter that lies there; ValueError where its file cannot be used."""
    config = read_json(folder / "config.json")
    try:
        adapter = SwinAdapter(token_model.description.embed_dim, **config[ADAPTER_KEY])
        file = open_tensors(folder / ADAPTER_NAME)
        file.check()
        adapter.load_state_dict(file.tensors)
    except Exception as error:
        raise ValueError(f"The adapter in {folder} cannot be read ({first_line(error)}); copy it again.") from error
    return AdaptedTokenModel(token_model, adapter)


def add_lora(token_model: TokenModel, rank: int = 8, alpha: float = 8.0) -> TokenModel:
    """Freezes the backbone and adds trainable low-rank matrices, times `alpha / rank`, to its attention, in place.

    ValueError where peft is not installed, or the backbone's attention cannot take the matrices.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError("LoRA needs peft, which is missing; run `pip install '.[lora]'` in the clone.") from error
    # peft divides by the rank, so its `int` may be any number.
    scale: Any = alpha
    config = peft.LoraConfig(r=rank, lora_alpha=scale, target_modules=_LORA_MODULES, lora_dropout=0.0)
    token_model.requires_grad_(False)
    try:
        peft.inject_adapter_in_model(config, token_model.model)
    except ValueError as error:
        raise ValueError(f"LoRA does not fit {token_model.description.label} ({error}); train its blocks.") from error
    return token_model


def merge_lora(token_model: TokenModel) -> TokenModel:
    """Adds the matrices to the weights they belong to and removes them, in place: timm's own modules remain."""
    layers = [(name, module) for name, module in token_model.model.named_modules() if hasattr(module, "lora_A")]
    with torch.no_grad():
        for name, layer in layers:
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(token_model.model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(token_model.model, "peft_config"):
        del token_model.model.peft_config
    return token_model
