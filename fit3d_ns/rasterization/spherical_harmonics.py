"""Real spherical harmonics up to degree 4 in the order and signs of 3D Gaussian Splatting: the definition in PyTorch.

Basis functions after Sloan, "Efficient Spherical Harmonic Evaluation" (JCGT 2013), written as polynomials of the unit
direction (x, y, z); index l*l + l + m holds degree l, order m.
"""

import torch
from jaxtyping import Float
from torch import Tensor

MAX_SH_DEGREE = 4
"""Highest degree whose basis is written down here."""
COLOR_OFFSET = 0.5
"""Added to the sum over the basis before clamping at zero, so that zero coefficients are mid grey."""


def evaluate_harmonics(
    sh_degree: int,
    means: Float[Tensor, "num_gaussians 3"],
    viewmats: Float[Tensor, "num_cameras 4 4"],
    coefficients: Float[Tensor, "*batch num_gaussians bases 3"],
    is_drawn: Tensor,
) -> Float[Tensor, "num_cameras num_gaussians 3"]:
    """Colour of each Gaussian seen from each camera; not below zero.

    Args:
        sh_degree: Highest degree that takes part; further coefficients are ignored.
        coefficients: [N, K, 3] or [C, N, K, 3] with K >= (sh_degree + 1)^2.
        is_drawn: Bool [C, N]; other rows get black and no gradient.
    """
    centres = torch.linalg.inv(viewmats)[:, :3, 3]
    directions = means[None] - centres[:, None]
    directions = torch.where(is_drawn[..., None], directions, directions.new_tensor([0.0, 0.0, 1.0]))
    basis = compute_sh_basis(sh_degree, torch.nn.functional.normalize(directions, dim=-1))
    colors = (basis[..., None] * coefficients[..., : basis.shape[-1], :]).sum(dim=-2)
    return torch.where(is_drawn[..., None], colors + COLOR_OFFSET, 0.0).clamp(min=0.0)


def compute_sh_basis(sh_degree: int, directions: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch bases"]:
    """Values of the (sh_degree + 1)^2 basis functions at unit directions."""
    x, y, z = directions.unbind(dim=-1)
    basis = [torch.full_like(x, 0.28209479177387814)]
    if sh_degree >= 1:
        basis += [-0.48860251190291992 * y, 0.48860251190291992 * z, -0.48860251190291992 * x]
    if sh_degree >= 2:
        basis += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (3 * z * z - 1),
            -1.0925484305920792 * x * z,
            0.54627421529603959 * (x * x - y * y),
        ]
    if sh_degree >= 3:
        basis += [
            -0.59004358992664352 * y * (3 * x * x - y * y),
            2.8906114426405538 * x * y * z,
            -0.45704579946446577 * y * (5 * z * z - 1),
            0.37317633259011540 * z * (5 * z * z - 3),
            -0.45704579946446577 * x * (5 * z * z - 1),
            1.4453057213202769 * z * (x * x - y * y),
            -0.59004358992664352 * x * (x * x - 3 * y * y),
        ]
    if sh_degree >= 4:
        basis += [
            2.5033429417967046 * x * y * (x * x - y * y),
            -1.7701307697799304 * y * z * (3 * x * x - y * y),
            0.94617469575756008 * x * y * (7 * z * z - 1),
            -0.66904654355728921 * y * z * (7 * z * z - 3),
            0.10578554691520430 * (35 * z**4 - 30 * z * z + 3),
            -0.66904654355728921 * x * z * (7 * z * z - 3),
            0.47308734787878004 * (x * x - y * y) * (7 * z * z - 1),
            -1.7701307697799304 * x * z * (x * x - 3 * y * y),
            0.62583573544917614 * (x * x * (x * x - 3 * y * y) - y * y * (3 * x * x - y * y)),
        ]
    return torch.stack(basis, dim=-1)
