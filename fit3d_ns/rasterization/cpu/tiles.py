"""Tile lists on the CPU: counting, sorting and distributing, and which blocks of a tile each Gaussian can reach.

A tile of 16x16 pixels holds 4x4 *blocks* of 4x4 pixels. For each entry of the tile lists a mask says in which blocks
the Gaussian's alpha can be at least 1/255; there the ellipse sigma <= ln(255 opacity) crosses it. The test is
exact up to a margin on the safe side, it is done once, and all passes skip the other blocks.

An entry also knows its *slot*: a row in which the sums of one Gaussian over one band of tile rows are kept. A band is
worked on by one thread, and a Gaussian's slots follow each other, so that adding them up has one fixed order.
"""

import math
from typing import NamedTuple

import numpy as np

from fit3d_ns.rasterization.cpu.runtime import CHUNK, compiled
from fit3d_ns.rasterization.cpu.vectors import BLOCK_SIZE
from fit3d_ns.rasterization.projection import TILE_SIZE, ProjectionSettings

BLOCKS_PER_SIDE = TILE_SIZE // BLOCK_SIZE
BLOCKS_PER_TILE = BLOCKS_PER_SIDE * BLOCKS_PER_SIDE
MAX_BANDS = 32
"""Bands per camera; more give more tasks to share out, and more slots to add up."""
ALL_BLOCKS = (1 << BLOCKS_PER_TILE) - 1
REACH_MARGIN = 0.01
"""Added to the squared reach of the ellipse relatively, and to its extent in pixels, against rounding."""


class TileLayout(NamedTuple):
    """How the images of one call are cut into tiles, and these into bands of tile rows."""

    width: int  # pixels
    height: int
    tile_width: int  # tiles in one row
    tile_height: int  # tiles in one column
    band_rows: int  # tile rows in each band, except for the last
    num_bands: int  # bands per camera


class CpuTiles(NamedTuple):
    """What the blending kernels read: the tile lists, and the Gaussians in them as flat arrays."""

    layout: TileLayout
    tile_ends: np.ndarray  # int64 [C*tiles]: where each tile's entries end and those of the next begin
    flatten_ids: np.ndarray  # int32 [entries]: camera * N + Gaussian
    block_masks: np.ndarray  # uint16 [entries]: which of the tile's 16 blocks the Gaussian can reach
    slots: np.ndarray  # int32 [entries]: row of partial sums that the entry adds to
    slot_starts: np.ndarray  # int64 [C*N + 1]: the slots of each Gaussian
    means2d: np.ndarray  # float32 [C*N*2]
    conics: np.ndarray  # float32 [C*N*3]
    opacities: np.ndarray  # float32 [C*N]


def create_layout(settings: ProjectionSettings) -> TileLayout:
    """The layout of images of this size."""
    tile_width, tile_height = settings.tile_width, settings.tile_height
    band_rows = math.ceil(tile_height / MAX_BANDS)
    num_bands = math.ceil(tile_height / band_rows)
    return TileLayout(settings.width, settings.height, tile_width, tile_height, band_rows, num_bands)


@compiled
def count_entries(radii, means2d, layout):
    """Counts the tiles and slots of each Gaussian and the entries of each tile.

    Returns tile spans [C*N, 4] (first column, end column, first row, end row), tiles per Gaussian [C*N], and running
    totals: of the slots before each Gaussian, `slot_starts` [C*N + 1], and of the entries, `tile_ends` [C*tiles].
    """
    num_gaussians = radii.shape[1]
    tile_width, tile_height, band_rows = layout.tile_width, layout.tile_height, layout.band_rows
    num_tiles = tile_width * tile_height
    num_slots = 0
    scale = np.float32(1.0 / TILE_SIZE)
    tile_spans, tiles_per_gauss = np.zeros((radii.size, 4), np.int32), np.zeros(radii.size, np.int32)
    slot_starts, tile_ends = np.empty(radii.size + 1, np.int64), np.zeros(radii.shape[0] * num_tiles, np.int64)
    for camera in range(radii.shape[0]):
        for gaussian in range(num_gaussians):
            index = camera * num_gaussians + gaussian
            slot_starts[index] = num_slots
            if radii[camera, gaussian] <= 0:
                continue
            reach = np.float32(radii[camera, gaussian]) * scale
            x, y = means2d[camera, gaussian, 0] * scale, means2d[camera, gaussian, 1] * scale
            left = min(max(np.floor(x - reach), 0.0), np.float32(tile_width))
            right = min(max(np.ceil(x + reach), 0.0), np.float32(tile_width))
            top = min(max(np.floor(y - reach), 0.0), np.float32(tile_height))
            bottom = min(max(np.ceil(y + reach), 0.0), np.float32(tile_height))
            tile_spans[index, 0], tile_spans[index, 1] = np.int32(left), np.int32(right)
            tile_spans[index, 2], tile_spans[index, 3] = np.int32(top), np.int32(bottom)
            tiles_per_gauss[index] = np.int32((right - left) * (bottom - top))
            if tiles_per_gauss[index] > 0:
                num_slots += (tile_spans[index, 3] - 1) // band_rows - tile_spans[index, 2] // band_rows + 1
            for row in range(tile_spans[index, 2], tile_spans[index, 3]):
                for column in range(tile_spans[index, 0], tile_spans[index, 1]):
                    tile_ends[camera * num_tiles + row * tile_width + column] += 1
    slot_starts[radii.size] = num_slots
    total = 0
    for tile in range(tile_ends.size):
        total += tile_ends[tile]
        tile_ends[tile] = total
    return tile_spans, tiles_per_gauss, slot_starts, tile_ends


@compiled
def fill_entries(order, num_gaussians, depths, layout, tile_bits, tile_spans, slot_starts, tile_ends):
    """Puts each Gaussian into its tiles, nearest first; returns `flatten_ids`, `isect_ids` and `slots`."""
    tile_width, band_rows = layout.tile_width, layout.band_rows
    cursors = np.zeros_like(tile_ends)
    cursors[1:] = tile_ends[:-1]
    num_entries = tile_ends[-1]
    flatten_ids, slots = np.empty(num_entries, np.int32), np.empty(num_entries, np.int32)
    isect_ids = np.empty(num_entries, np.int64)
    num_tiles = tile_width * layout.tile_height
    for i in range(order.size):
        index = order[i]
        camera = np.int64(index // num_gaussians)
        first_band = tile_spans[index, 2] // band_rows
        for row in range(tile_spans[index, 2], tile_spans[index, 3]):
            slot = slot_starts[index] + row // band_rows - first_band
            for column in range(tile_spans[index, 0], tile_spans[index, 1]):
                tile = np.int64(row * tile_width + column)
                place = cursors[camera * num_tiles + tile]
                cursors[camera * num_tiles + tile] += 1
                flatten_ids[place] = index
                isect_ids[place] = (((camera << tile_bits) | tile) << 32) | np.int64(depths[index])
                slots[place] = slot
    return flatten_ids, isect_ids, slots


@compiled
def measure_reach(task, conics, opacities, tiles_per_gauss, reach):
    """Fills `reach` [C*N, 6] of one chunk with what `_reached_blocks` needs of each Gaussian's ellipse.

    The ellipse holds the points with xx dx^2 + 2 xy dx dy + yy dy^2 <= level = 2 ln(255 opacity): half its height, the
    row of its rightmost point, xx level, the determinant, the slope -xy / xx of its middle line, and 1 / xx. The height
    is -1 if there are no such points, and NaN if the conic is no ellipse in float32; then all blocks are reached.
    """
    for g in range(task * CHUNK, min((task + 1) * CHUNK, opacities.size)):
        visible = 255.0 * np.float64(opacities[g])
        if tiles_per_gauss[g] == 0 or not visible >= 1.0:
            reach[g, 0] = -1.0
            continue
        xx, xy, yy = np.float64(conics[3 * g]), np.float64(conics[3 * g + 1]), np.float64(conics[3 * g + 2])
        determinant = xx * yy - xy * xy
        if not (determinant > 0.0 and xx > 0.0 and yy > 0.0):
            reach[g, 0] = np.nan
            continue
        level = 2.0 * math.log(visible) * (1.0 + REACH_MARGIN) + REACH_MARGIN
        reach[g, 0] = math.sqrt(level * xx / determinant)
        reach[g, 1] = -xy / yy * math.sqrt(level * yy / determinant)
        reach[g, 2], reach[g, 3] = xx * level, determinant
        reach[g, 4], reach[g, 5] = -xy / xx, 1.0 / xx


@compiled
def mark_blocks(task, layout, tile_ends, flatten_ids, means2d, reach, block_masks):
    """Fills the block masks of one row of tiles; `task` counts the tile rows of all cameras."""
    row = task % layout.tile_height
    for column in range(layout.tile_width):
        tile = task * layout.tile_width + column
        for entry in range(tile_ends[tile - 1] if tile > 0 else 0, tile_ends[tile]):
            g = flatten_ids[entry]
            x, y = means2d[2 * g] - TILE_SIZE * column, means2d[2 * g + 1] - TILE_SIZE * row
            block_masks[entry] = _reached_blocks(x, y, reach, g)


@compiled
def _reached_blocks(x, y, reach, g):
    """Bit 4 * block row + block column is set where the ellipse around (x, y), in pixels of the tile, crosses a block.

    Within a strip of rows the right end of the ellipse is furthest out at the row of its rightmost point, or at the
    strip's row next to that; likewise on the left.
    """
    half_height, rightmost, xx_level, determinant = reach[g, 0], reach[g, 1], reach[g, 2], reach[g, 3]
    if half_height != half_height:
        return np.uint16(ALL_BLOCKS)
    slope, inverse = reach[g, 4], reach[g, 5]
    mask = 0
    for strip in range(BLOCKS_PER_SIDE):
        low = max(strip * BLOCK_SIZE + 0.5 - REACH_MARGIN - y, -half_height)
        high = min(strip * BLOCK_SIZE + BLOCK_SIZE - 0.5 + REACH_MARGIN - y, half_height)
        if low > high:
            continue
        at_right, at_left = min(max(rightmost, low), high), min(max(-rightmost, low), high)
        right = x + slope * at_right + inverse * math.sqrt(max(xx_level - determinant * at_right * at_right, 0.0))
        left = x + slope * at_left - inverse * math.sqrt(max(xx_level - determinant * at_left * at_left, 0.0))
        # Block j holds pixel centres from 4 j + 0.5 to 4 j + 3.5.
        first = max(np.ceil((left - REACH_MARGIN + 0.5) * (1.0 / BLOCK_SIZE) - 1.0), 0.0)
        last = min(np.floor((right + REACH_MARGIN - 0.5) * (1.0 / BLOCK_SIZE)), BLOCKS_PER_SIDE - 1.0)
        if first <= last:
            bits = ((2 << int(last)) - 1) & ~((1 << int(first)) - 1)
            mask |= bits << (strip * BLOCKS_PER_SIDE)
    return np.uint16(mask)
