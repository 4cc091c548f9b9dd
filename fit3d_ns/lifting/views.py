"""`LiftView`: a camera with the tokens it saw; and which views of a capture are lifted, which only measure.

Cameras are in the world of the Gaussians, of any scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis, fit_pca
from fit3d_ns.geometry.cameras import Camera
from fit3d_ns.scene import PosedCapture, View
from fit3d_ns.utils.selection import select_evenly

MAX_PICTURE_TOKENS = 50_000
"""Tokens on which the colours of feature pictures are fitted."""


@dataclass(frozen=True)
class LiftView:
    """One captured view; its tokens and mask stay on disk until they are needed."""

    camera: Camera
    load_tokens: Callable[[], Float[Tensor, "h w embed"]]
    """Reads the original backbone's patch tokens of this view: finite, of any float type."""
    load_mask: Callable[[], Bool[Tensor, "height width"] | Float[Tensor, "height width"] | None] = lambda: None
    """Reads the valid mask, of the camera's size, or weights of 0 and above per pixel; None uses every pixel alike."""
    name: str = ""
    """What error messages call this view, for example the image's file name."""

    def read_tokens(self, device: torch.device) -> Float[Tensor, "h w embed"]:
        """The tokens as float32 on `device`."""
        return self.load_tokens().detach().to(device=device, dtype=torch.float32)

    def read_mask(self, device: torch.device) -> Float[Tensor, "height width"]:
        """Weights per pixel as float32 on `device`, ones where the view has no mask."""
        mask = self.load_mask()
        if mask is None:
            return torch.ones(self.camera.height, self.camera.width, device=device)
        return mask.detach().to(device=device, dtype=torch.float32)


def create_lift_views(
    capture: PosedCapture,
    views: Sequence[View],
    load_tokens: Callable[[View], Float[Tensor, "h w embed"]],
    load_mask: Callable[[View], Bool[Tensor, "height width"] | Float[Tensor, "height width"] | None] | None = None,
) -> list[LiftView]:
    """Views of `capture`, whose poses may be corrected ones, as a lift takes them; masks are the capture's by default.

    Tokens, which are those of the undistorted photographs, and masks are read each time they are needed.
    """
    return [
        LiftView(
            camera=view.camera,
            load_tokens=partial(load_tokens, view),
            load_mask=partial(load_mask or capture.load_valid_mask, view),
            name=view.name,
        )
        for view in views
    ]


def choose_views(capture: PosedCapture, num_views: int | None) -> tuple[list[View], list[View]]:
    """Evenly chosen training views, which are lifted, and those that only measure.

    These are `test`, else `val`, else training views that were not chosen.
    """
    train = capture.select("train")
    lifted = select_evenly(train, num_views)
    names = {view.name for view in lifted}
    left_out = [view for view in train if view.name not in names]
    return lifted, capture.select("test") or capture.select("val") or left_out


def fit_picture_basis(views: Sequence[LiftView]) -> PcaBasis:
    """Three directions and fixed colours for pictures of the backbone's tokens, from every n-th token of all views."""
    rows = sample_tokens(views, MAX_PICTURE_TOKENS)
    return fit_pca(rows, min(3, rows.shape[1]))


def sample_tokens(views: Sequence[LiftView], max_tokens: int) -> Float[Tensor, "num_tokens embed"]:
    """Every n-th token of all views, about `max_tokens` together, on the CPU."""
    height, width, _ = views[0].read_tokens(torch.device("cpu")).shape
    stride = max(height * width * len(views) // max(max_tokens, 1), 1)
    return torch.cat([view.read_tokens(torch.device("cpu")).flatten(0, 1)[::stride] for view in views])
