"""Seed points in and out: PLY (ascii, binary) and COLMAP's points3D (text, binary).

Read without open3d, which fails to import on machines without libusb.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data.frames import PointCloud
from fit3d_ns.utils.files import write_atomically

_PLY_TYPES = {
    **{"char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2"},
    **{"ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4"},
    **{"float": "f4", "float32": "f4", "double": "f8", "float64": "f8"},
}
_PLY_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": "="}
_GREY = 128


@dataclass(frozen=True)
class _PlyHeader:
    order: str
    """numpy's byte order, or `=` for text."""
    num_vertices: int
    properties: list[tuple[str, str]]
    """Name and numpy type of each vertex property."""
    size: int
    """Bytes before the first vertex."""


def read_ply_points(path: Path) -> PointCloud:
    """Reads positions and, where there are any, `red green blue` of a PLY file's vertices; grey otherwise.

    Colours are 8-bit, or floats of [0, 1].

    Raises:
        ValueError: The file is missing, is no PLY, is cut short, or has no finite positions.
    """
    vertices = read_ply_vertices(path)
    names = vertices.dtype.names or ()
    if not {"x", "y", "z"} <= set(names):
        raise ValueError(f"{path} has no vertex properties x, y, z but {', '.join(names) or 'none'}.")
    xyz = np.stack([vertices[axis].astype(np.float32) for axis in "xyz"], axis=-1)
    if {"red", "green", "blue"} <= set(names):
        rgb = np.stack([_to_bytes(vertices[colour]) for colour in ("red", "green", "blue")], axis=-1)
    else:
        rgb = np.full(xyz.shape, _GREY, dtype=np.uint8)
    return _finite_points(xyz, rgb, path)


def read_ply_vertices(path: Path) -> np.ndarray:
    """Reads all vertex properties of a PLY file as a structured array; the vertices must be the first element.

    Raises:
        ValueError: The file is missing, is no PLY, has lists in its vertices, or is cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Point cloud {path} is missing; restore it or take it out of the camera file.")
    with open(path, "rb") as file:
        content = file.read()
    header = _parse_ply_header(content, path)
    dtype = np.dtype([(name, header.order + kind) for name, kind in header.properties])
    if header.order == "=":
        return _parse_ascii_vertices(content[header.size :], header, dtype, path)
    if len(content) - header.size < header.num_vertices * dtype.itemsize:
        raise ValueError(f"Point cloud {path} is cut short: fewer than {header.num_vertices} vertices; copy it again.")
    return np.frombuffer(content, dtype, header.num_vertices, header.size)


def write_ply_points(points: PointCloud, path: Path) -> None:
    """Writes a binary PLY with float positions and 8-bit colours, atomically."""
    dtype = np.dtype([*[(axis, "<f4") for axis in "xyz"], *[(colour, "u1") for colour in ("red", "green", "blue")]])
    vertices = np.empty(len(points.xyz), dtype)
    for index, name in enumerate(dtype.names or ()):
        source = points.xyz if index < 3 else points.rgb
        vertices[name] = source[:, index % 3].numpy()
    kinds = ["float"] * 3 + ["uchar"] * 3
    properties = "".join(f"property {kind} {name}\n" for kind, name in zip(kinds, dtype.names or (), strict=True))
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\n{properties}end_header\n"
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        file.write(header.encode("ascii"))
        file.write(vertices.tobytes())


def find_colmap_points(folder: Path) -> Path | None:
    """The folder's `points3D.bin` or `points3D.txt`, the binary one first as COLMAP does; None if there is neither."""
    candidates = [Path(folder) / "points3D.bin", Path(folder) / "points3D.txt"]
    return next((path for path in candidates if path.is_file()), None)


def read_colmap_points(path: Path) -> PointCloud:
    """Reads a `points3D.txt` or `points3D.bin` alone, in COLMAP's own world.

    Raises:
        ValueError: The file is missing, malformed or cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Point cloud {path} is missing; restore it.")
    xyz, rgb = _read_colmap_binary(path) if path.suffix == ".bin" else _read_colmap_text(path)
    return _finite_points(xyz, rgb, path)


def write_colmap_points(points: PointCloud, path: Path) -> None:
    """Writes a `points3D.txt` without tracks; positions to four decimals, a tenth of a millimetre."""
    lines = ["# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)"]
    rows = zip(points.xyz.tolist(), points.rgb.tolist(), strict=True)
    for index, ((x, y, z), (red, green, blue)) in enumerate(rows, start=1):
        lines.append(f"{index} {x:.4f} {y:.4f} {z:.4f} {red} {green} {blue} 0")
    with write_atomically(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="ascii")


def move_points(points: PointCloud, transform: Float[Tensor, "3 4"]) -> PointCloud:
    """The points after the affine `transform` of their world."""
    return PointCloud(points.xyz @ transform[:, :3].T + transform[:, 3], points.rgb)


def _parse_ply_header(content: bytes, path: Path) -> _PlyHeader:
    end = content.find(b"end_header")
    line_end = content.find(b"\n", end)
    if not content.startswith(b"ply") or end < 0 or line_end < 0:
        raise ValueError(f"{path} is not a PLY file: it has no PLY header; restore the file or make it anew.")
    order, num_vertices, properties, element = None, None, [], None
    for line in content[:end].decode("ascii", errors="replace").splitlines():
        words = line.split()
        if words[:1] == ["format"] and len(words) > 1:
            order = _PLY_ORDERS.get(words[1])
        elif words[:1] == ["element"] and len(words) > 2:
            if num_vertices is None and words[1] != "vertex":
                raise ValueError(f"The first element of {path} is {words[1]}, not vertex; write the vertices first.")
            element = words[1]
            if element == "vertex":
                num_vertices = int(words[2])
        elif words[:1] == ["property"] and element == "vertex":
            if len(words) != 3 or words[1] not in _PLY_TYPES:
                raise ValueError(f"{path} has the vertex property `{line.strip()}`, which is no plain number.")
            properties.append((words[2], _PLY_TYPES[words[1]]))
    if order is None or num_vertices is None or not properties:
        raise ValueError(f"{path} has an incomplete PLY header; make the file anew.")
    return _PlyHeader(order, num_vertices, properties, line_end + 1)


def _parse_ascii_vertices(body: bytes, header: _PlyHeader, dtype: np.dtype, path: Path) -> np.ndarray:
    width = len(header.properties)
    rows = [line.split() for line in body.splitlines() if line.strip()][: header.num_vertices]
    if len(rows) < header.num_vertices or any(len(row) != width for row in rows):
        raise ValueError(
            f"Point cloud {path} is cut short: fewer than {header.num_vertices} vertices of {width} numbers."
        )
    vertices = np.empty(header.num_vertices, dtype)
    try:
        values = np.array(rows, dtype=np.float64).reshape(header.num_vertices, width)
    except ValueError as error:
        raise ValueError(f"Point cloud {path} holds something that is no number ({error}).") from error
    for index, (name, _) in enumerate(header.properties):
        vertices[name] = values[:, index]
    return vertices


def _read_colmap_text(path: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            # Tracks may be long and are not needed: id x y z r g b error track...
            words = line.split(maxsplit=7)
            if words and not words[0].startswith("#"):
                rows.append(words[1:7])
    try:
        values = np.array(rows, dtype=np.float64).reshape(-1, 6)
    except ValueError as error:
        raise ValueError(f"{path} is not a COLMAP points3D file ({error}); restore it.") from error
    return values[:, :3].astype(np.float32), values[:, 3:].clip(0, 255).astype(np.uint8)


def _read_colmap_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    # One point: id u64, xyz 3 f64, rgb 3 u8, error f64, track length u64, then 8 bytes for each of its elements.
    record = struct.Struct("<Q3d3BdQ")
    content = path.read_bytes()
    num_points = int.from_bytes(content[:8], "little")
    cut_short = ValueError(f"Point cloud {path} is cut short: fewer than {num_points} points; copy it again.")
    if len(content) < 8 + num_points * record.size:
        raise cut_short
    xyz = np.empty((num_points, 3), np.float32)
    rgb = np.empty((num_points, 3), np.uint8)
    offset = 8
    for index in range(num_points):
        if offset + record.size > len(content):
            raise cut_short
        values = record.unpack_from(content, offset)
        xyz[index], rgb[index] = values[1:4], values[4:7]
        offset += record.size + 8 * values[8]
    return xyz, rgb


def _to_bytes(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f" and values.size and 0.0 <= values.min() and values.max() <= 1.0:
        values = values * 255.0
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _finite_points(xyz: np.ndarray, rgb: np.ndarray, path: Path) -> PointCloud:
    """The points, if there are any and all are finite."""
    num_bad = int((~np.isfinite(xyz).all(axis=-1)).sum())
    if num_bad:
        raise ValueError(f"{num_bad} of {len(xyz)} points in {path} are not finite; remove them or make it anew.")
    return PointCloud(torch.from_numpy(np.ascontiguousarray(xyz)), torch.from_numpy(np.ascontiguousarray(rgb)))
