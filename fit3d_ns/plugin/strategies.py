"""Densification strategies of gsplat, made from the model's options; MCMC's relocation also without CUDA."""

from typing import Any

import torch
from gsplat.strategy import DefaultStrategy, MCMCStrategy
from gsplat.strategy.ops import _multinomial_sample, _update_param_with_optimizer
from gsplat.utils import normalized_quat_to_rotmat
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.plugin.model_config import FeatureSplatfactoModelConfig

NOISE_STEEPNESS, NOISE_THRESHOLD = 100.0, 0.995
"""k and t of the MCMC paper's noise schedule (section 3.2)."""


def create_strategy(config: FeatureSplatfactoModelConfig, num_views: int) -> DefaultStrategy | MCMCStrategy:
    """The strategy the options ask for; all step counts must be resolved.

    After an opacity reset, refinement pauses for about one epoch of the `num_views` training views, if asked for.
    """
    assert config.refine_every is not None and config.reset_alpha_every is not None
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

    def step_post_backward(
        self, params: Any, optimizers: Any, state: dict[str, Any], step: int, info: dict[str, Any], packed: bool = False
    ) -> None:
        """As gsplat's."""
        if step > 0:
            super().step_post_backward(params, optimizers, state, step, info, packed)


class PortableMCMCStrategy(MCMCStrategy):
    """gsplat's MCMC strategy with relocation and noise that run on any device (gsplat's are CUDA kernels).

    "3D Gaussian Splatting as Markov Chain Monte Carlo" (Kheradmand et al., 2024), equations 8 and 9.
    """

    def step_post_backward(
        self, params: Any, optimizers: Any, state: dict[str, Any], step: int, info: dict[str, Any], lr: float
    ) -> None:
        """Relocates and adds Gaussians at the refinement steps, and always disturbs positions, which learn at `lr`."""
        state["binoms"] = state["binoms"].to(params["means"].device)
        if self.refine_start_iter < step < self.refine_stop_iter and step % self.refine_every == 0:
            self._relocate_gs(params, optimizers, state["binoms"])
            self._add_new_gs(params, optimizers, state["binoms"])
        _disturb_positions(params, lr * self.noise_lr)

    @torch.no_grad()
    def _relocate_gs(self, params: Any, optimizers: Any, binoms: Tensor) -> int:
        opacities = torch.sigmoid(params["opacities"].flatten())
        is_dead = opacities <= self.min_opacity
        alive, dead = torch.where(~is_dead)[0], torch.where(is_dead)[0]
        if len(dead) == 0 or len(alive) == 0:
            return 0
        chosen = alive[_multinomial_sample(opacities[alive], len(dead), replacement=True)]
        self._copy(params, optimizers, binoms, chosen, dead)
        return len(dead)

    @torch.no_grad()
    def _add_new_gs(self, params: Any, optimizers: Any, binoms: Tensor) -> int:
        current = len(params["means"])
        num_new = max(0, min(self.cap_max, int(1.05 * current)) - current)
        if num_new > 0:
            opacities = torch.sigmoid(params["opacities"].flatten())
            self._copy(params, optimizers, binoms, _multinomial_sample(opacities, num_new, replacement=True))
        return num_new

    def _copy(
        self, params: Any, optimizers: Any, binoms: Tensor, chosen: Tensor, replaced: Tensor | None = None
    ) -> None:
        """Copies the chosen Gaussians over the replaced ones, or as new ones; all copies of one together look like it.

        Both are indices, one per copy; a Gaussian may be chosen several times.
        """
        opacities, scales = compute_relocation(
            opacities=torch.sigmoid(params["opacities"].flatten())[chosen],
            scales=torch.exp(params["scales"])[chosen],
            ratios=torch.bincount(chosen)[chosen] + 1,
            binoms=binoms,
        )
        opacities = opacities.clamp(min=self.min_opacity, max=1.0 - torch.finfo(torch.float32).eps)
        shared = {"opacities": torch.logit(opacities)[:, None], "scales": torch.log(scales)}

        def update_parameter(name: str, value: Tensor) -> torch.nn.Parameter:
            value = value.detach().clone()
            if name in shared:
                value[chosen] = shared[name]
            if replaced is None:
                return torch.nn.Parameter(torch.cat([value, value[chosen]]))
            value[replaced] = value[chosen]
            return torch.nn.Parameter(value)

        def update_moments(key: str, state: Tensor) -> Tensor:
            if replaced is None:
                return torch.cat([state, state.new_zeros((len(chosen), *state.shape[1:]))])
            state[chosen] = 0
            return state

        _update_param_with_optimizer(update_parameter, update_moments, params, optimizers)


@torch.no_grad()
def compute_relocation(
    opacities: Float[Tensor, " num_gaussians"],
    scales: Float[Tensor, "num_gaussians 3"],
    ratios: Tensor,
    binoms: Float[Tensor, "n_max n_max"],
) -> tuple[Float[Tensor, " num_gaussians"], Float[Tensor, "num_gaussians 3"]]:
    """Opacities and scales of the copies that together look like the one Gaussian they replace (equation 9).

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
    old = opacities.double()
    new = 1.0 - (1.0 - old) ** (1.0 / ratios.double())

    k = torch.arange(n_max, device=opacities.device)
    signs = torch.where(k % 2 == 0, 1.0, -1.0).double()
    # Coefficient of (new opacity)^(k+1) once the sum over i has been taken up to n = 1, 2, ..., n_max: [n_max, n_max].
    coefficients = binoms.double().tril().cumsum(dim=0) * signs / (k + 1).double().sqrt()
    powers = new[:, None] ** (k + 1)
    denominators = (coefficients[ratios.long() - 1] * powers).sum(dim=-1)
    factors = torch.where(denominators != 0, old / denominators, 1.0)
    return new.to(opacities.dtype), (factors[:, None] * scales.double()).to(scales.dtype)


@torch.no_grad()
def _disturb_positions(params: Any, scale: float) -> None:
    """Moves transparent Gaussians at random, more along their long axes (equation 8): covariance times noise."""
    opacities = torch.sigmoid(params["opacities"].flatten())
    # Nearly a step: opaque Gaussians stay, those below an opacity of 0.005 move freely.
    freedom = torch.sigmoid(NOISE_STEEPNESS * ((1 - opacities) - NOISE_THRESHOLD))
    noise = torch.randn_like(params["means"]) * freedom[:, None] * scale
    rotations = normalized_quat_to_rotmat(torch.nn.functional.normalize(params["quats"], dim=-1))
    variances = torch.exp(params["scales"]).square()
    in_axes = torch.einsum("nji,nj->ni", rotations, noise) * variances
    params["means"].add_(torch.einsum("nij,nj->ni", rotations, in_axes))
