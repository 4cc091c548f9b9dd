"""Flat Gaussians that cover a surface: points are smoothed along their normals and merged where the surface is plain.

Points lie in cells of a cubic grid with the side `cell`. Eight cells become one of twice the side where what they hold
is flat and of one colour, or where photographs do not resolve them; a wall ends in few large cells, an edge in many
small ones. Each remaining cell becomes one Gaussian along its points' spread.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from fit3d_ns.scene import Gaussians

OPACITY = 0.8
_SPREAD = 4.0
"""Standard deviations of a Gaussian per one of its points: 2 leaves no gaps between squares. More overlap
raises the held-out cosine and makes depth and colour coarser."""
_THINNESS = 0.1
"""Standard deviation along the normal, in the smaller one along the surface, where points lie in a plane."""
_NUM_NEIGHBOURS, _NUM_ROUNDS = 16, 2
_LARGEST_RESIDUAL = 0.25
"""Root mean square distance from the plane of a merged cell, in sides of the smallest cell."""
_LEAST_AGREEMENT = 0.97
"""Length of the mean of a merged cell's unit normals."""
_LARGEST_CONTRAST = 0.08
"""Standard deviation of a merged cell's colours, of all three channels together, in [0, 1]."""


@dataclass(frozen=True)
class SurfacePoints:
    """Points of a surface as photographs resolve it; lengths are in units of the capture's world."""

    xyz: Float[np.ndarray, "points 3"]
    normals: Float[np.ndarray, "points 3"]
    """Unit normals, towards the cameras."""
    rgb: Float[np.ndarray, "points 3"]
    """Colours in [0, 1]."""
    spacing: Float[np.ndarray, " points"]
    """Width of a pixel at the point, of the photograph that resolves it best."""

    def __len__(self) -> int:
        return len(self.xyz)

    def select(self, chosen: np.ndarray) -> "SurfacePoints":
        return SurfacePoints(self.xyz[chosen], self.normals[chosen], self.rgb[chosen], self.spacing[chosen])


def sum_groups(
    keys: Int[np.ndarray, " rows"], values: Float[np.ndarray, "rows columns"]
) -> tuple[Int[np.ndarray, " groups"], Int[np.ndarray, " rows"], Float[np.ndarray, "groups columns"]]:
    """The different keys, ascending; which of them each row has; and the sums of the rows that share one."""
    groups, members = np.unique(keys, return_inverse=True)
    sums = torch.zeros(len(groups), values.shape[1], dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(members), torch.from_numpy(values))
    return groups, members, sums.numpy()


def compute_cell_keys(xyz: Float[np.ndarray, "points 3"], cell: float) -> Int[np.ndarray, " points"]:
    """One number for each cell of a grid: 21 bits an axis; halving the axes' numbers gives the cell of twice the side.

    ValueError where the surface reaches too far for its cells.
    """
    numbers = np.floor(xyz / cell).astype(np.int64) + 2**20
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= 2**21):
        raise ValueError(f"A surface of {np.ptp(xyz, axis=0).max():g} units has no cells of {cell:g}; use larger ones.")
    return (numbers[:, 0] << 42) | (numbers[:, 1] << 21) | numbers[:, 2]


def estimate_normals(
    xyz: Float[np.ndarray, "points 3"], towards: Float[np.ndarray, "points 3"]
) -> Float[np.ndarray, "points 3"]:
    """Unit normals: of each point's neighbours the direction of least spread, on the side of the vectors `towards`."""
    neighbours = xyz[cKDTree(xyz).query(xyz, min(_NUM_NEIGHBOURS, len(xyz)))[1].reshape(len(xyz), -1)]
    offsets = neighbours - neighbours.mean(axis=1, keepdims=True)
    normals = np.linalg.eigh(np.einsum("nki,nkj->nij", offsets, offsets))[1][..., 0]
    return np.where((normals * towards).sum(axis=1, keepdims=True) < 0, -normals, normals)


def smooth_along_normals(points: SurfacePoints, cell: float) -> SurfacePoints:
    """Moves points along their normals to the plane of their neighbours: layers of a noisy surface become one."""
    reach = 2.5 * np.maximum(points.spacing, cell)
    xyz, normals = points.xyz, points.normals
    for _ in range(_NUM_ROUNDS):
        distances, indices = cKDTree(xyz).query(xyz, range(1, min(_NUM_NEIGHBOURS, len(xyz)) + 1))
        weights = np.exp(-2.0 * (distances / reach[:, None]) ** 2)
        # Neighbours around a corner or on the back of a thin wall do not count.
        weights *= np.clip(np.einsum("nki,ni->nk", normals[indices], normals) - 0.5, 0.0, None)
        heights = np.einsum("nki,ni->nk", xyz[indices] - xyz[:, None], normals)
        shift = (weights * heights).sum(axis=1) / weights.sum(axis=1)
        turned = np.einsum("nk,nki->ni", weights, normals[indices])
        xyz = xyz + shift[:, None] * normals
        normals = turned / np.linalg.norm(turned, axis=1, keepdims=True)
    return replace(points, xyz=xyz, normals=normals)


def create_point_surfels(points: SurfacePoints, cell: float) -> Gaussians:
    return _create_gaussians(_Moments(_list_moments(points, cell)))


def create_surfels(points: SurfacePoints, cell: float, cell_pixels: float) -> Gaussians:
    """One Gaussian for each cell that is left after merging; cells below `cell_pixels` pixels are always merged."""
    keys, _, sums = sum_groups(compute_cell_keys(points.xyz, cell), _list_moments(points, cell))
    mask = 2**21 - 1
    parents = ((keys >> 43) << 42) | (((keys >> 21) & mask) >> 1 << 21) | ((keys & mask) >> 1)
    _, members, joined = sum_groups(parents, sums)
    together = _Moments(joined)
    merges = together.residual < _LARGEST_RESIDUAL * cell
    merges &= (together.agreement > _LEAST_AGREEMENT) & (together.contrast < _LARGEST_CONTRAST)
    merges |= 2.0 * cell < cell_pixels * together.spacing
    return _create_gaussians(_Moments(np.concatenate([sums[~merges[members]], joined[merges]])))


def _list_moments(points: SurfacePoints, cell: float) -> Float[np.ndarray, "points 19"]:
    """The sums that `_Moments` reads, one row for each point."""
    squares = points.xyz[:, [0, 0, 0, 1, 1, 2]] * points.xyz[:, [0, 1, 2, 1, 2, 2]]
    columns = (np.ones(len(points)), points.xyz, squares, points.normals, points.rgb, (points.rgb**2).sum(axis=1))
    return np.column_stack([*columns, np.maximum(points.spacing, cell) ** 2 / 12.0, points.spacing])


class _Moments:
    """What follows from the sums over each cell's points."""

    def __init__(self, sums: Float[np.ndarray, "cells 19"]) -> None:
        means = sums / sums[:, :1]
        self.mean, self.rgb = means[:, 1:4], means[:, 13:16]
        self.contrast = np.sqrt(np.maximum(means[:, 16] - (self.rgb**2).sum(axis=1), 0.0))
        self.cell_variance, self.spacing = means[:, 17:18], means[:, 18]
        rows = means[:, 4:10] - self.mean[:, [0, 0, 0, 1, 1, 2]] * self.mean[:, [0, 1, 2, 1, 2, 2]]
        self.covariance = rows[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3)
        lengths = np.linalg.norm(sums[:, 10:13], axis=1)
        self.agreement = lengths / sums[:, 0]
        self.normal = normal = sums[:, 10:13] / np.maximum(lengths, 1e-12)[:, None]
        # Where both sides of something thin share a cell, its points' spread tells more.
        unclear = self.agreement < 0.5
        normal[unclear] = np.linalg.eigh(self.covariance[unclear])[1][..., 0]
        self.residual = np.sqrt(np.maximum(np.einsum("ni,nij,nj->n", normal, self.covariance, normal), 0.0))


def _create_gaussians(cells: _Moments) -> Gaussians:
    from scipy.spatial.transform import Rotation

    normal, covariance = cells.normal, cells.covariance
    # Any two directions along the surface, then turned to those of most and least spread.
    helper = np.eye(3)[np.abs(normal).argmin(axis=1)]
    first = np.cross(normal, helper)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    axes = np.stack([first, np.cross(normal, first)], axis=2)
    spread, turn = np.linalg.eigh(axes.transpose(0, 2, 1) @ covariance @ axes)
    axes = axes @ turn
    along = _SPREAD * np.sqrt(np.maximum(spread, 0.0) + cells.cell_variance)
    across = np.sqrt(cells.residual**2 + (_THINNESS * along[:, 0]) ** 2)
    rotation = np.concatenate([axes, np.cross(axes[..., 0], axes[..., 1])[..., None]], axis=2)
    scales = np.column_stack([along, across])
    return Gaussians.from_raw(
        means=torch.from_numpy(cells.mean),
        # xyzw -> wxyz
        quats=torch.from_numpy(Rotation.from_matrix(rotation).as_quat()[:, [3, 0, 1, 2]]),
        log_scales=torch.from_numpy(np.log(scales)),
        opacity_logits=torch.full((len(scales),), OPACITY).logit(),
        sh_dc=torch.from_numpy((cells.rgb - 0.5) * 2.0 * np.sqrt(np.pi)),
    )
