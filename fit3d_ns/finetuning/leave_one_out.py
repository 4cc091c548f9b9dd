"""Leave-one-out scenes from a scene file alone: the features without one view's part in the lift.

A lift solves A f = b with A = sum of R_j^T W_j R_j and b = sum of R_j^T W_j t_j over views j (R_j blends features to
the view's pixels, t_j are its tokens in the features' space, W_j its weights). Without view j the residual at f is
-(R_j^T W_j (t_j - R_j f)); one Jacobi step, with the row sums d of A that the file keeps as `blend_weight`, gives

    f_loo = f - R_j^T W_j (t_j - R_j f) / (d - d_j).

Features that were averaged over all lifted views (`lifted_views.py`) are such sums over d already, and the same step
takes the view's part out of them.

Gaussians that no other view saw cannot forget it: they keep f, and `is_known` says that they should not teach.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.features import TokenModel
from fit3d_ns.finetuning.lifted_views import find_lifted
from fit3d_ns.rasterization import backproject_features, rasterize_features
from fit3d_ns.scene import FeatureDecoder, FeatureScene, PosedCapture, View

SMALLEST_SHARE = 1e-3
"""Gaussians of which other views hold less than this share of the blend weight were seen by the one view alone."""


@torch.no_grad()
def leave_view_out(
    scene: FeatureScene, capture: PosedCapture, view: View, original: TokenModel
) -> tuple[FeatureScene, Bool[Tensor, " num_gaussians"]]:
    """The scene as if `view` had not been lifted, and `is_known`; the decoder stays.

    Views that were not lifted change nothing.

    Args:
        scene: A ready scene whose `blend_weight` is known.
        capture: Where the view's photograph is.
        original: The backbone whose tokens were lifted.

    Raises:
        ValueError: The scene keeps no blend weights.
    """
    if not bool(scene.gaussians.blend_weight.any()):
        raise ValueError(
            f"Scene {scene.scene_id} has no blend weights, which leave-one-out targets need; lift it with fit3d-lift."
        )
    if view.name not in {lifted.name for lifted in find_lifted(scene)}:
        return scene, torch.ones_like(scene.gaussians.blend_weight, dtype=torch.bool)
    device = scene.gaussians.means.device
    features_and_one = scene.features_and_one
    info = scene.project(view.camera_to_world, view.K, view.width, view.height)
    blended = rasterize_features(features_and_one, info)[0]
    own = _lower(_read_tokens(capture, view, original, device), scene.decoder)
    # (h, w, d) -> (H, W, d), each pixel its own token's value.
    spread = F.interpolate(own.permute(2, 0, 1)[None], size=(view.height, view.width), mode="nearest-exact")[0]
    weights = capture.load_valid_mask(view).to(device)[..., None] * blended[..., -1:]
    residual = (spread.permute(1, 2, 0) - blended[..., :-1]) * weights
    sums, own_weight = backproject_features(residual[None], info)
    total = scene.gaussians.blend_weight.float()
    rest = total - own_weight
    is_known = rest > SMALLEST_SHARE * total
    step = torch.where(is_known[:, None], sums / rest.clamp(min=1e-12)[:, None], 0.0)
    features = features_and_one[:, :-1] - step
    return replace(scene, gaussians=scene.gaussians.with_features(features)), is_known


def _read_tokens(
    capture: PosedCapture, view: View, original: TokenModel, device: torch.device
) -> Float[Tensor, "h w embed"]:
    # (h, w, 3) -> (1, 3, h, w)
    image = capture.load_image(view).permute(2, 0, 1)[None].to(device).float() / 255.0
    return original(image).maps[0].float()


def _lower(tokens: Float[Tensor, "h w embed"], decoder: FeatureDecoder) -> Float[Tensor, "h w dim"]:
    """Tokens in the features' space: least squares of the decoder on a constant map."""
    matrix = decoder.weight.sum(dim=(2, 3)).float()
    centred = tokens if decoder.bias is None else tokens - decoder.bias.float()
    return centred @ torch.linalg.pinv(matrix).T
