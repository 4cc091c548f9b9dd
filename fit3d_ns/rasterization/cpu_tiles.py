"""Tile lists on the CPU: counting, sorting and distributing, and which blocks of a tile each Gaussian can reach.

A tile of 16x16 pixels holds 4x4 *blocks* of 4x4 pixels. For each entry of the tile lists a bit mask says in which blocks
the Gaussian's alpha can be at least 1/255; there the ellipse sigma <= ln(255 opacity) crosses a pixel centre. The test is
exact up to a margin on the safe side, it is done once, and all passes skip the other blocks.

An entry also knows its *slot*: a row in which the sums of one Gaussian over one band of tile rows are kept. A band is
worked on by one thread, and a Gaussian's slots follow each other, so that adding them up has one fixed order.
"""

import math

import numpy as np

from fit3d_ns.rasterization.cpu_options import compiled
from fit3d_ns.rasterization.cpu_vectors import BLOCK_SIZE
from fit3d_ns.rasterization.projection import TILE_SIZE

BLOCKS_PER_SIDE = TILE_SIZE // BLOCK_SIZE
BLOCKS_PER_TILE = BLOCKS_PER_SIDE * BLOCKS_PER_SIDE
MAX_BANDS = 32
"""Bands per camera; more give more tasks to share out, and more slots to add up."""
ALL_BLOCKS = (1 << BLOCKS_PER_TILE) - 1
REACH_MARGIN = 0.01
"""Added to the squared reach of the ellipse relatively, and to its extent in pixels, against rounding."""

_RADIX_BITS = 11
_RADIX_PASSES = 3


def rows_per_band(tile_height: int) -> int:
    """Tile rows in each band of an image, except for the last."""
    return max(1, math.ceil(tile_height / MAX_BANDS))


@compiled
def count_entries(radii, means2d, tile_width, tile_height, band_rows, tile_spans, tiles_per_gauss, tile_ends):
    """Counts the tiles of each Gaussian and the entries of each tile.

    Fills `tile_spans` [C*N, 4] (first column, end column, first row, end row), `tiles_per_gauss` [C*N] and `tile_ends`
    [C*tiles] (running totals of the entries). Returns the number of bands that all Gaussians touch together.
    """
    num_gaussians = radii.shape[1]
    num_tiles = tile_width * tile_height
    num_slots = 0
    scale = np.float32(1.0 / TILE_SIZE)
    tile_ends[:] = 0
    for camera in range(radii.shape[0]):
        for gaussian in range(num_gaussians):
            index = camera * num_gaussians + gaussian
            tile_spans[index] = 0
            tiles_per_gauss[index] = 0
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
    total = 0
    for tile in range(tile_ends.size):
        total += tile_ends[tile]
        tile_ends[tile] = total
    return num_slots


@compiled
def order_by_depth(depths, tiles_per_gauss, order, keys, spare_order, spare_keys):
    """Indices of the Gaussians that enter a tile, nearest first and by index where depths are equal; returns how many.

    `depths` are the bits of positive float32 numbers [C*N] as uint32, which have the order of the numbers: a radix sort.
    """
    count = 0
    for index in range(depths.size):
        if tiles_per_gauss[index] > 0:
            order[count], keys[count] = index, depths[index]
            count += 1
    mask = np.uint32((1 << _RADIX_BITS) - 1)
    for step in range(_RADIX_PASSES):
        shift = np.uint32(step * _RADIX_BITS)
        starts = np.zeros((1 << _RADIX_BITS) + 1, np.int64)
        for i in range(count):
            starts[((keys[i] >> shift) & mask) + 1] += 1
        for digit in range(1 << _RADIX_BITS):
            starts[digit + 1] += starts[digit]
        for i in range(count):
            digit = (keys[i] >> shift) & mask
            place = starts[digit]
            starts[digit] += 1
            spare_order[place], spare_keys[place] = order[i], keys[i]
        order, spare_order = spare_order, order
        keys, spare_keys = spare_keys, keys
    # After an odd number of passes the two names have changed places: this writes into the caller's `order`.
    for i in range(count):
        spare_order[i] = order[i]
    return count


@compiled
def fill_entries(
    order, count, num_gaussians, depths, tile_spans, tile_width, tile_height, band_rows, tile_ends, slot_starts,
    flatten_ids, isect_ids, slots, cursors,
):  # fmt: skip
    """Puts each Gaussian into its tiles, nearest first, and numbers the slots; `cursors` is scratch [C*tiles]."""
    num_tiles = tile_width * tile_height
    tile_bits = 0
    while (1 << tile_bits) <= num_tiles:
        tile_bits += 1
    for tile in range(tile_ends.size):
        cursors[tile] = tile_ends[tile - 1] if tile > 0 else 0
    num_slots = 0
    for index in range(tile_spans.shape[0]):
        slot_starts[index] = num_slots
        if tile_spans[index, 1] > tile_spans[index, 0] and tile_spans[index, 3] > tile_spans[index, 2]:
            num_slots += (tile_spans[index, 3] - 1) // band_rows - tile_spans[index, 2] // band_rows + 1
    slot_starts[tile_spans.shape[0]] = num_slots
    for i in range(count):
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


@compiled
def mark_blocks(task, tile_width, tile_height, tile_ends, flatten_ids, means2d, conics, opacities, block_masks):
    """Fills the block masks of one row of tiles; `task` counts the tile rows of all cameras."""
    row = task % tile_height
    for column in range(tile_width):
        tile = task * tile_width + column
        for entry in range(tile_ends[tile - 1] if tile > 0 else 0, tile_ends[tile]):
            g = flatten_ids[entry]
            block_masks[entry] = _reached_blocks(
                means2d[2 * g] - TILE_SIZE * column, means2d[2 * g + 1] - TILE_SIZE * row,
                conics[3 * g], conics[3 * g + 1], conics[3 * g + 2], opacities[g],
            )  # fmt: skip


@compiled
def _reached_blocks(x, y, xx, xy, yy, opacity):
    """Bit 4 * block row + block column is set where the ellipse around (x, y), in pixels of the tile, crosses a block.

    Within a strip of rows the right end of the ellipse is furthest out at the row of its rightmost point, or at the
    strip's row next to that; likewise on the left.
    """
    visible = 255.0 * np.float64(opacity)
    if not visible >= 1.0:
        return np.uint16(0)
    a, b, c = np.float64(xx), np.float64(xy), np.float64(yy)
    determinant = a * c - b * b
    if not (determinant > 0.0 and a > 0.0 and c > 0.0):
        return np.uint16(ALL_BLOCKS)
    # Points with a dx^2 + 2 b dx dy + c dy^2 <= level, where level is 2 sigma.
    level = 2.0 * math.log(visible) * (1.0 + REACH_MARGIN) + REACH_MARGIN
    half_width = math.sqrt(level * c / determinant)
    half_height = math.sqrt(level * a / determinant)
    row_of_rightmost = -b / c * half_width
    mask = 0
    for strip in range(BLOCKS_PER_SIDE):
        low = max(strip * BLOCK_SIZE + 0.5 - REACH_MARGIN - y, -half_height)
        high = min(strip * BLOCK_SIZE + BLOCK_SIZE - 0.5 + REACH_MARGIN - y, half_height)
        if low > high:
            continue
        at_right = min(max(row_of_rightmost, low), high)
        at_left = min(max(-row_of_rightmost, low), high)
        right = x + (-b * at_right + math.sqrt(max(a * level - determinant * at_right * at_right, 0.0))) / a
        left = x + (-b * at_left - math.sqrt(max(a * level - determinant * at_left * at_left, 0.0))) / a
        # Block j holds pixel centres from 4 j + 0.5 to 4 j + 3.5.
        first = max(np.ceil((left - REACH_MARGIN - BLOCK_SIZE + 0.5) / BLOCK_SIZE), 0.0)
        last = min(np.floor((right + REACH_MARGIN - 0.5) / BLOCK_SIZE), BLOCKS_PER_SIDE - 1.0)
        for block in range(int(first), int(last) + 1):
            mask |= 1 << (strip * BLOCKS_PER_SIDE + block)
    return np.uint16(mask)
