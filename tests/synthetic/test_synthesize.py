import json
from pathlib import Path

import pytest
import torch

from fit3d_ns.cli.synthesize import main
from fit3d_ns.data.frames import Frame
from fit3d_ns.data.images import load_depth, load_image
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.geometry.cameras import project_points, viewmats_from_camera_to_worlds
from fit3d_ns.geometry.undistortion import compute_undistortion
from fit3d_ns.probing.datasets.scannet import read_scannetpp_labelled
from fit3d_ns.synthetic import synthesize as synthetic
from fit3d_ns.synthetic.rooms import CLASSES
from fit3d_ns.synthetic.synthesize import SynthesisConfig, synthesize_scenes
from tests.unprojection import unproject_depth

SMALL = {"num_scenes": 1, "num_frames": 9, "width": 64, "height": 48, "num_points": 500}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "rooms"
    synthesize_scenes(SynthesisConfig(folder, **SMALL))
    return folder


def test_synthesize_scenes__is_read_as_a_capture_and_as_a_labelled_set(made: Path) -> None:
    capture = read_capture(made / "room_00")
    assert capture.layout == "scannetpp" and "undistorted_images" in capture.description
    assert [frame.split for frame in capture.frames].count("test") == 1
    assert capture.points is not None and len(capture.points.xyz) == 500
    segmentation = read_scannetpp_labelled(made / "room_00", "train", "segmentation")
    depths = read_scannetpp_labelled(made / "room_00", "train", "depth")
    assert segmentation.class_names == CLASSES and len(segmentation.frames) == len(depths.frames) == 8
    hidden = 0
    for labelled, measured in zip(segmentation.frames, depths.frames, strict=True):
        assert labelled.load_labels is not None and measured.load_depth is not None
        labels, image = labelled.load_labels(), labelled.load_image()
        assert (labels == 255).equal(measured.load_depth() == 0)
        assert len(labels[labels != 255].unique()) > 6
        hidden += int((labels == 255).sum())
        # A flat grey box, far from its border to be clear of JPEG's ringing.
        inner = torch.nn.functional.max_pool2d((labels != 255).float()[None, None], 5, 1, 2)[0, 0] == 0
        assert not inner.any() or (image[inner].float() - 128).abs().max() < 12
    assert hidden == (48 // 5) * (64 // 5)


def look_up(frame: Frame, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and columns of world points that are in the picture, and which are; z-depths of all."""
    pixels, depth = project_points(points, viewmats_from_camera_to_worlds(frame.camera_to_world), frame.lens.K)
    columns, rows = pixels.floor().long().T
    inside = (depth > 0) & (columns >= 0) & (columns < frame.lens.width) & (rows >= 0) & (rows < frame.lens.height)
    return torch.stack([rows, columns])[:, inside], inside, depth


def test_synthesize_scenes__poses_depth_colours_labels_and_points_agree(made: Path) -> None:
    capture = read_capture(made / "room_00")
    first, second = capture.frames[:2]
    assert first.depth_path is not None and second.depth_path is not None and capture.points is not None
    first_depth, second_depth = load_depth(first.depth_path), load_depth(second.depth_path)
    points = unproject_depth(first_depth, first.camera_to_world, first.lens.K)
    (rows, columns), inside, depth = look_up(second, points.reshape(-1, 3))
    same = (depth[inside] - second_depth[rows, columns]).abs() < 0.02
    assert same.float().mean() > 0.5
    colours = load_image(first.image_path).reshape(-1, 3)[inside][same].float()
    expected = load_image(second.image_path)[rows, columns][same].float()
    shuffled = expected[torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))]
    # 64x48 pixels are coarse for the textures: what counts is that warping explains most of the difference.
    assert (colours - expected).abs().mean() < 0.35 * (colours - shuffled).abs().mean()
    # In the transforms' world up is -z: the floor is at 0, tables end at 0.74 m (desks a little higher).
    labels = load_image(made / "room_00" / "dslr" / "labels" / f"{first.image_path.stem}.png")[..., 0]
    height = -points[..., 2]
    assert height[labels == CLASSES.index("floor")].abs().max() < 0.01
    assert (
        -0.01 < height[labels == CLASSES.index("table")].min() < height[labels == CLASSES.index("table")].max() < 0.78
    )
    (rows, columns), inside, depth = look_up(first, capture.points.xyz)
    nearest = -torch.nn.functional.max_pool2d(-first_depth[None, None], 3, 1, 1)[0, 0]
    # Points may be hidden, never float in front of what the camera sees there; pixel centres miss thin things.
    assert (depth[inside] < nearest[rows, columns] - 0.02).float().mean() < 0.02
    assert ((depth[inside] - first_depth[rows, columns]).abs() < 0.05).float().mean() > 0.6


def test_synthesize_scenes__same_seed_same_files_and_other_seed_other_pictures(made: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        synthesize_scenes(SynthesisConfig(tmp_path / str(seed), seed=seed, **SMALL))
    files = sorted(path.relative_to(made) for path in (made / "room_00").rglob("*") if path.is_file())
    assert len(files) == 9 * 6 + 5
    for path in files:
        assert (made / path).read_bytes() == (tmp_path / "0" / path).read_bytes(), path
        assert path.suffix != ".JPG" or (made / path).read_bytes() != (tmp_path / "1" / path).read_bytes()


def make_stub_scene(config: SynthesisConfig, index: int, folder: Path) -> dict[str, object]:
    """Stands in for photographing a room where only the handling of folders is tested; there are two."""
    if index == 2:
        raise KeyboardInterrupt
    (folder / f"room_{index:02d}").mkdir(parents=True)
    return {"name": f"room_{index:02d}"}


def make_no_scene(config: SynthesisConfig, index: int, folder: Path) -> dict[str, str]:
    raise AssertionError("a finished folder is made again")


def test_synthesize_scenes__replaces_only_what_it_made_and_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "_synthesize_scene", make_stub_scene)
    target, home = tmp_path / "rooms", tmp_path / "home"
    made = synthesize_scenes(SynthesisConfig(target))
    monkeypatch.setattr(synthetic, "_synthesize_scene", make_no_scene)
    assert synthesize_scenes(SynthesisConfig(target)) == made
    monkeypatch.setattr(synthetic, "_synthesize_scene", make_stub_scene)
    (target / "stale").touch()
    for other in (SynthesisConfig(target), SynthesisConfig(target, num_points=7), SynthesisConfig(target, 1)):
        with pytest.raises(ValueError, match="is not empty; choose another --output-dir or add --overwrite"):
            synthesize_scenes(other)
    with pytest.raises(KeyboardInterrupt):
        synthesize_scenes(SynthesisConfig(target, num_scenes=3, overwrite=True))
    assert (target / "stale").exists()
    synthesize_scenes(SynthesisConfig(target, overwrite=True))
    assert not (target / "stale").exists()
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="was not made by fit3d-synthesize"):
        synthesize_scenes(SynthesisConfig(home, overwrite=True))
    assert sorted(tmp_path.iterdir()) == [home, target] and (home / "thesis.tex").exists()


def test_main__makes_fisheye_scenes_and_refuses_what_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "rooms"
    flags = "--num-scenes 1 --num-frames 3 --width 32 --height 24 --num-points 50 --seed 3 --lens fisheye".split()
    monkeypatch.setattr("sys.argv", ["fit3d-synthesize", "--output-dir", str(target), *flags])
    main()
    metrics = json.loads((target / "synthesis.json").read_text())
    assert metrics["seed"] == 3 and metrics["scenes"][0]["train_frames"] == 2
    assert sum(metrics["scenes"][0]["class_shares"].values()) == pytest.approx(1.0, abs=2e-3)
    assert str(target / "synthesis.json") in capsys.readouterr().out
    capture = read_capture(target / "room_00")
    assert [frame.split for frame in capture.frames] == ["train", "train", "test"]
    assert {frame.lens.model for frame in capture.frames} == {"fisheye"}
    assert compute_undistortion(capture.frames[0].lens).inside.all()
    main()
    assert "already" in capsys.readouterr().err
    for name in ("num_scenes", "num_frames", "width", "height", "num_points"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least"):
            SynthesisConfig(tmp_path, **{name: 0})
