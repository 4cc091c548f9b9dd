"""Step counts as fractions of the run, so that a 1,000-step run goes through every phase of a 30,000-step one.

The fractions are splatfacto's own defaults divided by its 30,000 iterations; at 30,000 steps nothing changes.
"""

from dataclasses import dataclass
from typing import Any

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


def resolve_model_steps(model: Any, max_num_iterations: int) -> None:
    """Fills every step count that the user left open, in place; values the user gave stay.

    Args:
        model: A `FeatureSplatfactoModelConfig`; fields that are None are open.
        max_num_iterations: Length of the whole run in steps, positive.

    Raises:
        ValueError: The run has no steps.
    """
    if max_num_iterations < 1:
        raise ValueError(f"--max-num-iterations must be at least 1, not {max_num_iterations}.")
    scale = max_num_iterations / SPLATFACTO_ITERATIONS
    for name, steps in MODEL_STEPS.items():
        if getattr(model, name) is None:
            setattr(model, name, max(round(steps * scale), 1))
    if model.refine_every is None:
        scaled = round(STEPS_PER_REFINEMENT * min(scale, 1.0))
        model.refine_every = max(scaled, MIN_STEPS_PER_REFINEMENT)
    if model.reset_alpha_every is None:
        steps_per_reset = REFINEMENTS_PER_RESET * STEPS_PER_REFINEMENT * scale
        if steps_per_reset < MIN_STEPS_PER_RESET:
            # More refinements than the run has: the strategy never comes to its first reset.
            model.reset_alpha_every = max_num_iterations // model.refine_every + 1
        else:
            model.reset_alpha_every = max(round(steps_per_reset / model.refine_every), 1)


def compute_solve_budget(num_steps: int, num_views: int, share: float) -> float:
    """What solving features may cost after `num_steps` colour steps, in `SolveCosts`' unit.

    Counting instead of timing keeps runs repeatable to the bit.

    Args:
        num_steps: Colour steps taken so far.
        num_views: Training views.
        share: Largest share of the colour time that may go into solving, for example 0.15.
    """
    return share * num_steps / max(num_views, 1)


@dataclass(frozen=True)
class SolveCosts:
    """Time of a solve's passes over all views; the unit is one colour step for every view.

    Measured on two CPU cores with 30k to 60k Gaussians and 64 channels; about half of it grows with the channels.
    """

    weighted_sum: float
    """Projecting all views, and the adjoint of their targets."""
    decoder: float
    """Rendering all views and the regression."""
    sampled_pass: float
    """One pass of the conjugate gradients over a few pixels per patch."""

    @property
    def smallest(self) -> float:
        """A solve without conjugate gradients."""
        return self.weighted_sum + self.decoder

    def count_passes(self, budget: float) -> int:
        """Passes of the conjugate gradients within a budget; their right-hand side costs one more."""
        return max(int((budget - self.smallest) / self.sampled_pass) - 1, 0)

    def compute(self, num_passes: int) -> float:
        """What a solve with so many passes costs."""
        return self.smallest + (self.sampled_pass * (num_passes + 1) if num_passes > 0 else 0.0)


def estimate_solve_costs(feature_dim: int, samples_per_patch: int = 4) -> SolveCosts:
    """The costs at a number of channels per Gaussian, and of samples along a patch's side (0 for every pixel)."""
    scale = 0.5 + feature_dim / 128
    sampled_pass = 0.28 if 0 < samples_per_patch <= 4 else 1.1
    return SolveCosts(weighted_sum=1.4 * scale, decoder=1.2 * scale, sampled_pass=sampled_pass * scale)
