"""PLY files: the vertices as a structured numpy array, and point clouds made of them. SPZ files as such arrays.

Text and both binary byte orders are read, by plyfile; little-endian binary is written.

Compressed PLY, as SuperSplat, splat-transform and gsplat (`ply_compressed`) write it, has 16 bytes a Gaussian.

    element chunk    one for 256 Gaussians: min_x .. max_z, min_scale_x .. max_scale_z, perhaps min_r .. max_b, floats
    element vertex   packed_position (11, 10, 11 bits), packed_rotation (2, 10, 10, 10), packed_scale (11, 10, 11) and
                     packed_color (8, 8, 8, 8), uint32, highest bits first
    element sh       perhaps: f_rest_0 ..., uchar

Positions, logarithms of scales and colours lie between the bounds of their chunk, opacity between 0 and 1. Of a
quaternion wxyz, the largest number is left out and the first two bits say which; the others are within 1/sqrt(2).

SPZ, Niantic's compact file of Gaussians: a header and tables, one after the other, little-endian, in gzip. In version 4
each table is a zstd frame, and their packed and unpacked sizes (uint64) stand where a uint32 after the header says.

header      "NGSP", version, number (uint32); degree of harmonics, binary places of positions, flags, 0 (bytes)
positions   3 signed integers of 24 bits
opacities   1 byte, of 0 to 1
colours     3 bytes, of 0.5 + 0.15 f_dc between 0 and 1
scales      3 bytes, 16 (logarithm + 10)
rotations   version 2: 3 bytes, x, y, z of -1 to 1, w is positive; 3 and 4: 32 bits, the highest 2 say which of
            xyzw is largest and left out, then for each of the others a sign and 9 bits of 0 to 1/sqrt(2)
harmonics   bytes, 128 (value + 1), of each coefficient red, green, blue
"""

import gzip
import struct
import zlib
from collections.abc import Mapping
from io import BufferedReader
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import zstandard
from plyfile import PlyData, PlyElement

from fit3d_ns.data.frames import PointCloud, create_points
from fit3d_ns.utils.errors import first_line
from fit3d_ns.utils.files import refuse_lfs_pointer, write_atomically
from fit3d_ns.utils.progress import notice

_GREY = 128
_COLOURS = (
    ("red", "green", "blue"),
    ("diffuse_red", "diffuse_green", "diffuse_blue"),
    ("r", "g", "b"),
    ("f_dc_0", "f_dc_1", "f_dc_2"),
)
"""Names of colours in point clouds, and last in Gaussians."""
SH_CONSTANT = 0.28209479177387814
"""Value of the first spherical harmonic: colour = 0.5 + SH_CONSTANT * f_dc."""
_MAX_16_BITS = 65535


def read_ply_elements(path: Path) -> dict[str, np.ndarray]:
    """Reads the elements by name, each as a 1-D structured array with one field per property.

    Elements of plain numbers in binary files are memory-mapped. ValueError where the file is missing, cut short, not a
    PLY, or has no vertices (`vertex`) of plain numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"PLY file {path} is missing; restore it or name another one.")
    refuse_lfs_pointer(path)
    try:
        elements = {element.name: element.data for element in PlyData.read(str(path))}
    except Exception as error:  # Of any type: a damaged header asks numpy for arrays that cannot be.
        raise ValueError(
            f"{path} is not a PLY file, damaged or cut short ({first_line(error)}); copy it again."
        ) from error
    if "vertex" not in elements or elements["vertex"].dtype.hasobject:
        raise ValueError(f"{path} has no element `vertex` of plain numbers; make the file again.")
    return elements


def write_ply_vertices(vertices: np.ndarray, path: Path) -> None:
    """Writes a structured array as little-endian binary PLY, atomically."""
    with write_atomically(Path(path)) as temporary:
        PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<").write(str(temporary))


def read_ply_points(path: Path) -> PointCloud | None:
    """Reads positions, float64, and colours of a PLY file's vertices; None where it has no vertices.

    Colours are `red green blue`, `diffuse_red ...` or `r g b`: 8 bits, 16 bits where one is beyond 255, or floats in
    [0, 1]; or those of Gaussians (`f_dc_0..2`). Points without colours are grey, those without a finite position are
    left out.
    """
    vertices = read_ply_elements(path)["vertex"]
    names = vertices.dtype.names or ()
    if not {"x", "y", "z"} <= set(names):
        raise ValueError(f"{path} has no vertex properties x, y, z but {', '.join(names)}.")
    xyz = np.stack([vertices[axis].astype(np.float64) for axis in "xyz"], axis=-1)
    found = next((group for group in _COLOURS if set(group) <= set(names)), None)
    if found is not None:
        values = np.stack([vertices[name] for name in found], axis=-1)
        rgb = _to_bytes(np.clip(0.5 + SH_CONSTANT * values, 0, 1) if found == _COLOURS[-1] else values)
    else:
        rgb = np.full(xyz.shape, _GREY, dtype=np.uint8)
    return create_points(xyz, rgb, path)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    finite = np.nan_to_num(values.astype(np.float64), nan=0.0)
    if finite.size and values.dtype.kind == "f" and 0.0 <= finite.min() and finite.max() <= 1.0:
        finite = finite * 255.0
    elif finite.size and 255.0 < finite.max() <= _MAX_16_BITS:
        finite = finite * (255.0 / _MAX_16_BITS)
    return np.clip(np.round(finite), 0, 255).astype(np.uint8)


_CHUNK = 256
_SH_RANGE = 8.0
"""Width of the range, about 0, in which harmonics are stored."""


def unpack_splats(elements: Mapping[str, np.ndarray], path: Path) -> np.ndarray:
    """The vertices as an uncompressed PLY has them: a structured array with float32 properties.

    ValueError where chunks or packed properties are missing.
    """
    vertices, chunks, harmonics = elements["vertex"], elements.get("chunk"), elements.get("sh", np.empty(0))
    names = ("packed_position", "packed_rotation", "packed_scale", "packed_color")
    lacking = [name for name in names if name not in (vertices.dtype.names or ())]
    if lacking or chunks is None or len(chunks) * _CHUNK < len(vertices):
        what = ", ".join(lacking) or "a chunk for each 256 vertices"
        raise ValueError(f"{path} is a compressed PLY without {what}; export it again.")
    if "sh" in elements and len(harmonics) != len(vertices):
        raise ValueError(f"{path} has {len(harmonics)} rows of harmonics for {len(vertices)} Gaussians; export again.")
    position, rotation, scale, colour = (vertices[name].astype(np.uint32) for name in names)
    owner = np.arange(len(vertices)) // _CHUNK

    def spread(shares: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
        try:
            low, high = (np.stack([chunks[f"{end}_{axis}"] for axis in axes], axis=1)[owner] for end in ("min", "max"))
        except ValueError as error:
            raise ValueError(f"{path} is a compressed PLY whose chunks lack bounds ({error}); export again.") from error
        return low + shares * (high - low)

    red_to_alpha = _split(colour, (8, 8, 8, 8))
    colours = red_to_alpha[:, :3]
    if "min_r" in (chunks.dtype.names or ()):
        colours = spread(colours, ("r", "g", "b"))
    others = (_split(rotation, (2, 10, 10, 10))[:, 1:] - 0.5) * np.sqrt(2.0)
    with np.errstate(divide="ignore"):
        logits = np.log(red_to_alpha[:, 3]) - np.log1p(-red_to_alpha[:, 3])
    tables = {
        ("x", "y", "z"): spread(_split(position, (11, 10, 11)), ("x", "y", "z")),
        ("f_dc_0", "f_dc_1", "f_dc_2"): (colours - 0.5) / SH_CONSTANT,
        ("opacity",): logits[:, None],
        ("scale_0", "scale_1", "scale_2"): spread(_split(scale, (11, 10, 11)), ("scale_x", "scale_y", "scale_z")),
        ("rot_0", "rot_1", "rot_2", "rot_3"): insert_largest(others, rotation >> np.uint32(30)),
    }
    for name in harmonics.dtype.names or ():
        # Bytes name the middles of 256 equal parts; the outermost two the ends.
        values = harmonics[name]
        shares = np.where(values == 0, 0.0, np.where(values == 255, 1.0, (values + 0.5) / 256.0))
        tables[(name,)] = (shares[:, None] - 0.5) * _SH_RANGE
    return create_vertices(tables)


def create_vertices(tables: Mapping[tuple[str, ...], np.ndarray]) -> np.ndarray:
    """A structured array of float32 properties, of tables [n, names]."""
    kinds = [(name, "<f4") for names in tables for name in names]
    return np.concatenate([*tables.values()], axis=1).astype("<f4").view(kinds)[:, 0]


def insert_largest(others: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Unit quaternions from three of their numbers and the place of the fourth, the largest, which is positive."""
    largest = np.sqrt(np.clip(1.0 - np.square(others).sum(axis=1), 0.0, None))
    quats = np.empty((len(others), 4))
    for place in range(4):
        rows = which == place
        quats[rows] = np.insert(others[rows], place, largest[rows], axis=1)
    return quats


def _split(packed: np.ndarray, bits: tuple[int, ...]) -> np.ndarray:
    """The numbers in a word, highest bits first, each as a share of its greatest value."""
    shift, columns = sum(bits), []
    for size in bits:
        shift -= size
        largest = 2**size - 1
        columns.append(((packed >> np.uint32(shift)) & np.uint32(largest)) / largest)
    return np.stack(columns, axis=1)


_SPZ_HEADER = struct.Struct("<4s2I4B")
_ROTATION_BYTES = {2: 3, 3: 4, 4: 4}
_LARGEST_RATIO = 1032
"""gzip makes nothing smaller than by this factor."""
_SPZ_COEFFICIENTS = (0, 3, 8, 15)
_SPZ_NAMES = tuple("x y z opacity f_dc_0 f_dc_1 f_dc_2 scale_0 scale_1 scale_2 rot_1 rot_2 rot_3 rot_0".split())


def read_spz(path: Path) -> np.ndarray:
    """The Gaussians as an uncompressed PLY has them: a structured array with float32 properties.

    ValueError where the file is missing, damaged, cut short, or of another version than 2 to 4.
    """
    convert = f"make a PLY with `npx @playcanvas/splat-transform {path.name} splat.ply`"
    if not path.is_file():
        raise ValueError(f"SPZ file {path} is missing; restore it or name another one.")
    try:
        with path.open("rb") as plain, gzip.open(plain) if plain.peek(2)[:2] == b"\x1f\x8b" else plain as file:
            magic, version, num, degree, places, flags, num_tables = _SPZ_HEADER.unpack(file.read(_SPZ_HEADER.size))
            if magic != b"NGSP" or version not in _ROTATION_BYTES or degree >= len(_SPZ_COEFFICIENTS) or places > 23:
                raise ValueError(f"{path} is SPZ version {version} with degree {degree}, which is not read; {convert}.")
            sizes = (9, 1, 3, 3, _ROTATION_BYTES[version], 3 * _SPZ_COEFFICIENTS[degree])
            if 9 * num > _LARGEST_RATIO * path.stat().st_size:
                raise ValueError(f"{path} is cut short: fewer than {num} Gaussians; copy it again.")
            num_bytes = num * sum(sizes)
            content = _unpack_tables(file, num_tables, num_bytes) if version == 4 else file.read(num_bytes)
            if len(content) != num_bytes:
                raise ValueError(f"{path} is cut short: fewer than {num} Gaussians; copy it again.")
            while version < 4 and file.read(2**20):
                pass  # Only the end of the file says whether it is whole.
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, struct.error) as error:
        raise ValueError(f"{path} is not SPZ of version 2 to 4, or damaged ({error}); {convert}.") from error
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
        {_SPZ_NAMES: np.concatenate(values, axis=1), tuple(f"f_rest_{index}" for index in range(sizes[5])): rest}
    )


def _unpack_tables(file: gzip.GzipFile | BufferedReader, num_tables: int, num_bytes: int) -> bytes:
    """The tables of version 4, joined; nothing where they have not this length together."""
    file.seek(*struct.unpack("<I", file.read(4)))
    sizes = struct.unpack(f"<{2 * num_tables}Q", file.read(16 * num_tables))
    if sum(sizes[1::2]) != num_bytes:
        return b""
    content, ends = file.read(), accumulate(sizes[::2], initial=0)
    frames = [zstandard.ZstdDecompressor().stream_reader(content[start:end]) for start, end in pairwise(ends)]
    return b"".join(frame.read(size) for frame, size in zip(frames, sizes[1::2], strict=True))


def _unpack_rotations(rotations: np.ndarray) -> np.ndarray:
    """Quaternions xyzw."""
    if rotations.shape[1] == _ROTATION_BYTES[2]:
        xyz = rotations / 127.5 - 1.0
        return np.concatenate([xyz, np.sqrt(np.clip(1.0 - np.square(xyz).sum(axis=1), 0, None))[:, None]], axis=1)
    packed = np.ascontiguousarray(rotations).view("<u4")[:, 0]
    parts = np.stack([packed >> shift & 1023 for shift in (20, 10, 0)], axis=1).astype(np.int64)
    others = np.where(parts > 511, -1.0, 1.0) * (parts & 511) / 511.0 * np.sqrt(0.5)
    return insert_largest(others, packed >> 30)
