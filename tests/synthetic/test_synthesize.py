import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fit3d_ns.cli.synthesize import main
from fit3d_ns.data.colmap import read_colmap
from fit3d_ns.data.frames import CaptureFiles, Frame
from fit3d_ns.data.images import load_depth, load_image, load_mask
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.geometry.cameras import project_points, viewmats_from_camera_to_worlds
from fit3d_ns.geometry.lenses import Lens
from fit3d_ns.geometry.undistortion import compute_undistortion
from fit3d_ns.synthetic import synthesize as synthetic
from fit3d_ns.synthetic.rooms import build_room
from fit3d_ns.synthetic.scannetpp_writer import compute_quaternion
from fit3d_ns.synthetic.synthesize import SynthesisConfig, synthesize_scenes
from fit3d_ns.synthetic.views import RoomRenderer
from fit3d_ns.synthetic.walk import walk_through
from tests.unprojection import unproject_depth

SMALL = {"num_frames": 9, "width": 64, "height": 48, "num_points": 500}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "rooms"
    synthesize_scenes(SynthesisConfig(folder, num_scenes=1, **SMALL))
    return folder


@pytest.fixture(scope="module")
def capture(made: Path) -> CaptureFiles:
    return read_capture(made / "room_00")


@pytest.fixture(scope="module")
def renderer() -> RoomRenderer:
    return RoomRenderer(build_room(np.random.default_rng(4)))


def look_up(frame: Frame, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels (row, column) of world points, their z-depths, and which are in the picture."""
    pixels, depth = project_points(points, viewmats_from_camera_to_worlds(frame.camera_to_world), frame.lens.K)
    columns, rows = pixels.floor().long().T
    inside = (depth > 0) & (columns >= 0) & (columns < frame.lens.width) & (rows >= 0) & (rows < frame.lens.height)
    return torch.stack([rows, columns], dim=-1)[inside], depth, inside


def test_synthesize_scenes__is_read_as_scannetpp(made: Path, capture: CaptureFiles) -> None:
    assert capture.layout == "scannetpp" and "undistorted_images" in capture.description
    assert [frame.split for frame in capture.frames].count("test") == 1
    assert capture.points is not None and len(capture.points.xyz) == 500
    assert all(frame.depth_path is not None and frame.mask_path is not None for frame in capture.frames)
    lens = capture.frames[0].lens
    # Off the middle, as real lenses are, but by no more than 2 %.
    assert 0.0 < abs(lens.cx - 32.0) <= 0.02 * 64 + 1e-3 and 0.0 < abs(lens.cy - 24.0) <= 0.02 * 48 + 1e-3
    dslr = made / "room_00" / "dslr"
    for kind in ("images", "anon_masks"):
        for path in (dslr / f"undistorted_{kind}").iterdir():
            assert path.read_bytes() == (dslr / f"resized_{kind}" / path.name).read_bytes()


def test_synthesize_scenes__points_lie_on_the_surfaces_that_the_depth_maps_show(capture: CaptureFiles) -> None:
    assert capture.points is not None
    agreeing = seen = 0
    for frame in capture.frames:
        assert frame.depth_path is not None
        pixels, depth, inside = look_up(frame, capture.points.xyz)
        depth_map = load_depth(frame.depth_path)
        measured = depth_map[pixels[:, 0], pixels[:, 1]]
        nearest = -torch.nn.functional.max_pool2d(-depth_map[None, None], 3, 1, 1)[0, 0]
        # Points may be hidden, never float in front of what the camera sees there; pixel centres miss thin things.
        in_front = depth[inside] < nearest[pixels[:, 0], pixels[:, 1]] - 0.02
        agreeing += int(((depth[inside] - measured).abs() < 0.05).sum())
        seen += int(inside.sum())
        assert in_front.float().mean() < 0.02
    assert agreeing / seen > 0.6


def test_synthesize_scenes__views_agree_in_colour_and_depth(capture: CaptureFiles) -> None:
    first, second = capture.frames[0], capture.frames[1]
    assert first.depth_path is not None and second.depth_path is not None
    depth = load_depth(first.depth_path)
    points = unproject_depth(depth, first.camera_to_world, first.lens.K).reshape(-1, 3)
    pixels, moved_depth, inside = look_up(second, points)
    other = load_depth(second.depth_path)[pixels[:, 0], pixels[:, 1]]
    same = (moved_depth[inside] - other).abs() < 0.02
    assert same.float().mean() > 0.5
    colours = load_image(first.image_path).reshape(-1, 3)[inside][same].float()
    expected = load_image(second.image_path)[pixels[:, 0], pixels[:, 1]][same].float()
    shuffled = expected[torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))]
    difference = (colours - expected).abs().mean()
    # 64x48 pixels are coarse beside the textures: what counts is that warping explains most of the difference.
    assert difference < 0.35 * (colours - shuffled).abs().mean()


def test_synthesize_scenes__labels_and_masks(made: Path, capture: CaptureFiles) -> None:
    dslr = made / "room_00" / "dslr"
    classes = json.loads((dslr / "classes.json").read_text())
    assert classes["ignore_index"] == 255 and "chair" in classes["classes"]
    hidden = 0
    for frame in capture.frames:
        assert frame.mask_path is not None
        labels = load_image(dslr / "labels" / f"{frame.image_path.stem}.png")[..., 0]
        mask = load_mask(frame.mask_path)
        assert torch.equal(labels == 255, ~mask)
        assert int(labels[mask].max()) < len(classes["classes"])
        hidden += int((~mask).sum())
        if not mask.all():
            assert frame.split == "train"
            # A flat grey box, far from its border to be clear of JPEG's ringing.
            inner = torch.nn.functional.max_pool2d(mask.float()[None, None], 5, 1, 2)[0, 0] == 0
            assert (load_image(frame.image_path)[inner].float() - 128).abs().max() < 12
    assert hidden > 0


def test_synthesize_scenes__labels_belong_to_the_geometry(made: Path, capture: CaptureFiles) -> None:
    classes = json.loads((made / "room_00" / "dslr" / "classes.json").read_text())["classes"]
    for frame in capture.frames[:3]:
        assert frame.depth_path is not None
        labels = load_image(made / "room_00" / "dslr" / "labels" / f"{frame.image_path.stem}.png")[..., 0]
        points = unproject_depth(load_depth(frame.depth_path), frame.camera_to_world, frame.lens.K)
        # In the transforms' world up is -z: the floor is at 0, and nothing else is as low.
        height = -points[..., 2]
        assert height[labels == classes.index("floor")].abs().max() < 0.01
        assert height[labels == classes.index("table")].min() > -0.01
        assert height[labels == classes.index("table")].max() < 0.75


def test_synthesize_scenes__same_seed_same_files(made: Path, tmp_path: Path) -> None:
    synthesize_scenes(SynthesisConfig(tmp_path / "again", num_scenes=1, **SMALL))
    files = sorted(path.relative_to(made) for path in (made / "room_00").rglob("*") if path.is_file())
    assert len(files) == 9 * 6 + 7
    for path in files:
        assert (made / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


def test_synthesize_scenes__colmap_files_describe_the_same_cameras(made: Path, capture: CaptureFiles) -> None:
    pytest.importorskip("pycolmap")
    scene = made.parent / "as_colmap"
    (scene / "sparse").mkdir(parents=True)
    os.symlink(made / "room_00" / "dslr" / "colmap", scene / "sparse" / "0")
    os.symlink(made / "room_00" / "dslr" / "resized_images", scene / "images")
    by_name = {frame.image_path.name: frame for frame in capture.frames}
    colmap = read_colmap(scene)
    assert colmap.points is not None and capture.points is not None
    for frame in colmap.frames:
        expected = by_name[frame.image_path.name]
        assert frame.lens == expected.lens
        seen, _ = project_points(colmap.points.xyz, viewmats_from_camera_to_worlds(frame.camera_to_world), frame.lens.K)
        wanted, depth = project_points(
            capture.points.xyz, viewmats_from_camera_to_worlds(expected.camera_to_world), frame.lens.K
        )
        # float32 poses; points beside the camera project to far away.
        ahead = depth > 0.3
        torch.testing.assert_close(seen[ahead], wanted[ahead], atol=2e-2, rtol=1e-4)


def test_render__depth_of_the_floor_has_the_closed_form(renderer: RoomRenderer) -> None:
    lens = Lens(40.0, 40.0, 33.1, 23.2, 64, 48)
    pose = walk_through((5.0, 5.0, 2.6), 8, 0.0)[3]
    view = renderer.render(pose, lens)
    floor = view.labels == 1
    assert floor.sum() > 50
    points = unproject_depth(view.depth, pose, lens.K)
    assert points[floor][:, 2].abs().max() < 1e-4
    torch.testing.assert_close(points, view.points, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "lens",
    [
        Lens(55.0, 55.0, 50.5, 35.0, 96, 72, "fisheye", (0.03, -0.01, 0.0, 0.0)),
        Lens(70.0, 70.0, 45.5, 38.0, 96, 72, "opencv", (-0.15, 0.03, 0.001, -0.002)),
    ],
    ids=["fisheye", "opencv"],
)
def test_render__undistorted_photographs_equal_pinhole_ones(renderer: RoomRenderer, lens: Lens) -> None:
    pose = walk_through((5.0, 5.0, 2.6), 8, 0.0)[5]
    undistortion = compute_undistortion(lens)
    photograph = renderer.render(pose, lens)
    pinhole = renderer.render(pose, undistortion.lens)
    moved = undistortion.apply_to_image(photograph.image)

    def compute_error(shift: float) -> float:
        """Mean difference to what a pinhole camera sees whose principal point is off by `shift` columns and rows."""
        shifted = replace(undistortion.lens, cx=undistortion.lens.cx + shift, cy=undistortion.lens.cy + shift)
        return float((moved - renderer.render(pose, shifted).image)[4:-4, 4:-4].abs().mean())

    # Interpolating once costs some sharpness; half a pixel of shift, OpenCV's other convention, costs far more.
    error = compute_error(0.0)
    assert error < 0.05
    assert error < 0.65 * min(compute_error(0.5), compute_error(-0.5))
    depth = undistortion.apply_to_depth(photograph.depth)
    close = ((depth - pinhole.depth).abs() < 0.03 * pinhole.depth).float().mean()
    assert close > 0.93


def test_synthesize_scenes__refuses_full_folders_and_replaces_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "_synthesize_scene", make_stub_scene)
    target = tmp_path / "rooms"
    synthesize_scenes(SynthesisConfig(target))
    with pytest.raises(ValueError, match="is not empty; choose another --output-dir or add --overwrite"):
        synthesize_scenes(SynthesisConfig(target))
    (target / "stale").touch()
    synthesize_scenes(SynthesisConfig(target, overwrite=True))
    assert not (target / "stale").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="was not made by fit3d-synthesize"):
        synthesize_scenes(SynthesisConfig(tmp_path / "home", overwrite=True))
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_synthesize_scenes__leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail_at_the_second(config: SynthesisConfig, index: int, folder: Path) -> dict[str, object]:
        if index == 1:
            raise error
        return make_stub_scene(config, index, folder)

    monkeypatch.setattr(synthetic, "_synthesize_scene", fail_at_the_second)
    with pytest.raises((KeyboardInterrupt, ValueError), match="No space left for .*rooms|^$"):
        synthesize_scenes(SynthesisConfig(tmp_path / "rooms"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["num_scenes", "num_frames", "width", "height", "num_points"])
def test_synthesis_config__refuses_numbers_that_make_no_scene(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least"):
        SynthesisConfig(tmp_path, **{name: 0})


def test_main__makes_fisheye_scenes_and_says_where_the_figures_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "rooms"
    flags = "--num-scenes 1 --num-frames 3 --width 32 --height 24 --num-points 50 --seed 3 --lens fisheye".split()
    monkeypatch.setattr("sys.argv", ["fit3d-synthesize", "--output-dir", str(target), *flags])
    main()
    figures = json.loads((target / "synthesis.json").read_text())
    assert figures["seed"] == 3 and figures["scenes"][0]["train_frames"] == 2
    assert sum(figures["scenes"][0]["class_shares"].values()) == pytest.approx(1.0, abs=2e-3)
    assert str(target / "synthesis.json") in capsys.readouterr().out
    capture = read_capture(target / "room_00")
    assert "because nerfstudio/transforms_undistorted.json is missing" in capture.description
    assert {frame.lens.model for frame in capture.frames} == {"fisheye"}
    assert [frame.split for frame in capture.frames] == ["train", "train", "test"]
    assert all(frame.depth_path is not None for frame in capture.frames)
    assert compute_undistortion(capture.frames[0].lens).inside.all()
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 1
    assert "is not empty" in capsys.readouterr().err


def test_compute_quaternion__matches_scipy() -> None:
    rotation_class = pytest.importorskip("scipy.spatial.transform").Rotation
    for rotation in rotation_class.random(20, random_state=0):
        x, y, z, w = rotation.as_quat()
        expected = np.array([w, x, y, z]) * np.sign(w)
        np.testing.assert_allclose(compute_quaternion(rotation.as_matrix()), expected, atol=1e-12)


def make_stub_scene(config: SynthesisConfig, index: int, folder: Path) -> dict[str, object]:
    """Stands in for photographing a room where only the handling of folders is tested."""
    (folder / f"room_{index:02d}").mkdir(parents=True)
    return {"name": f"room_{index:02d}"}
