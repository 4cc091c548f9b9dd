"""`FeatureDecoder`: the 3x3 convolution from rendered low-dimensional features to the backbone's (paper, section 3.1);
and `TokenReader`, which reads a rendered map at a token grid.

`F_high = conv(F_low) + bias * alpha` with zero padding: an empty pixel decodes to zero. Maps are channels-last
[..., H, W, D], as the rasterizer returns them. Convolution and interpolation are both linear and act alike at every
pixel, so decoding at full resolution and reading at the token grid equals reading nine shifted low-dimensional maps at
the token grid and multiplying each token's 9 D numbers with one E x 9 D matrix.

A patch grid (h, w) divides the image into h x w equal cells. `bilinear` reads what `F.interpolate(mode="bilinear",
align_corners=False, antialias=False)` computes: the two nearest pixel rows and columns of each cell centre. `area` is
the average over the cell, pixels on its border counted by the part inside. Both are separable, so a reading is one
short run of pixel rows per token row, one run of columns per token column, and their weights.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fit3d_ns.rasterization import rasterize_features

PixelValues = Float[Tensor, "*batch pixels channels"]
TokenVector = Float[Tensor, " embed"]
TokenReadingRule = Literal["bilinear", "area"]
NUM_TAPS = 9
"""Pixels under the 3x3 kernel."""


@dataclass(frozen=True)
class TokenAxis:
    """Which rows of an image the rows of a token grid read, and how; or its columns."""

    read: Int[Tensor, " read"]
    """Image rows that are read, ascending."""
    index: Int[Tensor, "tokens run"]
    """Which of the read rows each token row needs: a run of them; an index into `read`, not into the image."""
    weights: Float[Tensor, "3 tokens run"]
    """Their weights, float64, for the map shifted by one row down (tap 0), not at all, and one row up (tap 2)."""

    def gather(self, values: Tensor, dim: int) -> Tensor:
        """The run of each token in the place of the read rows, which are along `dim`."""
        runs = values.index_select(dim, self.index.flatten().to(values.device))
        return runs.unflatten(dim, self.index.shape)


@dataclass(frozen=True)
class TokenReader:
    """Reads maps of one image size at one token grid; made by `create_token_reader`."""

    pixels: Int[Tensor, "pixels 2"]
    """(row, col) of every pixel that is read: all pairs of some rows and some columns, rows first."""
    rows: TokenAxis
    columns: TokenAxis

    def blend(
        self, features: Float[Tensor, "num_gaussians channels"], info: dict[str, Any]
    ) -> Float[Tensor, "num_cameras pixels channels"]:
        """`rasterize_features` at `pixels`, or at once where these are all of the image."""
        if len(self.pixels) == int(info["width"]) * int(info["height"]):
            return rasterize_features(features, info).flatten(1, 2)
        return rasterize_features(features, info, pixels=self.pixels.to(features.device))

    def gather(self, maps: Float[Tensor, "*batch height width channels"]) -> PixelValues:
        """The values of full maps at `pixels`."""
        picked = maps.index_select(-3, self.rows.read.to(maps.device))
        return picked.index_select(-2, self.columns.read.to(maps.device)).flatten(-3, -2)

    def read(self, values: PixelValues) -> Float[Tensor, "*batch h w channels"]:
        """The token values of a map that is known at `pixels`."""
        return self._combine(values, slice(1, 2))[..., 0, :]

    def read_neighbourhoods(self, values: PixelValues) -> Float[Tensor, "*batch h w 9 channels"]:
        """The token values of the nine maps shifted by a 3x3 convolution's taps, zero outside the image.

        Tap `3 * ky + kx` is what the weight [ky, kx] multiplies. Needs a reader made with `neighbourhood=True`.
        """
        return self._combine(values, slice(0, 3))

    def _combine(self, values: PixelValues, taps: slice) -> Float[Tensor, "*batch h w taps channels"]:
        rows, columns = (axis.weights[taps].to(values) for axis in (self.rows, self.columns))
        grid = values.unflatten(-2, (len(self.rows.read), len(self.columns.read)))
        # y, x: taps; h, w: tokens; r, k: pixel rows and columns of each
        by_row = torch.einsum("...hrkc,yhr->...hykc", self.rows.gather(grid, -3), rows)
        read = torch.einsum("...hywkc,xwk->...hwyxc", self.columns.gather(by_row, -2), columns)
        return read.flatten(-3, -2)


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


class FeatureDecoder(nn.Module):
    """One 3x3 convolution, zero padding 1, with a bias that is weighted by the accumulated opacity."""

    def __init__(self, feature_dim: int, embed_dim: int, bias: bool = False):
        """Starts from PyTorch's default convolution weights, as the public code does; `from_pca` is the other start.

        The paper's code has no bias.
        """
        super().__init__()
        convolution = nn.Conv2d(feature_dim, embed_dim, 3, padding=1, bias=bias)
        self.weight = nn.Parameter(convolution.weight.detach().clone())
        self.bias = nn.Parameter(torch.zeros(embed_dim)) if bias else None

    @classmethod
    def from_weights(cls, weight: Float[Tensor, "embed dim 3 3"], bias: TokenVector | None = None) -> "FeatureDecoder":
        """A decoder with given weights (copied), on their device and in their dtype."""
        decoder = cls.__new__(cls)
        nn.Module.__init__(decoder)
        decoder.weight = nn.Parameter(weight.detach().clone())
        decoder.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return decoder

    @classmethod
    def from_matrix(cls, matrix: Float[Tensor, "taps_dim embed"], bias: TokenVector | None = None) -> "FeatureDecoder":
        """A decoder from the solution of a regression on `read_neighbourhoods` (its last two axes flattened)."""
        # (9*d, e) -> (3, 3, d, e) -> (e, d, 3, 3)
        weight = matrix.reshape(3, 3, -1, matrix.shape[1]).permute(3, 2, 0, 1)
        return cls.from_weights(weight.contiguous(), bias)

    @classmethod
    def from_pca(cls, components: Float[Tensor, "dim embed"], mean: TokenVector) -> "FeatureDecoder":
        """Decodes PCA coefficients: centre tap = components, bias = mean, all other taps zero."""
        weight = components.new_zeros(components.shape[1], components.shape[0], 3, 3)
        weight[:, :, 1, 1] = components.T
        return cls.from_weights(weight, mean)

    def copy_to(self, device: torch.device | str) -> "FeatureDecoder":
        """A copy on another device, or the same one."""
        bias = None if self.bias is None else self.bias.to(device)
        return FeatureDecoder.from_weights(self.weight.to(device), bias)

    @property
    def feature_dim(self) -> int:
        return self.weight.shape[1]

    @property
    def embed_dim(self) -> int:
        return self.weight.shape[0]

    @property
    def matrix(self) -> Float[Tensor, "taps_dim embed"]:
        """The weights as the matrix that multiplies a token's flattened neighbourhood; differentiable."""
        return self.weight.permute(2, 3, 1, 0).reshape(NUM_TAPS * self.feature_dim, self.embed_dim)

    def forward(
        self,
        features_low: Float[Tensor, "*batch height width dim"],
        alphas: Float[Tensor, "*batch height width"] | None = None,
    ) -> Float[Tensor, "*batch height width embed"]:
        """Decodes full maps of features that are not divided by alpha; a bias needs `alphas`, 0 to 1, to weight it."""
        self._check(features_low.shape[-1], alphas)
        batch = features_low.shape[:-3]
        # (*b, h, w, d) -> (b, d, h, w)
        maps = features_low.reshape(-1, *features_low.shape[-3:]).permute(0, 3, 1, 2)
        decoded = F.conv2d(maps, self.weight, padding=1).permute(0, 2, 3, 1)
        decoded = decoded.reshape(*batch, *decoded.shape[1:])
        if self.bias is not None and alphas is not None:
            decoded = decoded + alphas[..., None] * self.bias
        return decoded

    def decode_pixels(
        self,
        features_low: Float[Tensor, "*batch pixels dim"],
        alphas: Float[Tensor, "*batch pixels"] | None,
        reader: TokenReader,
    ) -> Float[Tensor, "*batch h w embed"]:
        """What `forward` and then reading at the token grid give, from features at `reader.pixels` only."""
        self._check(features_low.shape[-1], alphas)
        decoded = reader.read_neighbourhoods(features_low).flatten(-2, -1) @ self.matrix
        if self.bias is not None and alphas is not None:
            decoded = decoded + reader.read(alphas[..., None]) * self.bias
        return decoded

    def project(self, components: Float[Tensor, "components embed"], mean: TokenVector) -> "FeatureDecoder":
        """The decoder of `(F_high - alpha * mean) @ components.T`: a few channels, without ever decoding all E.

        Projection after a convolution is a convolution. The mean is weighted by alpha, so an empty pixel stays zero;
        where alpha is 1 this is the plain projection.
        """
        weight = torch.einsum("ce,edyx->cdyx", components, self.weight)
        bias = -mean if self.bias is None else self.bias - mean
        return FeatureDecoder.from_weights(weight, components @ bias)

    def decode_before_rendering(
        self, features: Float[Tensor, "num_gaussians dim"]
    ) -> tuple[Float[Tensor, "num_gaussians taps"], "FeatureDecoder"]:
        """Gaussians' own parts of what this decoder makes, and the decoder that sums them up after rendering.

        Rendering and convolution are linear, so either may come first. With E channels out, 9 E are rendered instead of
        D: for pictures of three channels that is less than half of the usual 64, with the same result.
        """
        taps = self.weight.shape[0] * 9
        own = torch.einsum("nd,edyx->neyx", features, self.weight).reshape(-1, taps)
        # Output e reads of its nine channels each at its own neighbour.
        reads = torch.eye(taps, device=own.device, dtype=own.dtype).reshape(-1, 9, taps).transpose(1, 2)
        return own, FeatureDecoder.from_weights(reads.reshape(-1, taps, 3, 3), self.bias)

    def _check(self, channels: int, alphas: Tensor | None) -> None:
        if channels != self.feature_dim:
            raise ValueError(f"The decoder takes {self.feature_dim} channels, the features have {channels}.")
        if self.bias is not None and alphas is None:
            raise ValueError("This decoder has a bias, which is weighted by alpha: give `alphas` too.")


def _create_axis(
    length: int, num_tokens: int, rule: TokenReadingRule, neighbourhood: bool, device: torch.device | str
) -> TokenAxis:
    # [tokens, length]; beyond the outermost pixels' centres, both neighbours of a token are that pixel.
    weights = F.interpolate(torch.eye(length, dtype=torch.float64)[None], num_tokens, mode="linear")[0].T
    if rule == "area":
        weights = _weigh_area(length, num_tokens)
    # Kernel tap 0 multiplies the pixel before, tap 2 the pixel after; the convolution pads with zeros.
    taps = torch.stack([F.pad(weights[:, 1:], (0, 1)), weights, F.pad(weights[:, :-1], (1, 0))])
    needed = ((taps if neighbourhood else weights[None]) != 0).any(dim=0)
    read = needed.any(dim=0).nonzero()[:, 0]
    run = int(needed.sum(dim=1).max())
    # As long as the longest everywhere, moved inwards at the end.
    first = needed[:, read].int().argmax(dim=1).clamp(max=len(read) - run)
    index = first[:, None] + torch.arange(run)
    return TokenAxis(read.to(device), index.to(device), taps[:, :, read].gather(2, index.expand(3, -1, -1)).to(device))


def _weigh_area(length: int, num_tokens: int) -> Float[Tensor, "tokens length"]:
    """The share of each token's cell that each pixel covers."""
    cell = length / num_tokens
    starts = torch.arange(num_tokens, dtype=torch.float64)[:, None] * cell
    shares = torch.arange(length + 1, dtype=torch.float64).clamp(starts, starts + cell).diff(dim=1)
    # Rounding leaves slivers of a pixel that must not be read.
    shares = torch.where(shares > 1e-9, shares, 0.0)
    return shares / shares.sum(dim=1, keepdim=True)
