"""What a lift is given: `LiftGaussians`, the fixed geometry, and `LiftView`s, cameras with the tokens they saw.

Frames: `means` and `viewmat` share one world of any scale; `viewmat` is world-to-camera in OpenCV axes, `K` in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns.rasterization import BackendName


@dataclass(frozen=True)
class LiftGaussians:
    """Activated Gaussians whose geometry stays as it is; no gradient ever reaches them."""

    means: Float[Tensor, "num_gaussians 3"]
    """Centres in world units."""
    quats: Float[Tensor, "num_gaussians 4"]
    """Rotations wxyz, of any length above zero."""
    scales: Float[Tensor, "num_gaussians 3"]
    """Standard deviations along the axes in world units, positive."""
    opacities: Float[Tensor, " num_gaussians"]
    """In [0, 1]."""
    rasterize_mode: Literal["classic", "antialiased"] = "classic"
    """How the geometry was trained; blending with the other mode gives other weights."""
    eps2d: float = 0.3
    """Blur added to every projected covariance, in square pixels."""
    near_plane: float = 0.01
    """Gaussians nearer than this z-depth, in world units, are not drawn."""
    far_plane: float = 1e10
    """Gaussians farther than this z-depth, in world units, are not drawn."""
    backend: BackendName = "auto"
    """Rasterization backend; `auto` follows the device of `means`."""

    def __len__(self) -> int:
        return self.means.shape[0]

    def find_valid(self) -> Bool[Tensor, " num_gaussians"]:
        """False where any number of a Gaussian is NaN or infinite, or its quaternion is zero."""
        columns = torch.cat([self.means, self.quats, self.scales, self.opacities[:, None]], dim=-1)
        return torch.isfinite(columns).all(dim=-1) & (self.quats.norm(dim=-1) > 1e-12)

    def select(self, keep: Bool[Tensor, " num_gaussians"]) -> "LiftGaussians":
        """The Gaussians where `keep` is True, detached, in the same order."""
        return replace(
            self,
            means=self.means.detach()[keep],
            quats=self.quats.detach()[keep],
            scales=self.scales.detach()[keep],
            opacities=self.opacities.detach()[keep],
        )


def _no_mask() -> None:
    return None


@dataclass(frozen=True)
class LiftView:
    """One captured view; its tokens and mask stay on disk until they are needed."""

    viewmat: Float[Tensor, "4 4"]
    """World-to-camera, OpenCV axes."""
    K: Float[Tensor, "3 3"]
    """Pinhole intrinsics in pixels of the `width` x `height` image."""
    width: int
    """Image width in pixels."""
    height: int
    """Image height in pixels."""
    load_tokens: Callable[[], Float[Tensor, "h w embed"] | None]
    """Reads the original backbone's patch tokens of this view; any float type."""
    load_mask: Callable[[], Bool[Tensor, "height width"] | Float[Tensor, "height width"] | None] = _no_mask
    """Reads the valid mask, or weights of 0 and above per pixel; None uses every pixel alike."""
    name: str = ""
    """What error messages call this view, for example the image's file name."""

    def read_tokens(self, device: torch.device) -> Float[Tensor, "h w embed"]:
        """The tokens as float32 on `device`.

        Raises:
            ValueError: The view has no tokens, or some that are no [h, w, E] map of finite numbers.
        """
        tokens = self.load_tokens()
        if tokens is None or tokens.numel() == 0:
            raise ValueError(f"View {self.name!r} has no patch tokens; extract features for it first or leave it out.")
        if tokens.ndim != 3:
            raise ValueError(f"View {self.name!r} has tokens of shape {tuple(tokens.shape)}; expected [h, w, embed].")
        tokens = tokens.detach().to(device=device, dtype=torch.float32)
        if not bool(torch.isfinite(tokens).all()):
            raise ValueError(f"View {self.name!r} has tokens that are not finite; delete its cached features.")
        return tokens

    def read_mask(self, device: torch.device) -> Float[Tensor, "height width"]:
        """Weights per pixel as float32 on `device`, ones where the view has no mask.

        Raises:
            ValueError: The mask is not of the view's size.
        """
        mask = self.load_mask()
        if mask is None:
            return torch.ones(self.height, self.width, device=device)
        if mask.shape != (self.height, self.width):
            raise ValueError(
                f"The mask of view {self.name!r} is {mask.shape[-1]}x{mask.shape[0]} pixels, "
                f"its camera {self.width}x{self.height}; resize one of them."
            )
        return mask.detach().to(device=device, dtype=torch.float32)
