"""From a posed capture to the views of a lift."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from fit3d_ns.geometry.cameras import viewmats_from_camera_to_worlds
from fit3d_ns.lifting.inputs import LiftView
from fit3d_ns.scene.posed_capture import PosedCapture, View


def create_lift_views(
    capture: PosedCapture, views: Sequence[View], load_tokens: Callable[[View], Float[Tensor, "h w embed"] | None]
) -> list[LiftView]:
    """Views of `capture` as a lift takes them; masks are read from the capture, each time they are needed.

    Args:
        views: Which of the capture's views, for example `capture.select("train")`.
        load_tokens: Reads the patch tokens of a view's undistorted photograph.
    """
    return [_create_lift_view(capture, view, load_tokens) for view in views]


def _create_lift_view(
    capture: PosedCapture, view: View, load_tokens: Callable[[View], Float[Tensor, "h w embed"] | None]
) -> LiftView:
    return LiftView(
        viewmat=viewmats_from_camera_to_worlds(view.camera_to_world),
        K=view.K,
        width=view.width,
        height=view.height,
        load_tokens=lambda: load_tokens(view),
        load_mask=lambda: capture.load_valid_mask(view),
        name=view.name,
    )
