"""The CPU backend: autograd functions around the compiled kernels, float32.

Projection, harmonics and blending are three nodes of the graph, so that `means2d` is a tensor of its own between them.
All arrays are cut into tasks by size alone and added up in a fixed order: results repeat to the bit.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from fit3d_ns.rasterization.cpu import blending as cpu_blending
from fit3d_ns.rasterization.cpu import features as cpu_features
from fit3d_ns.rasterization.cpu import harmonics as cpu_harmonics
from fit3d_ns.rasterization.cpu import projection as cpu_projection
from fit3d_ns.rasterization.cpu import tiles as cpu_tiles
from fit3d_ns.rasterization.cpu.scratch import take_zeros
from fit3d_ns.rasterization.cpu.threads import run_tasks
from fit3d_ns.rasterization.cpu.vectors import NUM_LANES
from fit3d_ns.rasterization.projection import ProjectedGaussians, ProjectionSettings
from fit3d_ns.rasterization.reference import BlendGeometry, TileLists


@dataclass(frozen=True)
class CpuTiles:
    """What the kernels need of the tile lists, as NumPy arrays."""

    layout: tuple[int, ...]
    """Bands per camera, tile rows per band, tile columns, tile rows, image width, image height."""
    tile_ends: np.ndarray
    """int64 [C*tiles]: where each tile's entries end; they begin where those of the tile before it end."""
    flatten_ids: np.ndarray
    """int32 [entries]: camera * N + Gaussian."""
    block_masks: np.ndarray
    """uint16 [entries]: which of the tile's 16 blocks the Gaussian can reach."""
    slots: np.ndarray
    """int32 [entries]: row of partial sums that the entry adds to."""
    slot_starts: np.ndarray
    """int64 [C*N + 1]: the slots of each Gaussian."""

    @property
    def num_tasks(self) -> int:
        """Bands of all cameras."""
        return self.layout[0] * (len(self.tile_ends) // (self.layout[2] * self.layout[3]))

    @property
    def num_slots(self) -> int:
        return int(self.slot_starts[-1])


def project_gaussians(
    means: Float[Tensor, "num_gaussians 3"],
    quats: Float[Tensor, "num_gaussians 4"],
    scales: Float[Tensor, "num_gaussians 3"],
    viewmats: Float[Tensor, "num_cameras 4 4"],
    Ks: Float[Tensor, "num_cameras 3 3"],
    settings: ProjectionSettings,
) -> ProjectedGaussians:
    """As `projection.project_gaussians`."""
    radii, means2d, depths, conics, compensations = _Projection.apply(means, quats, scales, viewmats, Ks, settings)
    return ProjectedGaussians(radii, means2d, depths, conics, compensations if settings.antialiased else None)


def evaluate_harmonics(
    sh_degree: int,
    means: Float[Tensor, "num_gaussians 3"],
    viewmats: Float[Tensor, "num_cameras 4 4"],
    coefficients: Float[Tensor, "*batch num_gaussians bases 3"],
    is_drawn: Tensor,
) -> Float[Tensor, "num_cameras num_gaussians 3"]:
    """As `spherical_harmonics.evaluate_harmonics`."""
    centres = torch.linalg.inv(viewmats)[:, :3, 3]
    if coefficients.ndim == 3:
        coefficients = coefficients[None]
    return _Harmonics.apply(means, centres, coefficients, is_drawn, sh_degree)


def build_geometry(
    projected: ProjectedGaussians, opacities: Float[Tensor, "num_cameras num_gaussians"], settings: ProjectionSettings
) -> BlendGeometry:
    """As `reference.build_geometry`; `extra` holds `CpuTiles`."""
    means2d, conics = projected.means2d.detach().contiguous(), projected.conics.detach().contiguous()
    opacities = opacities.detach().contiguous()
    num_cameras, num_gaussians = opacities.shape
    width, height = settings.tile_width, settings.tile_height
    num_tiles, total = width * height, num_cameras * num_gaussians
    band_rows = cpu_tiles.rows_per_band(height)

    tile_spans, tiles_per_gauss = np.empty((total, 4), np.int32), np.empty(total, np.int32)
    tile_ends = np.empty(num_cameras * num_tiles, np.int64)
    cpu_tiles.count_entries(
        projected.radii.numpy(), means2d.numpy(), width, height, band_rows, tile_spans, tiles_per_gauss, tile_ends
    )
    depth_bits = projected.depths.detach().contiguous().view(torch.int32).numpy().view(np.uint32).reshape(-1)
    order, spare_order = np.empty(total, np.int32), np.empty(total, np.int32)
    keys, spare_keys = np.empty(total, np.uint32), np.empty(total, np.uint32)
    count = cpu_tiles.order_by_depth(depth_bits, tiles_per_gauss, order, keys, spare_order, spare_keys)

    num_entries = int(tile_ends[-1])
    flatten_ids, slots = np.empty(num_entries, np.int32), np.empty(num_entries, np.int32)
    isect_ids, slot_starts = np.empty(num_entries, np.int64), np.empty(total + 1, np.int64)
    cpu_tiles.fill_entries(
        order, count, num_gaussians, depth_bits, tile_spans, width, height, band_rows, tile_ends, slot_starts,
        flatten_ids, isect_ids, slots, np.empty_like(tile_ends),
    )  # fmt: skip
    block_masks, reach = np.empty(num_entries, np.uint16), np.empty((total, 6))
    run_tasks(
        cpu_tiles.measure_reach, _num_tasks(total, cpu_tiles.CHUNK), *_flats(conics, opacities), tiles_per_gauss, reach
    )
    run_tasks(
        cpu_tiles.mark_blocks, num_cameras * height, width, height, tile_ends, flatten_ids,
        _flat(means2d), reach, block_masks,
    )  # fmt: skip
    layout = (-(-height // band_rows), band_rows, width, height, settings.width, settings.height)
    starts = np.concatenate([[0], tile_ends[:-1]]).astype(np.int32)
    return BlendGeometry(
        means2d=means2d,
        conics=conics,
        opacities=opacities,
        tiles=TileLists(
            tiles_per_gauss=torch.from_numpy(tiles_per_gauss).reshape(num_cameras, num_gaussians),
            isect_ids=torch.from_numpy(isect_ids),
            flatten_ids=torch.from_numpy(flatten_ids),
            isect_offsets=torch.from_numpy(starts).reshape(num_cameras, height, width),
        ),
        settings=settings,
        extra=CpuTiles(layout, tile_ends, flatten_ids, block_masks, slots, slot_starts),
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
    """As `reference.blend`."""
    return _Blending.apply(means2d, conics, opacities, colors, backgrounds, geometry, absgrad)


def blend_features(
    features: Float[Tensor, "num_gaussians channels"],
    geometry: BlendGeometry,
    pixels: Int[Tensor, "num_pixels 2"] | None,
) -> Float[Tensor, "num_cameras *pixels channels"]:
    """As `reference.blend_features`; with `pixels`, only their tiles are worked on."""
    settings = geometry.settings
    if pixels is None:
        rendered = _FeatureBlending.apply(features, geometry, None)
        return rendered.reshape(geometry.num_cameras, settings.height, settings.width, -1)
    indices = pixels[:, 0].long() * settings.width + pixels[:, 1].long()
    distinct, places = torch.unique(indices, return_inverse=True)
    # Also brings the rows from sorted order into that of `pixels`; its gradient adds repeated pixels up.
    return _FeatureBlending.apply(features, geometry, distinct)[:, places]


@torch.no_grad()
def backproject(
    feature_maps: Float[Tensor, "num_cameras height width channels"],
    geometry: BlendGeometry,
    sums: Float[Tensor, "num_gaussians channels"],
    totals: Float[Tensor, " num_gaussians"],
) -> None:
    """As `reference.backproject`."""
    _backproject_rows(feature_maps.flatten(1, 2), geometry, None, sums, totals)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, means, quats, scales, viewmats, Ks, settings: ProjectionSettings):
        means, quats, scales, viewmats, Ks = (x.detach().contiguous() for x in (means, quats, scales, viewmats, Ks))
        shape = (len(viewmats), len(means))
        radii, depths = means.new_empty(shape, dtype=torch.int32), means.new_empty(shape)
        means2d, conics = means.new_empty(*shape, 2), means.new_empty(*shape, 3)
        compensations = means.new_empty(shape if settings.antialiased else (0, 0))
        run_tasks(
            cpu_projection.project, _num_tasks(len(means), cpu_projection.CHUNK),
            *_arrays(means, quats, scales, viewmats, Ks), settings.width, settings.height,
            *map(np.float32, (settings.near_plane, settings.far_plane, settings.radius_clip, settings.eps2d)),
            *_arrays(radii, means2d, depths, conics, compensations),
        )  # fmt: skip
        ctx.save_for_backward(means, quats, scales, viewmats, Ks, radii, compensations)
        ctx.settings = settings
        ctx.mark_non_differentiable(radii)
        return radii, means2d, depths, conics, compensations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _, v_means2d, v_depths, v_conics, v_compensations):  # type: ignore[override]
        means, quats, scales, viewmats, Ks, radii, compensations = ctx.saved_tensors
        settings = ctx.settings
        num_tasks = _num_tasks(len(means), cpu_projection.CHUNK)
        v_means, v_quats, v_scales = (torch.empty_like(x) for x in (means, quats, scales))
        v_viewmats = np.zeros((num_tasks, *viewmats.shape))
        run_tasks(
            cpu_projection.project_backward, num_tasks, *_arrays(means, quats, scales, viewmats, Ks),
            settings.width, settings.height, np.float32(settings.eps2d), *_arrays(radii, compensations),
            *_arrays(v_means2d, v_depths, v_conics, v_compensations), *_arrays(v_means, v_quats, v_scales), v_viewmats,
        )  # fmt: skip
        return v_means, v_quats, v_scales, torch.from_numpy(v_viewmats.sum(axis=0)).to(means), None, None


class _Harmonics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, means, centres, coefficients, is_drawn, sh_degree: int):
        means, centres, coefficients = (x.detach().contiguous() for x in (means, centres, coefficients))
        colors = means.new_empty(len(centres), len(means), 3)
        run_tasks(
            cpu_harmonics.evaluate, _num_tasks(len(means), cpu_projection.CHUNK), sh_degree,
            *_arrays(means, centres, coefficients, is_drawn, colors),
        )  # fmt: skip
        ctx.save_for_backward(means, centres, coefficients, is_drawn, colors)
        ctx.sh_degree = sh_degree
        return colors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_colors):  # type: ignore[override]
        means, centres, coefficients, is_drawn, colors = ctx.saved_tensors
        num_tasks = _num_tasks(len(means), cpu_projection.CHUNK)
        v_means, v_coefficients = torch.empty_like(means), torch.empty_like(coefficients)
        v_centres = np.zeros((num_tasks, *centres.shape))
        run_tasks(
            cpu_harmonics.evaluate_backward, num_tasks, ctx.sh_degree,
            *_arrays(means, centres, coefficients, is_drawn, colors, v_colors, v_means), v_centres,
            v_coefficients.numpy(),
        )  # fmt: skip
        return v_means, torch.from_numpy(v_centres.sum(axis=0)).to(means), v_coefficients, None, None


class _Blending(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, means2d, conics, opacities, colors, backgrounds, geometry: BlendGeometry, absgrad: bool):
        tiles: CpuTiles = geometry.extra
        settings = geometry.settings
        colors = colors.detach().contiguous()
        channels = colors.shape[-1]
        images = colors.new_empty(geometry.num_cameras, settings.height, settings.width, channels)
        alphas = colors.new_empty(geometry.num_cameras, settings.height, settings.width, 1)
        flat_backgrounds = _flat(backgrounds) if backgrounds is not None else np.empty(0, np.float32)
        run_tasks(
            cpu_blending.blend, tiles.num_tasks, *tiles.layout, tiles.tile_ends, tiles.flatten_ids, tiles.block_masks,
            *_flats(geometry.means2d, geometry.conics, geometry.opacities, colors), channels, flat_backgrounds,
            *_flats(images, alphas),
        )  # fmt: skip
        # `means2d` is saved for the sake of its identity: backward hangs `absgrad` onto it.
        ctx.save_for_backward(means2d, colors, backgrounds, alphas)
        ctx.geometry, ctx.absgrad = geometry, absgrad
        return images, alphas

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_images, v_alphas):  # type: ignore[override]
        means2d, colors, backgrounds, alphas = ctx.saved_tensors
        geometry: BlendGeometry = ctx.geometry
        tiles: CpuTiles = geometry.extra
        channels = colors.shape[-1]
        stride = cpu_blending.MOMENTS + -(-channels // cpu_blending.GROUP) * cpu_blending.GROUP
        partials = take_zeros("partials", tiles.num_slots * stride)
        flat_backgrounds = _flat(backgrounds) if backgrounds is not None else np.empty(0, np.float32)
        run_tasks(
            cpu_blending.blend_backward, tiles.num_tasks, *tiles.layout, tiles.tile_ends, tiles.flatten_ids,
            tiles.block_masks, tiles.slots, *_flats(geometry.means2d, geometry.conics, geometry.opacities, colors),
            channels, flat_backgrounds, *_flats(v_images, v_alphas), ctx.absgrad, partials,
        )  # fmt: skip
        v_means2d, v_conics = torch.empty_like(geometry.means2d), torch.empty_like(geometry.conics)
        v_opacities, v_colors = torch.empty_like(geometry.opacities), torch.empty_like(colors)
        absolute = torch.empty_like(v_means2d if ctx.absgrad else v_means2d[:0])
        run_tasks(
            cpu_blending.collect_gradients, _num_tasks(geometry.opacities.numel(), cpu_blending.CHUNK),
            tiles.slot_starts, partials, channels, *_flats(geometry.conics, geometry.opacities),
            *_flats(v_means2d, v_conics, v_opacities, v_colors, absolute),
        )  # fmt: skip
        if ctx.absgrad:
            means2d.absgrad = absolute
        v_backgrounds = (v_images * (1.0 - alphas)).sum(dim=(1, 2)) if ctx.needs_input_grad[4] else None
        return v_means2d, v_conics, v_opacities, v_colors, v_backgrounds, None, None


class _FeatureBlending(torch.autograd.Function):
    """Features at all pixels, or at distinct row-major indices, as [C, P, D]; its gradient is the adjoint."""

    @staticmethod
    def forward(ctx: Any, features, geometry: BlendGeometry, indices: Tensor | None):
        tiles: CpuTiles = geometry.extra
        channels, stride = features.shape[1], _padded(features.shape[1])
        pixel_rows, num_rows = _pixel_rows(geometry.settings, indices)
        output = features.new_empty(geometry.num_cameras, num_rows, channels)
        run_tasks(
            cpu_features.blend_features, tiles.num_tasks, *tiles.layout, tiles.tile_ends, tiles.flatten_ids,
            tiles.block_masks, *_flats(geometry.means2d, geometry.conics, geometry.opacities),
            _flat(_pad_channels(features.detach())), geometry.num_gaussians, stride, channels, pixel_rows, num_rows,
            _flat(output),
        )  # fmt: skip
        ctx.geometry, ctx.indices = geometry, indices
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_output):  # type: ignore[override]
        sums = v_output.new_zeros(ctx.geometry.num_gaussians, v_output.shape[-1])
        _backproject_rows(v_output, ctx.geometry, ctx.indices, sums, sums.new_zeros(len(sums)))
        return sums, None, None


def _backproject_rows(
    rows: Tensor, geometry: BlendGeometry, indices: Tensor | None, sums: Tensor, totals: Tensor
) -> None:
    """Adds rows [C, P, D] at all pixels or at `indices` to `sums` [N, D], and their weights to `totals` [N]."""
    tiles: CpuTiles = geometry.extra
    channels, stride = rows.shape[-1], _padded(rows.shape[-1])
    pixel_rows, num_rows = _pixel_rows(geometry.settings, indices)
    partials = take_zeros("partials", tiles.num_slots * stride)
    weight_partials = take_zeros("weight_partials", tiles.num_slots)
    run_tasks(
        cpu_features.backproject, tiles.num_tasks, *tiles.layout, tiles.tile_ends, tiles.flatten_ids,
        tiles.block_masks, tiles.slots, *_flats(geometry.means2d, geometry.conics, geometry.opacities),
        _flat(_pad_channels(rows.detach())), stride, pixel_rows, num_rows, partials, weight_partials,
    )  # fmt: skip
    run_tasks(
        cpu_features.collect_sums, _num_tasks(geometry.num_gaussians, cpu_features.CHUNK), geometry.num_cameras,
        tiles.slot_starts, partials, weight_partials, stride, channels, *_flats(sums, totals),
    )  # fmt: skip


def _pixel_rows(settings: ProjectionSettings, indices: Tensor | None) -> tuple[np.ndarray, int]:
    """Which row holds each pixel (-1: none), and the number of rows."""
    num_pixels = settings.width * settings.height
    if indices is None:
        return np.arange(num_pixels, dtype=np.int32), num_pixels
    pixel_rows = np.full(num_pixels, -1, np.int32)
    pixel_rows[indices.numpy()] = np.arange(len(indices), dtype=np.int32)
    return pixel_rows, len(indices)


def _padded(channels: int) -> int:
    return -(-channels // NUM_LANES) * NUM_LANES


def _pad_channels(rows: Tensor) -> Tensor:
    missing = _padded(rows.shape[-1]) - rows.shape[-1]
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def _num_tasks(count: int, chunk: int) -> int:
    return -(-count // chunk)


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _flat(tensor: Tensor) -> np.ndarray:
    """The numbers as one array: a view if the tensor is contiguous, so that kernels can write through it."""
    return tensor.detach().contiguous().view(-1).numpy()


def _flats(*tensors: Tensor) -> list[np.ndarray]:
    return [_flat(tensor) for tensor in tensors]
