"""`lift_scene`: Gaussians and photographs to a whole `FeatureScene`: tokens, solve, by-products, held-out figures.

Tokens of all views come from the feature cache, which is filled first; the solve then reads them from disk, view by
view. Figures are those of what the scene file will hold: half-precision features, dropped Gaussians gone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.features import BackboneDescription, FeatureCache
from fit3d_ns.lifting.config import LiftConfig, LiftSceneConfig
from fit3d_ns.lifting.feature_error import evaluate_features
from fit3d_ns.lifting.passes import Progress
from fit3d_ns.lifting.solver import LiftResult, solve_features
from fit3d_ns.lifting.sources import (
    LiftSource,
    compare_with_photographs,
    warn_of_poor_fit,
)
from fit3d_ns.lifting.views import ChosenViews, LiftView, choose_views, fit_picture_basis, load_views
from fit3d_ns.scene import FeatureDecoder, FeatureScene, Gaussians
from fit3d_ns.scene.scene_costs import TRAINING_FIGURE
from fit3d_ns.utils.progress import PhaseTimer, create_progress, measure_peak_memory_mb, notice
from fit3d_ns.utils.selection import select_evenly


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
    basis: PcaBasis | None = None,
    pca: PcaBasis | None = None,
) -> tuple[FeatureScene, LiftResult]:
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
        basis: Space of the features, if other scenes share it; fitted to this scene's tokens by default.
        pca: Directions and colours of pictures, if other scenes share them; fitted by default.

    Returns:
        The scene on the CPU, with the lift's figures, and everything the solve found.

    Raises:
        ValueError: What `solve_features` and `extract_features` refuse, or a feature dimension above the tokens' width.
    """
    options = options or LiftSceneConfig()
    check_dimensions(config, backbone)
    timer = PhaseTimer()
    chosen = choose_views(source.capture, options.views)
    with timer.phase("photographs"):
        fit = compare_with_photographs(source, device)
    warn_of_poor_fit(source, fit)
    with timer.phase("tokens"):
        views = load_views(source.capture, [*chosen.lifted, *chosen.held_out], cache, options, device)
    lifted, held_out = views[: len(chosen.lifted)], views[len(chosen.lifted) :]
    is_resumed = state_path is not None and state_path.is_file()
    if is_resumed:
        notice(f"Going on with the interrupted lift in {state_path}.")
    with show_passes() as bar:
        result = solve_features(
            source.activate(device),
            lifted,
            config,
            basis=basis,
            backbone=backbone.identity,
            state_path=state_path,
            progress=progress or bar,
        )
    with timer.phase("pictures"):
        own = fit_picture_basis(lifted)
    keep = torch.ones_like(result.is_valid) if not options.drop_unseen else ~result.is_unseen
    scene = _create_scene(source, result, keep.cpu(), own if pca is None else pca, backbone)
    with timer.phase("evaluation"):
        figures = _measure_dropping(scene, source, chosen, device)
        figures |= measure_held_out(scene, held_out, own.mean, device)
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
    return replace(scene, metrics=figures, lifted_views=tuple(view.name for view in chosen.lifted)), result


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


def _create_scene(
    source: LiftSource, result: LiftResult, keep: Tensor, pca: PcaBasis, backbone: BackboneDescription
) -> FeatureScene:
    known = source.gaussians
    lifted = {
        "features": result.features.cpu(),
        "blend_weight": result.blend_weight.cpu(),
        "num_views": result.num_views.cpu(),
        "feature_variance": result.feature_variance.cpu(),
    }
    gaussians = Gaussians.from_raw(**{**known.tensors(), **lifted})
    # Rotations that are normalised twice are rounded twice.
    gaussians = replace(gaussians, quats=known.quats)
    decoder = result.decoder
    bias = None if decoder.bias is None else decoder.bias.detach().cpu()
    return FeatureScene(
        gaussians=gaussians.select(keep),
        decoder=FeatureDecoder.from_weights(decoder.weight.detach().cpu(), bias),
        posed_capture=source.capture,
        backbone=backbone,
        pca=pca,
        token_reading=result.config.token_reading,
        rasterize_mode=source.rasterize_mode,
        eps2d=source.eps2d,
    )


def _measure_dropping(
    scene: FeatureScene, source: LiftSource, chosen: ChosenViews, device: torch.device | str
) -> dict[str, Any]:
    """What leaving out Gaussians changed in lifted views."""
    if scene.gaussians.num_gaussians == source.gaussians.num_gaussians:
        return {}
    kept = replace(source, gaussians=scene.gaussians)
    changes = [
        float((source.render(view, device)[0] - kept.render(view, device)[0]).abs().max())
        for view in select_evenly(chosen.lifted, 3)
    ]
    return {"largest_change_by_dropping": max(changes)}


def measure_held_out(
    scene: FeatureScene,
    held_out: Sequence[LiftView],
    mean_token: Float[Tensor, " embed"],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Figures of a scene on views that it was not lifted from; none, with a notice, where that cannot be measured.

    Args:
        scene: What is measured, as it will be stored.
        held_out: Views with their tokens.
        mean_token: Of the views that were lifted, for the baseline.
        device: Where to render.
    """
    if not held_out:
        notice("No view is held out: the capture has no test views, so there are no figures for new views.")
        return {}
    scene = scene.to(device)
    try:
        metrics = evaluate_features(
            scene.activated,
            scene.gaussians.features.float(),
            scene.decoder,
            held_out,
            mean_token.to(device),
            token_reading=scene.token_reading,
        )
    except ValueError as error:
        # The lift itself is sound; what cannot be measured is left out of the figures, and said.
        notice(f"No held-out figures: {error}")
        return {}
    return {
        "feature_l1": metrics.feature_l1,
        "feature_cosine": metrics.feature_cosine,
        "feature_l1_mean_token": metrics.mean_token_l1,
        "feature_cosine_mean_token": metrics.mean_token_cosine,
        "num_eval_tokens": metrics.num_tokens,
    }
