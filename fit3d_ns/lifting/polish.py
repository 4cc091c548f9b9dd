"""The polish: a short gradient phase on the L1 loss, from the closed-form solution, one view a step."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.lifting.blending import ViewBlender
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.feature_error import FeatureLoss, FeatureLossConfig
from fit3d_ns.lifting.reduction import sum_over_processes
from fit3d_ns.rasterization import rasterize_features
from fit3d_ns.scene.feature_decoder import FeatureDecoder
from fit3d_ns.utils.seeds import create_generator


@torch.enable_grad()
def polish_features(
    features: Float[Tensor, "num_gaussians dim"],
    decoder: FeatureDecoder,
    blender: ViewBlender,
    config: LiftConfig,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "num_gaussians dim"]:
    """Runs `config.polish_steps` steps of Adam on features and decoder; the step shrinks linearly to zero.

    Views are drawn in shuffled rounds from a generator of its own. With a `group`, each process takes a view of its
    share and the gradients are averaged.

    Returns:
        The polished features; `decoder` is changed in place.
    """
    features = features.clone().requires_grad_(True)
    scale = float(features.detach().square().mean().sqrt())
    decoder_scale = float(decoder.weight.detach().square().mean().sqrt())
    learning_rates = [config.polish_learning_rate * scale, config.polish_learning_rate * decoder_scale]
    parameters = list(decoder.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(
        [{"params": [features], "lr": learning_rates[0]}, {"params": parameters, "lr": learning_rates[1]}]
    )
    # At the tokens themselves, read as all later stages read them.
    loss_config = FeatureLossConfig(
        multiple=1,
        token_to_pixel=config.token_to_pixel,
        token_reading=config.token_reading,
        alpha_weighting=config.accumulation_aware,
    )
    generator = create_generator(0, "polish")
    num_processes = 1 if group is None else dist.get_world_size(group)
    order: list[int] = []
    for step in range(config.polish_steps):
        if not order:
            order = torch.randperm(len(blender.views), generator=generator).tolist()
        for param_group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
            param_group["lr"] = learning_rate * (1.0 - step / config.polish_steps)
        optimizer.zero_grad()
        _compute_loss(features, decoder, blender, order.pop(), loss_config).backward()
        gradients = [parameter.grad for parameter in [features, *parameters] if parameter.grad is not None]
        sum_over_processes(gradients, group)
        for gradient in gradients:
            gradient /= num_processes
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return features.detach()


def _compute_loss(
    features: Float[Tensor, "num_gaussians dim"],
    decoder: FeatureDecoder,
    blender: ViewBlender,
    index: int,
    loss_config: FeatureLossConfig,
) -> Float[Tensor, ""]:
    view = blender.prepare(index)
    height, width = view.alphas.shape
    loss = FeatureLoss(width, height, view.grid, loss_config)
    pixels = None if loss.pixels is None else loss.pixels.to(features.device)
    features_low = rasterize_features(features, view.info, pixels=pixels)[0]
    return loss.compute(features_low, view.alphas, decoder, view.tokens, view.mask)
