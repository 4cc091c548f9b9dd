"""Relocation of dead Gaussians: 3D Gaussian Splatting as Markov Chain Monte Carlo (Kheradmand et al. 2024), Eq. 9.

The same function as `gsplat.relocation.compute_relocation`, in PyTorch, because gsplat's runs on CUDA alone.
"""

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def compute_relocation(
    opacities: Float[Tensor, " num_gaussians"],
    scales: Float[Tensor, "num_gaussians 3"],
    ratios: Tensor,
    binoms: Float[Tensor, "n_max n_max"],
) -> tuple[Float[Tensor, " num_gaussians"], Float[Tensor, "num_gaussians 3"]]:
    """Opacities and scales of the copies that together look like the one Gaussian they replace.

    Args:
        opacities: In [0, 1].
        ratios: Number of copies of each Gaussian, itself included; integers [N], clamped in place to 1..n_max.
        binoms: Binomial coefficients, `binoms[n, k]` = n over k.

    Returns:
        New opacities 1 - (1 - o)^(1/n), and scales multiplied by
        o / sum_{i=1..n} sum_{k=0..i-1} binom(i-1, k) (-1)^k (new opacity)^(k+1) / sqrt(k+1).
    """
    n_max = binoms.shape[0]
    ratios.clamp_(min=1, max=n_max)
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
