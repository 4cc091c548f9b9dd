"""The gradients of blended colours on the CPU; `reference.py` is the definition.

Colours are blended by `features.py`, as features are. Backward walks each block's list back to front. With
w = alpha T, q = color . v_image at a pixel, and B the sum of w q over everything behind plus T_final b, where
b = background . v_image - v_alpha:

    v_alpha_i = T_i q_i - B / (1 - alpha_i),    h = alpha_i v_alpha_i (zero where alpha was cut at 0.999)

and with d = centre - pixel the sums over the pixels of h, h dx, h dy, h dx^2, h dx dy, h dy^2 give the gradients of
opacity, centre and conic. Colours go by groups of four channels.
"""

import numpy as np

from fit3d_ns.rasterization.cpu.runtime import compiled
from fit3d_ns.rasterization.cpu.tiles import BLOCKS_PER_TILE
from fit3d_ns.rasterization.cpu.vectors import NUM_LANES, add_sums, broadcast, load, select, spread
from fit3d_ns.rasterization.cpu.weights import (
    PARAMS,
    block_centres,
    gather_tile,
    open_band,
    read_lanes,
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
def blend_backward(task, tiles, colors, channels, pixel_rows, v_images, behind, absgrad, partials):
    """Adds the sums of one band to its rows of `partials` [slots, MOMENTS + channels], flat; `behind` is b."""
    layout, slots = tiles.layout, tiles.slots
    num_pixels = layout.width * layout.height
    first, end, scratch = open_band(task, tiles, True)
    params, entries, lists, counts, open_lanes, hits, weights, alphas, befores, final = scratch
    stride = MOMENTS + channels
    tile_colors, tile_sums = np.empty(entries.size * channels, np.float32), np.empty(entries.size * stride, np.float32)
    gradients = np.empty((channels + 1) * NUM_LANES, np.float32)
    lanes, rows = np.empty(NUM_LANES, np.int64), np.empty(NUM_LANES, np.int64)
    for tile in range(first, end):
        camera, left, top = tile_corner(tile, layout)
        n = gather_tile(tile, left, top, tiles, scratch)
        for i in range(n):
            g = tiles.flatten_ids[entries[i]]
            for channel in range(channels):
                tile_colors[i * channels + channel] = colors[g * channels + channel]
        tile_sums[: n * stride] = 0.0
        for block in range(BLOCKS_PER_TILE):
            num_lanes = read_lanes(block, left, top, layout, pixel_rows, open_lanes, lanes, rows)
            if num_lanes == 0:
                continue
            num_hits = weigh_block(block, params, lists, counts, open_lanes, hits, weights, alphas, befores, final)
            if num_hits == 0:
                continue
            gradients[:] = 0.0
            for k in range(num_lanes):
                lane, pixel = lanes[k], camera * num_pixels + rows[k]
                for channel in range(channels):
                    gradients[channel * NUM_LANES + lane] = v_images[pixel * channels + channel]
                # In the last row: what is behind everything.
                gradients[channels * NUM_LANES + lane] = behind[pixel] * final[lane]
            _add_block(
                block, num_hits, hits, params, weights, alphas, befores, tile_colors, channels, gradients, absgrad,
                tile_sums,
            )  # fmt: skip
        for i in range(n):
            for k in range(stride):
                partials[slots[entries[i]] * stride + k] += tile_sums[i * stride + k]


@compiled
def _add_block(
    block, num_hits, hits, params, weights, alphas, befores, tile_colors, channels, gradients, absgrad, tile_sums
):
    """Adds one block's sums to the rows [MOMENTS + channels] of its Gaussians, back to front."""
    columns, rows = block_centres(block)
    zero, one = broadcast(np.float32(0.0)), broadcast(np.float32(1.0))
    stride = MOMENTS + channels
    behind = load(gradients, channels * NUM_LANES)
    for j in range(num_hits - 1, -1, -1):
        i = hits[j]
        p, row = i * PARAMS, i * stride
        weight, alpha = load(weights, j * NUM_LANES), load(alphas, j * NUM_LANES)
        q = zero
        for channel in range(0, channels, GROUP):
            c, at = i * channels + channel, channel * NUM_LANES
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
