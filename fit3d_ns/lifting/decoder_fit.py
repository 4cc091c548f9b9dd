"""Between tokens and features: the PCA basis that features live in, and the fit of the 3x3 decoder, in closed form.

A token t [E] has coordinates z = (t - mean) @ components.T [D] in the basis. The decoder is a ridge regression that
explains each token by x [9 D (+ 1)]: the nine shifted rendered maps read at the token (`scene.TokenReader`) and, with a
bias, the alpha read there. That is what `FeatureDecoder.decode_pixels` multiplies. The sums of x x^T and x t^T are all
that a fit needs, so those of several scenes add up to one decoder for all of them.
"""

import math
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.analysis.pca import PcaAccumulator, PcaBasis
from fit3d_ns.lifting.token_spreading import sum_over_cells
from fit3d_ns.scene.feature_decoder import NUM_TAPS, FeatureDecoder

# Neighbouring pixels are nearly collinear, and the sums carry float32 rounding: below this the fit is not definite.
_SMALLEST_RIDGE = 1e-6


def add_view_tokens(
    sums: PcaAccumulator, tokens: Float[Tensor, "h w embed"], mask: Float[Tensor, "height width"]
) -> None:
    """Counts a view's tokens, each by the share of its patch that lies under the valid mask."""
    grid = (tokens.shape[0], tokens.shape[1])
    pixels = mask[..., None]
    covered = sum_over_cells(pixels, grid) / sum_over_cells(torch.ones_like(pixels), grid).clamp(min=1.0)
    sums.add(tokens, covered[..., 0])


def fit_token_basis(tokens: PcaAccumulator, feature_dim: int, *, centred: bool = True) -> PcaBasis:
    """The `feature_dim` leading principal directions of accumulated tokens.

    Without `centred` the mean stays zero and most of the second moment is kept instead of the variance, for decoders
    without a bias. ValueError where no token was counted, or `feature_dim` exceeds the tokens' width.
    """
    if not tokens.sum_weights > 0:
        raise ValueError("No token lies under a valid mask, so there is nothing to fit a basis to; check the masks.")
    if centred:
        return tokens.finish(feature_dim)
    uncentred = copy(tokens)
    uncentred.sum_features = torch.zeros_like(tokens.sum_features)
    return uncentred.finish(feature_dim)


@dataclass
class DecoderStatistics:
    """Normal equations of the decoder fit, float64."""

    regressors: Float[Tensor, "inputs inputs"]
    """Sum of w x x^T."""
    products: Float[Tensor, "inputs embed"]
    """Sum of w x t^T."""

    @classmethod
    def create(
        cls, feature_dim: int, embed_dim: int, *, bias: bool, device: torch.device | str = "cpu"
    ) -> "DecoderStatistics":
        """Normal equations of no token."""
        num_inputs = NUM_TAPS * feature_dim + int(bias)
        return cls(
            torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device),
            torch.zeros(num_inputs, embed_dim, dtype=torch.float64, device=device),
        )

    def add(
        self,
        neighbourhoods: Float[Tensor, "h w 9 dim"],
        alphas: Float[Tensor, "h w"],
        tokens: Float[Tensor, "h w embed"],
        weights: Float[Tensor, "h w"],
    ) -> None:
        """Counts one view's tokens, each with a weight of 0 or above; alphas and features are read at the tokens."""
        # (h, w, 9, d) -> (h*w, 9*d)
        inputs = neighbourhoods.flatten(0, 1).flatten(1)
        if self.regressors.shape[0] > inputs.shape[1]:
            inputs = torch.cat([inputs, alphas.reshape(-1, 1)], dim=1)
        weighted = inputs * weights.reshape(-1, 1)
        # Products in float32, sums over views in float64: one view adds few terms.
        self.regressors += weighted.T @ inputs
        self.products += weighted.T @ tokens.flatten(0, 1)


def fit_decoder(statistics: Iterable[DecoderStatistics], basis: PcaBasis, ridge: float) -> FeatureDecoder:
    """The decoder of least squared error for all scenes that were lifted on `basis`, pulled towards the PCA decoder.

    `ridge` is the pull as a fraction of the mean squared regressor, 0 or above; below 1e-6 it acts as 1e-6, and
    infinity gives the PCA decoder.
    """
    remaining = iter(statistics)
    total = next(remaining)
    for other in remaining:
        total = DecoderStatistics(total.regressors + other.regressors, total.products + other.products)
    num_weights = NUM_TAPS * len(basis.components)
    has_bias = len(total.products) > num_weights
    # The decoder that reads the basis back: centre tap = components, bias = mean.
    start = FeatureDecoder.from_pca(basis.components, basis.mean).matrix.detach()
    start = (torch.cat([start, basis.mean[None]]) if has_bias else start).to(total.products)
    if math.isinf(ridge):
        solution = start
    else:
        diagonal = total.regressors.diagonal()
        penalty = torch.full_like(diagonal, float(diagonal[:num_weights].mean()))
        # The bias multiplies alpha, whose scale has nothing to do with the features'.
        penalty[num_weights:] = diagonal[num_weights:]
        matrix = total.regressors + torch.diag(max(ridge, _SMALLEST_RIDGE) * penalty.clamp(min=1e-12))
        change = torch.cholesky_solve(total.products - total.regressors @ start, torch.linalg.cholesky(matrix))
        solution = start + change
    bias = solution[-1].float() if has_bias else None
    return FeatureDecoder.from_matrix(solution[:num_weights].float(), bias)
