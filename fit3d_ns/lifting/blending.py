"""Blending as a linear operator: `R` takes features [N, D] to a view's pixels, its adjoint takes pixels back.

Symbols: `W` weights per pixel (mask, times alpha with alpha weighting), `t` targets per pixel, `P` the W-weighted mean
over each token's cell, `u` the within-patch weight (1 for the rules `bilinear` and `nearest`). A lift minimises the sum
over views of u W |t - R f|^2 + (1 - u) W |t - P R f|^2, so its operator is R^T W Q R with Q = u + (1 - u) P.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.pca import PcaBasis, apply_pca
from fit3d_ns.features import compute_patch_grid
from fit3d_ns.geometry.cameras import Camera
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.token_spreading import average_over_cells, spread_tokens
from fit3d_ns.lifting.views import LiftView
from fit3d_ns.rasterization import add_normal, backproject_features, rasterize_features
from fit3d_ns.rasterization.projection import TILE_SIZE
from fit3d_ns.scene import ActivatedGaussians, FeatureScene, PosedCapture, View
from fit3d_ns.utils.device import choose_budget_gb
from fit3d_ns.utils.selection import select_evenly
from fit3d_ns.utils.tensor_files import BoundedMemory

CPU_CACHE_GB = 1.024
"""Projections kept on a CPU by default, in 1e9 bytes."""
AVERAGING_SAMPLES = 4
"""Samples along a patch's side when features are averaged over views; more change nothing but the time."""
_TILES_PER_CALL, _MOST_VIEWS, _COPIED_BYTES = 264, 16, 2**28
"""What fills a card: two tiles for each of an H100's 132 multiprocessors. gsplat wants features once per view."""


def compute_stride(camera: Camera, patch_grid: tuple[int, int], samples_per_patch: int) -> int:
    """Side of blocks of pixels of which at least `samples_per_patch` lie along a patch's side; 0 asks for pixels."""
    if samples_per_patch == 0:
        return 1
    return max(int(min(camera.width / patch_grid[1], camera.height / patch_grid[0]) / samples_per_patch), 1)


def sample_camera(
    camera: Camera, eps2d: float, patch_grid: tuple[int, int], samples_per_patch: int
) -> tuple[Camera, float]:
    """A camera that looks at one value per square block of `compute_stride` pixels, and its blur.

    Shrinking the intrinsics moves pixel centres onto the centres of the blocks, and shrinking the blur with them keeps
    every projected covariance what it was: the result equals the full image sampled at block centres, except where tile
    boundaries truncate splats. Sizes that do not divide are stretched by under a block.
    """
    stride = compute_stride(camera, patch_grid, samples_per_patch)
    if stride == 1:
        return camera, eps2d
    width, height = max(round(camera.width / stride), 1), max(round(camera.height / stride), 1)
    shrinkage = torch.tensor([width / camera.width, height / camera.height, 1.0])
    K = camera.K * shrinkage[:, None].to(camera.K)
    return camera._replace(K=K, width=width, height=height), eps2d * float(shrinkage.prod())


@dataclass(frozen=True)
class PreparedView:
    """A view, projected: everything about it that does not depend on the features. Or several of one size, as one tall
    picture: view under view, and so are their token grids."""

    info: dict[str, Any]
    """The rasterizer's projection and tile lists, for `rasterize_features` and `backproject_features`."""
    num_views: int
    alphas: Float[Tensor, "height width"]
    """Rendered opacity, 0 to 1."""
    mask: Float[Tensor, "height width"]
    """Weights from the valid mask, ones where there is none."""
    tokens: Float[Tensor, "h w embed"]

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Token grid (h, w)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory that keeping this view takes."""
        values = [*self.info.values(), *vars(self.info["blend_geometry"]).values(), self.alphas, self.mask, self.tokens]
        # `info` shares storage between its entries; each storage counts once.
        storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class ViewBlender:
    """Prepares views and applies the operator to them; keeps projections between passes within a memory budget."""

    def __init__(
        self,
        gaussians: ActivatedGaussians,
        views: Sequence[LiftView],
        config: LiftConfig,
        *,
        samples_per_patch: int = 0,
        views_per_call: int = 1,
        memory_mb: float | None = None,
    ):
        """Keeps projections up to `memory_mb` times 1e6 bytes; `samples_per_patch` is that of `prepare_views`.

        By default the memory is the configuration's, or chosen by the device. Up to `views_per_call` views in a row
        that have one size are prepared and blended together.
        """
        self.gaussians, self.views, self.config, self.samples_per_patch = gaussians, views, config, samples_per_patch
        self.groups = _group_views(views, views_per_call)
        memory_mb = choose_cache_mb(config, gaussians.means.device) if memory_mb is None else memory_mb
        self._kept: BoundedMemory[PreparedView] = BoundedMemory(int(memory_mb * 1e6))

    def prepare(self, index: int) -> PreparedView:
        """Projects a group of views and reads its tokens, or takes it from the kept ones."""
        prepared = self._kept.get(index)
        if prepared is None:
            prepared = prepare_views(self.gaussians, self.groups[index], self.samples_per_patch)
            self._kept.keep(index, prepared, prepared.num_bytes)
        return prepared

    def add_normal(
        self, index: int, features: Float[Tensor, "num_gaussians dim"], image: Float[Tensor, "num_gaussians dim"]
    ) -> None:
        """Adds R^T W Q R f of one group of views to `image`, in place."""
        view = self.prepare(index)
        weights, within = compute_weights(view, self.config), self.config.within_patch_weight

        def weigh(maps: Float[Tensor, "views height width channels"]) -> Float[Tensor, "views height width channels"]:
            tall = maps.flatten(0, 1)
            if self.config.token_to_pixel == "area":
                tall = torch.lerp(average_over_cells(tall, weights, view.patch_grid), tall, within)
            return (tall * weights[..., None]).view_as(maps)

        add_normal(features, view.info, weigh, add_to=image)


def choose_cache_mb(config: LiftConfig, device: torch.device) -> float:
    """Memory for projections that are kept between passes, in 1e6 bytes: the configuration's, or the device's own."""
    return 1e3 * choose_budget_gb(device, CPU_CACHE_GB) if config.cache_memory_mb is None else config.cache_memory_mb


def choose_views_per_call(gaussians: ActivatedGaussians, view: LiftView, config: LiftConfig) -> int:
    """How many sampled views a card blends at once: small pictures leave most of it idle. 1 on a CPU."""
    if gaussians.means.device.type != "cuda" or config.token_to_pixel == "bilinear":
        return 1
    tokens = view.read_tokens(gaussians.means.device)
    camera, _ = sample_camera(view.camera, 0.0, (tokens.shape[0], tokens.shape[1]), config.samples_per_patch)
    num_tiles = math.ceil(camera.width / TILE_SIZE) * math.ceil(camera.height / TILE_SIZE)
    copied = _COPIED_BYTES // (4 * (config.feature_dim + 1) * max(len(gaussians), 1))
    return max(min(math.ceil(_TILES_PER_CALL / num_tiles), copied, _MOST_VIEWS), 1)


def _group_views(views: Sequence[LiftView], most: int) -> list[list[LiftView]]:
    groups: list[list[LiftView]] = []
    for _, same in itertools.groupby(views, key=lambda view: (view.camera.width, view.camera.height)):
        alike = list(same)
        groups += [alike[start : start + most] for start in range(0, len(alike), most)]
    return groups


@torch.no_grad()
def prepare_views(gaussians: ActivatedGaussians, views: Sequence[LiftView], samples_per_patch: int = 0) -> PreparedView:
    """Projects the Gaussians into views of one size; tokens and masks are read, with the errors of `LiftView`.

    About `samples_per_patch` pixels along a patch's side are looked at, 0 for all. The picture is then sampled at the
    centres of square blocks, each with the mean of its mask.
    """
    device = gaussians.means.device
    tokens = [view.read_tokens(device) for view in views]
    mask = torch.stack([view.read_mask(device) for view in views])
    grid = (tokens[0].shape[0], tokens[0].shape[1])
    sampled = [sample_camera(view.camera, gaussians.eps2d, grid, samples_per_patch) for view in views]
    cameras, eps2d = [camera for camera, _ in sampled], sampled[0][1]
    if mask.shape[1:] != (cameras[0].height, cameras[0].width):
        mask = F.adaptive_avg_pool2d(mask[:, None], (cameras[0].height, cameras[0].width))[:, 0]
    info = gaussians.project(*cameras, eps2d=eps2d)
    # Blending ones gives alpha.
    alphas = rasterize_features(gaussians.means.new_ones(len(gaussians), 1), info)[..., 0]
    return PreparedView(info, len(views), alphas.flatten(0, 1), mask.flatten(0, 1), torch.cat(tokens))


def compute_weights(view: PreparedView, config: LiftConfig) -> Float[Tensor, "height width"]:
    """W: how much each pixel counts."""
    return view.mask * view.alphas if config.accumulation_aware else view.mask


@torch.no_grad()
def backproject_targets(
    view: PreparedView, basis: PcaBasis, config: LiftConfig, zeros: Float[Tensor, "num_gaussians channels"]
) -> tuple[Float[Tensor, "num_gaussians dim"], Float[Tensor, " num_gaussians"], Float[Tensor, " num_gaussians"]]:
    """Prepared views' part of the weighted sum, R^T W t and R^T W 1, by a single adjoint pass with weights as one more
    channel; and R^T 1: how much of the picture each Gaussian makes up, in pixels, masked pixels included.

    `zeros` is memory for the result, [N, D + 1].
    """
    height, width = view.alphas.shape
    coordinates = apply_pca(view.tokens, basis)
    # Ones spread as ones: the last channel becomes W.
    with_ones = torch.cat([coordinates, torch.ones_like(coordinates[..., :1])], dim=-1)
    targets = spread_tokens(with_ones, width, height, config.token_to_pixel)
    targets = targets.mul_(compute_weights(view, config)[..., None])
    sums, blend_weight = backproject_features(targets.unflatten(0, (view.num_views, -1)), view.info, add_to=zeros)
    return sums[:, :-1], sums[:, -1], blend_weight


@torch.no_grad()
def average_over_views(scene: FeatureScene, capture: PosedCapture, max_views: int | None) -> FeatureScene:
    """The scene in which each Gaussian's features are the mean of what the patches it appears in show.

    A solve fits the tokens of every lifted view, their noise included; rendered at one of those views it gives back
    much of that view's noise. Averaging what the scene shows over views and patches removes it, as the weighted sum
    does, and needs the scene file and the valid masks alone:

        f' = sum of R^T W P R f / sum of R^T W 1, with W = opacity times valid mask.

    Masked pixels neither take part in a patch's mean nor receive it: features lifted there correspond to no token.
    Gaussians that no valid pixel shows keep theirs, and the decoder stays. At most `max_views` of the lifted views, as
    `capture` has them, are taken, evenly spread; None takes all.
    """
    features_and_one = scene.features_and_one
    sums = torch.zeros_like(features_and_one)
    for view in select_evenly(find_usable(scene, capture), max_views):
        patch_grid = compute_patch_grid(view.height, view.width, scene.backbone.patch_size)
        camera, eps2d = sample_camera(view.camera, scene.eps2d, patch_grid, AVERAGING_SAMPLES)
        mask = sample_mask(capture.load_valid_mask(view).to(sums.device), camera.width, camera.height)
        info = scene.activated.project(camera, eps2d=eps2d)
        low, alphas = rasterize_features(features_and_one, info)[0].tensor_split([-1], dim=-1)
        weights = alphas * mask[..., None]
        averaged = average_over_cells(low, weights[..., 0], patch_grid)
        backproject_features(torch.cat([averaged * weights, weights], dim=-1)[None], info, add_to=sums)
    total = sums[:, -1:]
    averages = sums[:, :-1] / total.clamp(min=1e-12)
    features = torch.where(total > 0, averages, features_and_one[:, :-1])
    return replace(scene, gaussians=scene.gaussians.with_features(features))


def find_lifted(scene: FeatureScene) -> list[View]:
    """The views that a scene was lifted from, as its file says; its training views where somebody else lifted it."""
    if scene.lifted_views is None:
        return scene.posed_capture.select("train")
    return [scene.posed_capture.name_to_view[name] for name in scene.lifted_views]


def find_usable(scene: FeatureScene, capture: PosedCapture) -> list[View]:
    """The lifted views as in `capture`, without those whose mask is gone: their valid pixels are unknown."""
    lifted = [capture.name_to_view[view.name] for view in find_lifted(scene)]
    return [view for view in lifted if view.frame.mask_path is None or view.frame.mask_path.is_file()]


def sample_mask(mask: Bool[Tensor, "height width"], width: int, height: int) -> Float[Tensor, "rows columns"]:
    """One where all pixels of a sample's block are valid, else zero, as where photographs are reduced."""
    return 1.0 - F.adaptive_max_pool2d((~mask).float()[None, None], (height, width))[0, 0]
