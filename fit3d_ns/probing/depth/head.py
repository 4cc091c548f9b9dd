"""The depth probe's heads: one linear layer onto depth bins (section 3.3), or the DPT head of Table 12.

The linear head reads patch tokens with the class token next to them. The public code upsamples the features four times
and applies the linear layer there. A linear layer applied to each pixel and a bilinear resize, whose weights sum to
one, commute; so logits are upsampled here, which costs a fraction.

The DPT head (Ranftl et al. 2021) brings four layers of tokens to four scales and fuses them from coarse to fine by
residual convolutions. Channels before the fusion are a quarter, a half, once and once the fused width.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.probing.frozen_features import Assembler, FrozenFeatures
from fit3d_ns.probing.pictures import resize_map
from fit3d_ns.probing.segmentation.head import INITIAL_DEVIATION

SHARE_OF_EACH_BIN = 0.1
"""Added to each rectified logit before normalising, so that no bin is ever empty (DINOv2's evaluation)."""
UPSAMPLING = 4
"""Pixels of the linear head's prediction per token and axis."""

BinNormalization = Literal["linear", "softmax"]


class DepthBins(nn.Module):
    """Logits over uniform bins to the expected depth in metres (AdaBins)."""

    centers: Tensor

    def __init__(
        self, min_depth: float, max_depth: float, num_bins: int = 256, normalization: BinNormalization = "linear"
    ) -> None:
        super().__init__()
        self.normalization: BinNormalization = normalization
        self.register_buffer("centers", torch.linspace(min_depth, max_depth, num_bins), persistent=False)

    def forward(self, logits: Float[Tensor, "batch bins height width"]) -> Float[Tensor, "batch height width"]:
        if self.normalization == "softmax":
            return torch.einsum("bkhw,k->bhw", logits.softmax(dim=1), self.centers)
        # Numerator and denominator are one product; the share of each bin adds a constant to both.
        both = torch.stack([self.centers, torch.ones_like(self.centers)])
        sums = torch.einsum("bkhw,jk->bjhw", logits.relu(), both) + SHARE_OF_EACH_BIN * both.sum(dim=1)[:, None, None]
        return sums[:, 0] / sums[:, 1]


class LinearDepthHead(nn.Module):
    """Pre-norm tokens of the last block to depth on a grid four times as fine as the tokens'.

    Training reads the same interpolated logits at `training_upsampling` places per token and axis; fewer are cheaper.
    """

    def __init__(self, assembler: Assembler, bins: DepthBins, training_upsampling: int = UPSAMPLING) -> None:
        super().__init__()
        self.assembler = assembler
        self.training_upsampling = training_upsampling
        self.bins = bins
        self.token_layer = nn.Linear(assembler.out_dim, len(bins.centers))
        # The class token is the same for all tokens: its share of the linear layer is computed once per image.
        self.class_layer = (
            nn.Linear(assembler.class_dim, len(bins.centers), bias=False) if assembler.class_dim else None
        )
        nn.init.normal_(self.token_layer.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self.token_layer.bias)
        if self.class_layer is not None:
            nn.init.normal_(self.class_layer.weight, std=INITIAL_DEVIATION)

    def forward(self, features: FrozenFeatures) -> Float[Tensor, "batch height width"]:
        """Depth in metres on `UPSAMPLING` times the token grid, or `training_upsampling` times in training."""
        # (b, c, h, w) -> (b, h, w, c) -> (b, bins, h, w)
        logits = self.token_layer(self.assembler(features).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.class_layer is not None:
            logits = logits + self.class_layer(self.assembler.select_class_token(features))[:, :, None, None]
        factor = self.training_upsampling if self.training else UPSAMPLING
        height, width = logits.shape[-2:]
        return self.bins(resize_map(logits, (factor * height, factor * width)))


class DPTDepthHead(nn.Module):
    """Pre-norm tokens of four blocks to depth on a grid eight times as fine as the tokens'."""

    def __init__(self, assembler: Assembler, bins: DepthBins, fused_dim: int = 256) -> None:
        super().__init__()
        self.assembler = assembler
        self.bins = bins
        widths = [max(fused_dim // 4, 1), max(fused_dim // 2, 1), fused_dim, fused_dim]
        in_dim = assembler.out_dim
        self.readouts = nn.ModuleList(
            nn.Sequential(nn.Linear(in_dim + assembler.class_dim, in_dim), nn.GELU()) for _ in widths
        )
        self.projections = nn.ModuleList(nn.Conv2d(in_dim, width, kernel_size=1) for width in widths)
        # To four times, twice, once and half the token grid.
        self.rescalings = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], kernel_size=4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], kernel_size=3, stride=2, padding=1),
            ]
        )
        self.reductions = nn.ModuleList(
            nn.Conv2d(width, fused_dim, kernel_size=3, padding=1, bias=False) for width in widths
        )
        self.fusions = nn.ModuleList(_Fusion(fused_dim, has_lateral=index < 3) for index in range(4))
        self.output = nn.Sequential(
            nn.Conv2d(fused_dim, fused_dim, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(fused_dim, len(bins.centers), kernel_size=1),
        )

    def forward(self, features: FrozenFeatures) -> Float[Tensor, "batch height width"]:
        levels = [self._reassemble(features, layer) for layer in range(4)]
        fused = self.fusions[-1](levels[-1], None)
        for level, fusion in zip(levels[-2::-1], list(self.fusions)[-2::-1], strict=True):
            fused = fusion(level, resize_map(fused, (level.shape[-2], level.shape[-1])))
        height, width = fused.shape[-2:]
        return self.bins(self.output(resize_map(fused, (2 * height, 2 * width))))

    def _reassemble(self, features: FrozenFeatures, layer: int) -> Tensor:
        tokens = self.assembler(features, layer)
        class_token = self.assembler.select_class_token(features, layer)
        # The class token is read next to each patch token, then projected away.
        class_map = class_token[:, :, None, None].expand(-1, -1, *tokens.shape[-2:])
        # (b, c, h, w) -> (b, h, w, c) -> (b, c, h, w)
        joined = torch.cat([tokens, class_map], dim=1).permute(0, 2, 3, 1)
        mixed = self.readouts[layer](joined).permute(0, 3, 1, 2)
        return self.reductions[layer](self.rescalings[layer](self.projections[layer](mixed)))


class _ResidualUnit(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(dim, dim, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, kernel_size=3, padding=1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.layers(maps)


class _Fusion(nn.Module):
    """Adds the coarser result to a level, if there is one, and refines the sum."""

    def __init__(self, dim: int, has_lateral: bool) -> None:
        super().__init__()
        self.lateral = _ResidualUnit(dim) if has_lateral else None
        self.refine = _ResidualUnit(dim)
        self.project = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, level: Tensor, coarser: Tensor | None) -> Tensor:
        if self.lateral is not None and coarser is not None:
            level = coarser + self.lateral(level)
        return self.project(self.refine(level))
