import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fit3d_ns.cli.lift import name_capture
from fit3d_ns.data.colmap import write_colmap_points
from fit3d_ns.data.frames import PointCloud
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.scene import create_posed_capture
from tests.data.miniature_captures import edit_json, make_pose, write_picture

POINTS = PointCloud(torch.tensor([[1.0, 2.0, 3.0], [-4.0, 5.0, 0.5]]), torch.tensor([[1, 2, 3], [4, 5, 6]]).byte())


def edit_frame(scene: Path, index: int, **changes: Any) -> None:
    frames = json.loads((scene / "transforms.json").read_text())["frames"]
    frames[index].update(changes)
    edit_json(scene / "transforms.json", frames=frames)


def test_read_transforms__reads_frames_and_holds_out_every_8th_name(nerfstudio_scene: Path) -> None:
    capture = read_capture(nerfstudio_scene)
    assert capture.layout == "nerfstudio"
    assert capture.scene_id == "fox_like"
    assert capture.points is None
    assert "no points" in capture.description
    # Sorted names 00 and 08 are positions 0 and 8.
    assert [index for index, frame in enumerate(capture.frames) if frame.split == "test"] == [0, 8]
    lens = capture.frames[5].lens
    assert (lens.fx, lens.fy, lens.cx, lens.cy, lens.width, lens.height) == (10.0, 11.0, 5.5, 4.25, 12, 8)
    expected = torch.tensor(make_pose(5))[:3]
    torch.testing.assert_close(capture.frames[5].camera_to_world, expected, rtol=0, atol=1e-6)


def test_read_transforms__every_8th_follows_the_names_not_the_file_order(nerfstudio_scene: Path) -> None:
    frames = json.loads((nerfstudio_scene / "transforms.json").read_text())["frames"]
    edit_json(nerfstudio_scene / "transforms.json", frames=frames[::-1])
    capture = read_capture(nerfstudio_scene)
    assert [frame.image_path.stem for frame in capture.frames if frame.split == "test"] == ["08", "00"]


def test_read_transforms__takes_a_camera_file_of_any_name(nerfstudio_scene: Path) -> None:
    os.rename(nerfstudio_scene / "transforms.json", nerfstudio_scene / "cameras_a.json")
    assert len(read_capture(nerfstudio_scene / "cameras_a.json").frames) == 10


def test_read_transforms__intrinsics_of_a_frame_win(nerfstudio_scene: Path) -> None:
    edit_frame(nerfstudio_scene, 1, fl_x=20.0, k1=0.1, camera_model="OPENCV")
    capture = read_capture(nerfstudio_scene)
    assert capture.frames[1].lens.fx == 20.0
    assert capture.frames[1].lens.model == "opencv"
    assert capture.frames[0].lens.model == "pinhole"


@pytest.mark.parametrize(
    ("changes", "model", "distortion"),
    [
        ({"camera_model": "OPENCV", "k1": 1e-2, "k2": 2e-2, "p1": 3e-3, "p2": 4e-3, "k3": 5e-3}, "opencv", None),
        ({"camera_model": None, "distortion_params": [1e-2, 2e-2, 5e-3, 0.0, 3e-3, 4e-3]}, "opencv", None),
        ({"camera_model": "OPENCV_FISHEYE", "k1": 0.1, "k4": 0.2}, "fisheye", (0.1, 0.0, 0.0, 0.2)),
        ({"camera_model": "OPENCV", "k1": 0.0}, "pinhole", ()),
    ],
)
def test_read_transforms__orders_distortion_as_opencv(
    nerfstudio_scene: Path, changes: dict[str, Any], model: str, distortion: tuple[float, ...] | None
) -> None:
    edit_json(nerfstudio_scene / "transforms.json", **changes)
    lens = read_capture(nerfstudio_scene).frames[0].lens
    assert lens.model == model
    # OpenCV's order is k1 k2 p1 p2 k3.
    assert lens.distortion == ((1e-2, 2e-2, 3e-3, 4e-3, 5e-3) if distortion is None else distortion)


def test_read_transforms__lists_split_and_leave_out(nerfstudio_scene: Path) -> None:
    names = [f"images/{index:02d}.png" for index in range(10)]
    edit_json(
        nerfstudio_scene / "transforms.json",
        train_filenames=[f"./{name}" for name in names[:5]],
        val_filenames=names[4:6],
        test_filenames=names[5:7],
    )
    capture = read_capture(nerfstudio_scene)
    # val wins over train, test over val; 7 to 9 stand in no list.
    assert [frame.split for frame in capture.frames] == ["train"] * 4 + ["val"] + ["test"] * 2
    assert "3 in none of them" in capture.description


def test_read_transforms__reads_masks_depths_and_ply(nerfstudio_scene: Path) -> None:
    write_picture(nerfstudio_scene / "masks" / "0.png", 255, mode="L")
    write_picture(nerfstudio_scene / "depths" / "0.png", 900, mode="I;16")
    edit_frame(nerfstudio_scene, 0, mask_path="masks/0.png", depth_file_path="depths/0.png")
    edit_json(nerfstudio_scene / "transforms.json", ply_file_path="sparse.ply")
    header = "ply\nformat ascii 1.0\nelement vertex 2\n" + "".join(f"property float {axis}\n" for axis in "xyz")
    (nerfstudio_scene / "sparse.ply").write_text(f"{header}end_header\n1 2 3\n-4 5 0.5\n")
    capture = read_capture(nerfstudio_scene)
    assert capture.frames[0].mask_path == nerfstudio_scene / "masks" / "0.png"
    assert capture.frames[0].depth_path == nerfstudio_scene / "depths" / "0.png"
    assert capture.frames[1].mask_path is None
    assert capture.points is not None
    assert torch.equal(capture.points.xyz, POINTS.xyz)


def test_read_transforms__moves_colmap_points_by_applied_transform(nerfstudio_scene: Path) -> None:
    model = nerfstudio_scene / "colmap" / "sparse" / "0"
    model.mkdir(parents=True)
    write_colmap_points(POINTS, model / "points3D.txt")
    transform = [[1.0, 0.0, 0.0, 10.0], [0.0, 0.0, 1.0, 20.0], [0.0, -1.0, 0.0, 30.0]]
    edit_json(nerfstudio_scene / "transforms.json", applied_transform=transform)
    capture = read_capture(nerfstudio_scene)
    assert capture.points is not None
    # x + 10, z + 20, 30 - y, written out.
    assert capture.points.xyz.tolist() == [[11.0, 23.0, 28.0], [6.0, 20.5, 25.0]]
    assert capture.colmap_to_world is not None
    assert capture.colmap_to_world.tolist() == transform


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": []}, "lists no frames"),
        ({"frames": None}, "lists no frames"),
        ({"frames": ["a.png"]}, "Entry 0 of `frames` .* has no file_path"),
        ({"camera_model": "FISHEYE624"}, "camera model FISHEYE624; known are SIMPLE_PINHOLE"),
        ({"fl_x": None}, "has no fl_x"),
        ({"fl_x": float("nan")}, "intrinsics that are not finite"),
        ({"fl_x": -3.0}, "must be positive"),
        ({"cx": "5.5"}, "cx = '5.5'; expected a number"),
        ({"k4": 0.5}, "k4 = 0.5"),
        ({"w": 13}, r"Image .*00.png is 12x8, its camera says 13x8"),
        ({"test_filenames": ["images/77.png"]}, r"1 test frames in test_filenames .*images/77.png"),
        ({"ply_file_path": "none.ply"}, "PLY file .*none.ply is missing"),
        ({"ply_file_path": "../none.ply"}, "climbs out of"),
        ({"applied_transform": [[1.0]]}, "applied_transform that is not a finite 3x4"),
    ],
)
def test_read_transforms__refuses_what_is_wrong(nerfstudio_scene: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(nerfstudio_scene / "transforms.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_capture(nerfstudio_scene)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[float("nan")] * 4] * 4, "NaN or infinite"),
        ([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0.0, 0], [0, 0, 0, 1]], "singular"),
        ([[2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 1]], "not a rotation"),
        ([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, -1.0, 0], [0, 0, 0, 1]], "not a rotation"),
        ([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]], r"shape \(3, 3\)"),
        ("identity", "not a 4x4 matrix of numbers"),
    ],
)
def test_read_transforms__refuses_wrong_poses_and_names_the_frame(
    nerfstudio_scene: Path, matrix: Any, message: str
) -> None:
    edit_frame(nerfstudio_scene, 3, transform_matrix=matrix)
    with pytest.raises(ValueError, match=f"images/03.png .*{message}"):
        read_capture(nerfstudio_scene)


@pytest.mark.parametrize("name", ["../stolen.png", "/etc/hostname", "images/../../stolen.png", "..\\stolen.png"])
def test_read_transforms__refuses_paths_outside_the_scene(nerfstudio_scene: Path, name: str) -> None:
    edit_frame(nerfstudio_scene, 0, file_path=name)
    with pytest.raises(ValueError, match="climbs out of|outside of"):
        read_capture(nerfstudio_scene)


def test_read_transforms__accepts_linked_images_and_absolute_paths_inside(nerfstudio_scene: Path) -> None:
    os.rename(nerfstudio_scene / "images", nerfstudio_scene.parent / "elsewhere")
    (nerfstudio_scene / "images").symlink_to(nerfstudio_scene.parent / "elsewhere")
    edit_frame(nerfstudio_scene, 0, file_path=str(nerfstudio_scene / "images" / "00.png"))
    edit_frame(nerfstudio_scene, 1, file_path=f"../{nerfstudio_scene.name}/images/01.png")
    edit_frame(nerfstudio_scene, 2, file_path="./images/../images/02.png")
    link = nerfstudio_scene.parent / "link"
    link.symlink_to(nerfstudio_scene)
    (nerfstudio_scene / "masks").mkdir(exist_ok=True)
    for scene in (nerfstudio_scene, link, nerfstudio_scene / "masks" / ".."):
        assert name_capture(scene) == scene.name.replace("..", nerfstudio_scene.name)
        capture = create_posed_capture(read_capture(scene))
        assert [view.name for view in capture.views[:3]] == [f"images/0{index}.png" for index in range(3)]


def test_read_transforms__refuses_missing_empty_and_repeated_images(nerfstudio_scene: Path) -> None:
    (nerfstudio_scene / "images" / "04.png").write_bytes(b"")
    with pytest.raises(ValueError, match="Image .*04.png is empty"):
        read_capture(nerfstudio_scene)
    (nerfstudio_scene / "images" / "04.png").unlink()
    with pytest.raises(ValueError, match="Image .*04.png is missing, as 1 of 10 photographs"):
        read_capture(nerfstudio_scene, is_strict=True)
    edit_frame(nerfstudio_scene, 4, file_path="images/05.png")
    with pytest.raises(ValueError, match="lists images/05.png more than once"):
        read_capture(nerfstudio_scene)


def test_read_transforms__refuses_eight_bit_depth(nerfstudio_scene: Path) -> None:
    write_picture(nerfstudio_scene / "depth.png", 90, mode="L")
    edit_frame(nerfstudio_scene, 0, depth_file_path="depth.png")
    with pytest.raises(ValueError, match="pixel format L; write 16-bit"):
        read_capture(nerfstudio_scene)


def test_read_capture__refuses_no_scene_no_layout_and_broken_json(tmp_path: Path, nerfstudio_scene: Path) -> None:
    with pytest.raises(ValueError, match="No such scene"):
        read_capture(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no scene"):
        read_capture(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a file; give the scene's folder"):
        read_capture(nerfstudio_scene / "images" / "00.png")
    (nerfstudio_scene / "transforms.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_capture(nerfstudio_scene)


@pytest.mark.parametrize(
    ("files", "given", "command"),
    [
        (["walk.MP4"], "walk.MP4", "ns-process-data video --data '{}/walk.MP4' --output-dir SCENE"),
        (["walk.mov"], ".", "ns-process-data video --data '{}/walk.mov' --output-dir SCENE"),
        (["a.JPG", "b.JPG"], ".", "fit3d-prepare photos '{}'"),
        (["images/a.png"], ".", "fit3d-prepare photos '{}'"),
    ],
)
def test_read_capture__names_the_command_that_finds_cameras(
    tmp_path: Path, files: list[str], given: str, command: str
) -> None:
    folder = tmp_path / "my holiday"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with pytest.raises(ValueError, match="has no cameras beside it") as error:
        read_capture(folder / given)
    assert f"`{command.format(folder)}`" in str(error.value)
