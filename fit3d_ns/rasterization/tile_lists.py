"""Tile lists: which Gaussians are blended in which 16x16 tile, front to back; and the definition in plain PyTorch.

A Gaussian enters each tile that the square of its radius around its centre touches. Entries are ordered by camera,
tile, z-depth (as float32) and, among equal depths, by index; this is gsplat 1.4's order, and the lists have its layout.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fit3d_ns.rasterization.projection import TILE_SIZE, ProjectedGaussians, ProjectionSettings


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
    """Who is blended where, in which order."""
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
