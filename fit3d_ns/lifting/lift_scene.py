"""`lift_scene`: Gaussians and photographs to a whole `FeatureScene`; `forecast_lift`: what that will cost.

Tokens of all views come from the feature cache, which is filled first; the solve then reads them from disk, view by
view. Metrics are those of what the scene file will hold: half-precision features, dropped Gaussians gone.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.features import BackboneDescription, FeatureCache, compute_feature_key, create_extractor, extract_features
from fit3d_ns.lifting.blending import choose_cache_mb, prepare_views
from fit3d_ns.lifting.config import LiftConfig, LiftSceneConfig
from fit3d_ns.lifting.feature_error import evaluate_features
from fit3d_ns.lifting.passes import Progress, list_decisive
from fit3d_ns.lifting.solver import LIFT_PRODUCTS, LiftResult, solve_features
from fit3d_ns.lifting.sources import LiftSource, check_photographs, compare_with_photographs
from fit3d_ns.lifting.views import LiftView, choose_views, create_lift_views, fit_picture_basis
from fit3d_ns.scene import FeatureScene, Gaussians, PosedCapture, View, load_scene, save_scene
from fit3d_ns.scene.posed_capture import record_capture
from fit3d_ns.scene.scene_file import TRAINING_SECONDS
from fit3d_ns.utils.files import hash_bytes, hash_file
from fit3d_ns.utils.progress import PhaseTimer, create_progress, measure_peak_memory_mb, notice
from fit3d_ns.utils.selection import select_evenly

LIFT_HASH = "lift_hash"
"""Metric of a scene: which lift it came from."""


@dataclass(frozen=True)
class LiftSetup:
    """What all lifts of a command share: the backbone with its cached tokens, settings, and where to work."""

    cache: FeatureCache
    """Tokens of the backbone that is lifted; its weights are read only if tokens are missing."""
    config: LiftConfig
    options: LiftSceneConfig = field(default_factory=LiftSceneConfig)
    device: str = "cpu"
    include_sh: bool = False
    """Whether scene files keep how colour depends on the direction."""

    @property
    def backbone(self) -> BackboneDescription:
        return self.cache.description

    def load_views(self, capture: PosedCapture, views: Sequence[View]) -> list[LiftView]:
        """Fills the cache with the tokens of `views`, where they are missing, and returns the views of a lift."""
        images = [partial(capture.load_image, view) for view in views]
        keys = extract_features(images, self.cache, device=self.device, batch_size=self.options.feature_batch_size)
        by_name = {view.name: key for view, key in zip(views, keys, strict=True)}
        return create_lift_views(capture, views, lambda view: self.cache.load(by_name[view.name]))


@dataclass(frozen=True)
class LiftForecast:
    """Predicted costs; other work on the machine changes the seconds."""

    num_gaussians: int
    num_views: int
    num_held_out: int
    token_seconds: float
    """Reading all photographs, and the backbone where the sampled view's tokens are not cached yet."""
    is_cached: bool
    """Whether the sampled view's tokens were cached; the forecast takes all other views to be like it."""
    solve_seconds: float
    """All passes of the solve, at most."""
    evaluation_seconds: float
    memory_mb: float
    """Peak memory in 1e6 bytes."""
    file_mb: float
    """Size of the scene file in 1e6 bytes."""

    @property
    def seconds(self) -> float:
        return self.token_seconds + self.solve_seconds + self.evaluation_seconds


def lift_scene(
    source: LiftSource,
    setup: LiftSetup,
    state_path: Path | None = None,
    *,
    progress: Progress | None = None,
    basis: PcaBasis | None = None,
    pca: PcaBasis | None = None,
) -> tuple[FeatureScene, LiftResult]:
    """Lifts a backbone's tokens onto a source: the scene on the CPU with its metrics, and everything the solve found.

    ValueError: what `solve_features` and `extract_features` refuse.

    Args:
        state_path: Where an interrupted solve is kept and found again; nowhere by default.
        progress: A progress bar by default.
        basis: Space of the features, if other scenes share it; fitted to this scene's tokens by default.
        pca: Directions and colours of pictures, if other scenes share them; fitted by default.
    """
    config, options, device, timer = setup.config, setup.options, setup.device, PhaseTimer()
    taught, measured = choose_views(source.capture, options.views)
    with timer.phase("photographs"):
        fit = check_photographs(source, device)
    with timer.phase("tokens"):
        views = setup.load_views(source.capture, [*taught, *measured])
    lifted, held_out = views[: len(taught)], views[len(taught) :]
    is_resumed = state_path is not None and state_path.is_file()
    if is_resumed:
        notice(f"Going on with the interrupted lift in {state_path}.")
    with _show_passes() as bar:
        result = solve_features(
            source.activate(device),
            lifted,
            config,
            basis=basis,
            backbone=setup.backbone.identity,
            state_path=state_path,
            progress=progress or bar,
        )
    with timer.phase("pictures"):
        own = fit_picture_basis(lifted)
    keep = torch.ones_like(result.is_valid) if not options.drop_unseen else ~result.is_unseen
    scene = _create_scene(source, result, keep.cpu(), own if pca is None else pca, setup.backbone)
    with timer.phase("evaluation"):
        metrics = _measure_dropping(scene, source, taught, device)
        metrics |= measure_held_out(scene, held_out, own.mean, device)
    metrics |= {
        "photograph_psnr": fit.psnr,
        "num_gaussians": scene.gaussians.num_gaussians,
        "num_invalid_gaussians": source.num_dropped + int((~result.is_valid).sum()),
        "num_unseen_gaussians": int(result.is_unseen.sum()),
        "num_dropped_unseen_gaussians": int((~keep).sum()),
        "num_train_views": len(lifted),
        "num_eval_views": len(held_out),
        "passes": result.num_passes,
        "residuals": [float(residual) for residual in result.residuals],
        "explained_share": result.basis.explained_share,
        "is_resumed": is_resumed,
        "seconds": {name: round(seconds, 3) for name, seconds in {**timer.seconds, **result.seconds}.items()},
        TRAINING_SECONDS: source.training_seconds,
        "peak_memory_mb": _measure_memory_mb(device),
        "source": source.description,
        "lift": asdict(config),
    }
    return replace(scene, metrics=metrics, lifted_views=tuple(view.name for view in taught)), result


def keep_features(source: LiftSource, setup: LiftSetup) -> FeatureScene | None:
    """The scene of a source with features of `setup`'s backbone and a decoder; None for one that is to be lifted."""
    if source.decoder is None:
        return None
    metrics = {
        "photograph_psnr": compare_with_photographs(source, setup.device).psnr,
        "num_gaussians": source.gaussians.num_gaussians,
        "num_invalid_gaussians": source.num_dropped,
        "source": source.description,
    }
    scene = FeatureScene(source.gaussians, source.decoder, source.capture, setup.backbone, metrics=metrics)
    return replace(scene, rasterize_mode=source.rasterize_mode, eps2d=source.eps2d)


def measure_held_out(
    scene: FeatureScene, held_out: Sequence[LiftView], mean_token: Float[Tensor, " embed"], device: str
) -> dict[str, Any]:
    """Metrics of a scene on views that it was not lifted from; none, with a notice, where that cannot be measured.

    The baseline's `mean_token` is that of the views that were lifted.
    """
    if not held_out:
        notice("No view is held out: the capture has no test views, so there are no metrics for new views.")
        return {}
    scene = scene.to(device)
    metrics = evaluate_features(
        scene.activated,
        scene.gaussians.features.float(),
        scene.decoder,
        held_out,
        mean_token.to(device),
        token_reading=scene.token_reading,
    )
    if metrics.num_tokens == 0:
        # The lift itself is sound.
        notice("No held-out metrics: no token of these views is covered by Gaussians and mask; check the cameras.")
        return {}
    return {
        "feature_l1": metrics.feature_l1,
        "feature_cosine": metrics.feature_cosine,
        "feature_l1_mean_token": metrics.mean_token_l1,
        "feature_cosine_mean_token": metrics.mean_token_cosine,
        "num_eval_tokens": metrics.num_tokens,
    }


def compute_lift_hash(source: LiftSource, setup: LiftSetup) -> str:
    """What a scene file depends on: source, photographs (names and contents), backbone and settings; one that is
    finished has it among its metrics, as `LIFT_HASH`."""
    frames = [view.frame for view in source.capture.views]
    files = [path for frame in frames for path in (frame.image_path, frame.mask_path) if path is not None]
    content = {
        "capture": record_capture(source.capture),
        "contents": [hash_file(path) if path.is_file() else None for path in files],
        "rendering": [source.rasterize_mode, source.eps2d, *([source.recipe] if source.recipe else [])],
        "backbone": setup.backbone.identity,
        "config": list_decisive(setup.config),
        "options": [setup.options.views, setup.options.drop_unseen, setup.include_sh],
    }
    # What the lift itself finds is no part of what it starts from: a scene file may be lifted onto itself.
    lifted = ("features", *LIFT_PRODUCTS) if source.decoder is None else ()
    found = {*lifted, *(() if setup.include_sh else ("sh_rest",))}
    tensors = [tensor for name, tensor in source.gaussians.tensors().items() if name not in found and not source.recipe]
    return hash_bytes(json.dumps(content).encode(), *(part.cpu().contiguous().numpy().tobytes() for part in tensors))


def find_finished(path: Path, lift_hash: str) -> FeatureScene | None:
    """The scene in a file, if it is of the same lift."""
    with suppress(ValueError):
        scene = load_scene(path)
        return scene if scene.metrics.get(LIFT_HASH) == lift_hash else None
    return None


def lift_to_file(source: LiftSource, setup: LiftSetup, path: Path, state_path: Path, overwrite: bool) -> FeatureScene:
    """The scene of a source, written to a file unless it is there already and not to be lifted again."""
    lift_hash = compute_lift_hash(source, setup)
    scene = None if overwrite else find_finished(path, lift_hash)
    if scene is None:
        lifted = keep_features(source, setup) or lift_scene(source, setup, state_path)[0]
        scene = replace(lifted, metrics={**lifted.metrics, LIFT_HASH: lift_hash})
        save_scene(scene, path, include_sh=setup.include_sh)
    return scene


def forecast_lift(source: LiftSource, setup: LiftSetup) -> LiftForecast:
    """Lifts the middle view alone, twice (kernels are compiled and files are read in the first), and counts.

    The view's tokens stay in the cache. ValueError as in `lift_scene`.
    """
    cache, config, device = setup.cache, setup.config, setup.device
    lifted, held_out = choose_views(source.capture, setup.options.views)
    num_views, num_held_out = len(lifted), len(held_out)
    sample = lifted[num_views // 2]
    start = time.perf_counter()
    image = source.capture.load_image(sample)
    key = compute_feature_key(image)
    read_seconds = time.perf_counter() - start
    is_cached = cache.contains(key)
    views = setup.load_views(source.capture, [sample])
    backbone_seconds = 0.0
    if not is_cached:
        # The first pass of a backbone also reads its weights: the second is timed, on tokens that are thrown away.
        extractor = create_extractor(cache.description, device=device)
        start = time.perf_counter()
        # (h, w, 3) -> (1, 3, h, w)
        extractor(image.permute(2, 0, 1)[None].float().to(device) / 255.0)
        backbone_seconds = time.perf_counter() - start
    gaussians = source.activate(device)
    one_pass = replace(config, max_passes=min(config.max_passes, 1), polish_steps=min(config.polish_steps, 1))
    solve_features(gaussians, views, one_pass)
    result = solve_features(gaussians, views, one_pass)

    def sum_seconds(*starts: str) -> float:
        """Of the passes whose names begin so."""
        return sum((seconds for name, seconds in result.pass_seconds.items() if name.startswith(starts)), 0.0)

    # What the conjugate gradients keep between passes, and make again where it does not fit.
    start = time.perf_counter()
    prepared = prepare_views(gaussians, views[:1], config.samples_per_patch)
    prepare_seconds = time.perf_counter() - start
    # Views whose projections are not kept are projected again in each pass after the first that projects them. A
    # sampled solve's decoder pass projects whole views in any case, and so did the measured one.
    cache_mb = choose_cache_mb(config, torch.device(device))
    num_kept = min(int(cache_mb * 1e6 / max(prepared.num_bytes, 1)), num_views)
    num_passes = config.max_passes + int("sampled weighted sum" not in result.pass_seconds)
    solve_seconds = (
        num_views * sum_seconds("basis", "weighted sum", "sampled weighted sum")
        + config.decoder_share * num_views * sum_seconds("decoder")
        + num_views * config.max_passes * sum_seconds("solve")
        + (num_views - num_kept) * num_passes * prepare_seconds
        + config.polish_steps * result.seconds["polish"]
    )
    kept_mb = (num_kept - 1) * prepared.num_bytes / 1e6
    stored = source.gaussians if setup.include_sh else replace(source.gaussians, sh_rest=None)
    # Features are stored in two bytes each.
    bytes_per_gaussian = stored.bytes_per_gaussian + 2 * (config.feature_dim - stored.feature_dim)
    decoder_bytes = 4 * 9 * config.feature_dim * cache.description.embed_dim
    return LiftForecast(
        num_gaussians=stored.num_gaussians,
        num_views=num_views,
        num_held_out=num_held_out,
        token_seconds=(num_views + num_held_out) * (read_seconds + backbone_seconds),
        is_cached=is_cached,
        solve_seconds=solve_seconds,
        evaluation_seconds=num_held_out * (prepare_seconds + sum_seconds("decoder")),
        memory_mb=_measure_memory_mb(device) + max(kept_mb, 0.0),
        file_mb=(stored.num_gaussians * bytes_per_gaussian + decoder_bytes) / 1e6,
    )


@contextmanager
def _show_passes() -> Iterator[Progress]:
    """A progress bar for the passes of a solve, one after the other."""
    with create_progress() as bar:
        task = bar.add_task("Lifting", total=None, note="")
        last = [""]

        def report(name: str, done: int, total: int) -> None:
            if name != last[0]:
                last[0] = name
                bar.reset(task, total=total, description=f"Lifting, {name}", note="")
                if bar.disable:
                    notice(f"Lifting, {name} ({total} views)")
            bar.update(task, completed=done)

        yield report


def _create_scene(
    source: LiftSource, result: LiftResult, keep: Tensor, pca: PcaBasis, backbone: BackboneDescription
) -> FeatureScene:
    lifted: dict[str, Any] = {name: getattr(result, name).cpu() for name in ("features", *LIFT_PRODUCTS)}
    gaussians = Gaussians.from_raw(**{**source.gaussians.tensors(), **lifted})
    # Rotations that are normalised twice are rounded twice.
    gaussians = replace(gaussians, quats=source.gaussians.quats)
    return FeatureScene(
        gaussians=gaussians.select(keep),
        decoder=result.decoder.copy_to("cpu"),
        posed_capture=source.capture,
        backbone=backbone,
        pca=pca,
        token_reading=result.config.token_reading,
        rasterize_mode=source.rasterize_mode,
        eps2d=source.eps2d,
    )


def _measure_dropping(scene: FeatureScene, source: LiftSource, lifted: Sequence[View], device: str) -> dict[str, Any]:
    """What leaving out Gaussians changed in lifted views."""
    if scene.gaussians.num_gaussians == source.gaussians.num_gaussians:
        return {}
    kept = replace(source, gaussians=scene.gaussians)
    pictures = [(source.render(view, device)[0], kept.render(view, device)[0]) for view in select_evenly(lifted, 3)]
    return {"largest_change_by_dropping": max(float((before - after).abs().max()) for before, after in pictures)}


def _measure_memory_mb(device: str) -> float:
    """Peak memory in 1e6 bytes: of the device on CUDA, resident on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return measure_peak_memory_mb()
