"""`lift_scene`: Gaussians and photographs to a whole `FeatureScene`: tokens, solve, by-products, held-out figures.

Tokens of all views come from the feature cache, which is filled first; the solve then reads them from disk, view by
view. Figures are those of what the scene file will hold: half-precision features, dropped Gaussians gone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis, fit_pca
from fit3d_ns.features import BackboneDescription, FeatureCache, FeatureKey, LazyImage, extract_features
from fit3d_ns.lifting.capture_views import create_lift_views
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.evaluation import evaluate_features
from fit3d_ns.lifting.inputs import LiftView
from fit3d_ns.lifting.lift_source import (
    LiftSource,
    compare_with_photographs,
    create_lift_gaussians,
    render_photograph,
    select_evenly,
)
from fit3d_ns.lifting.result import LiftResult
from fit3d_ns.lifting.solver import solve_features
from fit3d_ns.lifting.view_passes import Progress
from fit3d_ns.scene import FeatureDecoder, FeatureScene, PosedCapture, SceneBackbone, View, create_gaussians
from fit3d_ns.scene.scene_costs import TRAINING_FIGURE
from fit3d_ns.utils.progress import PhaseTimer, create_progress, measure_peak_memory_mb, notice

MAX_PICTURE_TOKENS = 50_000
"""Tokens on which the colours of feature pictures are fitted."""


@dataclass(frozen=True)
class LiftSceneConfig:
    """Which views are lifted and what is kept."""

    views: int | None = None
    """How many training views to lift, at even distances in file order; all by default."""
    drop_unseen: bool = False
    """Leave out Gaussians that no lifted view ever weighted; lifted views stay as they are."""
    feature_batch_size: int = 4
    """Photographs per pass of the backbone, at least 1."""

    def __post_init__(self) -> None:
        if self.views is not None and self.views < 1:
            raise ValueError(f"views is {self.views}; at least 1 view must be lifted.")


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


def check_dimensions(config: LiftConfig, backbone: BackboneDescription) -> None:
    """Raises ValueError if more dimensions are asked for than a token has; known before anything is computed."""
    if config.feature_dim > backbone.embed_dim:
        raise ValueError(
            f"feature_dim {config.feature_dim} exceeds the width {backbone.embed_dim} of {backbone.label}'s tokens; "
            f"choose --feature-dim {backbone.embed_dim} or less."
        )


def lift_scene(
    source: LiftSource,
    backbone: BackboneDescription,
    cache: FeatureCache,
    config: LiftConfig,
    options: LiftSceneConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    state_path: Path | None = None,
    progress: Progress | None = None,
) -> FeatureScene:
    """Lifts a backbone's tokens onto a source.

    Args:
        source: Gaussians and views.
        backbone: Whose tokens; its weights are read only if tokens are missing in the cache.
        cache: Where tokens are kept, of the same backbone.
        config: Settings of the solve.
        options: Which views, and what is kept.
        device: Where the backbone and the solve run.
        state_path: Where an interrupted solve is kept and found again; nowhere by default.
        progress: Called with (pass, views done, views); a progress bar by default.

    Returns:
        The scene on the CPU, with the lift's figures.

    Raises:
        ValueError: What `solve_features` and `extract_features` refuse, or a feature dimension above the tokens' width.
    """
    options = options or LiftSceneConfig()
    check_dimensions(config, backbone)
    timer = PhaseTimer()
    chosen = choose_views(source.capture, options.views)
    with timer.phase("photographs"):
        fit = compare_with_photographs(source, device)
    with timer.phase("tokens"):
        views = load_views(source.capture, [*chosen.lifted, *chosen.held_out], cache, options, device)
    lifted, held_out = views[: len(chosen.lifted)], views[len(chosen.lifted) :]
    is_resumed = state_path is not None and state_path.is_file()
    if is_resumed:
        notice(f"Going on with the interrupted lift in {state_path}.")
    with show_passes() as bar:
        result = solve_features(
            create_lift_gaussians(source, device),
            lifted,
            config,
            backbone=backbone.identity,
            state_path=state_path,
            progress=progress or bar,
        )
    with timer.phase("pictures"):
        pca = fit_picture_basis(lifted)
    keep = torch.ones_like(result.is_valid) if not options.drop_unseen else ~result.is_unseen
    scene = _create_scene(source, result, keep.cpu(), pca, backbone)
    with timer.phase("evaluation"):
        figures = _measure(scene, source, chosen, held_out, device)
    figures |= {
        "photograph_psnr": fit.psnr,
        "num_gaussians": scene.gaussians.num_gaussians,
        "num_invalid_gaussians": source.num_dropped + result.num_invalid,
        "num_unseen_gaussians": int(result.is_unseen.sum()),
        "num_dropped_unseen_gaussians": int((~keep).sum()),
        "num_train_views": len(lifted),
        "num_eval_views": len(held_out),
        "passes": result.num_passes,
        "residuals": [float(residual) for residual in result.residuals],
        "explained_share": result.basis.explained_share,
        "is_resumed": is_resumed,
        "seconds": {name: round(seconds, 3) for name, seconds in {**timer.seconds, **result.seconds}.items()},
        TRAINING_FIGURE: source.training_seconds,
        "peak_memory_mb": measure_lift_memory_mb(device),
        "source": source.description,
        "lift": asdict(config),
    }
    return replace(scene, figures=figures)


def load_views(
    capture: PosedCapture,
    views: Sequence[View],
    cache: FeatureCache,
    options: LiftSceneConfig,
    device: torch.device | str,
) -> list[LiftView]:
    """Fills the cache with the tokens of `views`, where they are missing, and returns the views of a lift."""
    images = [_lazy_image(capture, view) for view in views]
    keys = extract_features(images, cache.description, cache, device=device, batch_size=options.feature_batch_size)
    by_name: dict[str, FeatureKey] = {view.name: key for view, key in zip(views, keys, strict=True)}

    def load_tokens(view: View) -> Float[Tensor, "h w embed"]:
        return cache.load(by_name[view.name]).patch_tokens

    return create_lift_views(capture, views, load_tokens)


def fit_picture_basis(views: Sequence[LiftView]) -> PcaBasis:
    """Three directions and fixed colours for pictures of the backbone's tokens, from every n-th token of all views."""
    sizes = [view.read_tokens(torch.device("cpu")).shape for view in views[:1]]
    stride = max(sizes[0][0] * sizes[0][1] * len(views) // MAX_PICTURE_TOKENS, 1)
    rows = [view.read_tokens(torch.device("cpu")).flatten(0, 1)[::stride] for view in views]
    return fit_pca(torch.cat(rows), min(3, sizes[0][2]))


def measure_lift_memory_mb(device: torch.device | str) -> float:
    """Peak memory in 1e6 bytes: of the device on CUDA, resident on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return measure_peak_memory_mb()


@contextmanager
def show_passes() -> Iterator[Progress]:
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


def _lazy_image(capture: PosedCapture, view: View) -> LazyImage:
    return lambda: capture.load_image(view)


def _create_scene(
    source: LiftSource, result: LiftResult, keep: Tensor, pca: PcaBasis, backbone: BackboneDescription
) -> FeatureScene:
    known = source.gaussians
    values: dict[str, Any] = {
        "means": known.means,
        "quats": known.quats,
        "log_scales": known.log_scales,
        "opacity_logits": known.opacity_logits,
        "sh_dc": known.sh_dc,
        "features": result.features.cpu(),
        "blend_weight": result.blend_weight.cpu(),
        "num_views": result.num_views.cpu(),
        "feature_variance": result.feature_variance.cpu(),
    }
    if known.sh_rest is not None:
        values["sh_rest"] = known.sh_rest
    decoder = result.decoder
    bias = None if decoder.bias is None else decoder.bias.detach().cpu()
    return FeatureScene(
        gaussians=create_gaussians(**{name: value[keep] for name, value in values.items()}),
        decoder=FeatureDecoder.from_weights(decoder.weight.detach().cpu(), bias),
        posed_capture=source.capture,
        backbone=SceneBackbone.from_description(backbone),
        pca=pca,
        token_reading=result.config.token_reading,
        rasterize_mode=source.rasterize_mode,
        eps2d=source.eps2d,
    )


def _measure(
    scene: FeatureScene,
    source: LiftSource,
    chosen: ChosenViews,
    held_out: Sequence[LiftView],
    device: torch.device | str,
) -> dict[str, Any]:
    """Held-out figures, and what dropping Gaussians changed in lifted views."""
    kept = LiftSource(scene.gaussians, source.capture, source.description, source.rasterize_mode, source.eps2d)
    figures: dict[str, Any] = {}
    if scene.gaussians.num_gaussians < source.gaussians.num_gaussians:
        figures["largest_change_by_dropping"] = max(
            float((render_photograph(source, view, device)[0] - render_photograph(kept, view, device)[0]).abs().max())
            for view in select_evenly(chosen.lifted, 3)
        )
    if not held_out:
        notice("No view is held out: the capture has no test views, so there are no figures for new views.")
        return figures
    assert scene.pca is not None
    try:
        metrics = evaluate_features(
            create_lift_gaussians(kept, device),
            scene.gaussians.features.float().to(device),
            scene.to(device).decoder,
            held_out,
            scene.pca.mean.to(device),
            token_reading=scene.token_reading,
        )
    except ValueError as error:
        # The lift itself is sound; what cannot be measured is left out of the figures, and said.
        notice(f"No held-out figures: {error}")
        return figures
    return figures | {
        "feature_l1": metrics.feature_l1,
        "feature_cosine": metrics.feature_cosine,
        "feature_l1_mean_token": metrics.mean_token_l1,
        "feature_cosine_mean_token": metrics.mean_token_cosine,
        "num_eval_tokens": metrics.num_tokens,
    }
