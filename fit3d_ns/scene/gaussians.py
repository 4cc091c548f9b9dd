"""`Gaussians`: what a scene knows of each Gaussian, with the types of the scene file; and what the rasterizer takes.

Of the names, `log_scales` and `opacity_logits` are raw, `scales` and `opacities` activated; `quats` are wxyz
of length 1. `sh_dc` is the constant coefficient of the colour: `rgb = 0.5 + sh_dc / (2 sqrt(pi))`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.geometry.cameras import Camera, viewmats_from_camera_to_worlds
from fit3d_ns.rasterization import RasterizeMode, project, rasterization
from fit3d_ns.utils.tensor_files import count_bytes

# torch's uint16 lacks arithmetic, so counts are int32 in memory and uint16 in the file.
STORED_DTYPES = {
    **dict.fromkeys(("means", "blend_weight"), torch.float32),
    **dict.fromkeys("quats log_scales opacity_logits sh_dc sh_rest features feature_variance".split(), torch.float16),
    "num_views": torch.uint16,
}
_ROW_SHAPES = {
    **{"means": (3,), "quats": (4,), "log_scales": (3,), "sh_dc": (3,)},
    **dict.fromkeys(("opacity_logits", "blend_weight", "num_views", "feature_variance"), ()),
}
MAX_VIEWS_STORED = 2**16 - 1


@dataclass(frozen=True)
class Gaussians:
    """Gaussians with their features and by-products of the lift; `from_raw` makes them from any precision."""

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
    """Low-dimensional features that are blended as they are; 0 channels before a lift."""
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
            if tensor.ndim == 0 or tensor.shape[0] != self.num_gaussians:
                raise ValueError(f"`{name}` has shape {list(tensor.shape)} for {self.num_gaussians} Gaussians.")
            if name in _ROW_SHAPES and tensor.shape[1:] != _ROW_SHAPES[name]:
                raise ValueError(f"`{name}` has rows of {list(tensor.shape[1:])}, expected {list(_ROW_SHAPES[name])}.")
        if self.features.ndim != 2 or (self.sh_rest is not None and self.sh_rest.shape[2:] != (3,)):
            raise ValueError("`features` has to be [N, D] and `sh_rest` [N, K, 3].")
        if self.sh_rest is not None and self.sh_rest.shape[1] not in (3, 8, 15, 24):
            problem = f"{self.sh_rest.shape[1]} further spherical harmonics coefficients belong to no degree"
            raise ValueError(f"{problem}; expected 3, 8, 15 or 24.")

    @classmethod
    def from_raw(
        cls,
        means: Float[Tensor, "num_gaussians 3"],
        quats: Float[Tensor, "num_gaussians 4"],
        log_scales: Float[Tensor, "num_gaussians 3"],
        opacity_logits: Shaped[Tensor, "num_gaussians *one"],
        sh_dc: Float[Tensor, "num_gaussians 3"],
        features: Float[Tensor, "num_gaussians dim"] | None = None,
        *,
        sh_rest: Float[Tensor, "num_gaussians coefficients 3"] | None = None,
        blend_weight: Float[Tensor, " num_gaussians"] | None = None,
        num_views: Shaped[Tensor, " num_gaussians"] | None = None,
        feature_variance: Float[Tensor, " num_gaussians"] | None = None,
        drop_invalid: bool = False,
        exact: bool = False,
    ) -> "Gaussians":
        """Brings raw Gaussians of any precision, with rotations of any length, into the stored types.

        Features have 0 channels by default, by-products of the lift are zeros; counts are capped at 65535. With
        `drop_invalid` Gaussians are left out that cannot be stored or drawn: a number is NaN, infinite or beyond its
        stored type's range, a rotation has no length, or a scale overflows when it is activated. With `exact` single
        precision is kept. ValueError where a number cannot be stored and `drop_invalid` is off.
        """
        unknown = means.new_zeros(means.shape[0])
        counts = (unknown if num_views is None else num_views).detach().to(torch.int64)
        values: dict[str, Tensor] = {
            "means": means,
            "quats": F.normalize(quats.detach().float(), dim=-1),
            "log_scales": log_scales,
            # (n, 1) -> (n,)
            "opacity_logits": opacity_logits.reshape(-1),
            "sh_dc": sh_dc,
            "features": means.new_zeros(means.shape[0], 0) if features is None else features,
            "blend_weight": unknown if blend_weight is None else blend_weight,
            "num_views": counts.clamp(0, MAX_VIEWS_STORED),
            "feature_variance": unknown if feature_variance is None else feature_variance,
        }
        if sh_rest is not None and sh_rest.shape[1] > 0:
            values["sh_rest"] = sh_rest
        dtypes = {
            name: torch.float32 if exact and kind == torch.float16 else kind for name, kind in STORED_DTYPES.items()
        }
        stored = {name: value.detach().to(dtypes[name]).contiguous() for name, value in values.items()}
        invalid = {
            name: ~value.isfinite().reshape(len(value), value.shape[1:].numel()).all(dim=1)
            for name, value in stored.items()
            if value.is_floating_point()
        }
        gaussians = cls(**stored)
        if drop_invalid:
            has_length = quats.norm(dim=1) >= 1e-12
            can_be_drawn = stored["log_scales"].float().exp().isfinite().all(dim=1)
            return gaussians.select(has_length & can_be_drawn & ~torch.stack(list(invalid.values())).any(dim=0))
        for name, rows in invalid.items():
            if bool(rows.any()):
                raise ValueError(
                    f"`{name}` of {int(rows.sum())} Gaussians is NaN, infinite or too large for {stored[name].dtype}; "
                    "drop those Gaussians."
                )
        return gaussians

    @property
    def num_gaussians(self) -> int:
        return self.means.shape[0]

    @property
    def feature_dim(self) -> int:
        return self.features.shape[1]

    @property
    def sh_degree(self) -> int:
        """Degree of the stored colour, 0 to 4."""
        return 0 if self.sh_rest is None else {3: 1, 8: 2, 15: 3, 24: 4}[self.sh_rest.shape[1]]

    @property
    def colours(self) -> Float[Tensor, "num_gaussians coefficients 3"]:
        """Spherical harmonics coefficients of all degrees, float32."""
        constant = self.sh_dc[:, None].float()
        return constant if self.sh_rest is None else torch.cat([constant, self.sh_rest.float()], dim=1)

    @property
    def bytes_per_gaussian(self) -> float:
        """Bytes of all tensors per Gaussian, in their present types."""
        return count_bytes(*self.tensors().values()) / max(self.num_gaussians, 1)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by field name; `sh_rest` only if there is one."""
        return {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }

    def select(self, keep: Bool[Tensor, " num_gaussians"]) -> "Gaussians":
        # torch cannot index uint16 on every device; the detour through int32 is exact.
        return self._map(
            lambda tensor: tensor.int()[keep].to(tensor.dtype) if tensor.dtype == torch.uint16 else tensor[keep]
        )

    def to(self, device: torch.device | str) -> "Gaussians":
        return self._map(lambda tensor: tensor.to(device))

    def with_features(self, features: Float[Tensor, "num_gaussians dim"]) -> "Gaussians":
        """The same Gaussians with other features, which take the stored type."""
        return replace(self, features=features.to(STORED_DTYPES["features"]))

    def activate(self, rasterize_mode: RasterizeMode = "classic", eps2d: float = 0.3) -> "ActivatedGaussians":
        """Exponential, sigmoid and float32; mode and blur are those the Gaussians were trained with."""
        return ActivatedGaussians(
            means=self.means.float(),
            quats=self.quats.float(),
            scales=self.log_scales.float().exp(),
            opacities=self.opacity_logits.float().sigmoid(),
            rasterize_mode=rasterize_mode,
            eps2d=eps2d,
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Gaussians":
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class ActivatedGaussians:
    """Gaussians as the rasterizer takes them, float32."""

    means: Float[Tensor, "num_gaussians 3"]
    quats: Float[Tensor, "num_gaussians 4"]
    """Rotations wxyz, of any length above zero."""
    scales: Float[Tensor, "num_gaussians 3"]
    """Standard deviations along the axes in world units, positive."""
    opacities: Float[Tensor, " num_gaussians"]
    """In [0, 1]."""
    rasterize_mode: RasterizeMode = "classic"
    """Mode the Gaussians were trained in; blending in the other one gives other weights."""
    eps2d: float = 0.3
    """Blur added to every projected covariance, in square pixels."""

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def geometry(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means, quaternions, scales and opacities, as the rasterizer's first arguments."""
        return self.means, self.quats, self.scales, self.opacities

    def find_valid(self) -> Bool[Tensor, " num_gaussians"]:
        """False where any number of a Gaussian is NaN or infinite, or its quaternion is zero."""
        columns = torch.cat([self.means, self.quats, self.scales, self.opacities[:, None]], dim=-1)
        return torch.isfinite(columns).all(dim=-1) & (self.quats.norm(dim=-1) > 1e-12)

    def select(self, keep: Bool[Tensor, " num_gaussians"]) -> "ActivatedGaussians":
        means, quats, scales, opacities = (tensor[keep] for tensor in self.geometry)
        return replace(self, means=means, quats=quats, scales=scales, opacities=opacities)

    def project(self, *cameras: Camera, eps2d: float | None = None) -> dict[str, Any]:
        """The Gaussians as cameras of one picture size see them, for `rasterize_features` and `backproject_features`.

        `eps2d` is another blur than the Gaussians' own.
        """
        return project(
            *self.geometry,
            *self._batch(*cameras),
            rasterize_mode=self.rasterize_mode,
            eps2d=self.eps2d if eps2d is None else eps2d,
        )

    def render(
        self,
        colours: Float[Tensor, "num_gaussians *channels"],
        camera: Camera,
        *,
        sh_degree: int | None = None,
        render_mode: Literal["RGB", "ED"] = "RGB",
    ) -> tuple[Float[Tensor, "height width channels"], Float[Tensor, "height width"]]:
        """Blends colours, or with `ED` expected z-depth, and gives them with the rendered opacity.

        Colours are [N, C], or spherical harmonics coefficients [N, K, 3] with their `sh_degree`.
        """
        renders, alphas, _ = rasterization(
            *self.geometry,
            colours,
            *self._batch(camera),
            sh_degree=sh_degree,
            render_mode=render_mode,
            rasterize_mode=self.rasterize_mode,
            eps2d=self.eps2d,
        )
        return renders[0], alphas[0, ..., 0]

    def _batch(self, *cameras: Camera) -> tuple[Tensor, Tensor, int, int]:
        """A batch of cameras as the rasterizer takes it: world-to-camera in OpenCV axes."""
        poses = torch.stack([camera.camera_to_world for camera in cameras]).to(self.means)
        Ks = torch.stack([camera.K for camera in cameras]).to(self.means)
        return viewmats_from_camera_to_worlds(poses), Ks, cameras[0].width, cameras[0].height
