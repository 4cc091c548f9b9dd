"""Captures with the faults that people's captures have; each is put right and said, or refused in a sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fit3d_ns.data.images import list_images
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.scene import create_posed_capture
from tests.data.miniature_captures import HEIGHT, WIDTH, edit_json, write_picture

NUM_FRAMES, NUM_POINTS, FOCAL = 10, 400, 40.0
FORWARD = np.array([-0.8, 0.52, np.sqrt(1 - 0.8**2 - 0.52**2)])


@pytest.fixture
def seen_scene(tmp_path: Path) -> Path:
    """Ten cameras in a row that look along `FORWARD` at a cloud of points: in no other convention do they see it."""
    scene = tmp_path / "wall"
    right = np.cross(FORWARD, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    # Columns of OpenGL poses: right, up, backward.
    rotation = np.stack([right, np.cross(right, FORWARD), -FORWARD], axis=1)
    frames = []
    for index in range(NUM_FRAMES):
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = rotation, (0.3, 0.02 * index, 0.1)
        frames.append({"file_path": f"images/{index}.png", "transform_matrix": matrix.tolist()})
        write_picture(scene / f"images/{index}.png", 10 * index)
    write_points(scene, draw_points())
    intrinsics = {"fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2, "w": WIDTH, "h": HEIGHT}
    (scene / "transforms.json").write_text(json.dumps({**intrinsics, "frames": frames, "ply_file_path": "points.ply"}))
    return scene


def draw_points() -> np.ndarray:
    spread = np.random.default_rng(0).uniform(-0.3, 0.3, (NUM_POINTS, 3))
    return spread + 6.0 * FORWARD


def write_points(scene: Path, xyz: np.ndarray, colour_type: str = "uchar", scale: int = 1) -> None:
    header = ["ply", "format ascii 1.0", f"element vertex {len(xyz)}"]
    header += [f"property double {axis}" for axis in "xyz"]
    header += [f"property {colour_type} {colour}" for colour in ("red", "green", "blue")] + ["end_header"]
    rows = [f"{x!r} {y!r} {z!r} {10 * scale} {255 * scale} {3 * scale}" for x, y, z in xyz.tolist()]
    (scene / "points.ply").write_text("\n".join([*header, *rows, ""]).replace("np.float64", ""))


def edit_poses(scene: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    frames = json.loads((scene / "transforms.json").read_text())["frames"]
    for frame in frames:
        frame["transform_matrix"] = change(np.array(frame["transform_matrix"])).tolist()
    edit_json(scene / "transforms.json", frames=frames)


def test_far_world__keeps_its_millimetres(seen_scene: Path) -> None:
    expected = read_capture(seen_scene)
    offset = np.array([500000.0, 4649776.0, 120.0])
    edit_poses(seen_scene, lambda pose: np.concatenate([pose[:, :3], pose[:, 3:] + np.append(offset, 0)[:, None]], 1))
    write_points(seen_scene, draw_points() + offset)
    capture = read_capture(seen_scene)
    assert "far from its origin" in capture.description
    assert expected.points is not None and capture.points is not None and capture.points.xyz.dtype == torch.float32
    shift = capture.frames[0].camera_to_world[:, 3] - expected.frames[0].camera_to_world[:, 3]
    for frame, near in zip(capture.frames, expected.frames, strict=True):
        torch.testing.assert_close(frame.camera_to_world[:, 3] - shift, near.camera_to_world[:, 3], rtol=0, atol=1e-5)
    torch.testing.assert_close(capture.points.xyz - shift, expected.points.xyz, rtol=0, atol=1e-5)


def invert(pose: np.ndarray) -> np.ndarray:
    return np.linalg.inv(pose)


def flip(pose: np.ndarray) -> np.ndarray:
    return pose @ np.diag([1.0, -1.0, -1.0, 1.0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (flip, "has OpenCV's axes|have OpenCV's axes"),
        (invert, "poses are world-to-camera; invert them"),
        (lambda pose: invert(flip(pose)), "world-to-camera in OpenCV's axes"),
    ],
)
def test_points_out_of_view__name_the_convention_of_the_poses(
    seen_scene: Path, change: Callable[[np.ndarray], np.ndarray], sentence: str
) -> None:
    edit_poses(seen_scene, change)
    with pytest.raises(ValueError, match=f"No camera of .* sees any of its 400 seed points: probably .*({sentence})"):
        read_capture(seen_scene)


def test_points_out_of_view__name_the_world_of_the_points(seen_scene: Path) -> None:
    x, y, z = draw_points().T
    write_points(seen_scene, np.stack([y, x, -z], axis=1))
    with pytest.raises(ValueError, match=r"probably its points \(x, y, z\) are \(y, x, -z\) in the world of the poses"):
        read_capture(seen_scene)
    write_points(seen_scene, draw_points() + [100.0, 500.0, 0.0])
    with pytest.raises(ValueError, match="poses and points are of different worlds"):
        read_capture(seen_scene)


def test_intrinsics_in_shares_of_the_image__are_refused(seen_scene: Path) -> None:
    edit_json(seen_scene / "transforms.json", fl_x=3.3, fl_y=5.0, cx=0.5, cy=0.5)
    with pytest.raises(ValueError, match="intrinsics in shares of the image .* multiply fl_x and cx by w"):
        read_capture(seen_scene)


def test_missing_photographs__are_left_out_and_counted(seen_scene: Path) -> None:
    for index in (1, 4, 8):
        (seen_scene / f"images/{index}.png").unlink()
    capture = read_capture(seen_scene)
    assert [frame.image_path.stem for frame in capture.frames] == ["0", "2", "3", "5", "6", "7", "9"]
    assert "3 of 10 photographs are missing, such as 1.png" in capture.description
    with pytest.raises(ValueError, match="1.png is missing, as 3 of 10"):
        read_capture(seen_scene, is_strict=True)
    for index in (2, 3):
        (seen_scene / f"images/{index}.png").unlink()
    with pytest.raises(ValueError, match="1.png is missing, as 5 of 10"):
        read_capture(seen_scene)


def test_converted_photographs__are_found_by_their_name(seen_scene: Path) -> None:
    Image.open(seen_scene / "images/3.png").save(seen_scene / "images/3.JPG")
    (seen_scene / "images/3.png").unlink()
    assert read_capture(seen_scene, is_strict=True).frames[3].image_path.name == "3.JPG"


def test_names_without_suffix__may_have_dots(seen_scene: Path) -> None:
    frames = json.loads((seen_scene / "transforms.json").read_text())["frames"]
    for index, frame in enumerate(frames):
        (seen_scene / frame["file_path"]).rename(seen_scene / f"images/frame.{index:04d}.png")
        frame["file_path"] = f"images/frame.{index:04d}"
    edit_json(seen_scene / "transforms.json", frames=frames)
    found = [frame.image_path.name for frame in read_capture(seen_scene).frames]
    assert found == [f"frame.{index:04d}.png" for index in range(NUM_FRAMES)]


def test_resized_photographs__scale_their_lens(seen_scene: Path) -> None:
    for path in (seen_scene / "images").iterdir():
        write_picture(path, 9, (WIDTH // 2, HEIGHT // 2))
    capture = read_capture(seen_scene)
    assert (
        "10 photographs are of another size than their cameras say (such as 0.png: 6x4, not 12x8)"
        in capture.description
    )
    lens = capture.frames[0].lens
    assert (lens.fx, lens.fy, lens.cx, lens.cy, lens.width, lens.height) == (FOCAL / 2, FOCAL / 2, 3.0, 2.0, 6, 4)


def test_depth_as_arrays__is_refused_with_what_to_write(seen_scene: Path) -> None:
    frames = json.loads((seen_scene / "transforms.json").read_text())["frames"]
    np.save(seen_scene / "depth.npy", np.ones((HEIGHT, WIDTH)))
    edit_json(seen_scene / "transforms.json", frames=[frame | {"depth_file_path": "depth.npy"} for frame in frames])
    with pytest.raises(ValueError, match="is an array; write 16-bit grey PNGs in millimetres"):
        read_capture(seen_scene)


def test_depth_of_a_coarser_sensor__is_enlarged(seen_scene: Path) -> None:
    frames = json.loads((seen_scene / "transforms.json").read_text())["frames"]
    values = np.arange(1, 7, dtype=np.uint16).reshape(2, 3) * 1000
    Image.fromarray(values).save(seen_scene / "depth.png")
    edit_json(seen_scene / "transforms.json", frames=[frame | {"depth_file_path": "depth.png"} for frame in frames])
    capture = create_posed_capture(read_capture(seen_scene))
    depth = capture.load_depth(capture.views[0])
    assert depth is not None and np.array_equal(depth.numpy(), np.kron(values / 1000, np.ones((4, 4))))
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(seen_scene / "depth.png")
    with pytest.raises(ValueError, match="Depth map .*depth.png is 6x6, its image 12x8; make it again"):
        read_capture(seen_scene)


@pytest.mark.parametrize(
    ("size", "sentence"), [((12, 7), "correct w and h"), ((8, 12), "turned upright"), ((6, 6), "w and h")]
)
def test_photographs_of_another_shape__are_refused(seen_scene: Path, size: tuple[int, int], sentence: str) -> None:
    write_picture(seen_scene / "images/3.png", 9, size)
    with pytest.raises(ValueError, match=rf"3.png is {size[0]}x{size[1]}, its camera says 12x8; .*{sentence}"):
        read_capture(seen_scene)


def test_bad_frames__may_have_any_pose(seen_scene: Path) -> None:
    frames = json.loads((seen_scene / "transforms.json").read_text())["frames"]
    frames[2] |= {"is_bad": True, "transform_matrix": [[-float("inf")] * 4] * 4}
    del frames[5]["transform_matrix"]
    frames[5]["is_bad"] = True
    edit_json(seen_scene / "transforms.json", frames=frames)
    capture = read_capture(seen_scene)
    assert [index for index, frame in enumerate(capture.frames) if frame.is_bad] == [2, 5]
    assert "(2 of them bad)" in capture.description


def test_instant_ngp__is_fisheye_makes_a_fisheye_lens(seen_scene: Path) -> None:
    edit_json(seen_scene / "transforms.json", is_fisheye=True, k1=0.03, k2=-0.01, k3=0.002, k4=-0.001)
    lens = read_capture(seen_scene).frames[0].lens
    assert (lens.model, lens.distortion) == ("fisheye", (0.03, -0.01, 0.002, -0.001))


def test_panoramas__are_refused_with_the_command_that_cuts_them(seen_scene: Path) -> None:
    edit_json(seen_scene / "transforms.json", camera_model="EQUIRECTANGULAR")
    with pytest.raises(ValueError, match="EQUIRECTANGULAR: .*ns-process-data images --camera-type equirectangular"):
        read_capture(seen_scene)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks__are_read(seen_scene: Path, encoding: str) -> None:
    path = seen_scene / "transforms.json"
    path.write_text(path.read_text(), encoding=encoding)
    assert len(read_capture(seen_scene).frames) == NUM_FRAMES


@pytest.mark.parametrize("name", ["images/0.png", "transforms.json", "points.ply"])
def test_git_lfs_pointers__are_named_with_the_command(seen_scene: Path, name: str) -> None:
    (seen_scene / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")
    with pytest.raises(ValueError, match=f"{Path(name).name} is a Git LFS pointer.*git lfs pull"):
        read_capture(seen_scene)


def test_seed_colours_of_16_bits__are_scaled_and_bad_points_left_out(
    seen_scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = draw_points()
    points[7, 1] = float("nan")
    write_points(seen_scene, points, "ushort", 257)
    cloud: Any = read_capture(seen_scene).points
    assert cloud.rgb.unique(dim=0).tolist() == [[10, 255, 3]] and len(cloud.xyz) == NUM_POINTS - 1
    assert "1 of 400 points" in capsys.readouterr().err
    text = (seen_scene / "points.ply").read_text()
    (seen_scene / "points.ply").write_text(
        text.replace(" red\n", " diffuse_red\n").replace(" green\n", " diffuse_green\n")
    )
    assert read_capture(seen_scene).points.rgb.unique().tolist() == [128]  # type: ignore[union-attr]
    text = text.replace(" red\n", " diffuse_red\n").replace(" green\n", " diffuse_green\n")
    (seen_scene / "points.ply").write_text(text.replace(" blue\n", " diffuse_blue\n"))
    assert read_capture(seen_scene).points.rgb.unique(dim=0).tolist() == [[10, 255, 3]]  # type: ignore[union-attr]


def test_hidden_files__are_no_photographs(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/._0.jpg").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    with pytest.raises(ValueError, match="holds no scene"):
        read_capture(tmp_path)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """Eight cameras in the middle of a coloured ball look all around: in any convention they see some points."""
    scene = tmp_path / "room"
    directions = np.random.default_rng(1).normal(size=(3000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    columns, rows = np.meshgrid(np.arange(48) + 0.5, np.arange(32) + 0.5)
    rays = np.stack([(columns - 24) / 20.0, (16 - rows) / 20.0, -np.ones_like(rows)], axis=-1)
    frames = []
    for index in range(8):
        angle, tilt = 2 * np.pi * index / 8, 0.3 * np.sin(index)
        forward = np.array([np.cos(angle) * np.cos(tilt), np.sin(angle) * np.cos(tilt), np.sin(tilt)])
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([right, np.cross(right, forward), -forward], axis=1)
        matrix[:3, 3] = 0.05 * forward
        picture = paint(rays @ matrix[:3, :3].T)
        (scene / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(scene / f"images/{index}.png")
        frames.append({"file_path": f"images/{index}.png", "transform_matrix": matrix.tolist()})
    header = ["ply", "format ascii 1.0", "element vertex 3000", *(f"property double {axis}" for axis in "xyz")]
    header += [*(f"property uchar {colour}" for colour in ("red", "green", "blue")), "end_header"]
    lines = [" ".join(map(str, [*(5.0 * d), *c])) for d, c in zip(directions, paint(directions).tolist(), strict=True)]
    (scene / "points.ply").write_text("\n".join([*header, *lines, ""]))
    intrinsics = {"fl_x": 20.0, "fl_y": 20.0, "cx": 24.0, "cy": 16.0, "w": 48, "h": 32}
    (scene / "transforms.json").write_text(json.dumps({**intrinsics, "frames": frames, "ply_file_path": "points.ply"}))
    return scene


def paint(directions: np.ndarray) -> np.ndarray:
    """A colour that tells every direction apart."""
    unit = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    return (127.5 + 127.5 * unit).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(flip, "have OpenCV's axes"), (invert, "are world-to-camera; invert them"), (None, None)],
)
def test_colours__tell_the_convention_where_cameras_look_all_around(
    room: Path, change: Callable[[np.ndarray], np.ndarray] | None, sentence: str | None
) -> None:
    if change is None:
        assert len(read_capture(room).frames) == 8
        return
    edit_poses(room, change)
    with pytest.raises(ValueError, match=f"where its photographs show something else: probably its poses {sentence}"):
        read_capture(room)


def test_full_opencv__is_read_from_a_camera_file(seen_scene: Path) -> None:
    coefficients = {
        "k1": 0.05,
        "k2": -0.02,
        "p1": 0.002,
        "p2": -0.003,
        "k3": 0.01,
        "k4": 0.02,
        "k5": -0.01,
        "k6": 0.003,
    }
    edit_json(seen_scene / "transforms.json", camera_model="FULL_OPENCV", **coefficients)
    assert read_capture(seen_scene).frames[0].lens.distortion == tuple(coefficients.values())
    edit_json(seen_scene / "transforms.json", camera_model="OPENCV")
    with pytest.raises(ValueError, match="k4 = 0.02, .*write OPENCV_FISHEYE for a fisheye"):
        read_capture(seen_scene)


def test_hidden_files__are_in_no_list_of_pictures(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", "__MACOSX/b.jpg", ".thumbnails/c.jpg", "sub/d.HEIC", "e.txt"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    # What lies above the folder does not matter.
    found = list_images((tmp_path / "images").rename(tmp_path / ".images"))
    assert [path.name for path in found] == ["a.jpg", "d.HEIC"]
