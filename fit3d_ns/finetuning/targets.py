"""What the backbone is taught: the scene's features, rendered at the token grid of the image it is shown.

`F_high` at the token centres, from the image's own camera (paper, section 3.2): the value of rendering at full size,
decoding and resizing, computed where it is read. Each token's weight is the share of valid pixels times, as options,
the rendered alpha and a factor that falls with the features' variance over the lifted views.

Rendered targets are kept for later epochs, before mask and flip and in half precision. A target's hash covers
everything it depends on: the scene's content, the views and masks its features were averaged over, the camera, the
token grid, how tokens are read. So a folder that was filled on one machine serves others that have no rasterizer.

A feature that all views of a point agree on cannot hold its distance to the camera, so targets that are averaged over
views teach a backbone to forget depth. A second, linear head asks for it back. What it should read from the tokens is
blended from the scene's Gaussians at the token grid, as the features are:

    log(z / f)    z-depth of the Gaussians' centres over the focal length in pixels of the image that is shown, because
                  an image alone tells only this ratio; about the scene's mean, because worlds have any unit
    n             the shortest axis of the Gaussians, turned towards the camera, in OpenCV's camera axes (x right, y
                  down, z forwards); shorter than 1 where those that are blended disagree
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features import TokenModel
from fit3d_ns.finetuning import scene_bank
from fit3d_ns.finetuning.draws import Sample, TrainingViews
from fit3d_ns.finetuning.scene_bank import SceneAverages, SceneBank
from fit3d_ns.geometry.cameras import Camera, viewmats_from_camera_to_worlds
from fit3d_ns.rasterization.projection import rotations_from_quats
from fit3d_ns.scene import FeatureScene, TokenReadingRule, View, create_token_reader
from fit3d_ns.utils.files import hash_bytes, hash_file
from fit3d_ns.utils.limits import Limited, Limits
from fit3d_ns.utils.selection import select_evenly
from fit3d_ns.utils.tensor_files import TensorStore

TARGET_FOLDER = "targets"
"""Below the output folder, with the averaged features of scenes below itself; removed when training has ended."""
NUM_CHANNELS = 4
"""What the geometry head reads of a token: distance and normal."""
_NUM_VIEWS, _SMALLEST_ALPHA, _SMALLEST_DEPTH = 8, 1e-6, 1e-6


@dataclass(frozen=True)
class TargetConfig(Limited):
    """How targets are rendered, weighted and kept."""

    token_reading: Literal["scene", "bilinear", "area"] = "scene"
    """How a token reads the rendered map: as in the lift, at its centre (public code), or averaged over its patch."""
    average_views: bool = True
    """Average each scene's features over the lifted views and the patches that show them, masked pixels excepted,
    before targets are rendered: a solved lift also fits what each view alone said, which is the noise that fine-tuning
    should remove. The public code does not, nor does a weighted-sum lift (`fit3d-lift --max-passes 0`) need it."""
    average_gb: Annotated[float, Limits(at_least=0)] = 4.0
    """Averaged features in memory take at most this many 1e9 bytes, 0 and above (0.13 for a million Gaussians of 64
    channels); others lie on disk in the output folder, or with a `cache` of `none` or `memory` are averaged again."""
    weight_by_opacity: bool = True
    """Weight each token by its rendered alpha, so that holes teach nothing; the public code weighs all alike."""
    variance_weight: Annotated[float, Limits(at_least=0)] = 0.0
    """0 ignores it; k weights a token of the scene's mean feature variance by 1 / (1 + k), others accordingly."""
    geometry_weight: Annotated[float, Limits(at_least=0)] = 0.0
    """Weight of a second loss: a linear head, which is not saved, reads depth and normals of the scene's Gaussians from
    the tokens, so that they keep what views do not agree on: how far away things are. 0 (off, public code) or more."""
    leave_one_out: bool = False
    """Render each target from features without the image's own part in the lift."""
    cache: Literal["auto", "none", "memory", "disk"] = "auto"
    """Keep rendered targets for later epochs: in memory, or in memory and then on disk; `auto` does so on CPUs."""
    cache_gb: Annotated[float, Limits(at_least=0)] = 2.0
    """Targets in memory take at most this many 1e9 bytes, 0 and above."""
    cache_folder: Path | None = None
    """Where targets are kept on disk for other runs and machines; by default in the output folder while it trains."""


@dataclass(frozen=True)
class Target:
    """What one image's tokens should be, and how much each counts (0 to 1); float32, on the device."""

    features: Float[Tensor, "h w embed"]
    weights: Float[Tensor, "h w"]
    geometry: Float[Tensor, "h w 4"] | None = None
    """As `render_geometry` gives it, the logarithm about the scene's mean."""


@dataclass
class TargetRenderer:
    """Renders targets, or takes them from the store, if there is one.

    The views are the photographs of the bank's scenes; leave-one-out needs the backbone as it was before training.
    """

    bank: SceneBank
    views: TrainingViews
    config: TargetConfig
    store: TensorStore | None = None
    original: TokenModel | None = None
    num_rendered: int = 0
    _scene_hashes: dict[int, str] = field(default_factory=dict)
    _scene_distances: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rule = self.config.token_reading
        on_disk = self.bank.on_disk
        self.rules: list[TokenReadingRule] = [own.token_reading if rule == "scene" else rule for own in on_disk]
        assert self.original is not None or not self.config.leave_one_out

    def render(self, sample: Sample) -> Target:
        """The target of a sample, flipped as its image is; ValueError where the rendering is not finite."""
        content_hash = "" if self.store is None else self._compute_hash(sample)
        names = ["features", "confidence"] + ["geometry"] * (self.config.geometry_weight > 0)
        stored = None if self.store is None else self.store.load(content_hash, *names)
        if stored is None:
            stored = self._render(sample)
            self.num_rendered += 1
            if self.store is not None:
                stored = {key: value.detach().to("cpu", torch.float16) for key, value in stored.items()}
            if not bool(torch.isfinite(stored["features"]).all()):
                problem = f"The features rendered for {sample.name} are not finite or beyond half precision"
                raise ValueError(f"{problem}; lift its scene again.")
            if self.store is not None:
                self.store.save(content_hash, stored)
        # Read from the rounded numbers also when rendered just now: a resumed run must not see the difference.
        features, confidence, *geometry = (stored[name].to(self.bank.device, torch.float32) for name in names)
        weights = sample.mask.to(confidence) * confidence
        flip = sample.augmentation.apply_to_tokens
        target = Target(flip(features).contiguous(), flip(weights).contiguous())
        return replace(target, geometry=self._finish_geometry(geometry[0], sample)) if geometry else target

    def _finish_geometry(self, geometry: Float[Tensor, "h w 4"], sample: Sample) -> Float[Tensor, "h w 4"]:
        scene = sample.draw.scene
        if scene not in self._scene_distances:
            self._scene_distances[scene] = compute_mean_distance(self.bank[scene], self.views.views[scene])
        geometry = sample.augmentation.apply_to_tokens(geometry) - geometry.new_tensor(
            [self._scene_distances[scene], 0.0, 0.0, 0.0]
        )
        mirror = geometry.new_tensor([1.0, -1.0 if sample.augmentation.flip else 1.0, 1.0, 1.0])
        return (mirror * geometry).contiguous()

    @torch.no_grad()
    def _render(self, sample: Sample) -> dict[str, Tensor]:
        scene, config = self.bank[sample.draw.scene], self.config
        where = sample.camera, sample.patch_grid, self.rules[sample.draw.scene]
        known_share: Tensor | float = 1.0
        if config.leave_one_out:
            assert self.original is not None
            capture = self.views.captures[sample.draw.scene]
            scene, is_known = scene_bank.leave_view_out(scene, capture, sample.view, self.original)
            known_share = render_values(scene, *where, is_known.float()[:, None])[..., 0]
        features, alphas = scene.render_features_with_alpha(*where)
        confidence = alphas if config.weight_by_opacity else torch.ones_like(alphas)
        if config.leave_one_out:
            confidence = confidence * known_share / alphas.clamp(min=1e-6)
        if config.variance_weight > 0:
            # As a multiple of the scene's mean over blend weights; 0 where nothing varies.
            variance, weight = scene.gaussians.feature_variance.float(), scene.gaussians.blend_weight
            mean = (variance * weight).sum() / weight.sum().clamp(min=1e-12)
            relative = torch.where(mean > 0, variance / mean, 0.0)
            variance = render_values(scene, *where, relative[:, None])[..., 0]
            confidence = confidence / (1.0 + config.variance_weight * variance)
        stored = {"features": features, "confidence": confidence.clamp(0.0, 1.0)}
        return {**stored, "geometry": render_geometry(scene, *where)} if config.geometry_weight > 0 else stored

    def _compute_hash(self, sample: Sample) -> str:
        scene, view, window = sample.draw.scene, sample.view, sample.augmentation.window
        if scene not in self._scene_hashes:
            averages, on_disk = self.bank.averages, self.bank.on_disk[scene]
            content_hash = scene_bank.compute_scene_hash(on_disk) if averages is None else averages.compute_hash(scene)
            self._scene_hashes[scene] = content_hash
        config = self.config
        parts: list[object] = [self._scene_hashes[scene], view.name, window, sample.patch_grid, self.rules[scene]]
        parts += [view.camera_to_world.tolist(), view.K.tolist()]
        parts += [config.weight_by_opacity, config.variance_weight, config.leave_one_out]
        parts += ["geometry"] * (config.geometry_weight > 0)
        if config.leave_one_out:  # Which needs the image's own tokens.
            parts += [hash_file(path) for path in (view.frame.image_path, view.frame.mask_path) if path is not None]
        return hash_bytes(*(repr(part).encode() for part in parts))


@torch.no_grad()
def render_values(
    scene: FeatureScene,
    camera: Camera,
    patch_grid: tuple[int, int],
    rule: TokenReadingRule,
    values: Float[Tensor, "num_gaussians channels"],
) -> Float[Tensor, "h w channels"]:
    """Values of the Gaussians, blended and read at the token grid (h, w) of a picture."""
    size = (camera.width, camera.height, patch_grid)
    reader = create_token_reader(*size, rule, neighbourhood=False, device=values.device)
    return reader.read(reader.blend(values, scene.activated.project(camera)))[0]


@torch.no_grad()
def render_geometry(
    scene: FeatureScene, camera: Camera, patch_grid: tuple[int, int], rule: TokenReadingRule
) -> Float[Tensor, "h w 4"]:
    """Log of depth over focal length, and the normal, at each token; zeros where nothing is."""
    gaussians = scene.activated
    viewmat = viewmats_from_camera_to_worlds(camera.camera_to_world.to(gaussians.means))
    places = gaussians.means @ viewmat[:3, :3].T + viewmat[:3, 3]
    # Columns of a rotation are the axes.
    shortest = gaussians.scales.argmin(dim=1)[:, None, None].expand(-1, 3, 1)
    normals = rotations_from_quats(gaussians.quats).gather(2, shortest)[..., 0] @ viewmat[:3, :3].T
    normals = -normals * torch.sign((normals * places).sum(dim=1, keepdim=True))
    distances = torch.log(places[:, 2:].clamp(min=_SMALLEST_DEPTH) / float(camera.K[0, 0]))
    values = torch.cat([distances, normals, torch.ones_like(distances)], dim=1)
    blended = render_values(scene, camera, patch_grid, rule, values)
    alphas = blended[..., NUM_CHANNELS:]
    return torch.where(alphas > _SMALLEST_ALPHA, blended[..., :NUM_CHANNELS] / alphas, 0.0)


def compute_mean_distance(scene: FeatureScene, views: Sequence[View]) -> float:
    """Mean of log(z / f) over a few views, evenly spread."""
    chosen = select_evenly(views, _NUM_VIEWS)
    maps = [render_geometry(scene, view.camera, (16, 16), "area")[..., 0] for view in chosen]
    return float(torch.stack(maps).mean())


def create_averages(
    config: TargetConfig, bank: SceneBank, output_folder: Path, data_root: Path | None = None
) -> SceneAverages | None:
    """What replaces the features of a bank's scenes before targets are rendered, if a configuration asks for it.

    Averages that outgrow the memory go below the run's output folder. Captures lie below `data_root` if moved.
    """
    if not config.average_views:
        return None
    # Averaging costs seconds a scene on any device, reading the result a tenth of one.
    store = _create_store(config, config.average_gb, config.cache in ("auto", "disk"), output_folder, "averages")
    # A view can only be left out of an average that it is part of.
    max_views = None if config.leave_one_out else scene_bank.MAX_AVERAGED_VIEWS
    return SceneAverages(bank.on_disk, store, data_root, max_views)


def create_target_store(config: TargetConfig, device: torch.device, output_folder: Path) -> TensorStore | None:
    """Where a configuration keeps targets, None if it does not: on CUDA, rendering one costs less than keeping it.

    Targets that outgrow the memory go below the run's output folder.
    """
    kind = config.cache
    if kind == "auto":
        kind = "disk" if config.cache_folder is not None or device.type == "cpu" else "none"
    return None if kind == "none" else _create_store(config, config.cache_gb, kind == "disk", output_folder)


def _create_store(
    config: TargetConfig, memory_gb: float, on_disk: bool, output_folder: Path, subfolder: str = ""
) -> TensorStore:
    folder = (config.cache_folder or output_folder / TARGET_FOLDER) / subfolder
    return TensorStore(memory_gb, folder if on_disk else None, keep_on_disk=config.cache_folder is not None)
