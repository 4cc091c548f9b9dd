"""Reads runs of `ns-train`, without a pipeline: any splatfacto's as a `SplatRun`, ours also as a `FeatureScene`.

Its `config.yml` is read by `run_config.py`, which runs nothing that it says unless the user trusts it.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nerfstudio.models.splatfacto import SplatfactoModelConfig
from torch import Tensor

from fit3d_ns.features.backbones import BackboneDescription, describe_backbone
from fit3d_ns.features.sources import find_backbone_folder
from fit3d_ns.lifting.solver import LIFT_PRODUCTS
from fit3d_ns.plugin.checkpoints import load_latest_checkpoint
from fit3d_ns.plugin.dataset import UndistortedDataset, correct_poses
from fit3d_ns.plugin.feature_branch import PICTURE_BUFFERS, read_picture_basis
from fit3d_ns.plugin.run_config import find_config, load_config
from fit3d_ns.plugin.trainer import SUMMARY_NAME
from fit3d_ns.scene import FeatureDecoder, FeatureScene, Gaussians
from fit3d_ns.scene.posed_capture import PosedCapture
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.results import load_result


@dataclass(frozen=True)
class SplatRun:
    """One finished run: raw Gaussians in the training frame, and the views that trained and tested it."""

    config_path: Path
    """The run's config.yml."""
    config: Any
    """nerfstudio's trainer config."""
    step: int
    """Last step of the checkpoint."""
    gauss_params: dict[str, Tensor]
    """Raw parameters by splatfacto's names (`means`, `features_dc`, `opacities`, ...), and our `features`."""
    state: dict[str, Tensor]
    """The whole model state without its prefix."""
    run_state: dict[str, Any]
    """What our trainer saved next to the model; empty for nerfstudio's own runs."""
    capture: PosedCapture
    """Training views (poses corrected by the run's camera optimizer) and held-out views."""
    rasterize_mode: Literal["classic", "antialiased"]
    """How the Gaussians were trained."""

    def create_gaussians(self, exact: bool = False, **lifted: Tensor) -> Gaussians:
        """The Gaussians in their stored types, without those that cannot be stored or drawn.

        `exact`, and `lifted`, features and by-products of a lift, are arguments of `Gaussians.from_raw`.
        """
        raw = self.gauss_params
        sh_dc = raw["features_dc"]
        if self.config.pipeline.model.sh_degree == 0:
            # Then colours are stored before a sigmoid, not as coefficients.
            sh_dc = (torch.sigmoid(sh_dc) - 0.5) * (2 * np.pi**0.5)
        return Gaussians.from_raw(
            means=raw["means"],
            quats=raw["quats"],
            log_scales=raw["scales"],
            opacity_logits=raw["opacities"],
            sh_dc=sh_dc,
            sh_rest=raw["features_rest"],
            **lifted,
            drop_invalid=True,
            exact=exact,
        )


def read_run(path: Path, data: Path | None = None, trust_config: bool = False) -> SplatRun:
    """Reads a run of splatfacto or of a method built on it; `trust_config` as in `load_config`.

    `path` is the run's config.yml, its folder, or a folder above it that holds one run; `data` is where the dataset
    lies now, if it was moved since. ValueError: no run there, another kind of method, a dataset that moved, or no
    readable checkpoint.
    """
    config_path = find_config(Path(path))
    config = load_config(config_path, trust_config)
    model = config.pipeline.model
    if not isinstance(model, SplatfactoModelConfig):
        raise ValueError(f"{config_path} is a run of {config.method_name}; take one of splatfacto or built on it.")
    datamanager = config.pipeline.datamanager
    chosen = Path(datamanager.data or datamanager.dataparser.data) if data is None else Path(data)
    if not chosen.exists():
        how = "give its place with --data" if data is None else "check --data"
        raise ValueError(f"The dataset of {config_path} is not at {chosen}; {how}.")
    datamanager.data = datamanager.dataparser.data = chosen
    checkpoint, _ = load_latest_checkpoint(config_path.parent / config.relative_model_dir)
    stored = checkpoint["pipeline"]
    state = {key.removeprefix("module.").removeprefix("_model."): value for key, value in stored.items()}
    names = ("means", "scales", "quats", "features_dc", "features_rest", "opacities", "features")
    gauss_params = {name: state[f"gauss_params.{name}"].float() for name in names if f"gauss_params.{name}" in state}
    if "means" not in gauss_params:
        raise ValueError(f"The checkpoint of {config_path} holds no Gaussians; it may be of an older nerfstudio.")
    return SplatRun(
        config_path=config_path,
        config=config,
        step=int(checkpoint["step"]),
        gauss_params=gauss_params,
        state=state,
        run_state=checkpoint.get("fit3d", {}).get("run", {}),
        capture=_read_capture(config, state),
        rasterize_mode=model.rasterize_mode,
    )


def load_run_scene(
    path: Path, data: Path | None = None, drop_unseen: bool = False, trust_config: bool = False, exact: bool = False
) -> FeatureScene:
    """Reads a finished run of `fit3d-features`, found as in `read_run`, as the scene that stage II takes.

    `drop_unseen` leaves out Gaussians that no training view ever weighted; no captured view changes by that. With
    `exact` nothing is rounded to half precision, as a scene file would have it. A ValueError says that another method
    made the run, or that its features were never solved.
    """
    run = read_run(path, data, trust_config)
    if "features" not in run.gauss_params or "feature_branch.decoder.weight" not in run.state:
        problem = f"{run.config_path} is a run of {run.config.method_name} without features"
        raise ValueError(f"{problem}; lift it with `fit3d-lift --load-config {run.config_path}`.")
    model = run.config.pipeline.model
    if model.feature_loss_weight == 0:
        raise ValueError(f"{run.config_path} was trained with feature loss weight 0: it has no features to export.")
    is_finished = run.step + 1 >= run.config.max_num_iterations
    if model.feature_schedule == "solve" and not (is_finished and bool(run.state["feature_branch.is_solved"])):
        raise ValueError(f"{run.config_path} stopped before its features were solved; resume it with --load-dir.")
    # By-products of the last solve, after which no Gaussian was added or removed; none where there was no solve.
    lift, num_gaussians = run.run_state.get("lift", {}), len(run.gauss_params["means"])
    solved = {name: lift[name] for name in LIFT_PRODUCTS if name in lift and len(lift[name]) == num_gaussians}
    gaussians = run.create_gaussians(exact, features=run.gauss_params["features"], **solved)
    num_invalid = num_gaussians - gaussians.num_gaussians
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
        pca=read_picture_basis({name: run.state[f"feature_branch.{name}"] for name in PICTURE_BUFFERS}),
        token_reading=model.token_reading,
        rasterize_mode=run.rasterize_mode,
        metrics=read_run_figures(run.config_path),
        # A short run may have lifted fewer than it trained on; gradient steps see all, and older runs keep no names.
        lifted_views=tuple(run.run_state.get("lifted_views") or (view.name for view in run.capture.select("train"))),
    )


def read_backbone(path: Path, trust_config: bool = False) -> tuple[str, Path | None, str] | None:
    """Name, weights file and normalization of the backbone in a run's config; None where the method has no features."""
    config: Any = load_config(find_config(path), trust_config)
    datamanager = config.pipeline.datamanager
    name = getattr(datamanager, "backbone", None)
    return None if name is None else (name, datamanager.backbone_weights, datamanager.normalization)


def read_run_figures(config_path: Path) -> dict[str, Any]:
    """The metrics of a run by its config.yml; none where it did not finish, or is nerfstudio's own."""
    # Other programs also write a `results.json`; ours is the only one that is known here.
    with suppress(ValueError):
        return dict(load_result(config_path.parent / SUMMARY_NAME).metrics)
    return {}


def _describe_backbone(run: SplatRun) -> BackboneDescription:
    """The backbone's identity as the run recorded it, or from the config where it was written by an older version."""
    datamanager: Any = run.config.pipeline.datamanager
    given = datamanager.backbone, datamanager.backbone_weights, datamanager.normalization
    recorded = run.run_state.get("backbone") or describe_backbone(*given).to_metadata()
    place = find_backbone_folder(datamanager.backbone) or datamanager.backbone_weights
    return BackboneDescription.from_metadata(recorded, None if place is None else str(place))


def _read_capture(config: Any, state: dict[str, Tensor]) -> PosedCapture:
    """Training views with corrected poses, then held-out views, in one capture."""
    datamanager = config.pipeline.datamanager
    parser = datamanager.dataparser.setup()
    factor, data = datamanager.camera_res_scale_factor, Path(datamanager.dataparser.data)
    # Runs of other methods, and older ones, were trained at full size.
    max_side = getattr(datamanager, "max_image_side", 0)
    train = UndistortedDataset(parser.get_dataparser_outputs(split="train"), factor, data, "train", max_side)
    test = UndistortedDataset(parser.get_dataparser_outputs(split="test"), factor, data, "test", max_side)
    optimizer = config.pipeline.model.camera_optimizer.setup(num_cameras=len(train.cameras), device="cpu")
    prefix = "camera_optimizer."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    optimizer.load_state_dict(own, strict=False)
    poses = correct_poses(optimizer, train.cameras).cpu().float()
    views = [replace(view, camera_to_world=pose) for view, pose in zip(train.capture.views, poses, strict=True)]
    known = {view.name for view in views}
    views = [*views, *(view for view in test.capture.views if view.name not in known)]
    return replace(train.capture, views=views)
