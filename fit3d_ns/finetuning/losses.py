"""The feature loss and its normalisation: one mean over all tokens of all processes and accumulated batches.

    L = sum of w |f - F| / (C sum of w)

over the tokens of one optimizer step; w are the targets' weights, C the channels (public code: masked L1). Sums are
taken locally and divided by the global sum of weights, so that two processes give what one with twice the batch does.
"""

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_WEIGHT = 1e-8
"""Steps of less total weight have no valid token; their loss is zero."""


def compute_l1_sum(
    tokens: Float[Tensor, "batch patches embed"],
    targets: Float[Tensor, "batch patches embed"],
    weights: Float[Tensor, "batch patches"],
) -> Float[Tensor, " batch"]:
    """Sum over tokens of weight times mean absolute difference, per image, in float32."""
    distance = (tokens.float() - targets.float()).abs().mean(dim=-1)
    # Where nothing counts nothing may leak either: 0 * NaN is NaN.
    return torch.where(weights > 0, distance * weights, 0.0).sum(dim=-1)


def compute_cosine_sum(
    tokens: Float[Tensor, "batch patches embed"],
    targets: Float[Tensor, "batch patches embed"],
    weights: Float[Tensor, "batch patches"],
) -> Float[Tensor, " batch"]:
    """Sum over tokens of weight times cosine similarity, per image, in float32."""
    cosine = torch.nn.functional.cosine_similarity(tokens.float(), targets.float(), dim=-1)
    return torch.where(weights > 0, cosine * weights, 0.0).sum(dim=-1)
