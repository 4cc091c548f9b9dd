"""How alike tokens are to one of them."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def compute_similarity(
    tokens: Float[Tensor, "*batch embed"], query: Float[Tensor, " embed"], mean: Float[Tensor, " embed"] | None = None
) -> Float[Tensor, "*batch"]:
    """Cosine in [-1, 1] of every token to `query`; with `mean` both are taken relative to it."""
    if mean is not None:
        tokens, query = tokens - mean, query - mean
    return F.cosine_similarity(tokens, query.expand_as(tokens), dim=-1)


def pick_token(
    tokens: Float[Tensor, "h w embed"], point: tuple[float, float], width: int, height: int
) -> Float[Tensor, " embed"]:
    """The token whose patch holds the image point (x, y) in pixels.

    Raises:
        ValueError: The point lies outside the image.
    """
    x, y = point
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"Point ({x}, {y}) lies outside the {width}x{height} image.")
    return tokens[int(y * tokens.shape[0] / height), int(x * tokens.shape[1] / width)]


def map_similarity_to_colours(similarity: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch 3"]:
    """Blue for -1, white for 0, red for 1: the same in every picture."""
    positive, negative = similarity.clamp(0.0, 1.0), (-similarity).clamp(0.0, 1.0)
    return torch.stack([1.0 - negative, 1.0 - positive - negative, 1.0 - positive], dim=-1)
