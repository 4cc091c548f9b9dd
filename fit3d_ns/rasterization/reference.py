"""The reference backend: tile lists and blending in plain PyTorch, dense within each tile, float32 or float64.

It is the definition that the fast backends are tested against, so it is written to be read; gradients are autograd's.
A Gaussian enters each 16x16 tile that the square of its radius around its centre touches. Entries are ordered by
camera, tile, z-depth (as float32) and, among equal depths, by index: gsplat 1.4's order, in lists of its layout.
At a pixel, with the Gaussians of its tile in front-to-back order (Kerbl et al. 2023, Eq. 3):

    alpha_i = min(0.999, opacity_i * exp(-sigma_i)),  0 where it is below 1/255 or sigma_i is negative
    T_i = prod_{j < i} (1 - alpha_j),  stopping before the Gaussian after which T would be at most 1e-4
    value = sum_i alpha_i T_i value_i + T_final * background,   alpha = 1 - T_final

Spherical harmonics up to degree 4 have the order and signs of 3D Gaussian Splatting. Their basis functions (Sloan,
"Efficient Spherical Harmonic Evaluation", JCGT 2013) are polynomials of the unit direction (x, y, z); index
l*l + l + m holds degree l, order m.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fit3d_ns.rasterization.projection import TILE_SIZE, ProjectedGaussians, ProjectionSettings, project_gaussians

MAX_ALPHA = 0.999
"""No Gaussian is more opaque than this."""
MIN_ALPHA = 1.0 / 255.0
"""Fainter contributions are skipped."""
MIN_TRANSMITTANCE = 1e-4
"""A pixel is finished before the Gaussian that would bring its transmittance down to this."""

__all__ = ["backproject", "blend", "blend_features", "build_geometry", "evaluate_harmonics", "project_gaussians"]


@dataclass(frozen=True)
class TileLists:
    """The sorted pairs of Gaussian and tile of all cameras, without gradients."""

    tiles_per_gauss: Int[Tensor, "num_cameras num_gaussians"]
    """Number of tiles that each Gaussian enters."""
    isect_ids: Int[Tensor, " num_entries"]
    """int64 sort keys: camera | tile | bits of the float32 depth (32 bits)."""
    flatten_ids: Int[Tensor, " num_entries"]
    """int32 index camera * N + Gaussian of each entry."""
    isect_offsets: Int[Tensor, "num_cameras tile_height tile_width"]
    """int32 position of each tile's first entry; a tile ends where the next one begins."""


@dataclass(frozen=True)
class BlendGeometry:
    """Everything that blending needs to know about the Gaussians, detached: what `info` keeps for the features."""

    means2d: Float[Tensor, "num_cameras num_gaussians 2"]
    """Centres (x, y) in pixels."""
    conics: Float[Tensor, "num_cameras num_gaussians 3"]
    """Inverse covariances, xx, xy, yy."""
    opacities: Float[Tensor, "num_cameras num_gaussians"]
    """In [0, 1], compensation included."""
    tiles: TileLists
    """Which Gaussians are blended in which tile, in which order."""
    settings: ProjectionSettings
    """Image size and limits of the projection."""
    extra: Any = None
    """What one backend keeps for itself between its passes."""

    @property
    def num_cameras(self) -> int:
        return self.means2d.shape[0]

    @property
    def num_gaussians(self) -> int:
        return self.means2d.shape[1]


def build_geometry(
    projected: ProjectedGaussians, opacities: Float[Tensor, "num_cameras num_gaussians"], settings: ProjectionSettings
) -> BlendGeometry:
    """Sorts the projected Gaussians into tiles and detaches all."""
    return BlendGeometry(
        means2d=projected.means2d.detach(),
        conics=projected.conics.detach(),
        opacities=opacities.detach(),
        tiles=list_tiles(projected, settings),
        settings=settings,
    )


@torch.no_grad()
def list_tiles(projected: ProjectedGaussians, settings: ProjectionSettings) -> TileLists:
    """Sorts the Gaussians of each tile by depth."""
    num_cameras, num_gaussians = projected.radii.shape
    shape = projected.radii.new_tensor([settings.tile_width, settings.tile_height])
    centres = projected.means2d.float() / TILE_SIZE
    reach = projected.radii[..., None].float() / TILE_SIZE
    first = torch.floor(centres - reach).int().clamp(min=0).minimum(shape)
    last = torch.ceil(centres + reach).int().clamp(min=0).minimum(shape)
    extent = (last - first) * (projected.radii > 0)[..., None]
    tiles_per_gauss = extent.prod(dim=-1, dtype=torch.int32)

    counts = tiles_per_gauss.flatten().long()
    flatten_ids = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
    within = torch.arange(flatten_ids.numel(), device=counts.device) - (counts.cumsum(0) - counts)[flatten_ids]
    columns = extent.reshape(-1, 2)[flatten_ids, 0]
    tile_x = first.reshape(-1, 2)[flatten_ids, 0] + within % columns
    tile_y = first.reshape(-1, 2)[flatten_ids, 1] + within // columns
    camera_ids = flatten_ids // max(num_gaussians, 1)
    tile_ids = tile_y.long() * settings.tile_width + tile_x

    num_tiles = settings.tile_width * settings.tile_height
    depth_bits = projected.depths.float().view(torch.int32).flatten()[flatten_ids].long()
    keys = (camera_ids << (32 + num_tiles.bit_length())) | (tile_ids << 32) | depth_bits
    isect_ids, order = torch.sort(keys, stable=True)
    entries_per_tile = torch.bincount(camera_ids * num_tiles + tile_ids, minlength=num_cameras * num_tiles)
    isect_offsets = entries_per_tile.cumsum(0) - entries_per_tile
    return TileLists(
        tiles_per_gauss=tiles_per_gauss,
        isect_ids=isect_ids,
        flatten_ids=flatten_ids[order].int(),
        isect_offsets=isect_offsets.int().reshape(num_cameras, settings.tile_height, settings.tile_width),
    )


def blend(
    geometry: BlendGeometry,
    means2d: Float[Tensor, "num_cameras num_gaussians 2"],
    conics: Float[Tensor, "num_cameras num_gaussians 3"],
    opacities: Float[Tensor, "num_cameras num_gaussians"],
    colors: Float[Tensor, "num_cameras num_gaussians channels"],
    backgrounds: Float[Tensor, "num_cameras channels"] | None,
    absgrad: bool,
) -> tuple[Float[Tensor, "num_cameras height width channels"], Float[Tensor, "num_cameras height width 1"]]:
    """Images and accumulated alphas, differentiable with respect to all tensors.

    With `absgrad`, backward leaves the sum over pixels of the absolute gradient in `means2d.absgrad`.
    """
    settings = geometry.settings
    absolute = torch.zeros_like(means2d, requires_grad=False) if absgrad and means2d.requires_grad else None
    if absolute is not None:
        means2d.absgrad = absolute  # type: ignore[attr-defined]
    images, alphas = [], []
    for camera in range(geometry.num_cameras):
        pixels, values, transmittances = [], [], []
        for tile_pixels, ids in _iterate_tiles(geometry, camera):
            centres = means2d[camera, ids].expand(len(tile_pixels), -1, -1)
            if absolute is not None and len(ids):

                def add(gradient: Tensor, sums: Tensor = absolute[camera], ids: Tensor = ids) -> None:
                    sums.index_add_(0, ids, gradient.abs().sum(dim=0))

                centres.register_hook(add)
            weights, transmittance = _blend_weights(tile_pixels, centres, conics[camera, ids], opacities[camera, ids])
            pixels.append(tile_pixels)
            values.append(weights @ colors[camera, ids])
            transmittances.append(transmittance)
        # The tiles cover each pixel once; this brings the pixels from tile order into rows.
        rows = torch.cat(pixels)
        order = torch.argsort(rows[:, 0] * settings.width + rows[:, 1])
        image, transmittance = torch.cat(values)[order], torch.cat(transmittances)[order, None]
        if backgrounds is not None:
            image = image + transmittance * backgrounds[camera]
        images.append(image.reshape(settings.height, settings.width, -1))
        alphas.append(1.0 - transmittance.reshape(settings.height, settings.width, 1))
    return torch.stack(images), torch.stack(alphas)


def blend_features(
    features: Float[Tensor, "num_gaussians channels"],
    geometry: BlendGeometry,
    pixels: Int[Tensor, "num_pixels 2"] | None,
) -> Float[Tensor, "num_cameras *pixels channels"]:
    """Blended features, [C, H, W, D] or at pixels (row, column) [C, P, D]; differentiable by the features alone."""
    colors = features.expand(geometry.num_cameras, -1, -1)
    image, _ = blend(geometry, geometry.means2d, geometry.conics, geometry.opacities, colors, None, absgrad=False)
    return image if pixels is None else image[:, pixels[:, 0].long(), pixels[:, 1].long()]


@torch.no_grad()
def backproject(
    feature_maps: Float[Tensor, "num_cameras height width channels"],
    geometry: BlendGeometry,
    sums: Float[Tensor, "num_gaussians channels"],
    totals: Float[Tensor, " num_gaussians"],
) -> None:
    """Adds the maps' pixels by blend weight to `sums`, and the blend weights to `totals`, in place."""
    for camera in range(geometry.num_cameras):
        for pixels, ids in _iterate_tiles(geometry, camera):
            centres = geometry.means2d[camera, ids].expand(len(pixels), -1, -1)
            weights, _ = _blend_weights(pixels, centres, geometry.conics[camera, ids], geometry.opacities[camera, ids])
            sums.index_add_(0, ids, weights.T @ feature_maps[camera, pixels[:, 0], pixels[:, 1]])
            totals.index_add_(0, ids, weights.sum(dim=0))


def _blend_weights(
    pixels: Int[Tensor, "pixels 2"],
    centres: Float[Tensor, "pixels entries 2"],
    conics: Float[Tensor, "entries 3"],
    opacities: Float[Tensor, " entries"],
) -> tuple[Float[Tensor, "pixels entries"], Float[Tensor, " pixels"]]:
    """The weight alpha_i T_i of each Gaussian at each pixel, and the transmittance that is left."""
    dx = centres[..., 0] - (pixels[:, 1, None] + 0.5)
    dy = centres[..., 1] - (pixels[:, 0, None] + 0.5)
    sigmas = 0.5 * (conics[:, 0] * dx * dx + conics[:, 2] * dy * dy) + conics[:, 1] * dx * dy
    alphas = (opacities * torch.exp(-sigmas)).clamp(max=MAX_ALPHA)
    alphas = torch.where((sigmas >= 0) & (alphas >= MIN_ALPHA), alphas, 0.0)
    after = torch.cumprod(1.0 - alphas, dim=-1)
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], dim=-1)
    # `after` never rises, so this mask is True up to the last Gaussian that is blended.
    alphas = torch.where(after > MIN_TRANSMITTANCE, alphas, 0.0)
    return alphas * before, torch.prod(1.0 - alphas, dim=-1)


def _iterate_tiles(geometry: BlendGeometry, camera: int) -> Iterator[tuple[Int[Tensor, "p 2"], Int[Tensor, " n"]]]:
    """Pixels (row, column) and Gaussians, front to back, of every tile of one camera."""
    settings, tiles = geometry.settings, geometry.tiles
    starts = tiles.isect_offsets.flatten().tolist() + [len(tiles.flatten_ids)]
    for tile in range(settings.tile_width * settings.tile_height):
        top, left = tile // settings.tile_width * TILE_SIZE, tile % settings.tile_width * TILE_SIZE
        rows = torch.arange(top, min(top + TILE_SIZE, settings.height), device=geometry.means2d.device)
        columns = torch.arange(left, min(left + TILE_SIZE, settings.width), device=geometry.means2d.device)
        entry = camera * settings.tile_width * settings.tile_height + tile
        ids = tiles.flatten_ids[starts[entry] : starts[entry + 1]].long() - camera * geometry.num_gaussians
        yield torch.cartesian_prod(rows, columns), ids


MAX_SH_DEGREE = 4
"""Highest degree whose basis is written down here."""
COLOR_OFFSET = 0.5
"""Added to the sum over the basis before clamping at zero, so that zero coefficients are mid grey."""


def evaluate_harmonics(
    sh_degree: int,
    means: Float[Tensor, "num_gaussians 3"],
    viewmats: Float[Tensor, "num_cameras 4 4"],
    coefficients: Float[Tensor, "*batch num_gaussians bases 3"],
    is_drawn: Tensor,
) -> Float[Tensor, "num_cameras num_gaussians 3"]:
    """Colour of each Gaussian seen from each camera; not below zero.

    Args:
        sh_degree: Highest degree that takes part; further coefficients are ignored.
        coefficients: [N, K, 3] or [C, N, K, 3] with K >= (sh_degree + 1)^2.
        is_drawn: Bool [C, N]; other rows get black and no gradient.
    """
    centres = torch.linalg.inv(viewmats)[:, :3, 3]
    directions = means[None] - centres[:, None]
    directions = torch.where(is_drawn[..., None], directions, directions.new_tensor([0.0, 0.0, 1.0]))
    basis = compute_sh_basis(sh_degree, torch.nn.functional.normalize(directions, dim=-1))
    colors = (basis[..., None, :] @ coefficients[..., : basis.shape[-1], :])[..., 0, :]
    return torch.where(is_drawn[..., None], colors + COLOR_OFFSET, 0.0).clamp(min=0.0)


def compute_sh_basis(sh_degree: int, directions: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch bases"]:
    """Values of the (sh_degree + 1)^2 basis functions at unit directions."""
    x, y, z = directions.unbind(dim=-1)
    basis = [torch.full_like(x, 0.28209479177387814)]
    if sh_degree >= 1:
        basis += [-0.48860251190291992 * y, 0.48860251190291992 * z, -0.48860251190291992 * x]
    if sh_degree >= 2:
        basis += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (3 * z * z - 1),
            -1.0925484305920792 * x * z,
            0.54627421529603959 * (x * x - y * y),
        ]
    if sh_degree >= 3:
        basis += [
            -0.59004358992664352 * y * (3 * x * x - y * y),
            2.8906114426405538 * x * y * z,
            -0.45704579946446577 * y * (5 * z * z - 1),
            0.37317633259011540 * z * (5 * z * z - 3),
            -0.45704579946446577 * x * (5 * z * z - 1),
            1.4453057213202769 * z * (x * x - y * y),
            -0.59004358992664352 * x * (x * x - 3 * y * y),
        ]
    if sh_degree >= 4:
        basis += [
            2.5033429417967046 * x * y * (x * x - y * y),
            -1.7701307697799304 * y * z * (3 * x * x - y * y),
            0.94617469575756008 * x * y * (7 * z * z - 1),
            -0.66904654355728921 * y * z * (7 * z * z - 3),
            0.10578554691520430 * (35 * z**4 - 30 * z * z + 3),
            -0.66904654355728921 * x * z * (7 * z * z - 3),
            0.47308734787878004 * (x * x - y * y) * (7 * z * z - 1),
            -1.7701307697799304 * x * z * (x * x - 3 * y * y),
            0.62583573544917614 * (x * x * (x * x - 3 * y * y) - y * y * (3 * x * x - y * y)),
        ]
    return torch.stack(basis, dim=-1)
