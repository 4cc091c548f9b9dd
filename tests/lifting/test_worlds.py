"""Worlds of splats: found from files, from the cameras, or given; a wrong one never passes in silence."""

import json
import math

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from scipy.spatial.transform import Rotation

from fit3d_ns.data.capture_checks import check_capture
from fit3d_ns.data.frames import PointCloud
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.data.ply import read_ply_elements
from fit3d_ns.lifting.ply_sources import read_ply_source
from fit3d_ns.lifting.sources import PlyConfig, compare_with_photographs
from fit3d_ns.lifting.worlds import WorldChange, find_changes, invert_similarity, read_similarity
from tests.lift_capture import move_gaussians, write_capture, write_gaussians


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    root = tmp_path_factory.mktemp("worlds") / "room"
    return root, write_capture(root)


def test_world_change__composes_and_inverts():
    generator = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    rotation = rotation * torch.linalg.det(rotation)
    matrix = torch.cat([rotation * 2.5, torch.randn(3, 1, generator=generator)], dim=1)
    second = WorldChange(torch.cat([rotation.T @ rotation.T, torch.ones(3, 1)], dim=1), 0.4)
    points = torch.randn(7, 3, generator=generator)
    change = second.after(invert_similarity(matrix, "test"))
    before = points @ matrix[:, :3].T + matrix[:, 3]
    expected = (points @ (rotation.T @ rotation.T).T + 1.0) * 0.4
    found = (before @ change.transform[:, :3].T + change.transform[:, 3]) * change.scale
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_invert_similarity__refuses_mirrors_and_shears():
    with pytest.raises(ValueError, match="mirrors"):
        invert_similarity(torch.diag(torch.tensor([1.0, 1.0, -1.0, 0.0]))[:3], "x.json")
    with pytest.raises(ValueError, match="not a rotation with one scale"):
        invert_similarity(torch.diag(torch.tensor([1.0, 2.0, 1.0, 0.0]))[:3], "x.json")


def apply(change, points):
    return (points @ change.transform[:, :3].T + change.transform[:, 3]) * change.scale


def write_matrix(path, matrix):
    if path.suffix == ".npy":
        np.save(path, matrix)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"transform": matrix.tolist()}))
    else:
        np.savetxt(path, matrix)
    return path


ANGLE, SCALE, SHIFT = 0.7, 0.35, np.array([0.4, -1.0, 0.2])
ROTATION = np.array([[math.cos(ANGLE), -math.sin(ANGLE), 0], [0, 0, -1], [math.sin(ANGLE), math.cos(ANGLE), 0]])
MATRIX = np.vstack([np.column_stack([SCALE * ROTATION, SCALE * SHIFT]), [0, 0, 0, 1]])


@pytest.mark.parametrize("is_moved", [True, False])
def test_far_world__takes_splats_of_its_own_place_and_of_ours(tmp_path, is_moved):
    """A splat beside cameras that are far from the origin, and one that was exported from what we made of them."""
    raw, offset = write_capture(tmp_path / "room"), np.array([5000.0, 3000.0, 0.0])
    content = json.loads((tmp_path / "room/transforms.json").read_text())
    for frame in content["frames"]:
        for row, shift in zip(frame["transform_matrix"], offset, strict=False):
            row[3] += shift
    (tmp_path / "room/transforms.json").write_text(json.dumps(content))
    ply = write_gaussians(tmp_path / "far.ply", move_gaussians(raw, np.eye(3), offset * is_moved, 1.0))
    source = read_ply_source(ply, tmp_path / "room", PlyConfig())
    assert compare_with_photographs(source).psnr > 40


@pytest.mark.parametrize("name", ["m.txt", "m.npy", "m.json"])
@pytest.mark.parametrize("is_inverse", [False, True])
def test_ply_transform__takes_the_splat_to_its_photographs(capture, tmp_path, name, is_inverse):
    root, raw = capture
    ply = write_gaussians(tmp_path / "moved.ply", move_gaussians(raw, ROTATION, SHIFT, SCALE))
    path = write_matrix(tmp_path / name, np.linalg.inv(MATRIX) if is_inverse else MATRIX)
    source = read_ply_source(ply, root, PlyConfig(ply_transform=path))
    assert compare_with_photographs(source).psnr > 30


@pytest.mark.parametrize(
    ("factor", "shift"), [(1.2, 0.0), (0.8, 0.0), (1.1, 0.0), (1.0, 0.1), (1.0, -0.1)], ids=lambda value: f"{value:g}"
)
def test_ply_transform__a_scale_or_a_place_that_is_off_a_little_is_refused(capture, tmp_path, factor, shift):
    root, raw = capture
    ply = write_gaussians(tmp_path / "moved.ply", move_gaussians(raw, ROTATION, SHIFT, SCALE))
    wrong = MATRIX.copy()
    wrong[:3, :3] *= factor
    # The room is 6 m across.
    wrong[:3, 3] += SCALE * shift * np.array([1.0, 0.0, 1.0])
    path = write_matrix(tmp_path / "wrong.txt", wrong)
    with pytest.raises(ValueError, match="moved by wrong.txt (is not where the cameras|does not show what)"):
        read_ply_source(ply, root, PlyConfig(ply_transform=path))
    read_ply_source(ply, root, PlyConfig(ply_transform=path, smallest_psnr=0.0))


@pytest.mark.parametrize(
    ("rotvec", "shift", "scale", "with_points"),
    [
        ((0.05, -0.08, 0.06), (0.2, -0.1, 0.1), 1.15, False),
        ((math.pi / 2, 0.0, 0.05), (0.0, 0.1, 0.0), 0.9, False),
        # Any size and place, by the seed points.
        ((0.0, 0.0, math.pi / 2), (5.0, -3.0, 2.0), 7.0, True),
    ],
)
def test_align__finds_where_a_splat_lies(tmp_path, capsys, rotvec, shift, scale, with_points):
    root = tmp_path / "room"
    raw = write_capture(root)
    if with_points:
        write_gaussians(root / "points.ply", raw)
        content = json.loads((root / "transforms.json").read_text())
        (root / "transforms.json").write_text(json.dumps({**content, "ply_file_path": "points.ply"}))
    rotation = Rotation.from_rotvec(rotvec).as_matrix()
    ply = write_gaussians(tmp_path / "moved.ply", move_gaussians(raw, rotation, np.array(shift), scale))
    if scale != 0.9:  # On its side, by chance, this one is as good as many a right splat, and nothing nearby is better.
        with pytest.raises(ValueError, match=r"moved.ply .* (does not show|is not where the cameras)"):
            read_ply_source(ply, root, PlyConfig())
    source = read_ply_source(ply, root, PlyConfig(align=True))
    assert f"{ply} is aligned" in capsys.readouterr().err
    assert compare_with_photographs(source).psnr > 30
    capture = source.capture
    assert capture.dataparser_scale == pytest.approx(scale, rel=1e-2)
    np.testing.assert_allclose(capture.dataparser_transform[:, :3], rotation, atol=1e-2)
    np.testing.assert_allclose(capture.dataparser_transform[:, 3], shift, atol=2e-2)


def test_align__says_where_nothing_fits(capture, tmp_path):
    root, raw = capture
    ply = write_gaussians(tmp_path / "other.ply", {**raw, "sh_dc": raw["sh_dc"].roll(7, dims=0) * -1.5})
    with pytest.raises(ValueError, match="other.ply, aligned, does not show what the photographs of"):
        read_ply_source(ply, root, PlyConfig(align=True, smallest_psnr=20.0))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("1 2 3\n4 5 6\n", r"shape \(2, 3\)"),
        ("one\n", "does not hold a 4x4 matrix"),
        ("1 0 0 0\n0 2 0 0\n0 0 1 0\n", "one scale"),
    ],
)
def test_read_similarity__refuses_what_is_none(tmp_path, content, sentence):
    (tmp_path / "m.txt").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_similarity(tmp_path / "m.txt")
    with pytest.raises(ValueError, match="No such file: .*absent.txt"):
        read_similarity(tmp_path / "absent.txt")
    np.save(tmp_path / "m.npy", np.eye(4))
    (tmp_path / "m.npy").write_bytes((tmp_path / "m.npy").read_bytes().replace(b"}", b"{", 1))
    with pytest.raises(ValueError, match="does not hold a 4x4 matrix"):
        read_similarity(tmp_path / "m.npy")


def test_training_world__is_nerfstudios_default_where_no_run_says_otherwise(capture, tmp_path, capsys):
    root, raw = capture
    outputs = NerfstudioDataParserConfig(data=root, load_3D_points=False).setup().get_dataparser_outputs("train")
    # nerfstudio folds applied_transform into what it reports; the file of the run begins at COLMAP's world then.
    to_world = torch.from_numpy(
        np.vstack([json.loads((root / "transforms.json").read_text())["applied_transform"], [0, 0, 0, 1]])
    )
    found = outputs.dataparser_transform.double() @ torch.linalg.inv(to_world)
    (change,) = find_changes("training", read_capture(root), tmp_path / "absent.json")
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    expected = apply(WorldChange(found.float(), outputs.dataparser_scale), points)
    torch.testing.assert_close(apply(change, points), expected, rtol=1e-4, atol=1e-4)
    rotation, shift = found[:, :3].numpy(), found[:, 3].numpy()
    ply = write_gaussians(tmp_path / "run.ply", move_gaussians(raw, rotation, shift, outputs.dataparser_scale))
    source = read_ply_source(ply, root, PlyConfig(ply_world="training"))
    assert compare_with_photographs(source).psnr > 30
    assert "dataparser_transforms.json (--dataparser-transforms names another place)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="There is no .*elsewhere; give the run's folder"):
        read_ply_source(ply, root, PlyConfig(ply_world="training", dataparser_transforms=tmp_path / "elsewhere"))


def test_gsplat_world__is_found_from_cameras_and_points(capture):
    """The normalisation of gsplat's example trainer, step by step in numpy."""
    root, _ = capture
    files = read_capture(root)
    points = np.random.default_rng(4).normal(size=(200, 3)) * [3.0, 1.5, 0.4]
    cloud = PointCloud(torch.from_numpy(points), torch.zeros(200, 3, dtype=torch.uint8))
    files = check_capture(type(files)(**{**vars(files), "points": cloud, "colmap_to_world": None}))
    poses = np.stack([frame.camera_to_world.double().numpy() for frame in files.frames])
    up = poses[:, :, 1].mean(axis=0)
    up /= np.linalg.norm(up)
    # The smallest rotation from `up` to -y.
    axis = np.cross(up, [0.0, -1.0, 0.0])
    angle = math.acos(-up[1])
    turn = rotate(axis / np.linalg.norm(axis), angle)
    centres = poses[:, :, 3] @ turn.T
    forward = -poses[:, :, 2] @ turn.T
    focus = np.median([t - (f @ t) * f for t, f in zip(centres, forward, strict=True)], axis=0)
    scale = 1.0 / np.median(np.linalg.norm(centres - focus, axis=1))
    upright = (points @ turn.T - focus) * scale
    centre = np.median(upright, axis=0)
    _, _, axes = np.linalg.svd(upright - upright.mean(axis=0), full_matrices=False)
    expected = (upright - centre) @ axes.T
    changes = find_changes("gsplat", files, root / "absent.json")
    assert len(changes) == 5
    given = torch.from_numpy(points).float()
    torch.testing.assert_close(apply(changes[0], given), torch.from_numpy(upright).float(), rtol=1e-3, atol=1e-4)
    # Axes are known up to their signs, of which four leave the world unmirrored.
    found = [apply(change, given).numpy() for change in changes[1:]]
    for candidate in found:
        np.testing.assert_allclose(np.abs(candidate), np.abs(expected), rtol=1e-3, atol=1e-3)
    assert len({tuple(np.sign(candidate[0])) for candidate in found}) == 4


def rotate(axis, angle):
    from scipy.spatial.transform import Rotation

    return Rotation.from_rotvec(axis * angle).as_matrix()


def test_quaternions_in_another_order__are_recognised(capture, tmp_path, capsys):
    root, raw = capture
    # Long Gaussians, whose direction shows.
    raw = {**raw, "log_scales": raw["log_scales"] + torch.tensor([0.4, 0.0, -1.2])}
    photographed = write_photographs(tmp_path / "room", root, raw)
    ply = write_gaussians(tmp_path / "xyzw.ply", {**raw, "quats": raw["quats"][:, [1, 2, 3, 0]]})
    source = read_ply_source(ply, photographed, PlyConfig())
    assert "are in the order xyzw" in capsys.readouterr().err
    assert compare_with_photographs(source).psnr > 30


def write_photographs(scene, root, raw):
    """The same cameras with photographs of other Gaussians."""
    import shutil

    from PIL import Image

    from tests.lift_capture import render

    shutil.copytree(root, scene)
    for frame in json.loads((scene / "transforms.json").read_text())["frames"]:
        image = render(raw, torch.tensor(frame["transform_matrix"])[:3])
        Image.fromarray((image * 255).round().byte().numpy()).save(scene / frame["file_path"])
    return scene


@pytest.mark.parametrize("num_points", [0, 1, 3])
def test_gsplat_world__does_without_axes_where_there_are_too_few_points(capture, num_points):
    root, _ = capture
    files = read_capture(root)
    cloud = PointCloud(torch.ones(num_points, 3), torch.zeros(num_points, 3, dtype=torch.uint8))
    files = type(files)(**{**vars(files), "points": cloud if num_points else None})
    assert len(find_changes("gsplat", files, root / "absent.json")) == 1


@pytest.mark.parametrize("is_turned", [False, True])
def test_spz__is_found_with_either_direction_of_its_axes(capture, tmp_path, monkeypatch, is_turned):
    root, raw = capture
    # As Niantic's tools make it of a PLY (y down, z forward), and as others do.
    half_turn = np.diag([1.0, -1.0, -1.0]) if is_turned else np.eye(3)
    ply = write_gaussians(tmp_path / "a.ply", move_gaussians(raw, half_turn, np.zeros(3), 1.0))
    vertices = read_ply_elements(ply)["vertex"]
    monkeypatch.setattr("fit3d_ns.scene.ply.read_spz", lambda path: vertices)
    assert compare_with_photographs(read_ply_source(tmp_path / "a.spz", root, PlyConfig())).psnr > 30
