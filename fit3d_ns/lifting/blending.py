"""Blending as a linear operator: `R` takes features [N, D] to a view's pixels, its adjoint takes pixels back.

Symbols: `W` weights per pixel (mask, times alpha if accumulation-aware), `t` targets per pixel, `P` the W-weighted mean
over each token's cell, `u` the within-patch weight (1 for the rules `bilinear` and `nearest`). A lift minimises the sum
over views of u W |t - R f|^2 + (1 - u) W |t - P R f|^2, so its operator is R^T W Q R with Q = u + (1 - u) P.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.sampled_camera import compute_stride, sample_camera
from fit3d_ns.lifting.token_basis import project_tokens
from fit3d_ns.lifting.views import LiftView
from fit3d_ns.rasterization import backproject_features, rasterize_features
from fit3d_ns.scene.gaussians import ActivatedGaussians
from fit3d_ns.scene.token_grid import average_over_cells, spread_tokens


@dataclass(frozen=True)
class PreparedView:
    """One view, projected: everything about it that does not depend on the features."""

    info: dict[str, Any]
    """The rasterizer's projection and tile lists, for `rasterize_features` and `backproject_features`."""
    alphas: Float[Tensor, "height width"]
    """Rendered opacity, 0 to 1."""
    mask: Float[Tensor, "height width"]
    """Weights from the valid mask, ones where there is none."""
    tokens: Float[Tensor, "h w embed"]
    """The original backbone's patch tokens, float32."""

    @property
    def grid(self) -> tuple[int, int]:
        """Token grid (h, w)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory that keeping this view takes."""
        tensors = [*_collect_tensors(self.info), self.alphas, self.mask, self.tokens]
        # `info` shares storage between its entries; each storage counts once.
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class ViewSums:
    """A view's part of the weighted sum (`numerator / denominator`)."""

    numerator: Float[Tensor, "num_gaussians dim"]
    """R^T W t."""
    denominator: Float[Tensor, " num_gaussians"]
    """R^T W 1."""
    blend_weight: Float[Tensor, " num_gaussians"]
    """R^T 1: how much of the picture each Gaussian makes up, in pixels, masked pixels included."""


class ViewBlender:
    """Prepares views and applies the operator to them; keeps projections between passes within a memory budget."""

    def __init__(
        self,
        gaussians: ActivatedGaussians,
        views: Sequence[LiftView],
        config: LiftConfig,
        *,
        samples_per_patch: int = 0,
        memory_mb: float = 0.0,
    ):
        """Args:
        samples_per_patch: See `prepare_view`.
        memory_mb: Projections are kept up to this many 1e6 bytes.
        """
        self.gaussians = gaussians
        self.views = views
        self.config = config
        self.samples_per_patch = samples_per_patch
        self._kept: dict[int, PreparedView] = {}
        self._bytes_left = int(memory_mb * 1e6)

    def prepare(self, index: int) -> PreparedView:
        """Projects a view and reads its tokens, or takes it from the kept ones.

        The first views that fit stay for good: passes go round in one order, where dropping the least recently used
        would always drop the one that is needed next.
        """
        if index in self._kept:
            return self._kept[index]
        prepared = prepare_view(self.gaussians, self.views[index], self.samples_per_patch)
        if prepared.num_bytes <= self._bytes_left:
            self._bytes_left -= prepared.num_bytes
            self._kept[index] = prepared
        return prepared

    def add_normal(
        self,
        index: int,
        features: Float[Tensor, "num_gaussians dim"],
        image: Float[Tensor, "num_gaussians dim"],
    ) -> None:
        """Adds one view's R^T W Q R f to `image`, in place."""
        view = self.prepare(index)
        weights = compute_weights(view, self.config)
        features_low = rasterize_features(features, view.info)[0]
        if self.config.token_to_pixel == "area":
            averaged = average_over_cells(features_low, weights, view.grid)
            features_low = torch.lerp(averaged, features_low, self.config.within_patch_weight)
        backproject_features((features_low * weights[..., None])[None], view.info, add_to=image)


@torch.no_grad()
def prepare_view(gaussians: ActivatedGaussians, view: LiftView, samples_per_patch: int = 0) -> PreparedView:
    """Projects the Gaussians into a view; its tokens and mask are read.

    Args:
        samples_per_patch: How many pixels along a patch's side are looked at, about; 0 for all. The picture is then
            sampled at the centres of square blocks (`sampled_camera`), each with the mean of its mask.

    Raises:
        ValueError: The tokens or the mask do not fit, see `LiftView`.
    """
    device = gaussians.means.device
    tokens = view.read_tokens(device)
    mask = view.read_mask(device)
    stride = compute_stride(view.width, view.height, (tokens.shape[0], tokens.shape[1]), samples_per_patch)
    camera = sample_camera(view.K, view.width, view.height, gaussians.eps2d, stride)
    if stride > 1:
        mask = F.adaptive_avg_pool2d(mask[None, None], (camera.height, camera.width))[0, 0]
    info = gaussians.project(view.viewmat, camera.K, camera.width, camera.height, camera.eps2d)
    # Blending ones gives alpha.
    alphas = rasterize_features(gaussians.means.new_ones(len(gaussians), 1), info)[0, ..., 0]
    return PreparedView(info=info, alphas=alphas, mask=mask, tokens=tokens)


def compute_weights(view: PreparedView, config: LiftConfig) -> Float[Tensor, "height width"]:
    """W: how much each pixel counts."""
    return view.mask * view.alphas if config.accumulation_aware else view.mask


@torch.no_grad()
def backproject_targets(
    view: PreparedView,
    basis: PcaBasis,
    config: LiftConfig,
    zeros: Float[Tensor, "num_gaussians channels"] | None = None,
) -> ViewSums:
    """One view's part of the weighted sum: a single adjoint pass, weights riding along as one more channel.

    Args:
        view: The view.
        basis: Space of the targets.
        config: The rules.
        zeros: Memory for the result, [N, D + 1]; new by default.
    """
    height, width = view.alphas.shape
    coordinates = project_tokens(view.tokens, basis)
    # Ones spread as ones: the last channel becomes W.
    with_ones = torch.cat([coordinates, torch.ones_like(coordinates[..., :1])], dim=-1)
    targets = spread_tokens(with_ones, width, height, config.token_to_pixel)
    targets = targets.mul_(compute_weights(view, config)[..., None])
    sums, blend_weight = backproject_features(targets[None], view.info, add_to=zeros)
    return ViewSums(numerator=sums[:, :-1], denominator=sums[:, -1], blend_weight=blend_weight)


def _collect_tensors(value: Any) -> list[Tensor]:
    """All tensors in nested dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _collect_tensors(item)]
    if is_dataclass(value):
        return [tensor for item in fields(value) for tensor in _collect_tensors(getattr(value, item.name))]
    return []
