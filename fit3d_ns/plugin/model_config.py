"""Options of the `fit3d-features` model: splatfacto's, with open step counts, and the feature branch's.

Open step counts become fractions of the run, so that 1,000 steps go through every phase of 30,000. The fractions are
splatfacto's own defaults divided by its 30,000 iterations; at 30,000 steps nothing changes.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from nerfstudio.models.splatfacto import SplatfactoModelConfig

from fit3d_ns.lifting.config import LiftConfig, SolveConfig
from fit3d_ns.scene.feature_decoder import TokenReadingRule

SPLATFACTO_ITERATIONS = 30_000

MODEL_STEPS = {
    "warmup_length": 500,
    "resolution_schedule": 3_000,
    "sh_degree_interval": 1_000,
    "stop_screen_size_at": 4_000,
    "stop_split_at": 15_000,
    "early_solve_at": 1_500,
}
"""Defaults of a 30,000-step run; a shorter run scales them in proportion."""
STEPS_PER_REFINEMENT = 100
"""splatfacto's interval between densifications."""
MIN_STEPS_PER_REFINEMENT = 25
"""Gradient statistics of fewer views than this are too noisy to densify on."""
REFINEMENTS_PER_RESET = 30
"""splatfacto resets opacities every 30 densifications."""
MIN_STEPS_PER_RESET = 1_500
"""Opacities need some hundreds of steps to recover; shorter runs are not reset at all."""


@dataclass
class FeatureSplatfactoModelConfig(SplatfactoModelConfig):
    """Splatfacto with one feature vector per Gaussian and a 3x3 convolution that decodes rendered features.

    `method.py` fills in `_target`, the model's class, which this module does not know.
    """

    feature_dim: int = 64
    """Channels per Gaussian, D in the paper (section 3.1); 32 to 128 are usual, at least 1."""
    feature_loss_weight: float = 1.0
    """Weight of the feature loss; 0 switches the whole feature branch off. Geometry and colour never see this loss."""
    depth_loss_weight: float = 0.0
    """Weight of the mean relative error of rendered against measured depth, where frames have depth maps; 0 is off. It
    shapes Gaussians where photographs leave them open, such as bare walls."""
    feature_schedule: Literal["solve", "joint"] = "solve"
    """`solve`: colour alone first, then features by least squares; `joint`: gradient steps from step 0 (paper)."""
    feature_grid_multiple: int = 1
    """The feature loss of `joint` is taken at this multiple of the token grid; 0 takes it at image size (paper)."""
    accumulation_weighting: bool = True
    """Weight the feature loss at a pixel by its rendered opacity; False weights all valid pixels alike (paper)."""
    feature_init: Literal["zeros", "random"] = "zeros"
    """Initial features: `zeros` as the authors' code, or `random` (standard normal times 0.01) as their text."""
    decoder_bias: bool = True
    """Give the decoder a bias, scaled by rendered opacity; the paper's code has none."""
    solve_share: float = 0.15
    """Largest share of the colour steps' cost that may be spent on solving features, in (0, 1]. Runs of less than about
    25 steps per view first leave out passes, then views of the decoder's fit, then views (`SolveCosts`)."""
    early_solve_at: int | None = None
    """Step of the first quick solve, for the viewer; 1/20 of the run by default."""
    steps_per_solve: int = 0
    """Steps between further quick solves, so that the viewer shows features of the geometry as it is; each costs about
    three colour steps per view, beyond `solve_share`. 0 for none."""
    lift: SolveConfig = field(default_factory=SolveConfig)
    """How features are solved, where `feature_schedule` is `solve`."""
    strategy: Literal["default", "mcmc"] = "default"
    """Densification: splatfacto's, or 3D Gaussian splatting as Markov chain Monte Carlo."""
    mcmc_cap: int = 200_000
    """Largest number of Gaussians of the `mcmc` strategy."""
    mcmc_noise_lr: float = 5e5
    """Scale of the position noise of the `mcmc` strategy."""
    mcmc_min_opacity: float = 0.005
    """Gaussians below this opacity are moved to better places by the `mcmc` strategy."""
    mcmc_opacity_regularization: float = 0.01
    """Weight of the mean opacity in the loss of the `mcmc` strategy."""
    mcmc_scale_regularization: float = 0.01
    """Weight of the mean scale in the loss of the `mcmc` strategy."""
    lpips: Literal["auto", "off"] = "auto"
    """`auto` reports LPIPS where AlexNet's weights are already in torch's hub cache; nothing is ever downloaded."""
    warmup_length: int | None = None  # type: ignore[assignment]
    """Steps before the first densification; 1/60 of the run by default."""
    refine_every: int | None = None  # type: ignore[assignment]
    """Steps between densifications; 1/300 of the run by default, between 25 and 100."""
    resolution_schedule: int | None = None  # type: ignore[assignment]
    """Steps after which the training resolution doubles; 1/10 of the run by default."""
    reset_alpha_every: int | None = None  # type: ignore[assignment]
    """Densifications between opacity resets; 1/10 of the run by default, none in runs under 15,000 steps."""
    pause_after_reset: bool = True
    """Let one round of the views pass after an opacity reset before Gaussians are split or culled again (splatfacto);
    Inria's code, and so the paper's, does not."""
    sh_degree_interval: int | None = None  # type: ignore[assignment]
    """Steps after which the next degree of spherical harmonics is used; 1/30 of the run by default."""
    stop_screen_size_at: int | None = None  # type: ignore[assignment]
    """Step after which size on screen no longer counts; 2/15 of the run by default."""
    stop_split_at: int | None = None  # type: ignore[assignment]
    """Step at which densification ends; half the run by default."""

    @property
    def token_reading(self) -> TokenReadingRule:
        """How tokens are read off a rendered map: gradient steps compare features at points (paper)."""
        return "bilinear" if self.feature_schedule == "joint" else self.lift.token_reading

    def create_lift_config(self, max_passes: int, decoder_share: float) -> LiftConfig:
        """The options of one solve of at most `max_passes` passes, with the decoder fitted to at most that share."""
        # Runs from before `SolveConfig` hold a whole `LiftConfig`; the options of its own are the model's here.
        solve = {item.name: getattr(self.lift, item.name) for item in fields(SolveConfig)}
        solve |= {"max_passes": max_passes, "decoder_share": min(self.lift.decoder_share, decoder_share)}
        return LiftConfig(
            **solve,
            feature_dim=self.feature_dim,
            decoder_bias=self.decoder_bias,
            accumulation_aware=self.accumulation_weighting,
        )

    def check_features(self) -> None:
        """Refuses feature options that are out of range, with a ValueError that names the flag."""
        smallest = {"feature_dim": 1, "feature_loss_weight": 0, "feature_grid_multiple": 0, "steps_per_solve": 0}
        for name, least in (smallest | {"depth_loss_weight": 0}).items():
            if (value := getattr(self, name)) < least:
                flag = name.replace("_", "-")
                raise ValueError(f"--pipeline.model.{flag} is {value}; it must be at least {least}.")
        if not 0 < self.solve_share <= 1:
            raise ValueError(f"--pipeline.model.solve-share is {self.solve_share}; it must be in (0, 1].")

    def resolve_steps(self, max_num_iterations: int) -> None:
        """Fills every step count that the user left open, from the length of the whole run; given values stay."""
        if max_num_iterations < 1:
            raise ValueError(f"--max-num-iterations must be at least 1, not {max_num_iterations}.")
        scale = max_num_iterations / SPLATFACTO_ITERATIONS
        for name, steps in MODEL_STEPS.items():
            if getattr(self, name) is None:
                setattr(self, name, max(round(steps * scale), 1))
        if self.refine_every is None:
            self.refine_every = max(round(STEPS_PER_REFINEMENT * min(scale, 1.0)), MIN_STEPS_PER_REFINEMENT)
        if self.reset_alpha_every is None:
            reset = REFINEMENTS_PER_RESET * STEPS_PER_REFINEMENT * scale
            # More refinements than the run has: the strategy never comes to its first reset.
            never = max_num_iterations // self.refine_every + 1
            self.reset_alpha_every = never if reset < MIN_STEPS_PER_RESET else max(round(reset / self.refine_every), 1)
