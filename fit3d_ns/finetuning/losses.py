"""The loss of stage II: distance to the targets, and terms that hold the backbone near the original (off by default).

The feature loss is one mean over all tokens of all processes and accumulated batches of an optimizer step,

    L = sum of w |f - F| / (C sum of w),

where w are the targets' weights, C the channels (public code: masked L1). Sums are taken locally and divided by the
global sum of weights, so that two processes give what one with twice the batch does.

`AnchorConfig` says what the anchors are; L2-SP is Xuhong et al.'s (ICML 2018), WiSE-FT Wortsman et al.'s (CVPR 2022).
Of tokens before the final norm, a normed one y = g (x - m) / s + b tells x up to its mean m and deviation s; with those
of the original on the same image the target is x* = s (F - b) / g + m.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.finetuning.optimization import AnchorConfig, TokenOutputs

SMALLEST_WEIGHT = 1e-8
"""Steps of less total weight have no valid token; it counts instead, and their loss is zero."""


@dataclass(frozen=True)
class StepTotals:
    """What sums of one optimizer step are divided by: totals over all processes and accumulated batches.

    They are the sum of the targets' weights, the number of patch tokens, valid or not, and that of images.
    """

    weight: float
    num_tokens: float
    num_images: float


def compute_l1_sum(
    tokens: Float[Tensor, "batch patches embed"],
    targets: Float[Tensor, "batch patches embed"],
    weights: Float[Tensor, "batch patches"],
) -> Float[Tensor, " batch"]:
    """Sum over tokens of weight times mean absolute difference, per image, in float32."""
    distance = (tokens.float() - targets.float()).abs().mean(dim=-1)
    # Where nothing counts nothing may leak in either: 0 * NaN is NaN.
    return torch.where(weights > 0, distance * weights, 0.0).sum(dim=-1)


def compute_token_anchors(
    outputs: TokenOutputs,
    original: TokenOutputs,
    targets: Float[Tensor, "batch patches embed"],
    weights: Float[Tensor, "batch patches"],
    config: AnchorConfig,
    totals: StepTotals,
    norm: nn.Module,
) -> Float[Tensor, ""]:
    """The local part of all terms on tokens, normalised by the totals.

    `original` are the original backbone's tokens of the same images, without gradient, and `norm` is its final norm.
    """
    total = outputs.patch_tokens.new_zeros((), dtype=torch.float32)
    if config.feature_anchor > 0:
        kept = compute_l1_sum(outputs.patch_tokens, original.patch_tokens, torch.ones_like(weights)).sum()
        total = total + config.feature_anchor * kept / totals.num_tokens
    if config.prefix_anchor > 0 and outputs.prefix_tokens.shape[1] > 0:
        number = totals.num_images * outputs.prefix_tokens.shape[1]
        ones = weights.new_ones(outputs.prefix_tokens.shape[:2])
        kept = compute_l1_sum(outputs.prefix_tokens, original.prefix_tokens, ones).sum()
        kept = kept + compute_l1_sum(outputs.unnormed_prefix_tokens, original.unnormed_prefix_tokens, ones).sum()
        total = total + config.prefix_anchor * kept / number
    if config.pre_norm > 0:
        moved = invert_norm(targets, original.unnormed_patch_tokens, norm)
        lost = compute_l1_sum(outputs.unnormed_patch_tokens, moved, weights).sum()
        total = total + config.pre_norm * lost / totals.weight
    return total


@torch.no_grad()
def invert_norm(
    normed: Float[Tensor, "*batch embed"], unnormed: Float[Tensor, "*batch embed"], norm: nn.Module
) -> Float[Tensor, "*batch embed"]:
    """Tokens before a LayerNorm whose result is `normed`, with mean and deviation of the tokens `unnormed`.

    Another kind of norm raises ValueError.
    """
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"Supervision before the final norm needs LayerNorm, the backbone has {type(norm).__name__}.")
    normed, unnormed = normed.float(), unnormed.float()
    mean = unnormed.mean(dim=-1, keepdim=True)
    deviation = (unnormed.var(dim=-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    if norm.bias is not None:
        normed = normed - norm.bias.float()
    if norm.weight is not None:
        gain = norm.weight.float()
        # A channel that the norm silences tells nothing; it keeps the original's value.
        is_silent = gain.abs() < 1e-6
        normed = torch.where(is_silent, (unnormed - mean) / deviation, normed / torch.where(is_silent, 1.0, gain))
    return normed * deviation + mean


def compute_l2_sp(module: nn.Module, original: dict[str, Tensor], strength: float) -> Float[Tensor, ""]:
    """strength / 2 * squared distance of parameters from their values in `original` (by name)."""
    parameters = dict(module.named_parameters())
    distances = [(parameters[name] - value).float().square().sum() for name, value in original.items()]
    return 0.5 * strength * torch.stack(distances).sum()
