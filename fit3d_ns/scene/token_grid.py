"""Between a token grid and pixels: reading a rendered map at the tokens, and spreading tokens over the pixels.

A patch grid (h, w) divides the image into h x w equal cells.

Reading: `bilinear` is what `F.interpolate(mode="bilinear", align_corners=False, antialias=False)` computes: the two
nearest pixel rows and columns of each cell centre. `area` is the average over the cell, pixels on its border counted by
the part inside. Both are separable, so a reading is one short run of pixel rows per token row, one run of columns per
token column, and their weights.

Spreading: a pixel belongs to the token whose cell holds the pixel's centre.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.rasterization import rasterize_features

TokenReadingRule = Literal["bilinear", "area"]
TokenSpreadingRule = Literal["bilinear", "nearest", "area"]


@dataclass(frozen=True)
class TokenAxis:
    """Which rows of an image the rows of a token grid read, and how; or its columns."""

    read: Int[Tensor, " read"]
    """Image rows that are read, ascending."""
    index: Int[Tensor, "tokens run"]
    """For each token row, which of the read rows it needs; an index into `read`, not into the image."""
    weights: Float[Tensor, "tokens 3 run"]
    """Their weights, float64, for the map shifted by one row down (tap 0), not at all, and one row up (tap 2)."""


@dataclass(frozen=True)
class TokenReader:
    """Reads maps of one image size at one token grid; made by `create_token_reader`."""

    pixels: Int[Tensor, "pixels 2"]
    """(row, col) of every pixel that is read: all pairs of some rows and some columns, rows first."""
    rows: TokenAxis
    columns: TokenAxis

    @property
    def size(self) -> tuple[int, int]:
        """Token grid (h, w)."""
        return self.rows.index.shape[0], self.columns.index.shape[0]

    def blend(
        self, features: Float[Tensor, "num_gaussians channels"], info: dict[str, Any]
    ) -> Float[Tensor, "num_cameras pixels channels"]:
        """`rasterize_features` at `pixels`, or at once where these are all of the image."""
        if len(self.pixels) == int(info["width"]) * int(info["height"]):
            return rasterize_features(features, info).flatten(1, 2)
        return rasterize_features(features, info, pixels=self.pixels.to(features.device))

    def gather(self, maps: Float[Tensor, "*batch height width channels"]) -> Float[Tensor, "*batch pixels channels"]:
        """The values of full maps at `pixels`."""
        picked = maps.index_select(-3, self.rows.read.to(maps.device))
        return picked.index_select(-2, self.columns.read.to(maps.device)).flatten(-3, -2)

    def read(self, values: Float[Tensor, "*batch pixels channels"]) -> Float[Tensor, "*batch h w channels"]:
        """The token values of a map that is known at `pixels`."""
        return self._combine(values, slice(1, 2))[..., 0, :]

    def read_neighbourhoods(
        self, values: Float[Tensor, "*batch pixels channels"]
    ) -> Float[Tensor, "*batch h w 9 channels"]:
        """The token values of the nine maps shifted by a 3x3 convolution's taps, zero outside the image.

        Tap `3 * ky + kx` is what the weight [ky, kx] multiplies. Needs a reader made with `neighbourhood=True`.
        """
        return self._combine(values, slice(0, 3))

    def _combine(
        self, values: Float[Tensor, "*batch pixels channels"], taps: slice
    ) -> Float[Tensor, "*batch h w taps channels"]:
        row_weights = self.rows.weights[:, taps].to(values)
        column_weights = self.columns.weights[:, taps].to(values)
        batch, channels = values.shape[:-2], values.shape[-1]
        (h, num_taps, run_h), (w, _, run_w) = row_weights.shape, column_weights.shape
        num_columns = self.columns.read.shape[0]
        values = values.reshape(-1, self.rows.read.shape[0], num_columns, channels)
        # (b, h*run_h, columns, c) -> (b, h, run_h, columns*c) -> (b, h, ky, columns, c)
        values = values.index_select(1, self.rows.index.flatten().to(values.device))
        values = row_weights @ values.reshape(-1, h, run_h, num_columns * channels)
        values = values.reshape(-1, h, num_taps, num_columns, channels)
        # (b, h, ky, w*run_w, c) -> (b, h, w, run_w, ky*c) -> (b, h, w, kx, ky, c)
        values = values.index_select(3, self.columns.index.flatten().to(values.device))
        values = values.reshape(-1, h, num_taps, w, run_w, channels).permute(0, 1, 3, 4, 2, 5)
        values = column_weights @ values.reshape(-1, h, w, run_w, num_taps * channels)
        values = values.reshape(-1, h, w, num_taps, num_taps, channels).transpose(3, 4)
        return values.reshape(*batch, h, w, num_taps * num_taps, channels)


@lru_cache(maxsize=64)
def create_token_reader(
    width: int,
    height: int,
    size: tuple[int, int],
    rule: TokenReadingRule = "bilinear",
    neighbourhood: bool = True,
    device: torch.device | str = "cpu",
) -> TokenReader:
    """The reader of images at the token grid `size` (h, w), which may be finer than the image.

    With `neighbourhood`, the one-pixel ring that a 3x3 convolution needs is read, too. Its tensors live on `device`; it
    works on any, but elsewhere copies its tables at every use. ValueError: a size is not positive, an unknown rule.
    """
    if min(width, height, *size) < 1:
        raise ValueError(f"Cannot read an image of {width}x{height} at token grid {size}; all must be at least 1.")
    if rule not in ("bilinear", "area"):
        raise ValueError(f"Unknown token reading {rule!r}; choose 'bilinear' or 'area'.")
    rows = _create_axis(height, size[0], rule, neighbourhood, device)
    columns = _create_axis(width, size[1], rule, neighbourhood, device)
    pixels = torch.stack(torch.meshgrid(rows.read, columns.read, indexing="ij"), dim=-1).reshape(-1, 2)
    return TokenReader(pixels, rows, columns)


def read_at_tokens(
    maps: Float[Tensor, "*batch height width channels"], size: tuple[int, int], rule: TokenReadingRule = "bilinear"
) -> Float[Tensor, "*batch h w channels"]:
    """A full map (mask, alpha, depth, colour) read at the token grid by the same rule as the features."""
    reader = create_token_reader(maps.shape[-2], maps.shape[-3], size, rule, neighbourhood=False, device=maps.device)
    return reader.read(reader.gather(maps))


def spread_tokens(
    tokens: Float[Tensor, "h w channels"], width: int, height: int, rule: TokenSpreadingRule
) -> Float[Tensor, "height width channels"]:
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


def sum_over_cells(
    maps: Float[Tensor, "height width channels"], patch_grid: tuple[int, int]
) -> Float[Tensor, "h w channels"]:
    """Sums a pixel map over each token's cell; the adjoint of `spread_tokens` with `nearest`.

    Written as two matrix products, which repeat to the bit where scattered additions on a GPU do not.
    """
    height, width, channels = maps.shape
    rows = _mark_cells(height, patch_grid[0], maps.device).to(maps)
    columns = _mark_cells(width, patch_grid[1], maps.device).to(maps)
    # (h, H) x (H, W*c) -> (h, W, c), then (w, W) x (h, W, c) -> (h, w, c)
    by_row = (rows.T @ maps.reshape(height, width * channels)).reshape(patch_grid[0], width, channels)
    return columns.T @ by_row


def average_over_cells(
    maps: Float[Tensor, "height width channels"], weights: Float[Tensor, "height width"], patch_grid: tuple[int, int]
) -> Float[Tensor, "height width channels"]:
    """Replaces each pixel by the weighted mean over its token's cell; cells without weight become zero.

    Multiplied by `weights` this is symmetric and positive semidefinite, so conjugate gradients may use it.
    """
    sums = sum_over_cells(torch.cat([maps * weights[..., None], weights[..., None]], dim=-1), patch_grid)
    total = sums[..., -1:]
    means = torch.where(total > 0, sums[..., :-1] / total.clamp(min=1e-12), 0.0)
    return spread_tokens(means, maps.shape[1], maps.shape[0], "nearest")


def _create_axis(
    length: int, num_tokens: int, rule: TokenReadingRule, neighbourhood: bool, device: torch.device | str
) -> TokenAxis:
    first, weights = _weigh_bilinear(length, num_tokens) if rule == "bilinear" else _weigh_area(length, num_tokens)
    run = weights.shape[1]
    reach = 1 if neighbourhood else 0
    # A run has a place for each pixel of the reading and, if wanted, for one neighbour on either side.
    positions = first[:, None] + torch.arange(-reach, run + reach)
    shifted = weights.new_zeros(num_tokens, 3, run + 2 * reach)
    for tap in range(1 - reach, 2 + reach):
        # Kernel tap 0 multiplies the pixel before, tap 2 the pixel after.
        start = reach + tap - 1
        shifted[:, tap, start : start + run] = weights
    inside = (positions >= 0) & (positions < length)
    # The convolution pads with zeros: what lies outside the image adds nothing.
    shifted = shifted * inside[:, None]
    needed = (shifted != 0).any(dim=1)
    read = positions[needed].unique()
    index = torch.searchsorted(read, positions).clamp(max=read.shape[0] - 1)
    return TokenAxis(*(table.to(device) for table in (read, torch.where(needed, index, 0), shifted)))


def _weigh_bilinear(length: int, num_tokens: int) -> tuple[Int[Tensor, " tokens"], Float[Tensor, "tokens 2"]]:
    """First pixel and two weights of each token, PyTorch's rule: positions left of the first centre clamp to it."""
    centres = (torch.arange(num_tokens, dtype=torch.float64) + 0.5) * (length / num_tokens) - 0.5
    # Beyond the last pixel's centre both neighbours are that pixel: the same as standing on it.
    centres = centres.clamp(0.0, length - 1.0)
    first = centres.floor().long()
    second_weight = centres - first
    return first, torch.stack([1.0 - second_weight, second_weight], dim=1)


def _weigh_area(length: int, num_tokens: int) -> tuple[Int[Tensor, " tokens"], Float[Tensor, "tokens run"]]:
    """First pixel of each cell and the share of the cell that each pixel covers."""
    cell = length / num_tokens
    starts = torch.arange(num_tokens, dtype=torch.float64) * cell
    first = (starts + 1e-9).floor().long()
    run = math.ceil(cell - 1e-9) + 1
    edges = first[:, None] + torch.arange(run + 1, dtype=torch.float64)
    clipped = edges.clamp(starts[:, None], starts[:, None] + cell).clamp(max=float(length))
    shares = clipped.diff(dim=1)
    # Rounding leaves slivers of a pixel that must not be read.
    shares = torch.where(shares > 1e-9, shares, 0.0)
    return first, shares / shares.sum(dim=1, keepdim=True)


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
