"""Blend weights of one tile on the CPU, block by block: the part that every blending pass begins with.

`gather_tile` brings the Gaussians of a tile together and shares them out to the 16 blocks that they reach.
`weigh_block` walks one block's list front to back and leaves the Gaussians that were blended with their 16 weights.
`reference.py` defines the formulas. Nothing is kept from pass to pass: computing weights again costs less than storing.
"""

from typing import NamedTuple

import numpy as np

from fit3d_ns.rasterization.cpu.runtime import compiled
from fit3d_ns.rasterization.cpu.tiles import BLOCKS_PER_SIDE, BLOCKS_PER_TILE
from fit3d_ns.rasterization.cpu.vectors import (
    BLOCK_SIZE,
    NUM_LANES,
    any_lane,
    broadcast,
    exponential,
    load,
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
_ROWS, _COLUMNS = np.divmod(np.arange(NUM_LANES, dtype=np.float32), np.float32(BLOCK_SIZE))
"""Of each lane within its block."""


class TileScratch(NamedTuple):
    """Memory of one task, written again for each tile (the first four) and each block (the others)."""

    params: np.ndarray  # float32 [capacity * PARAMS]: numbers of the tile's i-th Gaussian
    entries: np.ndarray  # int64 [capacity]: its place in the tile lists
    lists: np.ndarray  # int32: `lists[b * capacity + j]`, j < `counts[b]`, is the j-th Gaussian i of block b
    counts: np.ndarray  # int64 [16]: Gaussians in the list of each block
    open_lanes: np.ndarray  # float32 [16]: 1 for the pixels of the block to blend and 0 for others
    hits: np.ndarray  # int64: the j-th Gaussian i that is blended in any pixel of the block
    weights: np.ndarray  # float32: from 16 j on, its weights; then zeros up to a multiple of `UNROLL` Gaussians
    alphas: np.ndarray  # float32: from 16 j on, its alphas; empty if they are not kept
    befores: np.ndarray  # float32: from 16 j on, the transmittances in front of it; empty if they are not kept
    final: np.ndarray  # float32 [16]: the transmittances that are left, 1 in pixels that are not blended


@compiled
def open_band(task, tiles, keeps_alphas):
    """First and end tile of a band of tile rows, and scratch for its tiles; tiles and tasks count over all cameras."""
    layout, tile_ends = tiles.layout, tiles.tile_ends
    camera, band = task // layout.num_bands, task % layout.num_bands
    first_row = camera * layout.tile_height + band * layout.band_rows
    end_row = camera * layout.tile_height + min((band + 1) * layout.band_rows, layout.tile_height)
    first, end = first_row * layout.tile_width, end_row * layout.tile_width
    capacity = 0
    for tile in range(first, end):
        capacity = max(capacity, tile_ends[tile] - (tile_ends[tile - 1] if tile > 0 else 0))
    num_kept = capacity * NUM_LANES if keeps_alphas else 0
    scratch = TileScratch(
        params=np.empty(capacity * PARAMS, np.float32),
        entries=np.empty(capacity, np.int64),
        lists=np.empty(capacity * BLOCKS_PER_TILE + 1, np.int32),
        counts=np.empty(BLOCKS_PER_TILE, np.int64),
        open_lanes=np.empty(NUM_LANES, np.float32),
        hits=np.empty(capacity + UNROLL, np.int64),
        weights=np.empty((capacity + UNROLL) * NUM_LANES, np.float32),
        alphas=np.empty(num_kept, np.float32),
        befores=np.empty(num_kept, np.float32),
        final=np.empty(NUM_LANES, np.float32),
    )
    return first, end, scratch


@compiled
def gather_tile(tile, left, top, tiles, scratch):
    """Copies the entries of a tile that reach any block to the front of scratch; returns their number."""
    params, entries, lists, counts = scratch.params, scratch.entries, scratch.lists, scratch.counts
    means2d, conics, opacities = tiles.means2d, tiles.conics, tiles.opacities
    flatten_ids, block_masks = tiles.flatten_ids, tiles.block_masks
    counts[:] = 0
    capacity = entries.size
    n = 0
    for entry in range(tiles.tile_ends[tile - 1] if tile > 0 else 0, tiles.tile_ends[tile]):
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
def weigh_block(block, params, lists, counts, open_lanes, hits, weights, alphas, befores, final):
    """Blend weights of one block; returns the number of Gaussians that are blended in any of its open pixels.

    It is called so often that handing it `TileScratch` as a whole would show; the arguments are its fields.
    """
    capacity, keeps_alphas = lists.size // BLOCKS_PER_TILE, alphas.size > 0
    columns, rows = block_centres(block)
    zero, one, max_alpha = broadcast(np.float32(0.0)), broadcast(np.float32(1.0)), broadcast(_MAX_ALPHA)
    # `live` falls to zero when a pixel is finished, and no test passes there any more; `left` keeps its last value.
    live, left = load(open_lanes, 0), one
    num_hits = 0
    for j in range(counts[block]):
        i = lists[block * capacity + j]
        p = i * PARAMS
        dx, dy = spread(params, p) - columns, spread(params, p + 1) - rows
        sigma = dx * (dx * spread(params, p + 2) + dy * spread(params, p + 3)) + dy * dy * spread(params, p + 4)
        alpha = exponential(zero - sigma) * spread(params, p + 5)
        alpha = select(alpha < max_alpha, alpha, max_alpha)
        counted = (alpha >= _MIN_ALPHA) & (sigma >= zero)
        after = live * (one - alpha)
        goes_on = after > _MIN_TRANSMITTANCE
        blended = counted & goes_on
        if any_lane(blended):
            hits[num_hits] = i
            store(weights, num_hits * NUM_LANES, select(blended, alpha * live, zero))
            if keeps_alphas:
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
def block_centres(block):
    """Columns and rows of the pixel centres of a block, from the tile's corner."""
    column, row = (block % BLOCKS_PER_SIDE) * BLOCK_SIZE, (block // BLOCKS_PER_SIDE) * BLOCK_SIZE
    return load(_COLUMNS, 0) + np.float32(column + 0.5), load(_ROWS, 0) + np.float32(row + 0.5)


@compiled
def read_lanes(block, left, top, layout, pixel_rows, open_lanes, lanes, rows):
    """Lists the pixels of a block that somebody reads, and closes the others; returns their number."""
    top += block // BLOCKS_PER_SIDE * BLOCK_SIZE
    left += block % BLOCKS_PER_SIDE * BLOCK_SIZE
    count = 0
    for lane in range(NUM_LANES):
        y, x = top + lane // BLOCK_SIZE, left + lane % BLOCK_SIZE
        row = pixel_rows[y * layout.width + x] if y < layout.height and x < layout.width else -1
        open_lanes[lane] = np.float32(1.0) if row >= 0 else np.float32(0.0)
        if row >= 0:
            lanes[count], rows[count] = lane, row
            count += 1
    return count


@compiled
def tile_corner(tile, layout):
    """Camera, and (left, top) in pixels of a tile counted over all cameras."""
    num_tiles = layout.tile_width * layout.tile_height
    within = tile % num_tiles
    return tile // num_tiles, within % layout.tile_width * TILE_SIZE, within // layout.tile_width * TILE_SIZE
