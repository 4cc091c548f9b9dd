"""Principal components of feature maps: exact, over any number of batches, with colours that never flicker.

Moments are summed in float64; with centred weighted covariance `C = V diag(variance) V^T`, `components` are the rows of
`V^T` by falling variance, the entry of largest magnitude positive. Coefficients are `(x - mean) @ components.T`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PcaBasis:
    """An orthonormal basis around a mean, and the coefficient ranges that become black and white in pictures."""

    mean: Float[Tensor, " embed"]
    """Weighted mean of the features."""
    components: Float[Tensor, "components embed"]
    """Orthonormal rows by falling explained variance."""
    explained_variance: Float[Tensor, " components"]
    """Variance along each component."""
    total_variance: float
    """Variance over all directions, kept or not."""
    colour_low: Float[Tensor, " 3"]
    """Coefficients of the first three components that are drawn as 0."""
    colour_high: Float[Tensor, " 3"]
    """Coefficients that are drawn as 1; above `colour_low`."""

    @property
    def explained_share(self) -> float:
        """Share of the total variance that the components keep, in [0, 1]."""
        return float(self.explained_variance.sum()) / max(self.total_variance, 1e-30)

    def to(self, device: torch.device | str) -> "PcaBasis":
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


class PcaAccumulator:
    """Sums the moments of weighted features; batches, views and processes may come in any order.

    `sum_weights`, `sum_features` and `sum_products` are float64 tensors on the given device, to be added up or stored.
    """

    def __init__(self, embed_dim: int, device: torch.device | str = "cpu"):
        self.sum_weights = torch.zeros((), dtype=torch.float64, device=device)
        self.sum_features = torch.zeros(embed_dim, dtype=torch.float64, device=device)
        self.sum_products = torch.zeros(embed_dim, embed_dim, dtype=torch.float64, device=device)

    def add(self, features: Float[Tensor, "*batch embed"], weights: Float[Tensor, "*batch"] | None = None) -> None:
        """Adds a batch; `weights` are at least 0, and all 1 by default."""
        # (*b, e) -> (n, e)
        rows = features.detach().reshape(-1, features.shape[-1]).double()
        flat = rows.new_ones(rows.shape[0]) if weights is None else weights.detach().reshape(-1).double()
        weighted = rows * flat[:, None]
        self.sum_weights += flat.sum()
        self.sum_features += weighted.sum(dim=0)
        self.sum_products += weighted.T @ rows

    def compute_covariance(self) -> tuple[Float[Tensor, " embed"], Float[Tensor, "embed embed"]]:
        """Mean and centred covariance, float64; ValueError where nothing with a positive weight was added."""
        if not self.sum_weights > 0:
            raise ValueError("No features to analyse: all weights are zero; check masks and coverage.")
        mean = self.sum_features / self.sum_weights
        return mean, self.sum_products / self.sum_weights - torch.outer(mean, mean)

    def finish(self, num_components: int) -> PcaBasis:
        """The basis of what was added; colour ranges reach two standard deviations until `fit_colours` sets them.

        ValueError where nothing was added; there are at most as many components as dimensions.
        """
        mean, covariance = self.compute_covariance()
        variance, directions = _decompose(covariance)
        kept = variance[:num_components]
        reach = 2.0 * _first_three(kept).sqrt()
        return PcaBasis(
            mean=mean.float(),
            components=directions[:num_components].float().contiguous(),
            explained_variance=kept.float(),
            total_variance=float(variance.sum()),
            colour_low=-reach.float(),
            colour_high=_above(-reach, reach).float(),
        )


def fit_pca(features: Float[Tensor, "*batch embed"], num_components: int) -> PcaBasis:
    """PCA of features that fit into memory, with percentile colour ranges.

    ValueError where there are none.
    """
    accumulator = PcaAccumulator(features.shape[-1], features.device)
    accumulator.add(features)
    return fit_colours(accumulator.finish(num_components), features)


def fit_colours(basis: PcaBasis, features: Float[Tensor, "*batch embed"]) -> PcaBasis:
    """Fixes the colour ranges at the 1st and 99th percentile of a sample: outliers must not darken every picture."""
    rows = features.detach().reshape(-1, features.shape[-1])
    if rows.shape[0] == 0:
        return basis
    # Sorting has no limit on the number of rows, which `torch.quantile` has.
    ordered = _first_three(apply_pca(rows, basis)).sort(dim=0).values
    last = rows.shape[0] - 1
    low, high = ordered[math.floor(1.0 / 100.0 * last)], ordered[math.ceil(99.0 / 100.0 * last)]
    return replace(basis, colour_low=low.to(basis.mean), colour_high=_above(low, high).to(basis.mean))


def apply_pca(features: Float[Tensor, "*batch embed"], basis: PcaBasis) -> Float[Tensor, "*batch components"]:
    """Coefficients of features in the basis."""
    return (features - basis.mean.to(features)) @ basis.components.to(features).T


def map_to_colours(
    coefficients: Float[Tensor, "*batch components"], basis: PcaBasis, alphas: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch 3"]:
    """Colours in [0, 1] of coefficients, always by the basis' fixed ranges; missing components are drawn as 0.

    With `alphas` they fade to black where nothing is.
    """
    low, high = basis.colour_low.to(coefficients), basis.colour_high.to(coefficients)
    colours = ((_first_three(coefficients) - low) / (high - low)).clamp(0.0, 1.0)
    colours[..., coefficients.shape[-1] :] = 0.0
    return colours if alphas is None else colours * alphas[..., None].clamp(0.0, 1.0)


def compute_effective_rank(batches: Sequence[Float[Tensor, "..."]]) -> float:
    """Exponential of the entropy of the normalised singular values of the centred features (Roy & Vetterli, 2007).

    It is between 1 (all features on a line) and `embed` (a ball); one that falls while a cosine rises means collapse.
    Each batch is [..., embed], for example a token map of any size.
    """
    accumulator = PcaAccumulator(batches[0].shape[-1], batches[0].device)
    for batch in batches:
        accumulator.add(batch)
    variance, _ = _decompose(accumulator.compute_covariance()[1])
    singular_values = variance.sqrt()
    shares = singular_values / singular_values.sum().clamp_min(1e-300)
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def _decompose(covariance: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Variances by falling size, never negative, and their directions as rows."""
    variance, columns = torch.linalg.eigh((covariance + covariance.T) / 2)
    directions = columns.T.flip(0)
    largest = directions.abs().argmax(dim=1, keepdim=True)
    signs = torch.where(directions.gather(1, largest) < 0, -1.0, 1.0)
    return variance.flip(0).clamp_min(0.0), directions * signs


def _first_three(coefficients: Float[Tensor, "*batch components"]) -> Float[Tensor, "*batch 3"]:
    """The first three, zeros where there are fewer."""
    return torch.nn.functional.pad(coefficients[..., :3], (0, max(3 - coefficients.shape[-1], 0)))


def _above(low: Tensor, high: Tensor) -> Tensor:
    """`high`, or a range of one where nothing varies."""
    return torch.where(high > low, high, low + 1.0)
