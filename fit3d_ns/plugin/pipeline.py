"""`FeaturePipeline`: where captured tokens meet the Gaussians: solving features, metrics, what a resume needs.

Solving features may cost a share of the time of the colour steps. Costs are estimated in units of one colour step over
all views, not measured, so runs stay repeatable to the bit. The least useful work is dropped first: passes beyond a
few, then views of the decoder's fit, then views altogether.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.viewer.viewer_elements import ViewerButton
from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.analysis.pictures import save_picture
from fit3d_ns.lifting.solver import LIFT_PRODUCTS, solve_features
from fit3d_ns.lifting.views import fit_picture_basis
from fit3d_ns.plugin.datamanager import FeatureDatamanager
from fit3d_ns.plugin.dataset import correct_poses
from fit3d_ns.plugin.model import FeatureSplatfactoModel
from fit3d_ns.utils.errors import install_error_sentences
from fit3d_ns.utils.progress import notice, track
from fit3d_ns.utils.selection import select_evenly

PASSES_WITH_ALL_VIEWS = 6
"""Below this many passes of the conjugate gradients, half of the decoder's views are worth less than two more passes
(held-out cosine .0018 against .003 from the fourth pass to the sixth, 109 views, 64 channels)."""
PASSES_WITH_HALF = 3
"""Below this many passes, the same holds for half of the views that are left."""
MIN_VIEWS = 8
"""However short a run is, its features are solved from this many views, or all there are."""


@dataclass(frozen=True)
class SolvePlan:
    """One solve."""

    max_passes: int
    """Passes of the conjugate gradients, 0 and above."""
    decoder_share: float = 1.0
    """Share of the views that the decoder is fitted to."""
    view_share: float = 1.0
    """Share of the views that are lifted at all."""

    def count_views(self, num_views: int) -> int:
        """How many views are lifted."""
        return min(max(int(self.view_share * num_views), MIN_VIEWS), num_views)


@dataclass(frozen=True)
class SolveCosts:
    """Time of a solve's passes over all views; the unit is one colour step for every view."""

    weighted_sum: float
    """Projecting all views, and the adjoint of their targets."""
    decoder: float
    """Rendering all views and the regression."""
    sampled_pass: float
    """One pass of the conjugate gradients over a few pixels per patch."""

    def compute(self, plan: SolvePlan) -> float:
        """What a solve costs; the right-hand side of the conjugate gradients costs one more pass."""
        passes = self.sampled_pass * (plan.max_passes + 1) if plan.max_passes > 0 else 0.0
        return plan.view_share * (self.weighted_sum + plan.decoder_share * self.decoder + passes)

    def plan(self, budget: float, max_passes: int) -> SolvePlan:
        """The best solve of at most `max_passes` passes within a budget, in the unit of the costs."""
        for decoder_share, enough in ((1.0, PASSES_WITH_ALL_VIEWS), (0.5, PASSES_WITH_HALF), (0.25, 0)):
            rest = budget - self.weighted_sum - decoder_share * self.decoder
            passes = max(min(int(rest / self.sampled_pass) - 1, max_passes), 0)
            if rest >= 0 and passes >= min(enough, max_passes):
                return SolvePlan(passes, decoder_share)
        smallest = SolvePlan(0, decoder_share)
        return SolvePlan(0, decoder_share, max(budget, 0.0) / self.compute(smallest))


def estimate_solve_costs(feature_dim: int, samples_per_patch: int = 4) -> SolveCosts:
    """The costs at a number of channels per Gaussian, and of samples along a patch's side (0 for every pixel).

    Measured on two CPU cores with 60k and 140k Gaussians and 64 channels, and rounded up by a third; about half of it
    grows with the channels.
    """
    scale = 0.5 + feature_dim / 128
    sampled_pass = 0.22 if 0 < samples_per_patch <= 4 else 0.9
    return SolveCosts(weighted_sum=1.1 * scale, decoder=0.95 * scale, sampled_pass=sampled_pass * scale)


EARLY_SOLVE = SolvePlan(max_passes=0, decoder_share=0.5)
"""The early solve, for the viewer."""
LAST_SOLVE = SolvePlan(max_passes=6)
"""What early solves must leave to the last one."""


@dataclass
class FeaturePipelineConfig(VanillaPipelineConfig):
    """nerfstudio's pipeline options."""

    _target: type = field(default_factory=lambda: FeaturePipeline)


class FeaturePipeline(VanillaPipeline):
    """Datamanager and model, and the closed-form lift that needs both."""

    datamanager: FeatureDatamanager
    model: FeatureSplatfactoModel

    def __init__(self, config: FeaturePipelineConfig, device: str, *args: Any, **kwargs: Any) -> None:
        # `ns-eval` and its siblings come here without passing our trainer config.
        install_error_sentences()
        super().__init__(config, device, *args, **kwargs)
        self.passes_spent = 0
        self.early_cost_spent = 0.0
        self.lift_state: dict[str, Tensor] = {}
        self.lifted_views: list[str] = []
        self.datamanager.tokens_in_training = self.branch.is_joint
        self.datamanager.depth_in_training = self.model.config.depth_loss_weight > 0
        if not self.branch.is_on:
            self.datamanager.cache = None
        else:
            self.branch.load_tokens = self.datamanager.load_tokens_of_camera
            # nerfstudio finds viewer elements among a module's attributes. Colours change only when one is pressed.
            self.fit_feature_colours = ViewerButton("Fit feature colours to this view", cb_hook=self._fit_colours)
            self.reset_feature_colours = ViewerButton("Feature colours of the scene", cb_hook=self._reset_colours)
            self._scene_basis: PcaBasis | None = None

    @property
    def branch(self) -> Any:
        """The model's feature branch."""
        return self.model.feature_branch

    def prepare_features(self) -> None:
        """Extracts missing tokens and fixes the colours of the pictures; does nothing where features are off."""
        if not self.branch.is_on:
            return
        self.datamanager.extract_tokens(self.datamanager.cached_train)
        self.datamanager.extract_tokens(self.datamanager.cached_eval)
        if self.branch.picture_basis is None:
            views = self.datamanager.create_lift_views(self.datamanager.train_dataset.cameras.camera_to_worlds)
            self.branch.set_picture_basis(fit_picture_basis(views).to(self.model.device))

    def solve_features_if_due(self, step: int, max_num_iterations: int) -> None:
        """Solves features early (one pass), when densification ends (one pass), and at the end (what is left)."""
        config = self.model.config
        if not self.branch.is_on or config.feature_schedule != "solve":
            return
        costs = estimate_solve_costs(config.feature_dim, config.lift.samples_per_patch)
        # A share of the colour steps' time. A run that goes on after its end solves again; what that end cost, its own
        # steps have paid.
        num_views = len(self.datamanager.train_dataset)
        left = config.solve_share * max_num_iterations / num_views - self.early_cost_spent
        done = step + 1
        if done == max_num_iterations:
            self.solve_features(costs.plan(left, config.lift.max_passes))
            notice(f"Features solved in {self.passes_spent} passes over {len(self.lifted_views)} views.")
        elif config.steps_per_solve > 0 and done % config.steps_per_solve == 0:
            self.solve_features(EARLY_SOLVE)
        elif done in (config.early_solve_at, config.stop_split_at):
            # Early features are for the viewer; the last solve is the one that counts.
            if left >= costs.compute(EARLY_SOLVE) + costs.compute(LAST_SOLVE):
                self.solve_features(EARLY_SOLVE)
                self.early_cost_spent += costs.compute(EARLY_SOLVE)

    def solve_features(self, plan: SolvePlan) -> None:
        """Lifts the captured tokens onto the Gaussians as they are now, by least squares (`fit3d_ns.lifting`)."""
        config = self.model.config
        lift = config.create_lift_config(plan.max_passes, plan.decoder_share)
        poses = correct_poses(self.model.camera_optimizer, self.datamanager.train_dataset.cameras.to(self.model.device))
        views = self.datamanager.create_lift_views(poses)
        views = select_evenly(views, plan.count_views(len(views)))
        result = solve_features(self.model.get_lift_gaussians(), views, lift)
        with torch.no_grad():
            self.model.features.copy_(result.features)
        self.branch.set_decoder(result.decoder)
        self.passes_spent += result.num_passes
        self.lift_state = {name: getattr(result, name) for name in LIFT_PRODUCTS}
        self.lifted_views = [view.name for view in views]

    def get_average_eval_image_metrics(
        self, step: int | None = None, output_path: Path | None = None, get_std: bool = False
    ) -> dict[str, float]:
        """Means (and standard deviations) over the held-out frames; frames without a covered token do not count."""
        self.eval()
        if output_path is not None:
            output_path.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, float]] = []
        frames = track(self.datamanager.fixed_indices_eval_dataloader, "Evaluating held-out frames")
        for index, (camera, batch) in enumerate(frames):
            start = time.perf_counter()
            with torch.no_grad():
                outputs = self.model.get_outputs_for_camera(camera)
                metrics, pictures = self.model.get_image_metrics_and_images(outputs, batch)
            rows.append(metrics | {"fps": 1.0 / (time.perf_counter() - start)})
            if output_path is not None:
                for name, picture in pictures.items():
                    save_picture(picture.cpu(), output_path / f"eval_{name}_{index:04d}.png")
        self.train()
        return _average(rows, get_std)

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        """Loads a checkpoint, strictly: a missing key is an error and never a random feature."""
        state = {key.removeprefix("module."): value for key, value in loaded_state.items()}
        # The degree of the spherical harmonics follows the step.
        self.model.step = step
        model = {key.removeprefix("_model."): value for key, value in state.items() if key.startswith("_model.")}
        self.model.load_state_dict(model)

    def capture_run_state(self) -> dict[str, Any]:
        """What a resumed run needs besides parameters and optimizers."""
        return {
            "datamanager": self.datamanager.capture_order(),
            "strategy": dict(self.model.strategy_state),
            "passes_spent": self.passes_spent,
            "early_cost_spent": self.early_cost_spent,
            "lift": self.lift_state,
            "lifted_views": self.lifted_views,
            "backbone": self.datamanager.train_dataset.metadata.get("backbone"),
        }

    def restore_run_state(self, state: dict[str, Any]) -> None:
        """Puts back what `capture_run_state` took."""
        self.datamanager.restore_order(state["datamanager"])
        device, kept = self.model.device, state["strategy"].items()
        self.model.strategy_state = {key: item.to(device) if isinstance(item, Tensor) else item for key, item in kept}
        self.passes_spent = int(state["passes_spent"])
        self.early_cost_spent = float(state.get("early_cost_spent", 0.0))
        self.lift_state = state["lift"]
        self.lifted_views = list(state.get("lifted_views", []))

    def _fit_colours(self, button: ViewerButton) -> None:
        fitted = self.branch.fit_basis_to_last_picture()
        if self.branch.picture_basis is not None and fitted is not None:
            self._scene_basis = self._scene_basis or self.branch.picture_basis
            self.branch.set_picture_basis(fitted)

    def _reset_colours(self, button: ViewerButton) -> None:
        if self._scene_basis is not None:
            self.branch.set_picture_basis(self._scene_basis)


def _average(rows: list[dict[str, float]], with_std: bool) -> dict[str, float]:
    """Means over frames, key by key, of the frames that have the figure; a figure that none has is left out."""
    averages: dict[str, float] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(key, np.nan) for row in rows]
        if not np.isnan(values).all():
            averages[key] = float(np.nanmean(values))
            if with_std:
                averages[f"{key}_std"] = float(np.nanstd(values))
    return averages
