"""Learning rates and momentum over the iterations of a probe, with the formulas of mmcv, which the public code uses.

t counts iterations from 0 to T - 1. Poly: (1 - t / T)^p. Cosine: m + (1 - m) (1 + cos(pi t / T)) / 2. Linear warm-up
over W iterations multiplies the schedule by 1 - (1 - t / W) (1 - r), from the ratio r on.
"""

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["poly", "cosine", "constant"]


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rate at each iteration."""

    kind: ScheduleKind
    """Shape after the warm-up."""
    num_iterations: int
    """T, at least 1."""
    num_warmup_iterations: int = 0
    """W; 0 for none."""
    warmup_ratio: float = 1e-6
    """Factor at the first iteration."""
    min_ratio: float = 0.0
    """Factor at the end, of cosine."""
    power: float = 1.0
    """Exponent of poly."""

    def compute_factor(self, iteration: int) -> float:
        """The factor at an iteration."""
        progress = iteration / self.num_iterations
        if self.kind == "poly":
            factor = (1.0 - progress) ** self.power
        elif self.kind == "cosine":
            factor = self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            factor = 1.0
        if iteration < self.num_warmup_iterations:
            factor *= 1.0 - (1.0 - iteration / self.num_warmup_iterations) * (1.0 - self.warmup_ratio)
        return factor


def compute_one_cycle_momentum(
    iteration: int, num_iterations: int, low: float = 0.85, high: float = 0.95, peak: float = 0.3
) -> float:
    """Momentum (Adam's first beta) of mmcv's `OneCycle` policy: from `high` to `low` and back, by cosines."""
    turn = peak * num_iterations - 1
    end = num_iterations - 1
    if iteration <= turn:
        share = iteration / turn if turn > 0 else 1.0
        return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * share))
    share = (iteration - turn) / (end - turn) if end > turn else 1.0
    return high + (low - high) * 0.5 * (1.0 + math.cos(math.pi * share))
