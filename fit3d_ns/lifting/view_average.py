"""`average_over_views`: each Gaussian's features become the mean of what the patches it appears in show.

A solve fits the tokens of every lifted view, their noise included; rendered at one of those views it gives back much of
what that view alone said. Averaging what the scene shows over views and patches takes that away, as the weighted sum
does, from the scene file alone: with f the solved features, R_j the blending of view j, P the mean over each token's
cell, and W_j the opacity,  f' = sum of R_j^T W_j P R_j f / sum of R_j^T W_j 1.  Valid masks take no part: they lie with
the photographs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fit3d_ns.lifting.sampled_camera import compute_stride, sample_camera
from fit3d_ns.lifting.token_grid import average_over_cells
from fit3d_ns.rasterization import backproject_features, rasterize_features
from fit3d_ns.scene import FeatureScene, View

SAMPLES_PER_PATCH = 4
"""Samples along a patch's side; more change nothing but the time."""


@torch.no_grad()
def average_over_views(
    scene: FeatureScene, views: Sequence[View], compute_grid: Callable[[View], tuple[int, int]]
) -> FeatureScene:
    """The scene with averaged features; Gaussians that none of the views sees keep theirs, and the decoder stays.

    Args:
        scene: A scene that is ready to render.
        views: Cameras over which is averaged, best those that were lifted.
        compute_grid: Token grid (h, w) of a view.
    """
    features_and_one = scene.activated.features_and_one
    sums = torch.zeros_like(features_and_one)
    for view in views:
        grid = compute_grid(view)
        stride = compute_stride(view.width, view.height, grid, SAMPLES_PER_PATCH)
        camera = sample_camera(view.K, view.width, view.height, scene.eps2d, stride)
        info = scene.project(view.camera_to_world, camera.K, camera.width, camera.height, camera.eps2d)
        low, alphas = rasterize_features(features_and_one, info)[0].tensor_split([-1], dim=-1)
        averaged = average_over_cells(low, alphas[..., 0], grid)
        sums += backproject_features(torch.cat([averaged * alphas, alphas], dim=-1)[None], info)[0]
    weights = sums[:, -1:]
    averages = sums[:, :-1] / weights.clamp(min=1e-12)
    features = torch.where(weights > 0, averages, features_and_one[:, :-1])
    return replace(scene, gaussians=replace(scene.gaussians, features=features.to(scene.gaussians.features.dtype)))
