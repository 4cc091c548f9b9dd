"""Feature losses for the gradient way: masked L1 between decoded rendered features and the backbone's tokens.

The loss is taken on a grid of `multiple` x the token grid, which needs only the pixels around its points, or at image
size as in the paper (section 3.1). Weights are mask, times alpha if accumulation-aware; alpha is detached, so a loss
never gains by making a pixel empty.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fit3d_ns.lifting.config import ReadingRule, SpreadingRule
from fit3d_ns.lifting.token_grid import spread_tokens
from fit3d_ns.scene.feature_decoder import FeatureDecoder
from fit3d_ns.scene.token_reading import TokenReader, create_token_reader


@dataclass(frozen=True)
class FeatureLossConfig:
    """Where and how rendered features are compared with tokens."""

    multiple: int = 2
    """The loss grid is this many times as fine as the token grid, 1 and above; 0 takes the loss at every pixel of the
    image (paper section 3.1)."""
    token_to_pixel: SpreadingRule = "bilinear"
    """How tokens are spread over a finer grid: `bilinear` (paper section 3.1), `nearest` and `area` hold them constant
    over their patch."""
    token_reading: ReadingRule = "bilinear"
    """How rendered features are read at the grid's points: sampled there (paper), or the mean of each cell."""
    accumulation_aware: bool = True
    """Weight each point by its rendered alpha; the paper weighs all alike."""

    def __post_init__(self) -> None:
        if self.multiple < 0:
            raise ValueError(f"The loss multiple is {self.multiple}; choose 1 or above, or 0 for image size.")


class FeatureLoss:
    """The loss for images and token grids of one size."""

    def __init__(self, width: int, height: int, patch_grid: tuple[int, int], config: FeatureLossConfig):
        """Args:
        width: Image width in pixels.
        height: Image height in pixels.
        patch_grid: Token grid (h, w).
        """
        self.width = width
        self.height = height
        self.config = config
        self.size = (height, width)
        self._reader: TokenReader | None = None
        if config.multiple > 0:
            self.size = (config.multiple * patch_grid[0], config.multiple * patch_grid[1])
            self._reader = create_token_reader(width, height, self.size, config.token_reading)

    @property
    def pixels(self) -> Int[Tensor, "pixels 2"] | None:
        """(row, col) of the pixels the loss needs, for `rasterize_features`; None where it needs the whole image."""
        return None if self._reader is None else self._reader.pixels

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
            features_low: Rendered features, of the whole image or at `pixels`.
            alphas: Rendered opacity of the whole image, 0 to 1; no gradient passes through it.
            decoder: From rendered features to tokens.
            patch_tokens: The original backbone's tokens of this view.
            valid_mask: True, or a weight above 0, where pixels count.
        """
        alphas = alphas.detach()
        mask = torch.ones_like(alphas) if valid_mask is None else valid_mask.to(alphas)
        weights = mask * alphas if self.config.accumulation_aware else mask
        if self._reader is None:
            decoded = decoder(features_low, alphas)
        else:
            at_pixels = features_low if features_low.ndim == 2 else self._reader.gather(features_low)
            decoded = decoder.decode_pixels(at_pixels, self._reader.gather(alphas[..., None])[..., 0], self._reader)
            weights = self._reader.read(self._reader.gather(weights[..., None]))[..., 0]
        target = spread_tokens(patch_tokens, self.size[1], self.size[0], self.config.token_to_pixel)
        return compute_masked_l1(decoded, target, weights)


def compute_masked_l1(
    predicted: Float[Tensor, "*batch embed"], target: Float[Tensor, "*batch embed"], weights: Float[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """sum(weights |predicted - target|) / (sum(weights) E); zero, with gradients, where all weights are zero."""
    distance = (predicted - target).abs().mean(dim=-1)
    return (distance * weights).sum() / weights.sum().clamp(min=1e-8)
