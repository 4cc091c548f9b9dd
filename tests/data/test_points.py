import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fit3d_ns.data.frames import PointCloud
from fit3d_ns.data.points import (
    find_colmap_points,
    move_points,
    read_colmap_points,
    read_ply_points,
    read_ply_vertices,
    write_colmap_points,
    write_ply_points,
)

XYZ = [[1.5, -2.0, 3.25], [0.0, 4.0, -1.0]]
RGB = [[1, 2, 3], [250, 128, 0]]
CLOUD = PointCloud(torch.tensor(XYZ), torch.tensor(RGB, dtype=torch.uint8))

ASCII = """ply
format ascii 1.0
comment by hand
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
1.5 -2.0 3.25 9 1 2 3
0 4 -1 9 250 128 0
3 0 1 0
"""


def test_read_ply_points__ascii(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_text(ASCII)
    cloud = read_ply_points(tmp_path / "a.ply")
    assert cloud.xyz.tolist() == XYZ and cloud.rgb.tolist() == RGB
    assert read_ply_vertices(tmp_path / "a.ply")["nx"].tolist() == [9.0, 9.0]


@pytest.mark.parametrize(("name", "order"), [("binary_little_endian", "<"), ("binary_big_endian", ">")])
def test_read_ply_points__binary_with_doubles_and_float_colours(tmp_path: Path, name: str, order: str) -> None:
    header = f"ply\nformat {name} 1.0\nelement vertex 2\n"
    header += "".join(f"property double {axis}\n" for axis in "xyz")
    header += "".join(f"property float {colour}\n" for colour in ("red", "green", "blue")) + "end_header\n"
    body = b"".join(struct.pack(f"{order}3d3f", *xyz, *np.array(rgb) / 255.0) for xyz, rgb in zip(XYZ, RGB))  # noqa: B905
    (tmp_path / "a.ply").write_bytes(header.encode() + body)
    cloud = read_ply_points(tmp_path / "a.ply")
    assert cloud.xyz.tolist() == XYZ and cloud.rgb.tolist() == RGB


def test_read_ply_points__agrees_with_another_reader(tmp_path: Path) -> None:
    plyfile = pytest.importorskip("plyfile")
    write_ply_points(CLOUD, tmp_path / "a.ply")
    vertices = plyfile.PlyData.read(str(tmp_path / "a.ply"))["vertex"]
    assert np.stack([vertices[axis] for axis in "xyz"], -1).tolist() == XYZ
    assert np.stack([vertices[colour] for colour in ("red", "green", "blue")], -1).tolist() == RGB
    plyfile.PlyData([plyfile.PlyElement.describe(np.array(vertices.data), "vertex")], text=True).write(
        str(tmp_path / "b.ply")
    )
    assert torch.equal(read_ply_points(tmp_path / "b.ply").xyz, CLOUD.xyz)


def test_write_ply_points__round_trip(tmp_path: Path) -> None:
    write_ply_points(CLOUD, tmp_path / "a.ply")
    cloud = read_ply_points(tmp_path / "a.ply")
    assert torch.equal(cloud.xyz, CLOUD.xyz) and torch.equal(cloud.rgb, CLOUD.rgb)


def test_read_ply_points__without_colours_is_grey(tmp_path: Path) -> None:
    text = "ply\nformat ascii 1.0\nelement vertex 1\n"
    text += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n1 2 3\n"
    (tmp_path / "a.ply").write_text(text)
    assert read_ply_points(tmp_path / "a.ply").rgb.tolist() == [[128, 128, 128]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"solid stl", "is not a PLY file"),
        (ASCII.replace("ascii", "runes").encode(), "incomplete PLY header"),
        (ASCII.encode()[:-35], "cut short: fewer than 2 vertices"),
        (ASCII.replace("-2.0", "two").encode(), "something that is no number"),
        (ASCII.replace("-2.0", "nan").encode(), "1 of 2 points in .* are not finite"),
        (ASCII.replace("float y", "float w").encode(), "no vertex properties x, y, z but x, w"),
        (ASCII.replace("vertex 2", "edge 2").encode(), "first element of .* is edge"),
        (ASCII.replace("float nx", "list uchar int nx").encode(), "which is no plain number"),
    ],
)
def test_read_ply_points__refuses_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.ply").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_ply_points(tmp_path / "a.ply")


def test_read_ply_points__refuses_half_a_binary_file(tmp_path: Path) -> None:
    write_ply_points(CLOUD, tmp_path / "a.ply")
    (tmp_path / "a.ply").write_bytes((tmp_path / "a.ply").read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut short"):
        read_ply_points(tmp_path / "a.ply")


def pack_colmap_points() -> bytes:
    """COLMAP's documented binary: the first point has a track of two elements, the second none."""
    first = struct.pack("<Q3d3BdQ", 7, *XYZ[0], *RGB[0], 0.5, 2) + struct.pack("<4i", 1, 2, 3, 4)
    return struct.pack("<Q", 2) + first + struct.pack("<Q3d3BdQ", 9, *XYZ[1], *RGB[1], 0.1, 0)


def test_read_colmap_points__binary_skips_tracks(tmp_path: Path) -> None:
    (tmp_path / "points3D.bin").write_bytes(pack_colmap_points())
    cloud = read_colmap_points(tmp_path / "points3D.bin")
    assert cloud.xyz.tolist() == XYZ and cloud.rgb.tolist() == RGB
    (tmp_path / "points3D.bin").write_bytes(pack_colmap_points()[:-9])
    with pytest.raises(ValueError, match="cut short: fewer than 2 points"):
        read_colmap_points(tmp_path / "points3D.bin")


def test_read_colmap_points__text_with_dark_colours_and_tracks(tmp_path: Path) -> None:
    (tmp_path / "points3D.txt").write_text("# comment\n\n1 1.5 -2 3.25 1 0 1 0.5 8 9 8 9\n2 0 4 -1 0 1 1 0\n")
    cloud = read_colmap_points(tmp_path / "points3D.txt")
    assert cloud.xyz.tolist() == XYZ
    assert cloud.rgb.tolist() == [[1, 0, 1], [0, 1, 1]]
    (tmp_path / "points3D.txt").write_text("1 2 3\n")
    with pytest.raises(ValueError, match="is not a COLMAP points3D file"):
        read_colmap_points(tmp_path / "points3D.txt")


def test_write_colmap_points__round_trip_and_binary_first(tmp_path: Path) -> None:
    assert find_colmap_points(tmp_path) is None
    write_colmap_points(CLOUD, tmp_path / "points3D.txt")
    assert find_colmap_points(tmp_path) == tmp_path / "points3D.txt"
    cloud = read_colmap_points(tmp_path / "points3D.txt")
    assert torch.equal(cloud.xyz, CLOUD.xyz) and torch.equal(cloud.rgb, CLOUD.rgb)
    (tmp_path / "points3D.bin").write_bytes(pack_colmap_points())
    assert find_colmap_points(tmp_path) == tmp_path / "points3D.bin"


def test_move_points__applies_the_affine_map() -> None:
    transform = torch.tensor([[0.0, 1.0, 0.0, 10.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -2.0, 1.0]])
    # y + 10, x, 1 - 2 z
    assert move_points(CLOUD, transform).xyz.tolist() == [[8.0, 1.5, -5.5], [14.0, 0.0, 3.0]]
