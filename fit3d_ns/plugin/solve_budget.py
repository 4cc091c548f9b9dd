"""What solving features may cost next to the colour steps, and what is left out where that is too little.

Costs are estimated in units of one colour step over all views, not measured, so runs stay repeatable to the bit. The
least useful work is dropped first: passes beyond a few, then views of the decoder's fit, then views altogether.
"""

from dataclasses import dataclass

PASSES_WITH_ALL_VIEWS = 6
"""Below this many passes of the conjugate gradients, half of the decoder's views are worth less than two more passes
(held-out cosine .0018 against .003 from the fourth pass to the sixth, 109 views, 64 channels)."""

PASSES_WITH_HALF = 3
"""Below this many, so is half of those that are left."""

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


def compute_solve_budget(num_steps: int, num_views: int, share: float) -> float:
    """What solving features may cost after `num_steps` colour steps, in `SolveCosts`' unit: a share of their time."""
    return share * num_steps / max(num_views, 1)


def estimate_solve_costs(feature_dim: int, samples_per_patch: int = 4) -> SolveCosts:
    """The costs at a number of channels per Gaussian, and of samples along a patch's side (0 for every pixel).

    Measured on two CPU cores with 60k and 140k Gaussians and 64 channels, and rounded up by a third; about half of it
    grows with the channels.
    """
    scale = 0.5 + feature_dim / 128
    sampled_pass = 0.22 if 0 < samples_per_patch <= 4 else 0.9
    return SolveCosts(weighted_sum=1.1 * scale, decoder=0.95 * scale, sampled_pass=sampled_pass * scale)
