"""Preconditioned conjugate gradients on the lift's normal equations, one column per feature dimension.

Solved is (A + L) f = b + L f0 with A = sum over views of R^T W Q R (see `blending`), b = sum of R^T W t, f0 the
weighted sum and L the Tikhonov weight. The preconditioner is M = d + L with d = sum of R^T W 1: the row sums of A where
alpha is 1, so that the first direction from zero is the weighted sum itself. All columns share the passes over the
views; each has its own step.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.lifting.blending import ViewBlender
from fit3d_ns.lifting.passes import ViewPasses

Features = Float[Tensor, "num_gaussians dim"]


class ConjugateGradients:
    """The solver; its vectors live in the passes' state, so that it can stop and go on between any two views.

    It stops on the true residual, which is computed again every few passes because gsplat's adjoint, with its atomic
    additions and fast exponentials, is not exact to the bit and the running residual drifts away from the truth.
    """

    def __init__(self, blender: ViewBlender, passes: ViewPasses, weighted_sum: Features, sums: tuple[str, str]):
        """Takes f0, and b and d from the passes' state by their names `sums`."""
        self.blender, self.passes = blender, passes
        self.config = blender.config
        self._tensors = passes.state.tensors
        self._numbers = passes.state.numbers
        numerator, denominator = (self._tensors[name] for name in sums)
        # The Tikhonov weight L is in proportion to the mean weight of the Gaussians that have any.
        seen = denominator[denominator > 0]
        self._penalty = self.config.regularization * float(seen.mean()) if len(seen) else 0.0
        self._diagonal = (denominator + self._penalty)[:, None]
        self._right_side = numerator + self._penalty * weighted_sum

    def solve(self) -> Features:
        """Runs from zero until the true residual is small or passes are used up."""
        config, numbers = self.config, self._numbers
        if "solution" not in self._tensors:
            self._start()
        while not numbers["is_solved"]:
            steps, interval = numbers["steps_since_truth"], config.steps_per_true_residual
            is_small = numbers["relative_residual"] <= config.tolerance
            may_begin = numbers["passes"] < config.max_passes and not (is_small and steps == 0)
            if not may_begin and not self.passes.state.current_pass:
                # A lift that is resumed later, in the decoder's pass, must not solve on.
                numbers["is_solved"] = 1
                break
            self.passes.save_if_due()
            if steps > 0 and (is_small or 0 < interval <= steps):
                self._compute_true_residual()
            else:
                self._step()
        return self._tensors["solution"]

    def _start(self) -> None:
        tensors, numbers = self._tensors, self._numbers
        tensors["solution"] = torch.zeros_like(self._right_side)
        # From zero the residual is the right-hand side, and the first direction is the weighted sum.
        tensors["residual"] = self._right_side.clone()
        tensors["direction"] = torch.zeros_like(self._right_side)
        tensors["residual_products"] = self._right_side.new_zeros(self._right_side.shape[1])
        numbers["passes"] = numbers["is_solved"] = numbers["steps_since_truth"] = 0
        numbers["relative_residual"] = 1.0

    def _step(self) -> None:
        tensors, name = self._tensors, f"solve {int(self._numbers['passes']) + 1}"
        # A state that was read in the middle of this pass has its direction already.
        if self.passes.state.current_pass != name:
            preconditioned = self._precondition(tensors["residual"])
            products = (tensors["residual"] * preconditioned).sum(dim=0)
            # The first direction is the preconditioned residual: its old products are zero.
            conjugation = _divide(products, tensors["residual_products"])
            tensors["direction"].mul_(conjugation).add_(preconditioned)
            tensors["residual_products"] = products
            del preconditioned
        self._apply_to(name, "direction")
        image = tensors["image"].add_(tensors["direction"], alpha=self._penalty)
        length = _divide(tensors["residual_products"], (tensors["direction"] * image).sum(dim=0))
        tensors["solution"].add_(tensors["direction"] * length)
        tensors["residual"].sub_(image * length)
        self._finish_pass(steps_since_truth=int(self._numbers["steps_since_truth"]) + 1)

    def _compute_true_residual(self) -> None:
        tensors = self._tensors
        self._apply_to(f"residual {int(self._numbers['passes']) + 1}", "solution")
        image = tensors["image"].add_(tensors["solution"], alpha=self._penalty)
        tensors["residual"] = self._right_side - image
        self._finish_pass(steps_since_truth=0)

    def _apply_to(self, name: str, vector: str) -> None:
        tensors = self._tensors

        def add(index: int) -> None:
            self.blender.add_normal(index, tensors[vector], tensors["image"])

        self.passes.run(name, {"image": torch.zeros_like(tensors[vector])}, add, len(self.blender.groups))

    def _finish_pass(self, steps_since_truth: int) -> None:
        del self._tensors["image"]
        residual, right_side = self._tensors["residual"], self._right_side
        norm = (right_side * self._precondition(right_side)).sum().sqrt()
        relative = float(_divide((residual * self._precondition(residual)).sum().sqrt(), norm))
        self._numbers["relative_residual"] = relative
        self._numbers["steps_since_truth"] = steps_since_truth
        self._numbers["passes"] += 1
        self.passes.state.residuals.append(relative)

    def _precondition(self, vector: Features) -> Features:
        # A Gaussian without any weight has a zero residual, whatever it is divided by.
        return vector / self._diagonal.clamp(min=1e-12)


def compute_weighted_sum(numerator: Features, denominator: Float[Tensor, " num_gaussians"]) -> Features:
    """The normalised weighted sum; zero for Gaussians without weight."""
    return torch.where(denominator[:, None] > 0, numerator / denominator[:, None].clamp(min=1e-12), 0.0)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    # A column that is solved exactly has zero products; it then stays where it is.
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-30), 0.0)
