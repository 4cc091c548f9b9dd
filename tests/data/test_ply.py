"""PLY files written by hand with `struct`, and what is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from fit3d_ns.data.ply import read_ply_elements, read_ply_points, write_ply_vertices

XYZ = [[1.5, -2.0, 3.25], [0.0, 4.0, -1.0]]
RGB = [[1, 2, 3], [250, 128, 0]]
COLOURS = ("red", "green", "blue")

ASCII = """ply
format ascii 1.0
comment by hand
element camera 1
property float focal
element vertex 2
property float x
property float y
property float z
property float nx
property uint8 red
property uint8 green
property uint8 blue
element face 1
property list uchar int vertex_indices
end_header
35
1.5 -2.0 3.25 9 1 2 3
0 4 -1 9 250 128 0
3 0 1 0
"""


def make_vertices() -> np.ndarray:
    dtype = [*[(axis, "<f4") for axis in "xyz"], *[(colour, "u1") for colour in COLOURS]]
    return np.array([(*xyz, *rgb) for xyz, rgb in zip(XYZ, RGB, strict=True)], dtype)


def test_read_ply__ascii(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_text(ASCII)
    cloud = read_ply_points(tmp_path / "a.ply")
    assert cloud is not None and cloud.xyz.tolist() == XYZ and cloud.rgb.tolist() == RGB
    assert read_ply_elements(tmp_path / "a.ply")["vertex"]["nx"].tolist() == [9.0, 9.0]


@pytest.mark.parametrize(("name", "order"), [("binary_little_endian", "<"), ("binary_big_endian", ">")])
def test_read_ply__binary_with_doubles_and_float_colours(tmp_path: Path, name: str, order: str) -> None:
    header = f"ply\nformat {name} 1.0\nelement camera 2\nproperty float focal\nelement vertex 2\n"
    header += "".join(f"property double {axis}\n" for axis in "xyz")
    header += "".join(f"property float {colour}\n" for colour in COLOURS) + "end_header\n"
    body = b"\x07" * 8
    for xyz, rgb in zip(XYZ, RGB, strict=True):
        body += struct.pack(f"{order}3d3f", *xyz, *np.array(rgb) / 255.0)
    (tmp_path / "a.ply").write_bytes(header.encode() + body)
    cloud = read_ply_points(tmp_path / "a.ply")
    assert cloud is not None and cloud.xyz.tolist() == XYZ and cloud.rgb.tolist() == RGB
    (tmp_path / "a.ply").write_bytes(header.encode() + body[:-4])
    with pytest.raises(ValueError, match="a.ply is not a PLY file, damaged or cut short"):
        read_ply_elements(tmp_path / "a.ply")["vertex"]


def test_write_ply__is_laid_out_as_the_format_says(tmp_path: Path) -> None:
    write_ply_vertices(make_vertices(), tmp_path / "out" / "a.ply")
    header, body = (tmp_path / "out" / "a.ply").read_bytes().split(b"end_header\n")
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\nelement vertex 2\nproperty float x\n")
    assert header.endswith(b"property uchar blue\n")
    assert body == b"".join(struct.pack("<3f3B", *xyz, *rgb) for xyz, rgb in zip(XYZ, RGB, strict=True))


@pytest.mark.parametrize("order", ["<", ">"])
def test_write_ply__round_trip(tmp_path: Path, order: str) -> None:
    vertices = make_vertices()
    write_ply_vertices(vertices.astype(vertices.dtype.newbyteorder(order)), tmp_path / "a.ply")
    read = read_ply_elements(tmp_path / "a.ply")["vertex"]
    assert read.dtype == vertices.dtype and np.array_equal(read, vertices)
    write_ply_vertices(vertices[:0], tmp_path / "a.ply")
    assert len(read_ply_elements(tmp_path / "a.ply")["vertex"]) == 0 and read_ply_points(tmp_path / "a.ply") is None


def test_read_ply_points__without_colours_is_grey(tmp_path: Path) -> None:
    text = "ply\nformat ascii 1.0\nelement vertex 1\n"
    text += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n1 2 3\n"
    (tmp_path / "a.ply").write_text(text)
    cloud = read_ply_points(tmp_path / "a.ply")
    assert cloud is not None and cloud.rgb.tolist() == [[128, 128, 128]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("solid stl", "is not a PLY file"),
        (ASCII.replace("end_header", "end"), "is not a PLY file"),
        (ASCII.replace("ascii", "runes"), "damaged"),
        (ASCII[:-35], "cut short .*row 0.*early end-of-line"),
        (ASCII.replace("-2.0", "two"), "damaged or cut short .*malformed input"),
        (ASCII.replace("float y", "float w"), "no vertex properties x, y, z but x, w"),
        (ASCII.replace("vertex 2", "edge 2"), "no element `vertex` of plain numbers"),
        (ASCII.replace("vertex 2", "vertex -2"), "damaged"),
        (ASCII.replace("vertex 2", "vertex 99999999999999999999"), "damaged"),
        (ASCII.replace("float nx", "list uchar int nx"), "no element `vertex` of plain numbers|damaged"),
        (ASCII.replace("float nx", "float x"), "damaged"),
    ],
)
def test_read_ply__refuses_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match="a.ply is missing"):
        read_ply_points(tmp_path / "a.ply")
    (tmp_path / "a.ply").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_ply_points(tmp_path / "a.ply")
