"""Compressed PLY, as SuperSplat, splat-transform and gsplat (`ply_compressed`) write it: 16 bytes a Gaussian.

    element chunk    one for 256 Gaussians: min_x .. max_z, min_scale_x .. max_scale_z, perhaps min_r .. max_b, floats
    element vertex   packed_position (11, 10, 11 bits), packed_rotation (2, 10, 10, 10), packed_scale (11, 10, 11) and
                     packed_color (8, 8, 8, 8), uint32, highest bits first
    element sh       perhaps: f_rest_0 ..., uchar

Positions, logarithms of scales and colours lie between the bounds of their chunk, opacity between 0 and 1. Of a
quaternion wxyz, the largest number is left out and the first two bits say which; the others are within 1/sqrt(2).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fit3d_ns.data.ply import SH_CONSTANT

_CHUNK = 256
_SH_RANGE = 8.0
"""Width of the range, about 0, in which harmonics are stored."""


def is_packed(elements: Mapping[str, np.ndarray]) -> bool:
    """Whether the elements of a PLY file are those of a compressed one."""
    return "packed_position" in (elements["vertex"].dtype.names or ())


def unpack_splats(elements: Mapping[str, np.ndarray], path: Path) -> np.ndarray:
    """The vertices as an uncompressed PLY has them: a structured array with float32 properties.

    ValueError where chunks or packed properties are missing.
    """
    vertices, chunks, harmonics = elements["vertex"], elements.get("chunk"), elements.get("sh")
    names = ("packed_position", "packed_rotation", "packed_scale", "packed_color")
    lacking = [name for name in names if name not in (vertices.dtype.names or ())]
    if lacking or chunks is None or len(chunks) * _CHUNK < len(vertices):
        what = ", ".join(lacking) or "a chunk for each 256 vertices"
        raise ValueError(f"{path} is a compressed PLY without {what}; export it again.")
    if harmonics is not None and len(harmonics) != len(vertices):
        raise ValueError(
            f"{path} has {len(harmonics)} rows of harmonics for {len(vertices)} Gaussians; export it again."
        )
    position, rotation, scale, colour = (vertices[name].astype(np.uint32) for name in names)
    owner = np.arange(len(vertices)) // _CHUNK

    def spread(shares: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
        try:
            low, high = (np.stack([chunks[f"{end}_{axis}"] for axis in axes], axis=1)[owner] for end in ("min", "max"))
        except ValueError as error:
            raise ValueError(
                f"{path} is a compressed PLY whose chunks lack bounds ({error}); export it again."
            ) from error
        return low + shares * (high - low)

    red_to_alpha = _split(colour, (8, 8, 8, 8))
    colours = red_to_alpha[:, :3]
    if "min_r" in (chunks.dtype.names or ()):
        colours = spread(colours, ("r", "g", "b"))
    with np.errstate(divide="ignore"):
        logits = np.log(red_to_alpha[:, 3]) - np.log1p(-red_to_alpha[:, 3])
    columns = {
        **_name(("x", "y", "z"), spread(_split(position, (11, 10, 11)), ("x", "y", "z"))),
        **_name(("f_dc_0", "f_dc_1", "f_dc_2"), (colours - 0.5) / SH_CONSTANT),
        "opacity": logits,
        **_name(
            ("scale_0", "scale_1", "scale_2"),
            spread(_split(scale, (11, 10, 11)), ("scale_x", "scale_y", "scale_z")),
        ),
        **_name(("rot_0", "rot_1", "rot_2", "rot_3"), _unpack_rotations(rotation)),
    }
    if harmonics is not None:
        columns |= {name: _unpack_harmonics(harmonics[name]) for name in harmonics.dtype.names or ()}
    unpacked = np.empty(len(vertices), [(name, "<f4") for name in columns])
    for name, values in columns.items():
        unpacked[name] = values
    return unpacked


def _split(packed: np.ndarray, bits: tuple[int, ...]) -> np.ndarray:
    """The numbers in a word, highest bits first, each as a share of its greatest value."""
    shift, columns = sum(bits), []
    for size in bits:
        shift -= size
        largest = 2**size - 1
        columns.append(((packed >> np.uint32(shift)) & np.uint32(largest)) / largest)
    return np.stack(columns, axis=1)


def _unpack_rotations(packed: np.ndarray) -> np.ndarray:
    others = (_split(packed, (2, 10, 10, 10))[:, 1:] - 0.5) * np.sqrt(2.0)
    largest = np.sqrt(np.clip(1.0 - np.square(others).sum(axis=1), 0.0, None))
    which = packed >> np.uint32(30)
    quats = np.empty((len(packed), 4))
    for place in range(4):
        rows = which == place
        quats[rows] = np.insert(others[rows], place, largest[rows], axis=1)
    return quats


def _unpack_harmonics(values: np.ndarray) -> np.ndarray:
    # Bytes name the middles of 256 equal parts; the outermost two the ends.
    shares = np.where(values == 0, 0.0, np.where(values == 255, 1.0, (values + 0.5) / 256.0))
    return (shares - 0.5) * _SH_RANGE


def _name(names: tuple[str, ...], columns: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(names, columns.T, strict=True))
