"""Blending of features and colours on the CPU, its adjoint, and the gradients of colours; `reference.py` defines them.

Features: per block of 4x4 pixels and list of n Gaussians with weights W [n, 16], forward is W^T F, the adjoint is W G:
small matrix products that stay in registers. Both go by `UNROLL` = 4 rows of the result and 32 channels at a time, so
that the running sums are eight registers. Channels are padded to a multiple of 16 (`stride`); the tail of 16 has a loop
of its own.

Colours are blended as features are, one channel more being their opacity. Backward walks each block's list back to
front. With w = alpha T, q = color . v_image at a pixel, and B the sum of w q over everything behind plus T_final b,
where b = background . v_image - v_alpha:

    v_alpha_i = T_i q_i - B / (1 - alpha_i),    h = alpha_i v_alpha_i (zero where alpha was cut at 0.999)

and with d = centre - pixel the sums over the pixels of h, h dx, h dy, h dx^2, h dx dy, h dy^2 give the gradients of
opacity, centre and conic. Colours go by groups of four channels.

`pixel_rows` [H*W] says in which row of the output, or of the maps, each pixel is: -1 for pixels that nobody reads,
which cost nothing.
"""

import numpy as np

from fit3d_ns.rasterization.cpu.runtime import CHUNK, compiled
from fit3d_ns.rasterization.cpu.tiles import BLOCKS_PER_TILE
from fit3d_ns.rasterization.cpu.vectors import NUM_LANES, add_sums, broadcast, load, select, spread, store
from fit3d_ns.rasterization.cpu.weights import (
    PARAMS,
    UNROLL,
    block_centres,
    gather_tile,
    open_band,
    read_lanes,
    tile_corner,
    weigh_block,
)
from fit3d_ns.rasterization.reference import MAX_ALPHA

GROUP = 4
"""Channels of colours that are handled together."""
MOMENTS = 8
"""Sums per Gaussian before those of the colours: h, h dx, h dy, h dx^2, h dx dy, h dy^2, and the two of `absgrad`."""
_MAX_ALPHA = np.float32(MAX_ALPHA)


@compiled
def blend_features(task, tiles, features, is_per_camera, stride, channels, pixel_rows, num_rows, output):
    """Fills the rows of `output` [C*num_rows*channels] that lie in one band.

    `features` are [N*stride], or [C*N*stride] if each camera has its own.
    """
    layout, flatten_ids = tiles.layout, tiles.flatten_ids
    num_gaussians = 0 if is_per_camera else features.size // stride
    first, end, scratch = open_band(task, tiles, False)
    params, entries, lists, counts, open_lanes, hits, weights, alphas, befores, final = scratch
    lanes, rows = np.empty(NUM_LANES, np.int64), np.empty(NUM_LANES, np.int64)
    sums = np.empty(NUM_LANES * stride, np.float32)
    for tile in range(first, end):
        camera, left, top = tile_corner(tile, layout)
        n = -1
        for block in range(BLOCKS_PER_TILE):
            num_lanes = read_lanes(block, left, top, layout, pixel_rows, open_lanes, lanes, rows)
            if num_lanes == 0:
                continue
            if n < 0:
                n = gather_tile(tile, left, top, tiles, scratch)
            num_hits = weigh_block(block, params, lists, counts, open_lanes, hits, weights, alphas, befores, final)
            for j in range(-(-num_hits // UNROLL) * UNROLL):
                hits[j] = (flatten_ids[entries[hits[j]]] - camera * num_gaussians) * stride
            sums[: num_lanes * stride] = 0.0
            _blend_block(num_hits, hits, weights, num_lanes, lanes, features, stride, sums)
            for k in range(num_lanes):
                target = (camera * num_rows + rows[k]) * channels
                output[target : target + channels] = sums[k * stride : k * stride + channels]


@compiled
def _blend_block(num_hits, hits, weights, num_lanes, lanes, features, stride, sums):
    """Adds the Gaussians to the pixels of a block, rows of `sums`, four at a time.

    `hits` are offsets into `features`; the list was filled up with zero weights.
    """
    for j in range(0, num_hits, UNROLL):
        a, b, c, d = j * NUM_LANES, (j + 1) * NUM_LANES, (j + 2) * NUM_LANES, (j + 3) * NUM_LANES
        row_a, row_b, row_c, row_d = hits[j], hits[j + 1], hits[j + 2], hits[j + 3]
        channel = 0
        while channel + 2 * NUM_LANES <= stride:
            a0, a1 = load(features, row_a + channel), load(features, row_a + channel + NUM_LANES)
            b0, b1 = load(features, row_b + channel), load(features, row_b + channel + NUM_LANES)
            c0, c1 = load(features, row_c + channel), load(features, row_c + channel + NUM_LANES)
            d0, d1 = load(features, row_d + channel), load(features, row_d + channel + NUM_LANES)
            for k in range(num_lanes):
                lane, target = lanes[k], k * stride + channel
                w_a, w_b = spread(weights, a + lane), spread(weights, b + lane)
                w_c, w_d = spread(weights, c + lane), spread(weights, d + lane)
                sum0, sum1 = load(sums, target), load(sums, target + NUM_LANES)
                store(sums, target, sum0 + a0 * w_a + b0 * w_b + c0 * w_c + d0 * w_d)
                store(sums, target + NUM_LANES, sum1 + a1 * w_a + b1 * w_b + c1 * w_c + d1 * w_d)
            channel += 2 * NUM_LANES
        if channel < stride:
            a0, b0 = load(features, row_a + channel), load(features, row_b + channel)
            c0, d0 = load(features, row_c + channel), load(features, row_d + channel)
            for k in range(num_lanes):
                lane, target = lanes[k], k * stride + channel
                total = load(sums, target) + a0 * spread(weights, a + lane) + b0 * spread(weights, b + lane)
                store(sums, target, total + c0 * spread(weights, c + lane) + d0 * spread(weights, d + lane))


@compiled
def backproject(task, tiles, maps, stride, pixel_rows, num_rows, partials, weight_partials):
    """Adds W G of one band to its rows of `partials` [slots*stride], and the sums of W to `weight_partials` [slots].

    `maps` are [C*num_rows*stride].
    """
    layout, slots = tiles.layout, tiles.slots
    first, end, scratch = open_band(task, tiles, False)
    params, entries, lists, counts, open_lanes, hits, weights, alphas, befores, final = scratch
    lanes, rows = np.empty(NUM_LANES, np.int64), np.empty(NUM_LANES, np.int64)
    tile_sums, tile_weights = np.empty(entries.size * stride, np.float32), np.empty(entries.size, np.float32)
    for tile in range(first, end):
        camera, left, top = tile_corner(tile, layout)
        n = -1
        for block in range(BLOCKS_PER_TILE):
            num_lanes = read_lanes(block, left, top, layout, pixel_rows, open_lanes, lanes, rows)
            if num_lanes == 0:
                continue
            if n < 0:
                n = gather_tile(tile, left, top, tiles, scratch)
                tile_sums[: n * stride] = 0.0
                tile_weights[:n] = 0.0
            num_hits = weigh_block(block, params, lists, counts, open_lanes, hits, weights, alphas, befores, final)
            for j in range(num_hits):
                total = np.float32(0.0)
                for lane in range(NUM_LANES):
                    total += weights[j * NUM_LANES + lane]
                tile_weights[hits[j]] += total
            for lane in range(num_lanes):
                rows[lane] = (rows[lane] + camera * num_rows) * stride
            _backproject_block(num_hits, hits, weights, num_lanes, lanes, rows, maps, stride, tile_sums)
        for i in range(n):
            slot = slots[entries[i]]
            weight_partials[slot] += tile_weights[i]
            for channel in range(0, stride, NUM_LANES):
                target = slot * stride + channel
                store(partials, target, load(partials, target) + load(tile_sums, i * stride + channel))


@compiled
def _backproject_block(num_hits, hits, weights, num_lanes, lanes, rows, maps, stride, tile_sums):
    """Adds the pixels of a block to the rows of its Gaussians, four at a time.

    `rows` are offsets into `maps`; the list was filled up with zero weights.
    """
    for j in range(0, num_hits, UNROLL):
        a, b, c, d = j * NUM_LANES, (j + 1) * NUM_LANES, (j + 2) * NUM_LANES, (j + 3) * NUM_LANES
        row_a, row_b = hits[j] * stride, hits[j + 1] * stride
        row_c, row_d = hits[j + 2] * stride, hits[j + 3] * stride
        zero = broadcast(np.float32(0.0))
        channel = 0
        while channel + 2 * NUM_LANES <= stride:
            a0, a1, b0, b1, c0, c1, d0, d1 = zero, zero, zero, zero, zero, zero, zero, zero
            for k in range(num_lanes):
                g0, g1 = load(maps, rows[k] + channel), load(maps, rows[k] + channel + NUM_LANES)
                lane = lanes[k]
                a0, a1 = a0 + g0 * spread(weights, a + lane), a1 + g1 * spread(weights, a + lane)
                b0, b1 = b0 + g0 * spread(weights, b + lane), b1 + g1 * spread(weights, b + lane)
                c0, c1 = c0 + g0 * spread(weights, c + lane), c1 + g1 * spread(weights, c + lane)
                d0, d1 = d0 + g0 * spread(weights, d + lane), d1 + g1 * spread(weights, d + lane)
            for row, sum0, sum1 in ((row_a, a0, a1), (row_b, b0, b1), (row_c, c0, c1), (row_d, d0, d1)):
                target = row + channel
                store(tile_sums, target, load(tile_sums, target) + sum0)
                store(tile_sums, target + NUM_LANES, load(tile_sums, target + NUM_LANES) + sum1)
            channel += 2 * NUM_LANES
        if channel < stride:
            a0, b0, c0, d0 = zero, zero, zero, zero
            for k in range(num_lanes):
                g0, lane = load(maps, rows[k] + channel), lanes[k]
                a0, b0 = a0 + g0 * spread(weights, a + lane), b0 + g0 * spread(weights, b + lane)
                c0, d0 = c0 + g0 * spread(weights, c + lane), d0 + g0 * spread(weights, d + lane)
            store(tile_sums, row_a + channel, load(tile_sums, row_a + channel) + a0)
            store(tile_sums, row_b + channel, load(tile_sums, row_b + channel) + b0)
            store(tile_sums, row_c + channel, load(tile_sums, row_c + channel) + c0)
            store(tile_sums, row_d + channel, load(tile_sums, row_d + channel) + d0)


@compiled
def collect_sums(task, num_cameras, slot_starts, partials, weight_partials, stride, channels, sums, totals):
    """Adds each Gaussian's slots, over all cameras in their order, to `sums` [N*channels] and `totals` [N].

    What no camera sees is not touched: of a large scene, one view sees little.
    """
    row = np.empty(stride, np.float32)
    num_gaussians = totals.size
    for g in range(task * CHUNK, min((task + 1) * CHUNK, num_gaussians)):
        num_slots = 0
        for camera in range(num_cameras):
            index = camera * num_gaussians + g
            num_slots += slot_starts[index + 1] - slot_starts[index]
        if num_slots == 0:
            continue
        row[:] = 0.0
        total = np.float32(0.0)
        for camera in range(num_cameras):
            index = camera * num_gaussians + g
            for slot in range(slot_starts[index], slot_starts[index + 1]):
                total += weight_partials[slot]
                for channel in range(stride):
                    row[channel] += partials[slot * stride + channel]
        totals[g] += total
        for channel in range(channels):
            sums[g * channels + channel] += row[channel]


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
