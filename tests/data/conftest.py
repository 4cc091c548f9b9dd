"""Miniature captures written by hand."""

from pathlib import Path

import pytest

from tests.data.miniature_captures import INTRINSICS, make_pose, write_json_file, write_picture


@pytest.fixture
def nerfstudio_scene(tmp_path: Path) -> Path:
    """Ten frames, no masks, no points."""
    scene = tmp_path / "fox_like"
    frames = [{"file_path": f"images/{index:02d}.png", "transform_matrix": make_pose(index)} for index in range(10)]
    for frame in frames:
        write_picture(scene / frame["file_path"])
    write_json_file(scene / "transforms.json", {**INTRINSICS, "camera_model": "PINHOLE", "frames": frames})
    return scene


@pytest.fixture
def scannetpp_scene(tmp_path: Path) -> Path:
    """Four train frames, the last one bad, and two test frames, in both variants, with masks, depth and points."""
    scene = tmp_path / "0a_5c_01"
    dslr = scene / "dslr"
    entries = []
    for index in range(6):
        name = f"DSC{index:05d}"
        entries.append(
            {
                "file_path": f"{name}.JPG",
                "mask_path": f"{name}.png",
                "is_bad": index == 3,
                "transform_matrix": make_pose(index),
            }
        )
        for variant in ("undistorted", "resized"):
            write_picture(dslr / f"{variant}_images" / f"{name}.JPG")
            write_picture(dslr / f"{variant}_anon_masks" / f"{name}.png", 255, mode="L")
        write_picture(dslr / "render_depth" / f"{name}.png", 1500, mode="I;16")
    meta = {**INTRINSICS, "has_mask": True, "frames": entries[:4], "test_frames": entries[4:]}
    fisheye = {"camera_model": "OPENCV_FISHEYE", "k1": 0.01, "k2": 0.0, "k3": 0.0, "k4": 0.0}
    write_json_file(dslr / "nerfstudio" / "transforms_undistorted.json", {**meta, "camera_model": "PINHOLE"})
    write_json_file(dslr / "nerfstudio" / "transforms.json", {**meta, **fisheye})
    names = [entry["file_path"] for entry in entries]
    write_json_file(dslr / "train_test_lists.json", {"train": names[:4], "test": names[4:], "has_masks": True})
    (dslr / "colmap").mkdir()
    (dslr / "colmap" / "points3D.txt").write_text("# comment\n7 1.0 2.0 3.0 10 20 30 0.5 1 2 3 4\n9 4 5 6 40 50 60 0\n")
    return scene
