"""The CUDA backend: gsplat's kernels (1.4, also 1.5), one projection and one tile sort for colour and features.

Shapes and meaning are as in `reference`. This is the only file of the rasterizer that imports gsplat. Gradients are
those of gsplat's own autograd functions; they come from atomic additions and do not repeat to the bit.
"""

import warnings
from collections.abc import Callable, Iterator

import torch
from gsplat import fully_fused_projection, isect_offset_encode, isect_tiles, rasterize_to_pixels, spherical_harmonics
from torch import Tensor
from torch.nn import functional

from fit3d_ns.rasterization.projection import TILE_SIZE, ProjectedGaussians, ProjectionSettings
from fit3d_ns.rasterization.reference import COLOR_OFFSET, BlendGeometry, TileLists

COMPILED_CHANNELS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513)
"""Channel counts that gsplat 1.4 has kernels for; other counts are padded by it."""
MOST_CHANNELS = 65
"""The most channels of one call: beyond, the kernels spill registers, and 128 channels take five times as long as 64 in
each direction (H100)."""
BYTES_PER_PIXEL = 28
"""Shared memory of gsplat's backward kernel per pixel of a tile, in addition to 4 bytes per channel."""
DEFAULT_SHARED_BYTES = 48 * 1024
"""What every card grants to one block of threads."""


def project_gaussians(
    means: Tensor, quats: Tensor, scales: Tensor, viewmats: Tensor, Ks: Tensor, settings: ProjectionSettings
) -> ProjectedGaussians:
    """As `projection.project_gaussians`; rows of radius 0 hold whatever was in memory, as with gsplat itself."""
    radii, means2d, depths, conics, compensations = fully_fused_projection(
        means, None, quats, scales, viewmats, Ks, settings.width, settings.height, settings.eps2d, settings.near_plane,
        settings.far_plane, settings.radius_clip, packed=False, calc_compensations=settings.antialiased,
    )  # fmt: skip
    return ProjectedGaussians(radii, means2d, depths, conics, compensations)


def evaluate_harmonics(
    sh_degree: int, means: Tensor, viewmats: Tensor, coefficients: Tensor, is_drawn: Tensor
) -> Tensor:
    """As `reference.evaluate_harmonics`."""
    # `inv` would wait for the card to find out whether they can be inverted.
    centres = torch.linalg.inv_ex(viewmats).inverse[:, :3, 3]
    directions = means[None] - centres[:, None]
    coefficients = coefficients.expand(len(viewmats), -1, -1, -1)
    # Beyond 1.5, gsplat takes coefficients without an axis of cameras only.
    colors = spherical_harmonics(
        sh_degree, directions.flatten(0, 1), coefficients.flatten(0, 1), masks=is_drawn.flatten()
    )
    return torch.where(is_drawn[..., None], colors.view_as(directions) + COLOR_OFFSET, 0.0).clamp(min=0.0)


def build_geometry(projected: ProjectedGaussians, opacities: Tensor, settings: ProjectionSettings) -> BlendGeometry:
    """As `reference.build_geometry`."""
    means2d = projected.means2d.detach().contiguous()
    conics, opacities = projected.conics.detach().contiguous(), opacities.detach().contiguous()
    radii, depths, size = projected.radii, projected.depths.detach(), (settings.tile_width, settings.tile_height)
    tiles_per_gauss, isect_ids, flatten_ids = isect_tiles(means2d, radii, depths, TILE_SIZE, *size)
    isect_offsets = isect_offset_encode(isect_ids, len(means2d), *size)
    tiles = TileLists(tiles_per_gauss, isect_ids, flatten_ids, isect_offsets)
    return BlendGeometry(means2d, conics, opacities, tiles, settings)


def blend(
    geometry: BlendGeometry,
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    colors: Tensor,
    backgrounds: Tensor | None,
    absgrad: bool,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.blend`; with `masks`, images and alphas of tiles that are False hold whatever was in memory.

    The gradient by alpha goes through the first chunk of channels alone. With several chunks `absgrad` is that of the
    last one: gsplat overwrites it.
    """
    parts = list(split_channels(colors.shape[-1], channels_per_call(means2d.device)))
    if absgrad and len(parts) > 1:
        last = parts[-1].stop - parts[-1].start
        warnings.warn(
            f"absgrad covers only the last {last} of {colors.shape[-1]} channels, which take {len(parts)} calls.",
            stacklevel=2,
        )
    images, alphas = [], []
    for part in parts:
        image, alpha = rasterize_to_pixels(
            means2d, conics, _pad(colors[..., part]), opacities, geometry.settings.width, geometry.settings.height,
            TILE_SIZE, geometry.tiles.isect_offsets, geometry.tiles.flatten_ids,
            backgrounds=None if backgrounds is None else _pad(backgrounds[..., part]), masks=masks, absgrad=absgrad,
        )  # fmt: skip
        count = part.stop - part.start
        images.append(image if image.shape[-1] == count else image[..., :count])
        alphas.append(alpha)
    return images[0] if len(images) == 1 else torch.cat(images, dim=-1), alphas[0]


def blend_features(features: Tensor, geometry: BlendGeometry, pixels: Tensor | None) -> Tensor:
    """As `reference.blend_features`; with `pixels`, tiles without any are skipped."""
    masks = None
    if pixels is not None:
        size = (geometry.settings.tile_height, geometry.settings.tile_width)
        is_read = torch.zeros(size, dtype=torch.bool, device=features.device)
        is_read[pixels[:, 0].long() // TILE_SIZE, pixels[:, 1].long() // TILE_SIZE] = True
        masks = is_read.expand(geometry.num_cameras, -1, -1)
    # The gradient of `expand` is a sum over cameras, a pass over memory that one camera can do without.
    colors = features[None] if geometry.num_cameras == 1 else features.expand(geometry.num_cameras, -1, -1)
    fixed = (geometry.means2d, geometry.conics, geometry.opacities)
    image, _ = blend(geometry, *fixed, colors, backgrounds=None, absgrad=False, masks=masks)
    return image if pixels is None else image[:, pixels[:, 0].long(), pixels[:, 1].long()]


def backproject(feature_maps: Tensor, geometry: BlendGeometry, sums: Tensor, totals: Tensor) -> None:
    """As `reference.backproject`: the gradient of blended features, with the weights as one more channel of ones."""
    channels = feature_maps.shape[-1]
    for part in split_channels(channels + 1, channels_per_call(feature_maps.device)):
        maps = feature_maps[..., part]
        if part.stop > channels:
            maps = torch.cat([maps, torch.ones_like(feature_maps[..., :1])], dim=-1)
        leaf = maps.new_zeros(geometry.num_gaussians, maps.shape[-1], requires_grad=True)
        with torch.enable_grad():
            blended = blend_features(leaf, geometry, None)
        (found,) = torch.autograd.grad(blended, leaf, maps)
        if part.stop > channels:
            totals += found[:, -1]
            found = found[:, :-1]
        sums[:, part] += found


def add_normal(features: Tensor, geometry: BlendGeometry, weigh: Callable[[Tensor], Tensor], sums: Tensor) -> None:
    """As `interface.add_normal`: one blending serves both directions, since the adjoint is its gradient."""
    for part in split_channels(features.shape[-1], channels_per_call(features.device)):
        leaf = features[:, part].detach().requires_grad_()
        with torch.enable_grad():
            blended = blend_features(leaf, geometry, None)
        (found,) = torch.autograd.grad(blended, leaf, weigh(blended.detach()))
        sums[:, part] += found


def split_channels(count: int, most: int) -> Iterator[slice]:
    """Channels 0 to `count` in as few calls of at most `most` as pad none by more than an eighth of what it takes."""
    first = 0
    while first < count:
        left = count - first
        taken = max(compiled for compiled in COMPILED_CHANNELS if compiled <= min(left, most))
        if any(left <= compiled <= most and compiled - left <= compiled / 8 for compiled in COMPILED_CHANNELS):
            taken = left
        yield slice(first, first + taken)
        first += taken


def _pad(values: Tensor) -> Tensor:
    """Zeros up to the next compiled channel count; beyond 1.5, gsplat no longer adds them."""
    count = values.shape[-1]
    missing = next(compiled for compiled in COMPILED_CHANNELS if compiled >= count) - count
    return functional.pad(values, (0, missing)) if missing else values


def channels_per_call(device: torch.device) -> int:
    """The most channels that pay in one call: their backward pass fits into the shared memory that the card grants."""
    properties = torch.cuda.get_device_properties(device)
    fitting = largest_channel_count(getattr(properties, "shared_memory_per_block_optin", DEFAULT_SHARED_BYTES))
    return min(fitting, MOST_CHANNELS)


def largest_channel_count(shared_bytes: int) -> int:
    """The largest compiled channel count whose tiles take at most `shared_bytes`; at least 1."""
    tile_pixels = TILE_SIZE * TILE_SIZE
    fitting = [count for count in COMPILED_CHANNELS if tile_pixels * (BYTES_PER_PIXEL + 4 * count) <= shared_bytes]
    return max(fitting, default=1)
