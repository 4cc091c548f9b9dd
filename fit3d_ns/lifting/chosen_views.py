"""Which views of a capture are lifted and which only measure, and their tokens, from the feature cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis, fit_pca
from fit3d_ns.features import FeatureCache, FeatureKey, LazyImage, extract_features
from fit3d_ns.lifting.capture_views import create_lift_views
from fit3d_ns.lifting.config import LiftSceneConfig
from fit3d_ns.lifting.inputs import LiftView
from fit3d_ns.lifting.lift_source import select_evenly
from fit3d_ns.scene import PosedCapture, View

MAX_PICTURE_TOKENS = 50_000
"""Tokens on which the colours of feature pictures are fitted."""


@dataclass(frozen=True)
class ChosenViews:
    """Views of a capture by what the lift does with them."""

    lifted: list[View]
    """Training views that teach the features."""
    held_out: list[View]
    """Views that only measure: `test`, else `val`, else training views that were not chosen."""


def choose_views(capture: PosedCapture, num_views: int | None) -> ChosenViews:
    """Evenly chosen training views, and those to measure on."""
    train = capture.select("train")
    lifted = select_evenly(train, num_views)
    names = {view.name for view in lifted}
    left_out = [view for view in train if view.name not in names]
    return ChosenViews(lifted, capture.select("test") or capture.select("val") or left_out)


def load_views(
    capture: PosedCapture,
    views: Sequence[View],
    cache: FeatureCache,
    options: LiftSceneConfig,
    device: torch.device | str,
) -> list[LiftView]:
    """Fills the cache with the tokens of `views`, where they are missing, and returns the views of a lift."""
    images = [_lazy_image(capture, view) for view in views]
    keys = extract_features(images, cache, device=device, batch_size=options.feature_batch_size)
    by_name: dict[str, FeatureKey] = {view.name: key for view, key in zip(views, keys, strict=True)}

    def load_tokens(view: View) -> Float[Tensor, "h w embed"]:
        return cache.load(by_name[view.name]).patch_tokens

    return create_lift_views(capture, views, load_tokens)


def fit_picture_basis(views: Sequence[LiftView]) -> PcaBasis:
    """Three directions and fixed colours for pictures of the backbone's tokens, from every n-th token of all views."""
    rows = sample_tokens(views, MAX_PICTURE_TOKENS)
    return fit_pca(rows, min(3, rows.shape[1]))


def sample_tokens(views: Sequence[LiftView], max_tokens: int) -> Float[Tensor, "num_tokens embed"]:
    """Every n-th token of all views, about `max_tokens` together, on the CPU."""
    height, width, _ = views[0].read_tokens(torch.device("cpu")).shape
    stride = max(height * width * len(views) // max(max_tokens, 1), 1)
    return torch.cat([view.read_tokens(torch.device("cpu")).flatten(0, 1)[::stride] for view in views])


def _lazy_image(capture: PosedCapture, view: View) -> LazyImage:
    return lambda: capture.load_image(view)
