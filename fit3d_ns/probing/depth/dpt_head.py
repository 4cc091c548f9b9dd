"""The DPT head of Table 12 (Ranftl et al. 2021): four layers of tokens, brought to four scales and fused from coarse
to fine by residual convolutions, then the same depth bins as the linear probe's.

Channels before the fusion are a quarter, a half, once and once the fused width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.probing.assembly import Assembler, FrozenFeatures
from fit3d_ns.probing.depth.bins import DepthBins
from fit3d_ns.probing.patch_fit import resize_map

NUM_LAYERS = 4
"""Layers of the backbone that are read, evenly spaced up to the last."""
FUSED_DIM = 256
"""Channels of the fused maps."""
_SCALES = (4.0, 2.0, 1.0, 0.5)
"""Size of each layer's map relative to the token grid, first layer first."""


class DPTDepthHead(nn.Module):
    """Pre-norm tokens of four blocks to depth on a grid eight times as fine as the tokens'."""

    def __init__(
        self, assembler: Assembler, bins: DepthBins, fused_dim: int = FUSED_DIM, num_layers: int = NUM_LAYERS
    ) -> None:
        super().__init__()
        if num_layers != len(_SCALES):
            raise ValueError(f"The DPT head reads {len(_SCALES)} layers, got {num_layers}.")
        self.assembler = assembler
        self.bins = bins
        widths = [max(fused_dim // 4, 1), max(fused_dim // 2, 1), fused_dim, fused_dim]
        in_dim = assembler.out_dim
        self.readouts = nn.ModuleList(
            nn.Sequential(nn.Linear(in_dim + assembler.class_dim, in_dim), nn.GELU()) for _ in _SCALES
        )
        self.projections = nn.ModuleList(nn.Conv2d(in_dim, width, kernel_size=1) for width in widths)
        self.rescalings = nn.ModuleList(
            _create_rescaling(width, scale) for width, scale in zip(widths, _SCALES, strict=True)
        )
        self.reductions = nn.ModuleList(
            nn.Conv2d(width, fused_dim, kernel_size=3, padding=1, bias=False) for width in widths
        )
        self.fusions = nn.ModuleList(
            _Fusion(fused_dim, has_lateral=index < len(_SCALES) - 1) for index in range(len(_SCALES))
        )
        self.output = nn.Sequential(
            nn.Conv2d(fused_dim, fused_dim, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(fused_dim, bins.num_bins, kernel_size=1),
        )

    def forward(self, features: FrozenFeatures) -> Float[Tensor, "batch height width"]:
        """Depth in metres on eight times the token grid."""
        levels = [self._reassemble(features, layer) for layer in range(len(_SCALES))]
        fused = self.fusions[-1](levels[-1], None)
        for level, fusion in zip(levels[-2::-1], list(self.fusions)[-2::-1], strict=True):
            fused = fusion(level, resize_map(fused, (level.shape[-2], level.shape[-1])))
        height, width = fused.shape[-2:]
        return self.bins(self.output(resize_map(fused, (2 * height, 2 * width))))

    def _reassemble(self, features: FrozenFeatures, layer: int) -> Tensor:
        tokens = self.assembler(features, layer)
        class_token = self.assembler.select_class_token(features, layer)
        # The class token is read beside each patch token, then projected away.
        beside = class_token[:, :, None, None].expand(-1, -1, *tokens.shape[-2:])
        joined = torch.cat([tokens, beside], dim=1).permute(0, 2, 3, 1)
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


def _create_rescaling(width: int, scale: float) -> nn.Module:
    if scale > 1:
        return nn.ConvTranspose2d(width, width, kernel_size=int(scale), stride=int(scale))
    if scale == 1:
        return nn.Identity()
    return nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1)
