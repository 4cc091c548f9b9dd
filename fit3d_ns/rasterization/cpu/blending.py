"""The gradients of blended colours on the CPU; `reference.py` is the definition.

Colours are blended by `features.py`, as features are. Backward walks each block's list back to front. With
w = alpha T, q = color . v_image at a pixel, and B the sum of w q over everything behind plus T_final b, where
b = background . v_image - v_alpha:

    v_alpha_i = T_i q_i - B / (1 - alpha_i),    h = alpha_i v_alpha_i (zero where alpha was cut at 0.999)

and with d = centre - pixel the sums over the pixels of h, h dx, h dy, h dx^2, h dx dy, h dy^2 give the gradients of
opacity, centre and conic. Colours go by groups of four, padded with zeros.
"""

import numpy as np

from fit3d_ns.rasterization.cpu.runtime import CHUNK, compiled
from fit3d_ns.rasterization.cpu.tiles import BLOCKS_PER_TILE
from fit3d_ns.rasterization.cpu.vectors import NUM_LANES, add_sums, broadcast, load, select, spread
from fit3d_ns.rasterization.cpu.weights import (
    PARAMS,
    block_centres,
    gather_tile,
    open_band,
    open_block,
    pixel_index,
    tile_corner,
    weigh_block,
)
from fit3d_ns.rasterization.reference import MAX_ALPHA

GROUP = 4
"""Channels that are handled together."""
MOMENTS = 8
"""Sums per Gaussian before those of the colours: h, h dx, h dy, h dx^2, h dx dy, h dy^2, and the two of `absgrad`."""

_MAX_ALPHA = np.float32(MAX_ALPHA)


@compiled
def blend_backward(task, tiles, colors, channels, v_images, behind, absgrad, partials):
    """Adds the sums of one band to its rows of `partials` [slots, MOMENTS + padded channels], flat; `behind` is b."""
    layout, slots = tiles.layout, tiles.slots
    num_pixels = layout.width * layout.height
    first, end, scratch = open_band(task, tiles, True)
    params, entries, lists, counts, open_lanes, hits, weights, alphas, befores, final = scratch
    padded = -(-channels // GROUP) * GROUP
    stride = MOMENTS + padded
    tile_colors, tile_sums = np.zeros(entries.size * padded, np.float32), np.empty(entries.size * stride, np.float32)
    gradients = np.zeros((padded + 1) * NUM_LANES, np.float32)
    for tile in range(first, end):
        camera, left, top = tile_corner(tile, layout)
        n = gather_tile(tile, left, top, tiles, scratch)
        _gather_colors(n, entries, tiles.flatten_ids, colors, channels, padded, tile_colors)
        tile_sums[: n * stride] = 0.0
        for block in range(BLOCKS_PER_TILE):
            if not open_block(block, left, top, layout, open_lanes):
                continue
            num_hits = weigh_block(block, params, lists, counts, open_lanes, hits, weights, alphas, befores, final)
            if num_hits == 0:
                continue
            for lane in range(NUM_LANES):
                if open_lanes[lane] == 0.0:
                    for channel in range(padded + 1):
                        gradients[channel * NUM_LANES + lane] = 0.0
                    continue
                pixel = camera * num_pixels + pixel_index(block, lane, left, top, layout)
                for channel in range(channels):
                    gradients[channel * NUM_LANES + lane] = v_images[pixel * channels + channel]
                # In the last row: what is behind everything.
                gradients[padded * NUM_LANES + lane] = behind[pixel] * final[lane]
            _add_block(
                block, num_hits, hits, params, weights, alphas, befores, tile_colors, padded, gradients, absgrad,
                tile_sums,
            )  # fmt: skip
        for i in range(n):
            for k in range(stride):
                partials[slots[entries[i]] * stride + k] += tile_sums[i * stride + k]


@compiled
def _add_block(
    block, num_hits, hits, params, weights, alphas, befores, tile_colors, padded, gradients, absgrad, tile_sums
):
    """Adds one block's sums to the rows [MOMENTS + padded] of its Gaussians, back to front."""
    columns, rows = block_centres(block)
    zero, one = broadcast(np.float32(0.0)), broadcast(np.float32(1.0))
    stride = MOMENTS + padded
    behind = load(gradients, padded * NUM_LANES)
    for j in range(num_hits - 1, -1, -1):
        i = hits[j]
        p, row = i * PARAMS, i * stride
        weight, alpha = load(weights, j * NUM_LANES), load(alphas, j * NUM_LANES)
        q = zero
        for channel in range(0, padded, GROUP):
            c, at = i * padded + channel, channel * NUM_LANES
            v_red, v_green = load(gradients, at), load(gradients, at + NUM_LANES)
            v_blue, v_more = load(gradients, at + 2 * NUM_LANES), load(gradients, at + 3 * NUM_LANES)
            q = q + v_red * spread(tile_colors, c) + v_green * spread(tile_colors, c + 1)
            q = q + v_blue * spread(tile_colors, c + 2) + v_more * spread(tile_colors, c + 3)
            add_sums(
                tile_sums, row + MOMENTS + channel, (weight * v_red, weight * v_green, weight * v_blue, weight * v_more)
            )
        v_alpha = load(befores, j * NUM_LANES) * q - behind / (one - alpha)
        behind = behind + weight * q
        h = select(alpha < _MAX_ALPHA, alpha * v_alpha, zero)
        dx, dy = spread(params, p) - columns, spread(params, p + 1) - rows
        h_dx, h_dy = h * dx, h * dy
        abs_x, abs_y = zero, zero
        if absgrad:
            xy = params[p + 3]
            abs_x = h_dx * (params[p + 2] * np.float32(2.0)) + h_dy * xy
            abs_y = h_dx * xy + h_dy * (params[p + 4] * np.float32(2.0))
            abs_x, abs_y = select(abs_x < zero, zero - abs_x, abs_x), select(abs_y < zero, zero - abs_y, abs_y)
        add_sums(tile_sums, row, (h, h_dx, h_dy, h_dx * dx, h_dx * dy, h_dy * dy, abs_x, abs_y))


@compiled
def collect_gradients(task, tiles, partials, channels, v_means2d, v_conics, v_opacities, v_colors, v_absolute):
    """Adds up each Gaussian's slots, in their order, and turns the sums into gradients; `v_absolute` may be empty."""
    slot_starts, conics, opacities = tiles.slot_starts, tiles.conics, tiles.opacities
    padded = -(-channels // GROUP) * GROUP
    stride = MOMENTS + padded
    sums = np.empty(stride, np.float32)
    for g in range(task * CHUNK, min((task + 1) * CHUNK, opacities.size)):
        sums[:] = 0.0
        for slot in range(slot_starts[g], slot_starts[g + 1]):
            for k in range(stride):
                sums[k] += partials[slot * stride + k]
        xx, xy, yy = conics[3 * g], conics[3 * g + 1], conics[3 * g + 2]
        # sigma falls where alpha rises: v_sigma = -h.
        v_means2d[2 * g] = -(xx * sums[1] + xy * sums[2])
        v_means2d[2 * g + 1] = -(xy * sums[1] + yy * sums[2])
        v_conics[3 * g] = np.float32(-0.5) * sums[3]
        v_conics[3 * g + 1] = -sums[4]
        v_conics[3 * g + 2] = np.float32(-0.5) * sums[5]
        v_opacities[g] = sums[0] / opacities[g] if opacities[g] > 0.0 else np.float32(0.0)
        if v_absolute.size > 0:
            v_absolute[2 * g], v_absolute[2 * g + 1] = sums[6], sums[7]
        for channel in range(channels):
            v_colors[g * channels + channel] = sums[MOMENTS + channel]


@compiled
def _gather_colors(n, entries, flatten_ids, colors, channels, padded, tile_colors):
    for i in range(n):
        g = flatten_ids[entries[i]]
        for channel in range(channels):
            tile_colors[i * padded + channel] = colors[g * channels + channel]
