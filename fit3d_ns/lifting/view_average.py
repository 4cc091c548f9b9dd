"""`average_over_views`: each Gaussian's features become the mean of what the patches it appears in show.

A solve fits the tokens of every lifted view, their noise included; rendered at one of those views it gives back much of
what that view alone said. Averaging what the scene shows over views and patches takes that away, as the weighted sum
does, from the scene file and the valid masks alone: with f the solved features, R_j the blending of view j, W_j the
opacity times the valid mask, and P_j the W_j-weighted mean over each token's cell,

    f' = sum of R_j^T W_j P_j R_j f / sum of R_j^T W_j 1.

Masked pixels thus neither take part in a patch's mean nor receive it: what was lifted there is nobody's token.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.lifting.sampled_camera import compute_stride, sample_camera
from fit3d_ns.rasterization import backproject_features, rasterize_features
from fit3d_ns.scene import FeatureScene, View
from fit3d_ns.scene.token_grid import average_over_cells

SAMPLES_PER_PATCH = 4
"""Samples along a patch's side; more change nothing but the time."""


@torch.no_grad()
def average_over_views(
    scene: FeatureScene,
    views: Sequence[View],
    compute_grid: Callable[[View], tuple[int, int]],
    load_valid_mask: Callable[[View], Bool[Tensor, "height width"]],
) -> FeatureScene:
    """The scene with averaged features; Gaussians that no valid pixel shows keep theirs, and the decoder stays.

    Args:
        scene: A scene that is ready to render.
        views: Cameras over which is averaged, best those that were lifted.
        compute_grid: Token grid (h, w) of a view.
        load_valid_mask: A view's mask at its full size, True = use.
    """
    features_and_one = scene.features_and_one
    sums = torch.zeros_like(features_and_one)
    for view in views:
        grid = compute_grid(view)
        stride = compute_stride(view.width, view.height, grid, SAMPLES_PER_PATCH)
        camera = sample_camera(view.K, view.width, view.height, scene.eps2d, stride)
        mask = sample_mask(load_valid_mask(view).to(sums.device), camera.width, camera.height)
        info = scene.project(view.camera_to_world, camera.K, camera.width, camera.height, camera.eps2d)
        low, alphas = rasterize_features(features_and_one, info)[0].tensor_split([-1], dim=-1)
        weights = alphas * mask[..., None]
        averaged = average_over_cells(low, weights[..., 0], grid)
        backproject_features(torch.cat([averaged * weights, weights], dim=-1)[None], info, add_to=sums)
    total = sums[:, -1:]
    averages = sums[:, :-1] / total.clamp(min=1e-12)
    features = torch.where(total > 0, averages, features_and_one[:, :-1])
    return replace(scene, gaussians=scene.gaussians.with_features(features))


def sample_mask(mask: Bool[Tensor, "height width"], width: int, height: int) -> Float[Tensor, "rows columns"]:
    """One where all pixels of a sample's block are valid, else zero, as where photographs are reduced.

    Args:
        mask: At the view's size.
        width: Columns of the sampled picture.
        height: Rows of the sampled picture.
    """
    invalid = (~mask).float()
    if mask.shape == (height, width):
        return 1.0 - invalid
    return 1.0 - F.adaptive_max_pool2d(invalid[None, None], (height, width))[0, 0]
