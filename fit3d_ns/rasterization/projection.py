"""Projection of 3D Gaussians onto image planes: the settings, the result, and the definition in plain PyTorch.

Formulas: EWA splatting (Zwicker et al. 2001) as 3D Gaussian Splatting uses it (Kerbl et al. 2023), with the constants
of gsplat 1.4: blur `eps2d`, field-of-view clamp of the Jacobian, radius ceil(3 sigma). Everything is in pixels of the
target image; pixel (row, col) has its centre at (col + 0.5, row + 0.5). C cameras, N Gaussians.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

TILE_SIZE = 16
"""Pixels along one side of a tile; a Gaussian is blended only in the tiles that the square of its radius touches."""
FOV_MARGIN = 0.3
"""The Jacobian is evaluated no further outside the image than this part of half the field of view."""
MIN_EIGENVALUE_GAP = 0.01
"""Lower bound in px^4 under the root of the larger eigenvalue, which keeps the radius finite for round Gaussians."""


@dataclass(frozen=True)
class ProjectionSettings:
    """Image size and limits of one call."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    near_plane: float = 0.01
    """Gaussians whose centre has a smaller z-depth are dropped."""
    far_plane: float = 1e10
    """Gaussians whose centre has a larger z-depth are dropped."""
    radius_clip: float = 0.0
    """Gaussians of at most this radius in pixels are dropped."""
    eps2d: float = 0.3
    """Added to both diagonal entries of the projected covariance, px^2."""
    antialiased: bool = False
    """Whether opacities are scaled by sqrt(det / blurred det), as Mip-Splatting does (Yu et al. 2024)."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            size = f"{self.width} x {self.height}"
            raise ValueError(f"An image of {size} pixels cannot be rendered; pass a positive width and height.")

    @property
    def tile_width(self) -> int:
        """Tiles in one row."""
        return -(-self.width // TILE_SIZE)

    @property
    def tile_height(self) -> int:
        """Tiles in one column."""
        return -(-self.height // TILE_SIZE)


@dataclass(frozen=True)
class ProjectedGaussians:
    """Gaussians on the image planes; rows of radius 0 are not drawn and hold zeros."""

    radii: Int[Tensor, "num_cameras num_gaussians *axes"]
    """Pixels, int32; gsplat 1.5 gives two numbers per Gaussian."""
    means2d: Float[Tensor, "num_cameras num_gaussians 2"]
    """Centres (x, y) in pixels."""
    depths: Float[Tensor, "num_cameras num_gaussians"]
    """z-depth of the centres."""
    conics: Float[Tensor, "num_cameras num_gaussians 3"]
    """Entries xx, xy, yy of the inverse of the blurred covariance, px^-2."""
    compensations: Float[Tensor, "num_cameras num_gaussians"] | None
    """Factors in [0, 1] for the opacities; None in classic mode."""


def project_gaussians(
    means: Float[Tensor, "num_gaussians 3"],
    quats: Float[Tensor, "num_gaussians 4"],
    scales: Float[Tensor, "num_gaussians 3"],
    viewmats: Float[Tensor, "num_cameras 4 4"],
    Ks: Float[Tensor, "num_cameras 3 3"],
    settings: ProjectionSettings,
) -> ProjectedGaussians:
    """Projects every Gaussian into every camera; differentiable with respect to all but `Ks`."""
    rotations = viewmats[:, :3, :3]
    in_camera = torch.einsum("cij,nj->icn", rotations, means) + viewmats[:, :3, 3].T[..., None]
    in_range = (in_camera[2] >= settings.near_plane) & (in_camera[2] <= settings.far_plane)
    # Dropped rows are computed at a harmless point, so that no NaN enters their (zero) gradients.
    x, y, z = torch.where(in_range, in_camera, in_camera.new_tensor([0.0, 0.0, 1.0])[:, None, None])

    # The Gaussian's half axes k in camera coordinates, and where the Jacobian brings them on the image.
    axes_x, axes_y, axes_z = torch.einsum("cij,njk->ikcn", rotations, rotations_from_quats(quats) * scales[:, None, :])
    fx, fy, cx, cy = (Ks[:, None, row, column] for row, column in ((0, 0), (1, 1), (0, 2), (1, 2)))
    on_x = fx / z * (axes_x - (x / z).clamp(*limit_slopes(fx, cx, settings.width)) * axes_z)
    on_y = fy / z * (axes_y - (y / z).clamp(*limit_slopes(fy, cy, settings.height)) * axes_z)
    xx, xy, yy = (on_x * on_x).sum(dim=0), (on_x * on_y).sum(dim=0), (on_y * on_y).sum(dim=0)

    sharp_determinants = xx * yy - xy * xy
    xx, yy = xx + settings.eps2d, yy + settings.eps2d
    determinants = xx * yy - xy * xy
    radii = _compute_radii(xx, yy, determinants)

    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1)
    size = means2d.new_tensor([settings.width, settings.height])
    on_image = ((means2d + radii[..., None] > 0) & (means2d - radii[..., None] < size)).all(dim=-1)
    is_drawn = in_range & (determinants > 0) & (radii > settings.radius_clip) & on_image

    determinants = torch.where(is_drawn, determinants, 1.0)
    conics = torch.stack([yy, -xy, xx], dim=-1) / determinants[..., None]
    compensations = None
    if settings.antialiased:
        ratios = sharp_determinants / determinants
        is_positive = is_drawn & (ratios > 0)
        compensations = torch.where(is_positive, torch.where(is_positive, ratios, 1.0).sqrt(), 0.0)
    return ProjectedGaussians(
        radii=torch.where(is_drawn, radii, 0.0).int(),
        means2d=torch.where(is_drawn[..., None], means2d, 0.0),
        depths=torch.where(is_drawn, z, 0.0),
        conics=torch.where(is_drawn[..., None], conics, 0.0),
        compensations=compensations,
    )


def rotations_from_quats(quats: Float[Tensor, "num_gaussians 4"]) -> Float[Tensor, "num_gaussians 3 3"]:
    """Rotation matrices of quaternions (wxyz) of any length but zero."""
    w, x, y, z = (quats / quats.norm(dim=-1, keepdim=True)).unbind(dim=-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([entry for row in rows for entry in row]).reshape(3, 3, -1).movedim(-1, 0)


def limit_slopes(
    focal_lengths: Float[Tensor, "*axes"], centres: Float[Tensor, "*axes"], size: int | Float[Tensor, "*axes"]
) -> tuple[Float[Tensor, "*axes"], Float[Tensor, "*axes"]]:
    """Lowest and highest slope x / z (or y / z) at which the Jacobian is taken: the widened field of view."""
    margins = FOV_MARGIN * 0.5 * size / focal_lengths
    return -(centres / focal_lengths + margins), (size - centres) / focal_lengths + margins


@torch.no_grad()
def _compute_radii(xx: Tensor, yy: Tensor, determinants: Tensor) -> Tensor:
    """Three standard deviations along the longer axis, rounded up: whole numbers that int32 holds."""
    half_trace = 0.5 * (xx + yy)
    gap = (half_trace * half_trace - determinants).clamp(min=MIN_EIGENVALUE_GAP).sqrt()
    return torch.ceil(3.0 * (half_trace + gap).sqrt()).clamp(max=2.0**30)
