"""Blend weights of one tile on the CPU, block by block: the part that every blending pass begins with.

`gather_tile` brings the Gaussians of a tile together and shares them out to the 16 blocks that they reach.
`weigh_block` walks one block's list front to back and leaves the Gaussians that were blended with their 16 weights.
`reference.py` defines the formulas. Nothing is kept from pass to pass: computing weights again costs less than storing.
"""

import numpy as np

from fit3d_ns.rasterization.cpu.options import compiled
from fit3d_ns.rasterization.cpu.tiles import BLOCKS_PER_SIDE, BLOCKS_PER_TILE
from fit3d_ns.rasterization.cpu.vectors import (
    BLOCK_SIZE,
    NUM_LANES,
    any_lane,
    block_columns,
    block_rows,
    both,
    broadcast,
    exponential,
    load,
    minimum,
    select,
    spread,
    store,
)
from fit3d_ns.rasterization.projection import TILE_SIZE
from fit3d_ns.rasterization.reference import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE

PARAMS = 8
"""Numbers per Gaussian in `params`: centre x, y from the tile's corner; xx / 2, xy, yy / 2 of the conic; opacity."""
UNROLL = 4
"""Lists of weights are filled up with zeros to a multiple of this."""

_MAX_ALPHA, _MIN_ALPHA = np.float32(MAX_ALPHA), np.float32(MIN_ALPHA)
_MIN_TRANSMITTANCE = np.float32(MIN_TRANSMITTANCE)


@compiled
def longest_tile(first_tile, end_tile, tile_ends):
    """The largest number of entries of the tiles, which decides how much scratch a task takes."""
    longest = 0
    for tile in range(first_tile, end_tile):
        longest = max(longest, tile_ends[tile] - (tile_ends[tile - 1] if tile > 0 else 0))
    return longest


@compiled
def gather_tile(
    start, end, left, top, flatten_ids, block_masks, means2d, conics, opacities, params, entries, lists, counts
):
    """Copies the entries of a tile that reach any block to the front of scratch; returns their number.

    `entries[i]` is the place in the tile lists, `params` as above; `lists[b * capacity + j]`, j < `counts[b]`, are the
    numbers i of block b, front to back, with capacity `entries.size`.
    """
    counts[:] = 0
    capacity = entries.size
    n = 0
    for entry in range(start, end):
        mask = np.uint32(block_masks[entry])
        if mask == 0:
            continue
        g = flatten_ids[entry]
        entries[n] = entry
        params[n * PARAMS] = means2d[2 * g] - np.float32(left)
        params[n * PARAMS + 1] = means2d[2 * g + 1] - np.float32(top)
        params[n * PARAMS + 2] = np.float32(0.5) * conics[3 * g]
        params[n * PARAMS + 3] = conics[3 * g + 1]
        params[n * PARAMS + 4] = np.float32(0.5) * conics[3 * g + 2]
        params[n * PARAMS + 5] = opacities[g]
        for block in range(BLOCKS_PER_TILE):
            # Written in any case, kept only where the bit is set: cheaper than a branch.
            lists[block * capacity + counts[block]] = n
            counts[block] += (mask >> np.uint32(block)) & np.uint32(1)
        n += 1
    return n


@compiled
def weigh_block(block, params, lists, counts, capacity, open_lanes, hits, weights, alphas, befores, final, keeps):
    """Blend weights of one block; returns the number of Gaussians that are blended in any of its pixels.

    Fills for the j-th of them `hits[j]` (its number in the tile) and `weights[16 j:]`, then zero weights up to a
    multiple of `UNROLL`; with `keeps` also its `alphas` and the transmittances `befores` it. `open_lanes` [16] is 1 for
    pixels to blend and 0 for others; `final` gets the transmittances that are left (1 in other pixels).
    """
    columns = block_columns() + np.float32((block % BLOCKS_PER_SIDE) * BLOCK_SIZE + 0.5)
    rows = block_rows() + np.float32((block // BLOCKS_PER_SIDE) * BLOCK_SIZE + 0.5)
    zero, one = broadcast(np.float32(0.0)), broadcast(np.float32(1.0))
    # `live` falls to zero when a pixel is finished, and no test passes there any more; `left` keeps its last value.
    live, left = load(open_lanes, 0), one
    num_hits = 0
    for j in range(counts[block]):
        i = lists[block * capacity + j]
        p = i * PARAMS
        dx, dy = spread(params, p) - columns, spread(params, p + 1) - rows
        sigma = dx * (dx * spread(params, p + 2) + dy * spread(params, p + 3)) + dy * dy * spread(params, p + 4)
        alpha = minimum(exponential(zero - sigma) * spread(params, p + 5), broadcast(_MAX_ALPHA))
        counted = both(alpha >= _MIN_ALPHA, sigma >= zero)
        after = live * (one - alpha)
        goes_on = after > _MIN_TRANSMITTANCE
        blended = both(counted, goes_on)
        if any_lane(blended):
            hits[num_hits] = i
            store(weights, num_hits * NUM_LANES, select(blended, alpha * live, zero))
            if keeps:
                store(alphas, num_hits * NUM_LANES, select(blended, alpha, zero))
                store(befores, num_hits * NUM_LANES, live)
            num_hits += 1
        left = select(blended, after, left)
        live = select(counted, select(goes_on, after, zero), live)
        if not any_lane(live > zero):
            break
    for j in range(num_hits, -(-num_hits // UNROLL) * UNROLL):
        hits[j] = hits[0]
        store(weights, j * NUM_LANES, zero)
    store(final, 0, left)
    return num_hits


@compiled
def open_block(block, left, top, width, height, open_lanes):
    """Marks the pixels of a block that lie on the image; returns whether there are any."""
    found = False
    for lane in range(NUM_LANES):
        row = top + (block // BLOCKS_PER_SIDE) * BLOCK_SIZE + lane // BLOCK_SIZE
        column = left + (block % BLOCKS_PER_SIDE) * BLOCK_SIZE + lane % BLOCK_SIZE
        is_open = row < height and column < width
        open_lanes[lane] = np.float32(1.0) if is_open else np.float32(0.0)
        found = found or is_open
    return found


@compiled
def pixel_index(block, lane, left, top, width):
    """Row-major index on the image of one pixel of a block."""
    row = top + (block // BLOCKS_PER_SIDE) * BLOCK_SIZE + lane // BLOCK_SIZE
    return row * width + left + (block % BLOCKS_PER_SIDE) * BLOCK_SIZE + lane % BLOCK_SIZE


@compiled
def tile_corner(tile, tile_width, tile_height):
    """Camera, and (left, top) in pixels of a tile counted over all cameras."""
    within = tile % (tile_width * tile_height)
    return tile // (tile_width * tile_height), within % tile_width * TILE_SIZE, within // tile_width * TILE_SIZE


@compiled
def tile_range(task, num_bands, band_rows, tile_width, tile_height):
    """First and end tile, counted over all cameras, of a band of tile rows; tasks count the bands of all cameras."""
    camera, band = task // num_bands, task % num_bands
    first = camera * tile_height + band * band_rows
    end = camera * tile_height + min((band + 1) * band_rows, tile_height)
    return first * tile_width, end * tile_width
