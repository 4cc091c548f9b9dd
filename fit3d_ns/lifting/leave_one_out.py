"""Leave-one-out features: what the weighted sum would be had one view not taken part.

The lift keeps numerator and denominator of the weighted sum; a view's own part is one adjoint pass on its tokens, and
is taken out. Only the features forget the view: the basis and the decoder have seen it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.lifting.blending import backproject_targets, prepare_view
from fit3d_ns.lifting.inputs import LiftGaussians, LiftView
from fit3d_ns.lifting.result import LiftResult


@torch.no_grad()
def compute_leave_one_out(
    gaussians: LiftGaussians, view: LiftView, result: LiftResult, *, smallest_share: float = 1e-4
) -> Float[Tensor, "num_gaussians dim"]:
    """Weighted-sum features without `view`, which must be one of the lifted ones.

    Args:
        gaussians: As they were given to the lift.
        smallest_share: Where the other views hold less than this share of a Gaussian's weight, nothing but rounding
            is left of them, and the Gaussian gets zero.

    Raises:
        ValueError: The number of Gaussians is not the lift's.
    """
    if len(gaussians) != len(result.is_valid):
        raise ValueError(f"The lift was made for {len(result.is_valid)} Gaussians, not {len(gaussians)}.")
    features = torch.zeros_like(result.features)
    keep = result.is_valid
    own = backproject_targets(prepare_view(gaussians.select(keep), view), result.basis, result.config)
    total = result.denominator[keep]
    numerator, denominator = result.numerator[keep] - own.numerator, total - own.denominator
    is_known = (denominator > smallest_share * total)[:, None]
    features[keep] = torch.where(is_known, numerator / denominator.clamp(min=1e-12)[:, None], 0.0)
    return features
