"""The CPU backend: autograd functions around the compiled kernels, float32; shapes and meaning as in `reference`.

Projection and blending are two nodes of the graph, so that `means2d` is a tensor of its own between them.
All arrays are cut into tasks by size alone and added up in a fixed order: results repeat to the bit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fit3d_ns.rasterization import projection, reference
from fit3d_ns.rasterization.cpu import blending
from fit3d_ns.rasterization.cpu import tiles as cpu_tiles
from fit3d_ns.rasterization.cpu.runtime import count_chunks, run_tasks, take_zeros
from fit3d_ns.rasterization.cpu.tiles import CpuTiles
from fit3d_ns.rasterization.cpu.vectors import NUM_LANES
from fit3d_ns.rasterization.projection import MIN_EIGENVALUE_GAP, ProjectedGaussians, ProjectionSettings
from fit3d_ns.rasterization.reference import BlendGeometry, TileLists


def project_gaussians(
    means: Tensor, quats: Tensor, scales: Tensor, viewmats: Tensor, Ks: Tensor, settings: ProjectionSettings
) -> ProjectedGaussians:
    """As `projection.project_gaussians`, which here works on the Gaussians that may be in view, camera by camera."""
    found = []
    for camera in range(len(viewmats)):
        rows = _find_in_view(means, scales, viewmats[camera], Ks[camera], settings)
        in_view = means.index_select(0, rows), quats.index_select(0, rows), scales.index_select(0, rows)
        found.append((rows, projection.project_gaussians(*in_view, viewmats[camera, None], Ks[camera, None], settings)))

    def spread(name: str) -> Tensor:
        return _spread([(rows, getattr(projected, name)) for rows, projected in found], len(means))

    radii, means2d, depths, conics = map(spread, ("radii", "means2d", "depths", "conics"))
    return ProjectedGaussians(radii, means2d, depths, conics, spread("compensations") if settings.antialiased else None)


def evaluate_harmonics(
    sh_degree: int, means: Tensor, viewmats: Tensor, coefficients: Tensor, is_drawn: Tensor
) -> Tensor:
    """As `reference.evaluate_harmonics`, which here works on what is drawn, camera by camera."""
    found = []
    for camera, drawn in enumerate(is_drawn):
        rows = drawn.nonzero()[:, 0]
        own = coefficients[camera % len(coefficients)] if coefficients.ndim == 4 else coefficients
        seen = means.index_select(0, rows), viewmats[camera, None], own.index_select(0, rows)
        found.append((rows, reference.evaluate_harmonics(sh_degree, *seen, drawn[None, rows])))
    return _spread(found, len(means))


def build_geometry(projected: ProjectedGaussians, opacities: Tensor, settings: ProjectionSettings) -> BlendGeometry:
    """As `reference.build_geometry`; `extra` holds `CpuTiles`."""
    means2d, conics = projected.means2d.detach().contiguous(), projected.conics.detach().contiguous()
    opacities = opacities.detach().contiguous()
    flat_means2d, flat_conics, flat_opacities = _flats(means2d, conics, opacities)
    layout = cpu_tiles.create_layout(settings)
    num_cameras, num_gaussians = opacities.shape
    radii = projected.radii.numpy()
    tile_spans, tiles_per_gauss, slot_starts, tile_ends = cpu_tiles.count_entries(radii, means2d.numpy(), layout)
    depth_bits = _flat(projected.depths).view(np.uint32)
    # Nearest first, and by index where depths are equal; the bits of positive numbers are ordered as they are.
    reaching = torch.from_numpy(np.flatnonzero(tiles_per_gauss))
    nearest = torch.from_numpy(depth_bits.view(np.int32))[reaching].sort(stable=True).indices
    order = reaching[nearest].int().numpy()
    tile_bits = (layout.tile_width * layout.tile_height).bit_length()
    flatten_ids, isect_ids, slots = cpu_tiles.fill_entries(
        order, num_gaussians, depth_bits, layout, tile_bits, tile_spans, slot_starts, tile_ends
    )
    reach, block_masks = np.empty((opacities.numel(), 6)), np.empty(len(flatten_ids), np.uint16)
    run_tasks(cpu_tiles.measure_reach, count_chunks(len(reach)), flat_conics, flat_opacities, tiles_per_gauss, reach)
    run_tasks(
        cpu_tiles.mark_blocks, num_cameras * layout.tile_height, layout, tile_ends, flatten_ids, flat_means2d, reach,
        block_masks,
    )  # fmt: skip
    isect_offsets = torch.from_numpy(np.concatenate([[0], tile_ends[:-1]]).astype(np.int32))
    return BlendGeometry(
        means2d=means2d,
        conics=conics,
        opacities=opacities,
        tiles=TileLists(
            tiles_per_gauss=torch.from_numpy(tiles_per_gauss).reshape(num_cameras, num_gaussians),
            isect_ids=torch.from_numpy(isect_ids),
            flatten_ids=torch.from_numpy(flatten_ids),
            isect_offsets=isect_offsets.reshape(num_cameras, layout.tile_height, layout.tile_width),
        ),
        settings=settings,
        extra=CpuTiles(
            layout, tile_ends, flatten_ids, block_masks, slots, slot_starts, flat_means2d, flat_conics, flat_opacities
        ),
    )


def blend_features(features: Tensor, geometry: BlendGeometry, pixels: Tensor | None) -> Tensor:
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
def backproject(feature_maps: Tensor, geometry: BlendGeometry, sums: Tensor, totals: Tensor) -> None:
    """As `reference.backproject`."""
    _backproject_rows(feature_maps.flatten(1, 2), geometry, None, sums, totals)


@torch.no_grad()
def _find_in_view(means: Tensor, scales: Tensor, viewmat: Tensor, K: Tensor, settings: ProjectionSettings) -> Tensor:
    """Rows of all Gaussians that can be drawn, and of few others: each is taken for a ball of its largest scale.

    J has no singular value above f / z sqrt(1 + slope_x^2 + slope_y^2), which bounds the radius.
    """
    in_camera = torch.addmm(viewmat[:3, 3, None], viewmat[:3, :3], means.T)
    z = in_camera[2]
    focal_lengths, centres, size = K.diagonal()[:2], K[:2, 2], K.new_tensor([settings.width, settings.height])
    slopes = torch.stack(projection.limit_slopes(focal_lengths, centres, size)).abs().amax(dim=0)
    stretch = focal_lengths.max() * (1.0 + slopes.square().sum()).sqrt()
    # What the blur and the smallest gap of eigenvalues add, one pixel for rounding up and one for float32.
    margin = 3.0 * (settings.eps2d + MIN_EIGENVALUE_GAP**0.5) ** 0.5 + 2.0
    radii = 3.0 * stretch * scales.amax(dim=-1) / z + margin
    is_in_view = (z >= settings.near_plane) & (z <= settings.far_plane)
    for axis in range(2):
        place = focal_lengths[axis] * in_camera[axis] / z + centres[axis]
        is_in_view &= (place + radii > 0) & (place - radii < size[axis])
    return is_in_view.nonzero()[:, 0]


def _spread(found: Sequence[tuple[Tensor, Tensor]], num_gaussians: int) -> Tensor:
    """[C, N, ...] from each camera's row numbers [n] and values [1, n, ...]; zeros elsewhere."""
    indices = torch.cat([rows + camera * num_gaussians for camera, (rows, _) in enumerate(found)])
    values = torch.cat([values[0] for _, values in found])
    everything = values.new_zeros(len(found) * num_gaussians, *values.shape[1:])
    return everything.index_copy_(0, indices, values).unflatten(0, (len(found), num_gaussians))


class _Blending(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, geometry: BlendGeometry, means2d, conics, opacities, colors, backgrounds, absgrad: bool):
        colors = colors.detach().contiguous()
        # Opacity is the blend of ones.
        blended = _blend_rows(functional.pad(colors, (0, 1), value=1.0), geometry, None)
        settings = geometry.settings
        images, alphas = blended.unflatten(1, (settings.height, settings.width)).split((colors.shape[-1], 1), dim=-1)
        if backgrounds is not None:
            images = images + (1.0 - alphas) * backgrounds[:, None, None]
        images, alphas = images.contiguous(), alphas.contiguous()
        # `means2d` is saved for its identity: backward attaches `absgrad` to it.
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
        colors, padded = (_pad_channels(rows, blending.GROUP) for rows in (colors, v_images))
        stride, num_slots = blending.MOMENTS + colors.shape[-1], int(tiles.slot_starts[-1])
        partials = take_zeros("partials", num_slots * stride)
        behind = -v_alphas if backgrounds is None else v_images @ backgrounds[:, None, :, None] - v_alphas
        run_tasks(
            blending.blend_backward, _count_bands(geometry), tiles, _flat(colors), colors.shape[-1],
            _pixel_rows(geometry.settings, None)[0], *_flats(padded, behind), ctx.absgrad, partials,
        )  # fmt: skip
        # One row for each Gaussian in each camera.
        sums = means2d.new_zeros(geometry.opacities.numel(), stride)
        _collect(tiles, 1, partials, take_zeros("weight_partials", num_slots), sums, sums.new_zeros(len(sums)))
        moments, v_colors, _ = sums.view(*geometry.opacities.shape, stride).tensor_split(
            [blending.MOMENTS, blending.MOMENTS + channels], dim=-1
        )
        h, h_dx, h_dy, h_dxx, h_dxy, h_dyy, *absolute = moments.unbind(dim=-1)
        xx, xy, yy = geometry.conics.unbind(dim=-1)
        # sigma falls where alpha rises: v_sigma = -h.
        v_means2d = -torch.stack([xx * h_dx + xy * h_dy, xy * h_dx + yy * h_dy], dim=-1)
        v_conics = -torch.stack([0.5 * h_dxx, h_dxy, 0.5 * h_dyy], dim=-1)
        v_opacities = torch.where(geometry.opacities > 0.0, h / geometry.opacities, 0.0)
        if ctx.absgrad:
            means2d.absgrad = torch.stack(absolute, dim=-1)
        v_backgrounds = (v_images * (1.0 - alphas)).sum(dim=(1, 2)) if ctx.needs_input_grad[5] else None
        return None, v_means2d, v_conics, v_opacities, v_colors, v_backgrounds, None


def blend(geometry: BlendGeometry, means2d, conics, opacities, colors, backgrounds, absgrad: bool) -> tuple:
    """As `reference.blend`."""
    return _Blending.apply(geometry, means2d, conics, opacities, colors, backgrounds, absgrad)


class _FeatureBlending(torch.autograd.Function):
    """Features at all pixels, or at distinct row-major indices, as [C, P, D]; its gradient is the adjoint."""

    @staticmethod
    def forward(ctx: Any, features, geometry: BlendGeometry, indices: Tensor | None):
        output = _blend_rows(features, geometry, indices)
        ctx.geometry, ctx.indices = geometry, indices
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_output):  # type: ignore[override]
        sums = v_output.new_zeros(ctx.geometry.num_gaussians, v_output.shape[-1])
        _backproject_rows(v_output, ctx.geometry, ctx.indices, sums, sums.new_zeros(len(sums)))
        return sums, None, None


def _blend_rows(features: Tensor, geometry: BlendGeometry, indices: Tensor | None) -> Tensor:
    """Features [N, D], or of each camera [C, N, D], at all pixels or at `indices`, as [C, P, D]."""
    padded, channels = _pad_channels(features), features.shape[-1]
    pixel_rows, num_rows = _pixel_rows(geometry.settings, indices)
    output = features.new_empty(geometry.num_cameras, num_rows, channels)
    run_tasks(
        blending.blend_features, _count_bands(geometry), geometry.extra, _flat(padded), features.ndim == 3,
        padded.shape[-1], channels, pixel_rows, num_rows, _flat(output),
    )  # fmt: skip
    return output


def _backproject_rows(
    rows: Tensor, geometry: BlendGeometry, indices: Tensor | None, sums: Tensor, totals: Tensor
) -> None:
    """Adds rows [C, P, D] at all pixels or at `indices` to `sums` [N, D], and their weights to `totals` [N]."""
    tiles: CpuTiles = geometry.extra
    padded = _pad_channels(rows)
    stride, num_slots = padded.shape[-1], int(tiles.slot_starts[-1])
    partials, weight_partials = take_zeros("partials", num_slots * stride), take_zeros("weight_partials", num_slots)
    run_tasks(
        blending.backproject, _count_bands(geometry), tiles, _flat(padded), stride,
        *_pixel_rows(geometry.settings, indices), partials, weight_partials,
    )  # fmt: skip
    _collect(tiles, geometry.num_cameras, partials, weight_partials, sums, totals)


def _collect(
    tiles: CpuTiles, num_cameras: int, partials: np.ndarray, weight_partials: np.ndarray, sums: Tensor, totals: Tensor
) -> None:
    """Adds slots, flat, to the rows that they belong to; the slots of several cameras may share the rows."""
    stride = len(partials) // max(len(weight_partials), 1)
    run_tasks(
        blending.collect_sums, count_chunks(len(sums)), num_cameras, tiles.slot_starts, partials, weight_partials,
        stride, sums.shape[-1], *_flats(sums, totals),
    )  # fmt: skip


def _pixel_rows(settings: ProjectionSettings, indices: Tensor | None) -> tuple[np.ndarray, int]:
    """Which row holds each pixel (-1: none), and the number of rows."""
    num_pixels = settings.width * settings.height
    if indices is None:
        return np.arange(num_pixels, dtype=np.int32), num_pixels
    pixel_rows = np.full(num_pixels, -1, np.int32)
    pixel_rows[indices.numpy()] = np.arange(len(indices), dtype=np.int32)
    return pixel_rows, len(indices)


def _pad_channels(rows: Tensor, multiple: int = NUM_LANES) -> Tensor:
    """Rows whose last axis is filled up with zeros to a multiple."""
    missing = -rows.shape[-1] % multiple
    return functional.pad(rows.detach(), (0, missing)) if missing else rows


def _count_bands(geometry: BlendGeometry) -> int:
    """Tasks of the kernels that handle one band of tile rows at a time."""
    return geometry.num_cameras * geometry.extra.layout.num_bands


def _flat(tensor: Tensor) -> np.ndarray:
    """The numbers as one array: a view if the tensor is contiguous, so that kernels can write through it."""
    return tensor.detach().contiguous().view(-1).numpy()


def _flats(*tensors: Tensor) -> list[np.ndarray]:
    return [_flat(tensor) for tensor in tensors]
