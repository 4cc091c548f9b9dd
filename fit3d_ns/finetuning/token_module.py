"""`TokenModule`: what accelerate wraps. Its `forward` takes the images of one batch and returns their tokens.

Everything the losses need comes out of the one `forward`, because calling another method of a wrapped module skips the
synchronisation of gradients in silence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.features import TokenModel


class TokenOutputs(NamedTuple):
    """Tokens of images of one size; a plain tuple, so that wrappers can convert it."""

    patch_tokens: Float[Tensor, "batch patches embed"]
    """After the final norm, if the backbone's description says so: what scenes were lifted from."""
    unnormed_patch_tokens: Float[Tensor, "batch patches embed"]
    """Before the final norm."""
    prefix_tokens: Float[Tensor, "batch prefix embed"]
    """As `patch_tokens`."""
    unnormed_prefix_tokens: Float[Tensor, "batch prefix embed"]
    """Before the final norm."""


class TokenModule(nn.Module):
    """A backbone with its preprocessing, for batches of images of several sizes."""

    def __init__(self, token_model: TokenModel) -> None:
        super().__init__()
        self.token_model = token_model

    def forward(self, groups: Sequence[Float[Tensor, "_ 3 _ _"]]) -> list[TokenOutputs]:
        """Tokens of each group of images; images of one group have one size, in [0, 1]."""
        return [compute_outputs(self.token_model, images) for images in groups]


def compute_outputs(token_model: TokenModel, images: Float[Tensor, "batch 3 height width"]) -> TokenOutputs:
    """All tokens of the last block that any loss reads."""
    description = token_model.description
    (unnormed,) = token_model.forward_unnormed(images, [description.num_blocks - 1])
    tokens = token_model.apply_norm(unnormed) if description.norm else unnormed
    return TokenOutputs(tokens.patch_tokens, unnormed.patch_tokens, tokens.prefix_tokens, unnormed.prefix_tokens)


def freeze_unreachable(module: TokenModule, loss_reads_prefix: bool, loss_reads_unnormed: bool) -> list[str]:
    """Freezes the parameters that the loss cannot reach, found by one backward pass on a small image.

    Args:
        loss_reads_prefix: The loss has a term on prefix tokens.
        loss_reads_unnormed: The loss has a term on tokens before the final norm.

    Returns:
        Names of the parameters that were frozen here.
    """
    parameter = next(module.parameters())
    side = 2 * module.token_model.description.patch_size
    image = torch.linspace(0.0, 1.0, 3 * side * side, device=parameter.device).reshape(1, 3, side, side)
    with torch.enable_grad():
        (outputs,) = module([image])
        total = outputs.patch_tokens.sum()
        if loss_reads_prefix:
            total = total + outputs.prefix_tokens.sum() + outputs.unnormed_prefix_tokens.sum()
        if loss_reads_unnormed:
            total = total + outputs.unnormed_patch_tokens.sum()
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(total, [parameter for _, parameter in named], allow_unused=True)
    frozen = [
        (name, parameter) for (name, parameter), gradient in zip(named, gradients, strict=True) if gradient is None
    ]
    for _, parameter in frozen:
        parameter.requires_grad_(False)
    return [name for name, _ in frozen]
