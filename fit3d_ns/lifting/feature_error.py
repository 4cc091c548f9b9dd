"""How far decoded rendered features are from the backbone's tokens: `FeatureLoss` to train, `FeatureMetrics` to report.

The loss is taken on a grid of `multiple` x the token grid, which needs only the pixels around its points, or at image
size as in the paper (section 3.1). Its weights are the mask, times alpha with `alpha_weighting`; alpha is detached, so
a loss never gains by making a pixel empty. Metrics are means over the *covered* tokens: those whose alpha and mask,
read as the features are read, exceed one half.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.lifting.token_spreading import TokenSpreadingRule, spread_tokens
from fit3d_ns.lifting.views import LiftView
from fit3d_ns.rasterization import rasterize_features
from fit3d_ns.scene.feature_decoder import FeatureDecoder, TokenReader, TokenReadingRule, create_token_reader
from fit3d_ns.scene.gaussians import ActivatedGaussians
from fit3d_ns.utils.limits import Limited, Limits

COVERED = 0.5
"""Tokens with no more rendered alpha, or no more valid area, than this are not compared."""


@dataclass(frozen=True)
class FeatureLossConfig(Limited):
    """Where and how rendered features are compared with tokens."""

    multiple: Annotated[int, Limits(at_least=0)] = 2
    """The loss grid is this many times as fine as the token grid, 1 and above; 0 takes the loss at every pixel of the
    image (paper section 3.1)."""
    token_to_pixel: TokenSpreadingRule = "bilinear"
    """How tokens are spread over a finer grid: `bilinear` (paper section 3.1), `nearest` and `area` hold them constant
    over their patch."""
    token_reading: TokenReadingRule = "bilinear"
    """How rendered features are read at the grid's points: sampled there (paper), or the mean of each cell."""
    alpha_weighting: bool = True
    """Weight each point by its rendered alpha; the paper weighs all alike."""


class FeatureLoss:
    """The loss for images and token grids of one size."""

    def __init__(
        self, width: int, height: int, patch_grid: tuple[int, int], config: FeatureLossConfig, device: torch.device
    ):
        self.config = config
        self.size = (height, width)
        self.reader: TokenReader | None = None
        if config.multiple > 0:
            self.size = (config.multiple * patch_grid[0], config.multiple * patch_grid[1])
            self.reader = create_token_reader(width, height, self.size, config.token_reading, device=device)

    def blend(
        self, features: Float[Tensor, "num_gaussians dim"], info: dict[str, Any]
    ) -> Float[Tensor, "height width dim"] | Float[Tensor, "pixels dim"]:
        """What `compute` needs of the features of a projection's first camera; differentiable by the features."""
        return rasterize_features(features, info)[0] if self.reader is None else self.reader.blend(features, info)[0]

    def compute(
        self,
        features_low: Float[Tensor, "height width dim"] | Float[Tensor, "pixels dim"],
        alphas: Float[Tensor, "height width"],
        decoder: FeatureDecoder,
        patch_tokens: Float[Tensor, "h w embed"],
        valid_mask: Bool[Tensor, "height width"] | Float[Tensor, "height width"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean absolute difference over the weighted points and all channels; zero where nothing is valid.

        Args:
            features_low: Rendered features, of the whole image or what `blend` gives.
            alphas: Rendered opacity of the whole image, 0 to 1; no gradient passes through it.
            valid_mask: True, or a weight above 0, where pixels count.
        """
        alphas = alphas.detach()
        mask = torch.ones_like(alphas) if valid_mask is None else valid_mask.to(alphas)
        weights = mask * alphas if self.config.alpha_weighting else mask
        if self.reader is None:
            decoded = decoder(features_low, alphas)
        else:
            at_pixels = features_low if features_low.ndim == 2 else self.reader.gather(features_low)
            decoded = decoder.decode_pixels(at_pixels, self.reader.gather(alphas[..., None])[..., 0], self.reader)
            weights = self.reader.read(self.reader.gather(weights[..., None]))[..., 0]
        target = spread_tokens(patch_tokens, self.size[1], self.size[0], self.config.token_to_pixel)
        return compute_masked_l1(decoded, target, weights)


def compute_masked_l1(
    predicted: Float[Tensor, "*batch embed"], target: Float[Tensor, "*batch embed"], weights: Float[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """sum(weights |predicted - target|) / (sum(weights) E); zero, with gradients, where all weights are zero."""
    distance = (predicted - target).abs().mean(dim=-1)
    return (distance * weights).sum() / weights.sum().clamp(min=1e-8)


@dataclass(frozen=True)
class FeatureMetrics:
    """Means over all covered tokens of all views; NaN where there is none."""

    feature_l1: float
    """Absolute difference per channel, in units of the tokens."""
    feature_cosine: float
    """Cosine similarity, -1 to 1."""
    mean_token_l1: float
    """What predicting one constant token everywhere gives; a lift must be below."""
    mean_token_cosine: float
    """What predicting one constant token everywhere gives; a lift must be above."""
    num_tokens: int
    """Covered tokens."""

    @classmethod
    def from_sums(cls, sums: Float[Tensor, "5"]) -> "FeatureMetrics":
        """The metrics of what `sum_view_errors` gave, of one view or added up over several."""
        num_tokens = int(sums[-1])
        if num_tokens == 0:
            return cls(math.nan, math.nan, math.nan, math.nan, 0)
        l1, cosine, mean_token_l1, mean_token_cosine = (sums[:-1] / num_tokens).tolist()
        return cls(l1, cosine, mean_token_l1, mean_token_cosine, num_tokens)


@torch.no_grad()
def sum_view_errors(
    features: Float[Tensor, "num_gaussians dim"],
    info: dict[str, Any],
    decoder: FeatureDecoder,
    tokens: Float[Tensor, "h w embed"],
    mask: Float[Tensor, "height width"],
    mean_token: Float[Tensor, " embed"],
    token_reading: TokenReadingRule,
) -> Float[Tensor, "5"]:
    """Sums over the covered tokens of a projected view, float64, in the order of the fields of `FeatureMetrics`.

    The mask is 0 to 1, `mean_token` is the constant token of the baseline.
    """
    height, width = mask.shape
    size = (width, height, (tokens.shape[0], tokens.shape[1]))
    reader = create_token_reader(*size, token_reading, device=features.device)
    # Opacity is the blend of ones.
    low, alphas = reader.blend(F.pad(features, (0, 1), value=1.0), info)[0].tensor_split([-1], dim=-1)
    predicted = decoder.decode_pixels(low, alphas[..., 0], reader)
    read = reader.read(torch.cat([alphas, reader.gather(mask[..., None])], dim=-1))
    covered = (read > COVERED).all(dim=-1)
    expected = tokens[covered]
    sums = []
    for guess in (predicted[covered], mean_token.to(expected).expand_as(expected)):
        sums.append((guess - expected).abs().mean(dim=-1).sum())
        sums.append(F.cosine_similarity(guess, expected, dim=-1).sum())
    return torch.stack([value.double() for value in (*sums, covered.sum())])


@torch.no_grad()
def evaluate_features(
    gaussians: ActivatedGaussians,
    features: Float[Tensor, "num_gaussians dim"],
    decoder: FeatureDecoder,
    views: Sequence[LiftView],
    mean_token: Float[Tensor, " embed"],
    *,
    token_reading: TokenReadingRule,
) -> FeatureMetrics:
    """Renders views that a lift has not seen and compares them with their tokens, read by the lift's `token_reading`.

    The baseline's `mean_token` is that of the views that the lift has seen, `LiftResult.basis.mean`.
    """
    device = features.device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    valid = gaussians.find_valid()
    gaussians, features = gaussians.select(valid), features[valid]
    for view in views:
        info = gaussians.project(view.camera)
        tokens, mask = view.read_tokens(device), view.read_mask(device)
        sums += sum_view_errors(features, info, decoder, tokens, mask, mean_token, token_reading)
    return FeatureMetrics.from_sums(sums)
