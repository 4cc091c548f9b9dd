"""What `ns-train` gets of photographs: transparency and lenses that nerfstudio's cameras do not know."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import Image

from fit3d_ns.plugin.dataparser import FeatureDataParserConfig
from fit3d_ns.plugin.dataset import UndistortedDataset
from fit3d_ns.plugin.method import fit3d_features_paper
from fit3d_ns.scene.posed_capture import parse_capture, record_capture


def open_dataset(scene: Path) -> UndistortedDataset:
    outputs = FeatureDataParserConfig(data=scene).setup().get_dataparser_outputs("train")
    return UndistortedDataset(outputs, 1.0, scene, "train")


def write_rgba(path: Path) -> np.ndarray:
    """Red hidden under the transparent left half, half transparent in the first column of the right one."""
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[:, :32] = 255, 0, 0, 0
    rgba[:, 32:] = 40, 80, 120, 255
    rgba[:, 32, 3] = 128
    Image.fromarray(rgba).save(path)
    return rgba


def test_transparency__is_background_for_colours_and_nothing_for_features(mini_capture: Path, tmp_path: Path) -> None:
    scene = Path(shutil.copytree(mini_capture, tmp_path / "scene"))
    for path in (scene / "images").iterdir():
        write_rgba(path)
    data = open_dataset(scene).get_data(0, "uint8")
    # The model puts its own background behind the fourth channel; no hidden red.
    assert data["image"][0, [0, 32, 33]].tolist() == [[0, 0, 0, 0], [40, 80, 120, 128], [40, 80, 120, 255]]
    assert "mask" not in data
    assert data["feature_mask"][0, [0, 32, 33], 0].tolist() == [0.0, 0.0, 1.0]
    assert data["photograph"][0, [0, 32, 33]].tolist() == [[0, 0, 0], [20, 40, 60], [40, 80, 120]]


def test_transparency__blender_scenes_are_as_nerfstudio_reads_them(mini_capture: Path, tmp_path: Path) -> None:
    frames = json.loads((mini_capture / "transforms.json").read_text())["frames"][:2]
    for index, frame in enumerate(frames):
        (tmp_path / "train").mkdir(exist_ok=True)
        write_rgba(tmp_path / f"train/r_{index}.png")
        frame["file_path"] = f"./train/r_{index}"
    (tmp_path / "transforms_train.json").write_text(json.dumps({"camera_angle_x": 1.0, "frames": frames}))
    outputs = BlenderDataParserConfig(data=tmp_path).setup().get_dataparser_outputs("train")
    ours, theirs = UndistortedDataset(outputs, 1.0, tmp_path, "train"), InputDataset(outputs)
    assert torch.equal(ours.get_image_float32(0), theirs.get_image_float32(0))
    assert ours.get_image_float32(0)[0, 0].tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(ours.get_image_uint8(0), theirs.get_image_uint8(0))


def test_full_opencv__is_undistorted_in_training_as_in_the_lift(mini_capture: Path, tmp_path: Path) -> None:
    scene = Path(shutil.copytree(mini_capture, tmp_path / "scene"))
    content = json.loads((scene / "transforms.json").read_text())
    model = scene / "sparse" / "0"
    model.mkdir(parents=True)
    (scene / "transforms.json").unlink()
    coefficients = "0.05 -0.02 0.002 -0.003 0.01 0.02 -0.01 0.003"
    (model / "cameras.txt").write_text(f"1 FULL_OPENCV 64 48 60 60 32 24 {coefficients}\n")
    names = [Path(frame["file_path"]).name for frame in content["frames"]]
    (model / "images.txt").write_text("".join(f"{i + 1} 1 0 0 0 {i} 0 5 1 {name}\n\n" for i, name in enumerate(names)))
    (model / "points3D.txt").write_text("")
    dataset = open_dataset(scene)
    lens = dataset.capture.views[0].frame.lens
    assert lens.distortion == tuple(map(float, coefficients.split()))
    without = dataset.capture.load_image(dataset.capture.views[0])
    assert torch.equal(torch.from_numpy(dataset.get_numpy_image(0)), without)


def test_principal_point__is_in_the_middle_of_what_the_paper_method_trains_on(
    mini_capture: Path, tmp_path: Path
) -> None:
    scene = Path(shutil.copytree(mini_capture, tmp_path / "scene"))
    content = json.loads((scene / "transforms.json").read_text())
    content |= {"camera_model": "OPENCV_FISHEYE", "fl_x": 40.0, "fl_y": 40.0, "cx": 34.0, "cy": 23.0, "k1": 0.02}
    (scene / "transforms.json").write_text(json.dumps(content))
    assert open_dataset(scene).cameras.cx[0].item() != 32.0
    parser = replace(fit3d_features_paper.config.pipeline.datamanager.dataparser, data=scene)
    dataset = UndistortedDataset(parser.setup().get_dataparser_outputs("train"), 1.0, scene, "train")
    assert dataset.cameras.cx.unique().tolist() == [32.0] and dataset.cameras.cy.unique().tolist() == [24.0]
    # A scene file brings pictures back as they were trained on.
    capture = parse_capture(json.loads(json.dumps(record_capture(dataset.capture))))
    shown, again = (item.load_image(item.views[0]) for item in (dataset.capture, capture))
    assert torch.equal(shown, again) and torch.equal(capture.views[0].K, dataset.capture.views[0].K)
    other = record_capture(open_dataset(scene).capture)
    assert "is_centred" not in other["lenses"][0]


def test_large_photographs__are_halved_until_they_fit_and_it_is_said_once(mini_capture: Path, capsys) -> None:
    outputs = FeatureDataParserConfig(data=mini_capture).setup().get_dataparser_outputs("train")
    # 64x48: twice halved to 16x12.
    dataset = UndistortedDataset(outputs, 1.0, mini_capture, "train", max_side=20)
    view = dataset.capture.views[0]
    assert (view.width, view.height) == (16, 12) and dataset.get_numpy_image(0).shape == (12, 16, 3)
    assert view.frame.lens.width == 64
    assert capsys.readouterr().err.count("reduced 4 times; --pipeline.datamanager.max-image-side 0 keeps them") == 1
    for factor, max_side, width in ((1.0, 0, 64), (1.0, 64, 64), (0.5, 20, 32)):
        other = UndistortedDataset(outputs, factor, mini_capture, "train", max_side)
        assert other.capture.views[0].width == width


def test_large_photographs__are_reduced_by_the_method_and_not_in_older_runs() -> None:
    from fit3d_ns.plugin.datamanager import FeatureDatamanagerConfig
    from fit3d_ns.plugin.method import fit3d_features

    assert fit3d_features.config.pipeline.datamanager.max_image_side == 1600
    # A config.yml of before has no such line: its class's default counts.
    assert FeatureDatamanagerConfig.max_image_side == 0
