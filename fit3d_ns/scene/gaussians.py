"""`FeatureGaussians`: what a lifted scene knows of each Gaussian, with the types it has in the scene file.

Names follow the house: `log_scales` and `opacity_logits` are raw, `scales` and `opacities` activated; `quats` are wxyz
of length 1. `sh_dc` is the constant coefficient of the colour: `rgb = 0.5 + sh_dc / (2 sqrt(pi))`.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

# torch's uint16 lacks arithmetic, so counts are int32 in memory and uint16 in the file.
STORED_DTYPES = {
    "means": torch.float32,
    "quats": torch.float16,
    "log_scales": torch.float16,
    "opacity_logits": torch.float16,
    "sh_dc": torch.float16,
    "features": torch.float16,
    "blend_weight": torch.float32,
    "num_views": torch.uint16,
    "feature_variance": torch.float16,
    "sh_rest": torch.float16,
}
MAX_VIEWS_STORED = 2**16 - 1


@dataclass(frozen=True)
class FeatureGaussians:
    """Gaussians with features, raw and as stored; `create_gaussians` makes them from any precision."""

    means: Float[Tensor, "num_gaussians 3"]
    """Centres in the scene's frame."""
    quats: Float[Tensor, "num_gaussians 4"]
    """Rotations, wxyz, length 1."""
    log_scales: Float[Tensor, "num_gaussians 3"]
    """Natural logarithms of the standard deviations along the axes."""
    opacity_logits: Float[Tensor, " num_gaussians"]
    """Opacities before the sigmoid."""
    sh_dc: Float[Tensor, "num_gaussians 3"]
    """Constant spherical harmonics coefficient of the colour."""
    features: Float[Tensor, "num_gaussians dim"]
    """Low-dimensional features that are blended as they are."""
    blend_weight: Float[Tensor, " num_gaussians"]
    """Sum of the blending weights over all pixels of all lifted views; 0 where no view saw it or it is unknown."""
    num_views: Shaped[Tensor, " num_gaussians"]
    """Number of lifted views in which the Gaussian had weight; uint16."""
    feature_variance: Float[Tensor, " num_gaussians"]
    """Variance over views of what is seen at the Gaussian, mean over the D channels."""
    sh_rest: Float[Tensor, "num_gaussians coefficients 3"] | None = None
    """Further colour coefficients of degrees 1 and up, or None: colour does not depend on the direction."""

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            if tensor.shape[0] != self.num_gaussians:
                raise ValueError(f"`{name}` has {tensor.shape[0]} rows for {self.num_gaussians} Gaussians.")
        if self.sh_rest is not None and self.sh_rest.shape[1] not in (3, 8, 15, 24):
            raise ValueError(
                f"{self.sh_rest.shape[1]} further spherical harmonics coefficients belong to no degree; "
                "expected 3, 8, 15 or 24."
            )

    @property
    def num_gaussians(self) -> int:
        """N."""
        return self.means.shape[0]

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.features.shape[1]

    @property
    def sh_degree(self) -> int:
        """Degree of the stored colour, 0 to 4."""
        return 0 if self.sh_rest is None else {3: 1, 8: 2, 15: 3, 24: 4}[self.sh_rest.shape[1]]

    @property
    def bytes_per_gaussian(self) -> float:
        """Bytes of all tensors per Gaussian, in their present types."""
        total = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
        return total / max(self.num_gaussians, 1)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by field name; `sh_rest` only if there is one."""
        return {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }

    def select(self, keep: Bool[Tensor, " num_gaussians"]) -> "FeatureGaussians":
        """The Gaussians where `keep` is True, in the same order."""
        # torch cannot index uint16 on every device; the detour through int32 is exact.
        return self._map(
            lambda tensor: tensor.int()[keep].to(tensor.dtype) if tensor.dtype == torch.uint16 else tensor[keep]
        )

    def to(self, device: torch.device | str) -> "FeatureGaussians":
        """The same Gaussians on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function: Any) -> "FeatureGaussians":
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class ActivatedGaussians:
    """The same Gaussians as the rasterizer takes them, all float32."""

    means: Float[Tensor, "num_gaussians 3"]
    """Centres."""
    quats: Float[Tensor, "num_gaussians 4"]
    """Rotations, wxyz."""
    scales: Float[Tensor, "num_gaussians 3"]
    """Standard deviations along the axes, positive."""
    opacities: Float[Tensor, " num_gaussians"]
    """Opacities in [0, 1]."""
    features_and_one: Float[Tensor, "num_gaussians dim_and_one"]
    """Features, and a last channel of ones: what that blends to is the accumulated opacity."""


def activate(gaussians: FeatureGaussians) -> ActivatedGaussians:
    """Exponential, sigmoid and float32."""
    return ActivatedGaussians(
        means=gaussians.means.float(),
        quats=gaussians.quats.float(),
        scales=gaussians.log_scales.float().exp(),
        opacities=gaussians.opacity_logits.float().sigmoid(),
        features_and_one=torch.nn.functional.pad(gaussians.features.float(), (0, 1), value=1.0),
    )


def create_gaussians(
    means: Float[Tensor, "num_gaussians 3"],
    quats: Float[Tensor, "num_gaussians 4"],
    log_scales: Float[Tensor, "num_gaussians 3"],
    opacity_logits: Shaped[Tensor, "num_gaussians *one"],
    sh_dc: Float[Tensor, "num_gaussians 3"],
    features: Float[Tensor, "num_gaussians dim"],
    *,
    sh_rest: Float[Tensor, "num_gaussians coefficients 3"] | None = None,
    blend_weight: Float[Tensor, " num_gaussians"] | None = None,
    num_views: Shaped[Tensor, " num_gaussians"] | None = None,
    feature_variance: Float[Tensor, " num_gaussians"] | None = None,
) -> FeatureGaussians:
    """Brings raw Gaussians of any precision into the stored types.

    Args:
        means: Centres.
        quats: Rotations, wxyz, any length.
        log_scales: Raw scales.
        opacity_logits: Raw opacities, [N] or [N, 1].
        sh_dc: Constant colour coefficient.
        features: Features; use `torch.zeros(N, 0)` where there are none yet.
        sh_rest: Further colour coefficients; none at all if it is empty.
        blend_weight: By-product of the lift; zeros if unknown.
        num_views: By-product of the lift, counts; zeros if unknown, capped at 65535.
        feature_variance: By-product of the lift; zeros if unknown.

    Raises:
        ValueError: A value is NaN, infinite or beyond half precision; drop such Gaussians first, see `find_invalid`.
    """
    unknown = means.new_zeros(means.shape[0])
    quats = torch.nn.functional.normalize(quats.detach().float(), dim=-1)
    counts = (unknown if num_views is None else num_views).detach().to(torch.int64)
    values: dict[str, Tensor] = {
        "means": means,
        "quats": quats,
        "log_scales": log_scales,
        # (n, 1) -> (n,)
        "opacity_logits": opacity_logits.reshape(-1),
        "sh_dc": sh_dc,
        "features": features,
        "blend_weight": unknown if blend_weight is None else blend_weight,
        "num_views": counts.clamp(0, MAX_VIEWS_STORED),
        "feature_variance": unknown if feature_variance is None else feature_variance,
    }
    if sh_rest is not None and sh_rest.shape[1] > 0:
        values["sh_rest"] = sh_rest
    stored = {name: value.detach().to(STORED_DTYPES[name]).contiguous() for name, value in values.items()}
    for name, value in stored.items():
        if value.is_floating_point() and not value.isfinite().all():
            number = int((~value.isfinite()).reshape(value.shape[0], -1).any(dim=1).sum())
            raise ValueError(
                f"`{name}` of {number} Gaussians is NaN, infinite or too large for {value.dtype}; drop those Gaussians."
            )
    return FeatureGaussians(**stored)


def find_invalid(**tensors: Shaped[Tensor, "num_gaussians ..."]) -> Bool[Tensor, " num_gaussians"]:
    """True for Gaussians that cannot be stored or drawn.

    Args:
        tensors: By the argument names of `create_gaussians`. A row is invalid if it is NaN, infinite or beyond its
            stored type's range, or, of `quats`, if its length is zero.
    """
    first = next(iter(tensors.values()))
    invalid = torch.zeros(first.shape[0], dtype=torch.bool, device=first.device)
    for name, tensor in tensors.items():
        rows = tensor.reshape(tensor.shape[0], -1)
        if name == "quats":
            invalid |= rows.norm(dim=1) < 1e-12
            rows = torch.nn.functional.normalize(rows, dim=1)
        invalid |= ~rows.to(STORED_DTYPES[name]).isfinite().all(dim=1)
    return invalid
