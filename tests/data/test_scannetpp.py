import json
from pathlib import Path

import pytest
import torch

from fit3d_ns.data.layouts import read_capture
from fit3d_ns.data.scannetpp import read_scannetpp
from tests.data.miniature_captures import edit_json, make_pose, write_picture


def test_read_scannetpp__takes_the_undistorted_variant_when_complete(scannetpp_scene: Path) -> None:
    capture = read_capture(scannetpp_scene)
    assert capture.layout == "scannetpp"
    assert capture.scene_id == "0a_5c_01"
    assert capture.is_metric
    assert "undistorted_images" in capture.description
    assert [frame.split for frame in capture.frames] == ["train"] * 4 + ["test"] * 2
    assert [frame.is_bad for frame in capture.frames] == [False, False, False, True, False, False]
    assert {frame.lens.model for frame in capture.frames} == {"pinhole"}
    assert (capture.frames[0].lens.cx, capture.frames[0].lens.cy) == (5.5, 4.25)
    expected = torch.tensor(make_pose(2))[:3]
    torch.testing.assert_close(capture.frames[2].camera_to_world, expected, rtol=0, atol=1e-6)


def test_read_scannetpp__maps_colmap_points_into_the_world_of_the_cameras(scannetpp_scene: Path) -> None:
    points = read_capture(scannetpp_scene).points
    assert points is not None
    # (x, y, z) -> (y, x, -z)
    assert points.xyz.tolist() == [[2.0, 1.0, -3.0], [5.0, 4.0, -6.0]]
    assert points.rgb.tolist() == [[10, 20, 30], [40, 50, 60]]


def test_read_scannetpp__depth_belongs_to_the_distorted_pictures(scannetpp_scene: Path) -> None:
    assert read_scannetpp(scannetpp_scene, "undistorted").frames[0].depth_path is None
    distorted = read_scannetpp(scannetpp_scene, "fisheye").frames[0]
    assert distorted.depth_path == scannetpp_scene / "dslr" / "render_depth" / "DSC00000.png"
    assert distorted.lens.model == "fisheye"
    assert distorted.lens.distortion == (0.01, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "piece",
    [
        "nerfstudio/transforms_undistorted.json",
        "undistorted_images/DSC00004.JPG",
        "undistorted_anon_masks/DSC00001.png",
    ],
)
def test_read_scannetpp__falls_back_to_the_fisheye_variant_and_says_why(scannetpp_scene: Path, piece: str) -> None:
    (scannetpp_scene / "dslr" / piece).unlink()
    capture = read_capture(scannetpp_scene)
    assert capture.frames[0].lens.model == "fisheye"
    assert f"because {piece} is missing" in capture.description


@pytest.mark.parametrize("key, value", [("camera_model", "unknown"), ("fl_x", None), ("test_frames", [])])
def test_read_scannetpp__falls_back_whatever_cameras_an_incomplete_variant_has(
    scannetpp_scene: Path, key: str, value: object
) -> None:
    path = scannetpp_scene / "dslr" / "nerfstudio" / "transforms_undistorted.json"
    edit_json(path, **{key: value})
    (scannetpp_scene / "dslr" / "undistorted_images" / "DSC00000.JPG").unlink()
    assert read_capture(scannetpp_scene).frames[0].lens.model == "fisheye"


def test_read_scannetpp__a_bad_frame_may_lack_its_picture(scannetpp_scene: Path) -> None:
    (scannetpp_scene / "dslr" / "undistorted_images" / "DSC00003.JPG").unlink()
    assert read_capture(scannetpp_scene).frames[0].lens.model == "pinhole"


def test_read_scannetpp__accepts_the_dslr_folder_and_a_linked_scene(scannetpp_scene: Path, tmp_path: Path) -> None:
    assert read_capture(scannetpp_scene / "dslr").scene_id == "0a_5c_01"
    (tmp_path / "linked_scene").symlink_to(scannetpp_scene, target_is_directory=True)
    linked = read_capture(tmp_path / "linked_scene")
    assert linked.scene_id == "linked_scene"
    assert len(linked.frames) == 6


def test_read_scannetpp__lists_decide_the_split_and_test_wins(scannetpp_scene: Path) -> None:
    lists = scannetpp_scene / "dslr" / "train_test_lists.json"
    edit_json(lists, train=["DSC00000.JPG", "DSC00001.JPG", "DSC99999.JPG"], test=["DSC00001.JPG", "DSC00002.JPG"])
    capture = read_capture(scannetpp_scene)
    # 3 stands in no list and keeps its place in `frames`; 4 and 5 keep theirs in `test_frames`.
    assert [frame.split for frame in capture.frames] == ["train", "test", "test", "train", "test", "test"]
    assert "1 listed train frames have no camera" in capture.description


def test_read_scannetpp__without_points_says_none(scannetpp_scene: Path) -> None:
    (scannetpp_scene / "dslr" / "colmap" / "points3D.txt").unlink()
    capture = read_capture(scannetpp_scene)
    assert capture.points is None
    assert "no COLMAP points" in capture.description


def test_read_scannetpp__refuses_a_test_list_of_absent_frames(scannetpp_scene: Path) -> None:
    edit_json(scannetpp_scene / "dslr" / "train_test_lists.json", test=["DSC00004.JPG", "DSC77777.JPG"])
    with pytest.raises(ValueError, match=r"train_test_lists.json names 1 test frames without a camera \(DSC77777"):
        read_capture(scannetpp_scene)


def test_read_scannetpp__refuses_names_that_leave_the_folder(scannetpp_scene: Path) -> None:
    transforms = scannetpp_scene / "dslr" / "nerfstudio" / "transforms_undistorted.json"
    frames = json.loads(transforms.read_text())["frames"]
    frames[0]["file_path"] = "../../../secret.JPG"
    edit_json(transforms, frames=frames)
    with pytest.raises(ValueError, match="climbs out of"):
        read_capture(scannetpp_scene)


def test_read_scannetpp__refuses_masks_of_another_shape(scannetpp_scene: Path) -> None:
    write_picture(scannetpp_scene / "dslr" / "undistorted_anon_masks" / "DSC00002.png", 255, (6, 6), "L")
    with pytest.raises(ValueError, match=r"Mask .*DSC00002.png is 6x6, its image 12x8"):
        read_capture(scannetpp_scene)


def test_read_scannetpp__refuses_a_scene_without_camera_files(tmp_path: Path) -> None:
    (tmp_path / "scene" / "dslr").mkdir(parents=True)
    with pytest.raises(ValueError, match="no dslr/nerfstudio folder"):
        read_capture(tmp_path / "scene")
    (tmp_path / "scene" / "dslr" / "nerfstudio").mkdir()
    with pytest.raises(ValueError, match="No camera file .*transforms.json"):
        read_capture(tmp_path / "scene")


def test_read_capture__names_the_scenes_of_a_folder_of_scenes(scannetpp_scene: Path) -> None:
    with pytest.raises(ValueError, match="holds 1 ScanNet.. scenes .0a_5c_01."):
        read_capture(scannetpp_scene.parent)


def test_read_capture__refuses_a_scene_without_usable_train_frames(scannetpp_scene: Path) -> None:
    names = [f"DSC{index:05d}.JPG" for index in (0, 1, 2, 4, 5)]
    edit_json(scannetpp_scene / "dslr" / "train_test_lists.json", test=names)
    with pytest.raises(ValueError, match="no usable train frame"):
        read_capture(scannetpp_scene)


def test_read_scannetpp__a_scene_as_fit3ds_authors_prepare_it(scannetpp_scene: Path, tmp_path: Path) -> None:
    """The pieces that their `reorganize_data.py` moves; a mask counts where there is one of the photograph's name."""
    dslr, scene = scannetpp_scene / "dslr", tmp_path / "scenes" / "0a5c013435"
    scene.mkdir(parents=True)
    (dslr / "undistorted_images").rename(scene / "images")
    (dslr / "undistorted_anon_masks").rename(scene / "masks")
    (dslr / "colmap" / "points3D.txt").rename(scene / "points3D.txt")
    (dslr / "nerfstudio" / "transforms_undistorted.json").rename(scene / "transforms_train.json")
    (scene / "masks" / "DSC00002.png").unlink()
    capture = read_capture(scene)
    assert (capture.layout, capture.scene_id, capture.is_metric) == ("scannetpp", "0a5c013435", True)
    assert "transforms_train.json with images" in capture.description
    assert [frame.split for frame in capture.frames] == ["train"] * 4 + ["test"] * 2
    first, third = capture.frames[0], capture.frames[2]
    assert (first.image_path, first.mask_path) == (scene / "images/DSC00000.JPG", scene / "masks/DSC00000.png")
    assert third.mask_path is None and capture.frames[3].is_bad
    torch.testing.assert_close(first.camera_to_world, torch.tensor(make_pose(0))[:3], rtol=0, atol=1e-6)
    assert capture.points is not None and capture.points.xyz.tolist() == [[2.0, 1.0, -3.0], [5.0, 4.0, -6.0]]
    assert capture.colmap_to_world is not None
    (scene / "points3D.txt").unlink()
    assert read_capture(scene).points is None
    (scene / "transforms_train.json").write_text("{}")
    with pytest.raises(ValueError, match="transforms_train.json lists no frames"):
        read_capture(scene)
