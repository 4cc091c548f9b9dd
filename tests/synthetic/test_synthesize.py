import json
from pathlib import Path

import pytest
import torch

from fit3d_ns.analysis.correspondence import DepthView, create_grid_points, find_covisible, look_up, unproject
from fit3d_ns.cli.synthesize import main
from fit3d_ns.data.images import load_depth, load_image
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.geometry.cameras import project_points, viewmats_from_camera_to_worlds
from fit3d_ns.geometry.undistortion import compute_undistortion
from fit3d_ns.probing.datasets.scannet import read_scannetpp_labelled
from fit3d_ns.synthetic import synthesize as synthetic
from fit3d_ns.synthetic.rooms import CLASSES
from fit3d_ns.synthetic.synthesize import SynthesisConfig, synthesize_scenes

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


def test_synthesize_scenes__poses_depth_colours_labels_and_points_agree(made: Path) -> None:
    capture = read_capture(made / "room_00")
    views, pictures, classes = [], [], []
    for frame in capture.frames[:2]:
        assert frame.depth_path is not None and capture.points is not None
        views.append(DepthView(load_depth(frame.depth_path), frame.lens.K, frame.camera_to_world))
        pictures.append(load_image(frame.image_path).float().mean(dim=-1))
        classes.append(load_image(made / f"room_00/dslr/labels/{frame.image_path.stem}.png")[..., 0].float())
    points = create_grid_points(64, 48, (48, 64))
    places = find_covisible(*views, points, 0.01)
    assert len(places[0]) > 0.5 * len(find_covisible(*views, points, torch.inf)[0])
    greys, labels = ([look_up(*both) for both in zip(maps, places, strict=True)] for maps in (pictures, classes))
    shuffled = greys[1][torch.randperm(len(greys[1]), generator=torch.Generator().manual_seed(0))]
    # 64x48 pixels are coarse for the textures: what counts is that warping explains most of the difference.
    assert (greys[0] - greys[1]).abs().mean() < 0.35 * (greys[0] - shuffled).abs().mean()
    assert (labels[0] == labels[1]).float().mean() > 0.95
    # In the transforms' world up is -z: the floor is at 0, tables end at 0.74 m (desks a little higher).
    height = -unproject(points, views[0].depth.flatten(), views[0])[:, 2].view(48, 64)
    floor, table = (height[classes[0] == CLASSES.index(name)] for name in ("floor", "table"))
    assert floor.abs().max() < 0.01 and -0.01 < table.min() < table.max() < 0.78
    pixels, depth = project_points(
        capture.points.xyz, viewmats_from_camera_to_worlds(views[0].camera_to_world), views[0].K
    )
    inside = (depth > 0) & (pixels >= 0).all(dim=1) & (pixels < torch.tensor([64, 48])).all(dim=1)
    nearest = -torch.nn.functional.max_pool2d(-views[0].depth[None, None], 3, 1, 1)[0, 0]
    # Points may be hidden, never float in front of what the camera sees there; pixel centres miss thin things.
    assert (depth < look_up(nearest, pixels) - 0.02)[inside].float().mean() < 0.02
    assert ((depth - look_up(views[0].depth, pixels)).abs() < 0.05)[inside].float().mean() > 0.6


def make_stub_scene(config: SynthesisConfig, index: int, folder: Path) -> dict[str, object]:
    """Stands in for photographing a room where only the handling of folders is tested; there are two."""
    if index == 2:
        raise KeyboardInterrupt
    (folder / f"room_{index:02d}").mkdir(parents=True)
    return {"name": f"room_{index:02d}"}


def test_synthesize_scenes__replaces_only_what_it_made_and_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, home = tmp_path / "rooms", tmp_path / "home"
    monkeypatch.setattr(synthetic, "_synthesize_scene", make_stub_scene)
    made = synthesize_scenes(SynthesisConfig(target))
    with monkeypatch.context() as patch:
        patch.delattr(synthetic, "_synthesize_scene")
        assert synthesize_scenes(SynthesisConfig(target)) == made
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


def test_main__same_seed_same_files_and_another_lens_and_seed_other_pictures(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output-dir", str(tmp_path), *"--num-scenes 1 --num-frames 9 --width 64 --height 48".split()]
    main([*flags, "--num-points", "500"])
    files = sorted(path.relative_to(made) for path in (made / "room_00").rglob("*") if path.is_file())
    assert len(files) == 9 * 6 + 5
    assert all((made / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)
    assert str(tmp_path / "synthesis.json") in capsys.readouterr().out
    main([*flags, "--num-points", "500"])
    assert "already" in capsys.readouterr().err
    main([*flags, "--seed", "3", "--lens", "fisheye", "--num-points", "50", "--overwrite"])
    metrics = json.loads((tmp_path / "synthesis.json").read_text())
    assert metrics["seed"] == 3 and metrics["scenes"][0]["train_frames"] == 8
    # What the box of one photograph hides has no class.
    shown = 1.0 - (48 // 5) * (64 // 5) / (9 * 64 * 48)
    assert sum(metrics["scenes"][0]["class_shares"].values()) == pytest.approx(shown, abs=2e-3)
    capture = read_capture(tmp_path / "room_00")
    assert {frame.lens.model for frame in capture.frames} == {"fisheye"}
    assert compute_undistortion(capture.frames[0].lens).inside.all()
    for path in (made / "room_00").rglob("resized_images/*"):
        assert path.read_bytes() != (tmp_path / path.relative_to(made)).read_bytes()
    for name in ("num_scenes", "num_frames", "width", "height", "num_points"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least"):
            SynthesisConfig(tmp_path, **{name: 0})
