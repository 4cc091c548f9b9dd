"""`TokenBasis`: the low-dimensional space in which features live, by PCA of the tokens of one or many scenes.

A token t [E] has coordinates z = (t - mean) @ components.T [D] and is read back as z @ components + mean.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class TokenBasis:
    """Orthonormal directions of largest token variance."""

    mean: Float[Tensor, " embed"]
    """Centre of the tokens; zeros for an uncentred basis."""
    components: Float[Tensor, "dim embed"]
    """Orthonormal rows, by falling variance, signs fixed so that the largest entry of each is positive."""
    variance_kept: float = float("nan")
    """Share of the tokens' variance (second moment if uncentred) that the components span, 0 to 1."""

    @property
    def feature_dim(self) -> int:
        return self.components.shape[0]

    @property
    def embed_dim(self) -> int:
        return self.components.shape[1]

    def project(self, tokens: Float[Tensor, "*batch embed"]) -> Float[Tensor, "*batch dim"]:
        """Coordinates of tokens.

        Raises:
            ValueError: The tokens are of another width.
        """
        if tokens.shape[-1] != self.embed_dim:
            raise ValueError(
                f"The basis is made for tokens of width {self.embed_dim}, these have {tokens.shape[-1]}; "
                "use a basis of the same backbone."
            )
        return (tokens - self.mean) @ self.components.T

    def unproject(self, coordinates: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch embed"]:
        """Tokens with the given coordinates."""
        return coordinates @ self.components + self.mean

    def to(self, device: torch.device) -> "TokenBasis":
        return TokenBasis(self.mean.to(device), self.components.to(device), self.variance_kept)


@dataclass
class TokenStatistics:
    """Weighted first and second moments of tokens in float64; those of several scenes add up to a shared basis."""

    weight: Float[Tensor, ""]
    first: Float[Tensor, " embed"]
    second: Float[Tensor, "embed embed"]

    @classmethod
    def create(cls, embed_dim: int, device: torch.device | str = "cpu") -> "TokenStatistics":
        """Statistics of no token."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(), zeros(embed_dim), zeros(embed_dim, embed_dim))

    def add(self, tokens: Float[Tensor, "*batch embed"], weights: Float[Tensor, "*batch"]) -> None:
        """Counts tokens, each `weights` (0 or above) times."""
        # (h, w, e) -> (h*w, e)
        flat = tokens.reshape(-1, tokens.shape[-1]).double()
        flat_weights = weights.reshape(-1).double()
        self.weight += flat_weights.sum()
        self.first += flat_weights @ flat
        self.second += (flat * flat_weights[:, None]).T @ flat

    def merge(self, other: "TokenStatistics") -> "TokenStatistics":
        """Statistics of both sets of tokens together."""
        return TokenStatistics(self.weight + other.weight, self.first + other.first, self.second + other.second)


def fit_token_basis(statistics: TokenStatistics, feature_dim: int, *, centred: bool = True) -> TokenBasis:
    """The `feature_dim` leading principal directions.

    Args:
        centred: False leaves the mean at zero and keeps most of the second moment instead of the variance.

    Raises:
        ValueError: No token was counted, or `feature_dim` exceeds the tokens' width.
    """
    embed_dim = statistics.first.shape[0]
    if feature_dim > embed_dim:
        raise ValueError(f"feature_dim {feature_dim} exceeds the tokens' width {embed_dim}; choose at most that.")
    if not statistics.weight > 0:
        raise ValueError("No token lies under a valid mask, so there is nothing to fit a basis to; check the masks.")
    mean = statistics.first / statistics.weight
    scatter = statistics.second / statistics.weight
    if centred:
        scatter = scatter - torch.outer(mean, mean)
    else:
        mean = torch.zeros_like(mean)
    eigenvalues, eigenvectors = torch.linalg.eigh(scatter)
    components = eigenvectors.flip(-1)[:, :feature_dim].T
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    spectrum = eigenvalues.flip(-1).clamp(min=0)
    total = float(spectrum.sum())
    kept = float(spectrum[:feature_dim].sum()) / total if total > 0 else 1.0
    return TokenBasis(mean.float(), components.float().contiguous(), kept)


def merge_statistics(statistics: Iterable[TokenStatistics]) -> TokenStatistics:
    """Statistics of many scenes together, for a basis they share.

    Raises:
        ValueError: There are none, or they are of different backbones.
    """
    merged: TokenStatistics | None = None
    for item in statistics:
        if merged is not None and merged.first.shape != item.first.shape:
            raise ValueError(
                f"Token statistics of widths {merged.first.shape[0]} and {item.first.shape[0]} do not add up; "
                "a shared basis needs scenes of one backbone."
            )
        merged = item if merged is None else merged.merge(item)
    if merged is None:
        raise ValueError("No scene was given to share a basis between.")
    return merged
