"""`FeatureDecoder`: the 3x3 convolution from rendered low-dimensional features to the backbone's (paper, section 3.1).

`F_high = conv(F_low) + bias * alpha` with zero padding: an empty pixel decodes to zero. Maps are channels-last
[..., H, W, D], as the rasterizer returns them. Convolution and interpolation are both linear and act alike at every
pixel, so decoding at full resolution and reading at the token grid equals reading nine shifted low-dimensional maps at
the token grid and multiplying each token's 9 D numbers with one E x 9 D matrix.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fit3d_ns.scene.token_grid import TokenReader

NUM_TAPS = 9
"""Pixels under the 3x3 kernel."""


class FeatureDecoder(nn.Module):
    """One 3x3 convolution, zero padding 1, with a bias that is weighted by the accumulated opacity."""

    def __init__(self, feature_dim: int, embed_dim: int, bias: bool = False):
        """Starts from PyTorch's default convolution weights, as the public code does; `from_pca` is the other start.

        A dimension below 1 is a ValueError. The paper's code has no bias.
        """
        super().__init__()
        if feature_dim < 1 or embed_dim < 1:
            raise ValueError(f"Decoder from {feature_dim} to {embed_dim} channels: both must be at least 1.")
        convolution = nn.Conv2d(feature_dim, embed_dim, 3, padding=1, bias=bias)
        self.weight = nn.Parameter(convolution.weight.detach().clone())
        self.bias = nn.Parameter(torch.zeros(embed_dim)) if bias else None

    @classmethod
    def from_weights(
        cls, weight: Float[Tensor, "embed dim 3 3"], bias: Float[Tensor, " embed"] | None = None
    ) -> "FeatureDecoder":
        """A decoder with given weights (copied), on their device and in their dtype."""
        decoder = cls.__new__(cls)
        nn.Module.__init__(decoder)
        decoder.weight = nn.Parameter(weight.detach().clone())
        decoder.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return decoder

    @classmethod
    def from_matrix(
        cls, matrix: Float[Tensor, "taps_dim embed"], bias: Float[Tensor, " embed"] | None = None
    ) -> "FeatureDecoder":
        """A decoder from the solution of a regression on `read_neighbourhoods` (its last two axes flattened)."""
        # (9*d, e) -> (3, 3, d, e) -> (e, d, 3, 3)
        weight = matrix.reshape(3, 3, -1, matrix.shape[1]).permute(3, 2, 0, 1)
        return cls.from_weights(weight.contiguous(), bias)

    @classmethod
    def from_pca(cls, components: Float[Tensor, "dim embed"], mean: Float[Tensor, " embed"]) -> "FeatureDecoder":
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

    def project(self, components: Float[Tensor, "components embed"], mean: Float[Tensor, " embed"]) -> "FeatureDecoder":
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
