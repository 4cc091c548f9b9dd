"""How original and fine-tuned features become one map (Tables 6, 7 and 13), as a module in front of every head.

Symbols: a *part* is one backbone, original first; `maps` are [batch, parts, layers, h, w, embed], class tokens
[batch, parts, layers, embed]. `original` and `finetuned` have one part, the others but `duplicate` have two.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

Assembly = Literal["original", "finetuned", "concat", "duplicate", "add", "linear"]
"""`concat` is the paper's; `finetuned` is the fine-tuned backbone alone; `duplicate` is the control of Table 13, the
original beside itself; `add` and `linear` (a trained layer back to the original's size) are Table 7's."""

Part = Literal["original", "finetuned"]

ClassTokenSource = Literal["auto", "original", "finetuned", "none"]
"""Whose class token is put beside the patch tokens: `auto` takes the original's where it runs (the public code), else
the fine-tuned one's."""

ASSEMBLIES: tuple[Assembly, ...] = get_args(Assembly)


def list_parts(assembly: Assembly) -> tuple[Part, ...]:
    """The backbones that have to run."""
    if assembly in ("original", "duplicate"):
        return ("original",)
    if assembly == "finetuned":
        return ("finetuned",)
    return ("original", "finetuned")


@dataclass(frozen=True)
class FrozenFeatures:
    """What the frozen backbones say about a batch of images."""

    maps: Float[Tensor, "batch parts layers h w embed"]
    """Patch tokens."""
    class_tokens: Float[Tensor, "batch parts layers embed"]
    """Class tokens; of size 0 in the last axis where the backbone has none."""

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "FrozenFeatures":
        """The same on another device and in another type."""
        return FrozenFeatures(self.maps.to(device, dtype), self.class_tokens.to(device, dtype))


class Assembler(nn.Module):
    """Makes one map, and one class token, out of the parts of a layer; only `linear` has something to learn."""

    def __init__(self, assembly: Assembly, embed_dim: int, class_token_source: ClassTokenSource = "auto") -> None:
        super().__init__()
        self.assembly = assembly
        self.embed_dim = embed_dim
        self.parts = list_parts(assembly)
        self.class_token_part = _find_class_token_part(self.parts, class_token_source)
        self.fusion = nn.Linear(2 * embed_dim, embed_dim) if assembly == "linear" else None

    @property
    def out_dim(self) -> int:
        """Channels of the assembled map."""
        return 2 * self.embed_dim if self.assembly in ("concat", "duplicate") else self.embed_dim

    @property
    def width(self) -> int:
        """Inputs of the first linear layer that is trained on the patch tokens."""
        return self.out_dim if self.fusion is None else 2 * self.embed_dim

    @property
    def class_dim(self) -> int:
        """Length of the class token that goes with the map; 0 where none is asked for."""
        return 0 if self.class_token_part is None else self.embed_dim

    def forward(self, features: FrozenFeatures, layer: int = -1) -> Float[Tensor, "batch channels h w"]:
        """The assembled map of one layer."""
        tokens = self.assemble(features.maps[:, :, layer])
        # (b, h, w, c) -> (b, c, h, w)
        return tokens.permute(0, 3, 1, 2)

    def assemble(self, parts: Float[Tensor, "batch parts *grid embed"]) -> Float[Tensor, "batch *grid channels"]:
        """Assembles vectors of any grid, the empty one included."""
        if self.assembly in ("original", "finetuned"):
            return parts[:, 0]
        if self.assembly == "duplicate":
            return torch.cat([parts[:, 0], parts[:, 0]], dim=-1)
        if self.assembly == "add":
            return parts[:, 0] + parts[:, 1]
        joined = torch.cat([parts[:, 0], parts[:, 1]], dim=-1)
        return joined if self.fusion is None else self.fusion(joined)

    def select_class_token(self, features: FrozenFeatures, layer: int = -1) -> Float[Tensor, "batch class_dim"]:
        """The class token of one layer; [batch, 0] where none is asked for."""
        if self.class_token_part is None:
            return features.class_tokens[:, 0, layer, :0]
        return features.class_tokens[:, self.class_token_part, layer]


def _find_class_token_part(parts: tuple[Part, ...], source: ClassTokenSource) -> int | None:
    if source == "none":
        return None
    if source == "auto":
        return 0
    if source not in parts:
        raise ValueError(f"The class token of the {source} backbone is asked for, but only {', '.join(parts)} runs.")
    return parts.index(source)
