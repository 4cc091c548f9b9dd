"""Densification strategies of gsplat, made from the model's options; MCMC's without kernels of CUDA."""

from typing import Any
from unittest import mock

import torch
from gsplat.strategy import DefaultStrategy, MCMCStrategy
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.plugin.model_config import FeatureSplatfactoModelConfig
from fit3d_ns.rasterization.projection import rotations_from_quats


def create_strategy(config: FeatureSplatfactoModelConfig, num_views: int) -> DefaultStrategy | MCMCStrategy:
    """The strategy the options ask for; all step counts must be resolved.

    After an opacity reset, refinement pauses for about one epoch of the `num_views` training views, if asked for.
    """
    assert config.refine_every is not None and config.reset_alpha_every is not None, "resolve_steps fills step counts"
    if config.strategy == "mcmc":
        return PortableMCMCStrategy(
            cap_max=config.mcmc_cap,
            noise_lr=config.mcmc_noise_lr,
            refine_start_iter=config.warmup_length,
            refine_stop_iter=config.stop_split_at,
            refine_every=config.refine_every,
            min_opacity=config.mcmc_min_opacity,
        )
    strategy = DefaultStrategy if config.pause_after_reset else InriaStrategy
    return strategy(
        prune_opa=config.cull_alpha_thresh,
        grow_grad2d=config.densify_grad_thresh,
        grow_scale3d=config.densify_size_thresh,
        grow_scale2d=config.split_screen_size,
        prune_scale3d=config.cull_scale_thresh,
        prune_scale2d=config.cull_screen_size,
        refine_scale2d_stop_iter=config.stop_screen_size_at,
        refine_start_iter=config.warmup_length,
        refine_stop_iter=config.stop_split_at,
        reset_every=config.reset_alpha_every * config.refine_every,
        refine_every=config.refine_every,
        pause_refine_after_reset=num_views + config.refine_every if config.pause_after_reset else 0,
        absgrad=config.use_absgrad,
    )


class InriaStrategy(DefaultStrategy):
    """Densification as Inria's code has it: without gsplat's opacity reset at step 0."""

    def step_post_backward(self, params: Any, optimizers: Any, state: Any, step: int, *rest: Any, **named: Any) -> None:
        """As gsplat's."""
        if step > 0:
            super().step_post_backward(params, optimizers, state, step, *rest, **named)


class PortableMCMCStrategy(MCMCStrategy):
    """gsplat's MCMC strategy on any device: its two kernels are replaced by plain torch while it works.

    "3D Gaussian Splatting as Markov Chain Monte Carlo" (Kheradmand et al., 2024), equations 8 and 9.
    """

    def step_post_backward(self, *, optimizers: Any, packed: bool = False, **parts: Any) -> None:
        """Relocates and adds Gaussians at the refinement steps, and always disturbs positions, as far as these learn.

        Called as splatfacto calls the default strategy, which has `packed` and not the positions' learning rate.
        """
        rate = float(optimizers["means"].param_groups[0]["lr"])
        portable: Any = {"compute_relocation": compute_relocation, "quat_scale_to_covar_preci": compute_covariances}
        with mock.patch.multiple("gsplat.strategy.ops", **portable):
            super().step_post_backward(optimizers=optimizers, lr=rate, **parts)

    def _relocate_gs(self, params: Any, optimizers: Any, binoms: Tensor) -> int:
        # Where none is left to copy, gsplat would draw from nothing.
        is_any_alive = bool((torch.sigmoid(params["opacities"]) > self.min_opacity).any())
        return super()._relocate_gs(params, optimizers, binoms) if is_any_alive else 0


@torch.no_grad()
def compute_relocation(
    opacities: Float[Tensor, "num_gaussians *one"],
    scales: Float[Tensor, "num_gaussians 3"],
    ratios: Tensor,
    binoms: Float[Tensor, "n_max n_max"],
) -> tuple[Float[Tensor, "num_gaussians *one"], Float[Tensor, "num_gaussians 3"]]:
    """gsplat's: opacities and scales of the copies that together look like the one Gaussian they replace (equation 9).

    Args:
        ratios: Number of copies of each Gaussian, itself included; integers [N], taken as at least 1 and at most n_max.
        binoms: Binomial coefficients, `binoms[n, k]` = n over k.

    Returns:
        New opacities 1 - (1 - o)^(1/n), and scales multiplied by
        o / sum_{i=1..n} sum_{k=0..i-1} binom(i-1, k) (-1)^k (new opacity)^(k+1) / sqrt(k+1).
    """
    n_max = binoms.shape[0]
    ratios = ratios.clamp(min=1, max=n_max)
    # The alternating sum cancels strongly for many copies, so it is taken in float64.
    old = opacities.double().flatten()
    new = 1.0 - (1.0 - old) ** (1.0 / ratios.double())

    k = torch.arange(n_max, device=opacities.device)
    signs = torch.where(k % 2 == 0, 1.0, -1.0).double()
    # Coefficient of (new opacity)^(k+1) once the sum over i has been taken up to n = 1, 2, ..., n_max: [n_max, n_max].
    coefficients = binoms.double().tril().cumsum(dim=0) * signs / (k + 1).double().sqrt()
    powers = new[:, None] ** (k + 1)
    denominators = (coefficients[ratios.long() - 1] * powers).sum(dim=-1)
    factors = torch.where(denominators != 0, old / denominators, 1.0)
    return new.view_as(opacities).to(opacities.dtype), (factors[:, None] * scales.double()).to(scales.dtype)


@torch.no_grad()
def compute_covariances(
    quats: Float[Tensor, "num_gaussians 4"], scales: Float[Tensor, "num_gaussians 3"], **_: bool
) -> tuple[Float[Tensor, "num_gaussians 3 3"], None]:
    """What gsplat's `quat_scale_to_covar_preci` gives, without the precisions: rotations are wxyz of any length."""
    axes = rotations_from_quats(quats) * scales[:, None, :]
    return axes @ axes.mT, None
