"""Held-out figures of a lift: decoded rendered features against the tokens of views that took no part."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.lifting.blending import prepare_view
from fit3d_ns.lifting.config import ReadingRule
from fit3d_ns.lifting.inputs import LiftGaussians, LiftView
from fit3d_ns.rasterization import rasterize_features
from fit3d_ns.scene.feature_decoder import FeatureDecoder
from fit3d_ns.scene.token_reading import create_token_reader


@dataclass(frozen=True)
class FeatureMetrics:
    """Means over all counted tokens of all views."""

    feature_l1: float
    """Absolute difference per channel, in units of the tokens."""
    feature_cosine: float
    """Cosine similarity, -1 to 1."""
    mean_token_l1: float
    """What predicting one constant token everywhere gives; a lift must be below."""
    mean_token_cosine: float
    """What predicting one constant token everywhere gives; a lift must be above."""
    num_tokens: int
    """Tokens counted."""


@torch.no_grad()
def evaluate_features(
    gaussians: LiftGaussians,
    features: Float[Tensor, "num_gaussians dim"],
    decoder: FeatureDecoder,
    views: Sequence[LiftView],
    mean_token: Float[Tensor, " embed"],
    *,
    token_reading: ReadingRule,
    smallest_alpha: float = 0.5,
    smallest_mask: float = 0.5,
) -> FeatureMetrics:
    """Compares at the token grid, over tokens whose alpha and mask, read there, exceed the thresholds.

    Args:
        views: Views that the lift has not seen.
        token_reading: How the map is read, `LiftConfig.token_reading` of the lift.
        mean_token: The mean token of the views that it has seen, for the baseline; `LiftResult.basis.mean`.

    Raises:
        ValueError: No token is covered in any view.
    """
    totals = torch.zeros(5, dtype=torch.float64, device=features.device)
    valid = gaussians.find_valid()
    gaussians, features = gaussians.select(valid), features[valid]
    for view in views:
        prepared = prepare_view(gaussians, view)
        reader = create_token_reader(view.width, view.height, prepared.grid, token_reading)
        features_low = rasterize_features(features, prepared.info, pixels=reader.pixels.to(features.device))[0]
        decoded = decoder.decode_pixels(features_low, reader.gather(prepared.alphas[..., None])[..., 0], reader)
        maps = torch.stack([prepared.alphas, prepared.mask], dim=-1)
        alphas, mask = reader.read(reader.gather(maps)).unbind(dim=-1)
        counted = (alphas > smallest_alpha) & (mask > smallest_mask)
        predicted, expected = decoded[counted], prepared.tokens[counted]
        constant = mean_token.to(expected).expand_as(expected)
        figures = [_sum_l1(predicted, expected), _sum_cosine(predicted, expected)]
        figures += [_sum_l1(constant, expected), _sum_cosine(constant, expected), counted.sum()]
        totals += torch.stack([figure.double() for figure in figures])
    num_tokens = int(totals[-1])
    if num_tokens == 0:
        raise ValueError("No token of the evaluated views is covered by Gaussians and mask; check the cameras.")
    l1, cosine, mean_token_l1, mean_token_cosine = (totals[:-1] / num_tokens).tolist()
    return FeatureMetrics(l1, cosine, mean_token_l1, mean_token_cosine, num_tokens)


def _sum_l1(predicted: Float[Tensor, "n embed"], expected: Float[Tensor, "n embed"]) -> Float[Tensor, ""]:
    return (predicted - expected).abs().mean(dim=-1).sum()


def _sum_cosine(predicted: Float[Tensor, "n embed"], expected: Float[Tensor, "n embed"]) -> Float[Tensor, ""]:
    return torch.nn.functional.cosine_similarity(predicted, expected, dim=-1).sum()
