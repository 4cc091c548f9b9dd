"""`create_depth_view`: what a view knows of depth, for comparing views: measured where it can be, else rendered."""

from collections.abc import Callable

import torch

from fit3d_ns.analysis.correspondence import DepthView
from fit3d_ns.scene.feature_scene import FeatureScene
from fit3d_ns.scene.posed_capture import PosedCapture, View

MIN_DEPTH_ALPHA = 0.5
"""Rendered depth counts where at least this much opacity stands behind it."""


def create_depth_view(capture: PosedCapture, view: View, get_scene: Callable[[], FeatureScene] | None) -> DepthView:
    """Depth, camera and valid mask of a view, on the CPU, in the unit of the poses.

    Args:
        capture: Where the view's files are.
        view: Which view.
        get_scene: Gives the scene that renders depth where none is measured or its unit is not known.

    Raises:
        ValueError: There is neither measured depth nor a scene.
    """
    depth = capture.load_depth(view) if capture.metric_scale is not None else None
    if depth is not None and capture.metric_scale is not None:
        depth = depth * capture.metric_scale
    elif get_scene is not None:
        rendered, alphas = get_scene().render_depth(view.camera_to_world, view.K, view.width, view.height)
        depth = torch.where(alphas >= MIN_DEPTH_ALPHA, rendered, 0.0).cpu()
    else:
        raise ValueError(
            f"{capture.root} has no depth map for {view.name}; give a capture with depth (dslr/render_depth) or a "
            "scene file."
        )
    return DepthView(depth, view.K, view.camera_to_world, capture.load_valid_mask(view))
