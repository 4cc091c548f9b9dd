"""Spreading tokens over the pixels that they are compared with, and its adjoint.

A patch grid (h, w) divides the image into h x w equal cells; a pixel belongs to the token whose cell holds the pixel's
centre.
"""

from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

PixelMap = Float[Tensor, "height width channels"]
TokenSpreadingRule = Literal["bilinear", "nearest", "area"]


def spread_tokens(tokens: Float[Tensor, "h w channels"], width: int, height: int, rule: TokenSpreadingRule) -> PixelMap:
    """The value each pixel is compared with.

    `bilinear` interpolates between token centres (paper section 3.1, `align_corners=False`); `nearest` and `area` give
    each pixel its own token's value.
    """
    if rule == "bilinear":
        # (h, w, c) -> (1, c, h, w) -> (H, W, c)
        channels_first = tokens.permute(2, 0, 1)[None]
        spread = F.interpolate(channels_first, size=(height, width), mode="bilinear", align_corners=False)
        return spread[0].permute(1, 2, 0)
    rows = _assign_cells(height, tokens.shape[0], tokens.device)
    columns = _assign_cells(width, tokens.shape[1], tokens.device)
    return tokens[rows][:, columns]


def sum_over_cells(maps: PixelMap, patch_grid: tuple[int, int]) -> Float[Tensor, "h w channels"]:
    """Sums a pixel map over each token's cell; the adjoint of `spread_tokens` with `nearest`.

    Written as two matrix products, which repeat to the bit where scattered additions on a GPU do not.
    """
    height, width, channels = maps.shape
    rows = _mark_cells(height, patch_grid[0], maps.device).to(maps)
    columns = _mark_cells(width, patch_grid[1], maps.device).to(maps)
    # (h, H) x (H, W*c) -> (h, W, c), then (w, W) x (h, W, c) -> (h, w, c)
    by_row = (rows.T @ maps.reshape(height, width * channels)).reshape(patch_grid[0], width, channels)
    return columns.T @ by_row


def average_over_cells(maps: PixelMap, weights: Float[Tensor, "height width"], patch_grid: tuple[int, int]) -> PixelMap:
    """Replaces each pixel by the weighted mean over its token's cell; cells without weight become zero.

    Multiplied by `weights` this is symmetric and positive semidefinite, so conjugate gradients may use it.
    """
    sums = sum_over_cells(torch.cat([maps * weights[..., None], weights[..., None]], dim=-1), patch_grid)
    total = sums[..., -1:]
    means = torch.where(total > 0, sums[..., :-1] / total.clamp(min=1e-12), 0.0)
    return spread_tokens(means, maps.shape[1], maps.shape[0], "nearest")


@lru_cache(maxsize=64)
def _mark_cells(length: int, num_cells: int, device: torch.device) -> Float[Tensor, "length num_cells"]:
    """One where a pixel lies in a cell."""
    return F.one_hot(_assign_cells(length, num_cells, device), num_cells).float()


@lru_cache(maxsize=64)
def _assign_cells(length: int, num_cells: int, device: torch.device) -> Int[Tensor, " length"]:
    """The cell that each pixel's centre lies in."""
    # Integer arithmetic: floor((pixel + 0.5) * cells / length) without rounding.
    pixels = torch.arange(length, device=device)
    return ((2 * pixels + 1) * num_cells // (2 * length)).clamp(max=num_cells - 1)
