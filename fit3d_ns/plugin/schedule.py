"""Step counts as fractions of the run, so that a 1,000-step run goes through every phase of a 30,000-step one.

The fractions are splatfacto's own defaults divided by its 30,000 iterations; at 30,000 steps nothing changes.
"""

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
