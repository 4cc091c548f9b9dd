"""A finished `fit3d-features` run as a `FeatureScene`: what stage II needs, without nerfstudio inside."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.features.backbones import BackboneDescription, describe_backbone
from fit3d_ns.plugin.run_reader import SplatRun, read_run, read_run_figures
from fit3d_ns.scene import FeatureDecoder, FeatureScene
from fit3d_ns.utils.progress import notice


def load_run_scene(path: Path, data: Path | None = None, drop_unseen: bool = False) -> FeatureScene:
    """Reads a run of `fit3d-features`.

    Args:
        path: The run's config.yml or its folder.
        data: Where the dataset lies now, if it was moved since.
        drop_unseen: Leave out Gaussians that no training view ever weighted; no captured view changes by that.

    Raises:
        ValueError: Another method's run, or one whose features were never solved.
    """
    return create_run_scene(read_run(path, data), drop_unseen)


def create_run_scene(run: SplatRun, drop_unseen: bool = False) -> FeatureScene:
    """The scene of a run that was read; see `load_run_scene`."""
    if "features" not in run.gauss_params or "feature_branch.decoder.weight" not in run.state:
        raise ValueError(
            f"{run.config_path} is a run of {run.config.method_name} without features; lift it with "
            f"`fit3d-lift --load-config {run.config_path}`."
        )
    model = run.config.pipeline.model
    if model.feature_loss_weight == 0:
        raise ValueError(f"{run.config_path} was trained with feature loss weight 0: it has no features to export.")
    is_finished = run.step + 1 >= run.config.max_num_iterations
    if model.feature_schedule == "solve" and not (is_finished and bool(run.state["feature_branch.is_solved"])):
        raise ValueError(f"{run.config_path} stopped before its features were solved; resume it with --load-dir.")
    gaussians = run.create_gaussians(features=run.gauss_params["features"], **_read_by_products(run))
    num_invalid = len(run.gauss_params["means"]) - gaussians.num_gaussians
    if num_invalid > 0:
        notice(f"Left out {num_invalid} Gaussians with NaN, infinite or oversized numbers.")
    if drop_unseen:
        seen = gaussians.blend_weight > 0
        if not bool(seen.any()):
            raise ValueError(f"{run.config_path} kept no blend weights (joint schedule); export without --drop-unseen.")
        notice(f"Left out {int((~seen).sum())} Gaussians that no training view weighted.")
        gaussians = gaussians.select(seen)
    bias = run.state.get("feature_branch.decoder.bias")
    return FeatureScene(
        gaussians=gaussians,
        decoder=FeatureDecoder.from_weights(run.state["feature_branch.decoder.weight"].float(), bias),
        posed_capture=run.capture,
        backbone=_describe_backbone(run),
        pca=_read_picture_basis(run.state),
        token_reading=model.token_reading,
        rasterize_mode=run.rasterize_mode,
        metrics=read_run_figures(run.config_path),
        # A short run may have lifted fewer than it trained on; gradient steps see all, and older runs keep no names.
        lifted_views=tuple(run.run_state.get("lifted_views") or (view.name for view in run.capture.select("train"))),
    )


def _read_by_products(run: SplatRun) -> dict[str, Tensor]:
    """By-products of the last solve, after which no Gaussian was added or removed; none where there was no solve."""
    lift, num_gaussians = run.run_state.get("lift", {}), len(run.gauss_params["means"])
    names = ("blend_weight", "num_views", "feature_variance")
    return {name: lift[name] for name in names if name in lift and len(lift[name]) == num_gaussians}


def _describe_backbone(run: SplatRun) -> BackboneDescription:
    """The backbone's identity as the run recorded it, or from the config where it was written by an older version."""
    recorded = run.run_state.get("backbone")
    if recorded:
        return BackboneDescription.from_metadata(recorded)
    datamanager: Any = run.config.pipeline.datamanager
    return describe_backbone(datamanager.backbone, datamanager.backbone_weights, datamanager.normalization)


def _read_picture_basis(state: dict[str, Tensor]) -> PcaBasis | None:
    components = state["feature_branch.pca_components"]
    if not bool(components.any()):
        return None
    return PcaBasis(
        mean=state["feature_branch.pca_mean"],
        components=components,
        explained_variance=state["feature_branch.pca_variance"],
        total_variance=float(state["feature_branch.pca_total_variance"]),
        colour_low=state["feature_branch.pca_low"],
        colour_high=state["feature_branch.pca_high"],
    )
