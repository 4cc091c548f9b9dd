"""SPZ, Niantic's compact file of Gaussians: gzip around a header and tables, one after the other, little-endian.

header      "NGSP", version, number (uint32); degree of harmonics, binary places of positions, flags, 0 (bytes)
positions   3 signed integers of 24 bits
opacities   1 byte, of 0 to 1
colours     3 bytes, of 0.5 + 0.15 f_dc between 0 and 1
scales      3 bytes, 16 (logarithm + 10)
rotations   version 2: 3 bytes, x, y, z of -1 to 1, w is positive; version 3: 32 bits, the highest 2 say which of
            xyzw is largest and left out, then for each of the others a sign and 9 bits of 0 to 1/sqrt(2)
harmonics   bytes, 128 (value + 1), of each coefficient red, green, blue
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from fit3d_ns.data.ply import create_vertices, insert_largest
from fit3d_ns.utils.progress import notice

_HEADER = struct.Struct("<4s2I4B")
_ROTATION_BYTES = {2: 3, 3: 4}
_COEFFICIENTS = (0, 3, 8, 15)
_NAMES = tuple("x y z opacity f_dc_0 f_dc_1 f_dc_2 scale_0 scale_1 scale_2 rot_1 rot_2 rot_3 rot_0".split())


def read_spz(path: Path) -> np.ndarray:
    """The Gaussians as an uncompressed PLY has them: a structured array with float32 properties.

    ValueError where the file is missing, damaged, cut short, or of another version than 2 and 3.
    """
    convert = f"make a PLY with `npx @playcanvas/splat-transform {path.name} splat.ply`"
    if not path.is_file():
        raise ValueError(f"SPZ file {path} is missing; restore it or name another one.")
    try:
        with gzip.open(path) as file:
            magic, version, num, degree, places, flags, _ = _HEADER.unpack(file.read(_HEADER.size))
            if magic != b"NGSP" or version not in _ROTATION_BYTES or degree >= len(_COEFFICIENTS) or places > 23:
                raise ValueError(f"{path} is SPZ version {version} with degree {degree}, which is not read; {convert}.")
            sizes = (9, 1, 3, 3, _ROTATION_BYTES[version], 3 * _COEFFICIENTS[degree])
            # gzip makes nothing more than 1032 times smaller.
            content = file.read(min(num * sum(sizes), 1032 * path.stat().st_size))
            if len(content) < num * sum(sizes):
                raise ValueError(f"{path} is cut short: fewer than {num} Gaussians; copy it again.")
            while file.read(2**20):
                pass  # Only the end of the file says whether it is whole.
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"{path} is not SPZ of version 2 or 3, or damaged ({error}); {convert}.") from error
    if flags & 1:
        notice(f"{path} was trained antialiased: add --rasterize-mode antialiased.")
    parts = np.split(np.frombuffer(content, np.uint8), num * np.cumsum(sizes)[:-1])
    tables = [part.reshape(num, size) for part, size in zip(parts, sizes, strict=True)]
    # Three bytes each become the upper ones of four, whose sign then counts.
    words = np.zeros((num, 3, 4), np.uint8)
    words[..., 1:] = tables[0].reshape(num, 3, 3)
    with np.errstate(divide="ignore"):
        logits = np.log(tables[1] / 255.0) - np.log(1.0 - tables[1] / 255.0)
    positions, colours = (words.view("<i4")[..., 0] >> 8) / 2.0**places, (tables[2] / 255.0 - 0.5) / 0.15
    # Coefficient by coefficient -> all of red first.
    rest = (tables[5].reshape(num, sizes[5] // 3, 3).transpose(0, 2, 1).reshape(num, sizes[5]) - 128.0) / 128.0
    values = (positions, logits, colours, tables[3] / 16.0 - 10.0, _unpack_rotations(tables[4]))
    return create_vertices(
        {_NAMES: np.concatenate(values, axis=1), tuple(f"f_rest_{index}" for index in range(sizes[5])): rest}
    )


def _unpack_rotations(rotations: np.ndarray) -> np.ndarray:
    """Quaternions xyzw."""
    if rotations.shape[1] == _ROTATION_BYTES[2]:
        xyz = rotations / 127.5 - 1.0
        return np.concatenate([xyz, np.sqrt(np.clip(1.0 - np.square(xyz).sum(axis=1), 0, None))[:, None]], axis=1)
    packed = np.ascontiguousarray(rotations).view("<u4")[:, 0]
    parts = np.stack([packed >> shift & 1023 for shift in (20, 10, 0)], axis=1).astype(np.int64)
    others = np.where(parts > 511, -1.0, 1.0) * (parts & 511) / 511.0 * np.sqrt(0.5)
    return insert_largest(others, packed >> 30)
