"""Blending of many-channel features on the CPU and its adjoint, as small matrix products that stay in registers.

Per block of 4x4 pixels and list of n Gaussians with weights W [n, 16]: forward is W^T F, the adjoint is W G. Both go by
`UNROLL` = 4 rows of the result and 32 channels at a time, so that the running sums are eight registers. Channels are
padded to a multiple of 16 (`stride`); the tail of 16 has a loop of its own.

`pixel_rows` [H*W] says in which row of the output, or of the maps, each pixel is: -1 for pixels that nobody reads,
which cost nothing.
"""

import numpy as np

from fit3d_ns.rasterization.cpu.runtime import CHUNK, compiled
from fit3d_ns.rasterization.cpu.tiles import BLOCKS_PER_TILE
from fit3d_ns.rasterization.cpu.vectors import NUM_LANES, broadcast, load, spread, store
from fit3d_ns.rasterization.cpu.weights import UNROLL, gather_tile, open_band, read_lanes, tile_corner, weigh_block


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
