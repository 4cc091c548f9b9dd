"""Cameras of photographs that have none: pictures of a room made here, against the cameras that took them."""

import cv2
import numpy as np
import pytest
import torch

from fit3d_ns.cli import prepare
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.geometry.cameras import camera_to_worlds_from_viewmats

WIDTH, HEIGHT, FOCAL = 480, 360, 420.0
HALF_SIDES = np.array([3.0, 2.0, 4.0])


def _create_viewmats(number):
    """Cameras that walk through the room and turn, OpenCV's axes."""
    viewmats = []
    for step in np.linspace(-1, 1, number):
        yaw = 0.3 * step
        rotation = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
        position = np.array([1.2 * step, 0.4 * np.sin(3 * step), -1.0 + 0.5 * step * step])
        viewmats.append(np.vstack([np.column_stack([rotation, -rotation @ position]), [0, 0, 0, 1]]))
    return np.stack(viewmats)


def _photograph(viewmat, textures):
    """A picture of the inside of a box, whose walls have textures, by the ray of each pixel."""
    rotation, position = viewmat[:3, :3], -viewmat[:3, :3].T @ viewmat[:3, 3]
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    rays = np.stack([(x - WIDTH / 2) / FOCAL, (y - HEIGHT / 2) / FOCAL, np.ones_like(x)], axis=-1) @ rotation
    reach = (np.where(rays > 0, HALF_SIDES, -HALF_SIDES) - position) / np.where(rays == 0, 1e-9, rays)
    wall = reach.argmin(axis=-1)
    points = position + rays * reach.min(axis=-1)[..., None]
    picture = np.zeros((HEIGHT, WIDTH), np.float32)
    for axis in range(3):
        u, v = (points[..., other] for other in range(3) if other != axis)
        for side in range(2):
            seen = (wall == axis) & ((points[..., axis] > 0) == bool(side))
            maps = ((u + 4) * 100).astype(np.float32), ((v + 4) * 100).astype(np.float32)
            picture[seen] = cv2.remap(textures[2 * axis + side], *maps, cv2.INTER_LINEAR)[seen]
    return picture


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder of photographs alone, and the cameras that took them."""
    folder, generator = tmp_path_factory.mktemp("room") / "photos", np.random.default_rng(0)
    folder.mkdir()
    textures = []
    for _ in range(6):
        layers = [cv2.resize(generator.random((n, n), np.float32), (800, 800)) for n in (20, 60, 200)]
        textures.append(255 * sum(layers) / 3)
    viewmats = _create_viewmats(10)
    for index, viewmat in enumerate(viewmats):
        cv2.imwrite(str(folder / f"{index}.png"), _photograph(viewmat, textures))
    return folder, viewmats


def test_prepare_photos__finds_the_cameras_that_took_them(room, capsys):
    folder, viewmats = room
    prepare.main(["photos", str(folder)])
    assert "10 of 10 photographs have cameras" in capsys.readouterr().out
    capture = read_capture(folder)
    names = [frame.image_path.name for frame in capture.frames]
    assert names == [f"{index}.png" for index in range(10)]
    found = torch.stack([frame.camera_to_world for frame in capture.frames]).double()
    truth = camera_to_worlds_from_viewmats(torch.from_numpy(viewmats))
    # Its world lies anywhere and has any scale: relative turns, and ratios of distances, are what it must find.
    for first, second in ((0, 9), (2, 5), (4, 7)):
        turns = [poses[first, :3, :3].T @ poses[second, :3, :3] for poses in (found, truth)]
        torch.testing.assert_close(turns[0], turns[1], rtol=0, atol=0.01)
    distances = [torch.cdist(poses[:, :3, 3], poses[:, :3, 3]) for poses in (found, truth)]
    ratios = (distances[0] / distances[1])[distances[1] > 0.3]
    assert float(ratios.std() / ratios.mean()) < 0.01
    focal = float(capture.frames[0].lens.fx)
    assert focal == pytest.approx(FOCAL, rel=0.02)
    assert {frame.lens for frame in capture.frames} == {capture.frames[0].lens}
    with pytest.raises(SystemExit) as stopped:
        prepare.main(["photos", str(folder)])
    assert "--overwrite finds them again" in capsys.readouterr().err and stopped.value.code != 0


def test_prepare_photos__says_where_nothing_can_be_connected(tmp_path, capsys):
    for index in range(3):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((120, 160, 3), 60 * index, np.uint8))
    with pytest.raises(SystemExit):
        prepare.main(["photos", str(tmp_path)])
    assert "could be connected; take more, with more overlap" in capsys.readouterr().err
    assert not (tmp_path / "sparse").exists()
    for name, words, sentence in (
        ("a.webp", [], "COLMAP does not read a.webp; convert"),
        ("transforms.json", ["--overwrite"], "transforms.json is there already: cameras are known; move it away first"),
        ("notes.txt", ["--depth-only"], "--depth-only and --jobs are for ScanNet++"),
    ):
        (tmp_path / name).write_bytes((tmp_path / "2.png").read_bytes())
        with pytest.raises(SystemExit):
            prepare.main(["photos", str(tmp_path), *words])
        assert sentence in capsys.readouterr().err
        (tmp_path / name).unlink()
    (tmp_path / "masks").mkdir()
    (tmp_path / "2.png").rename(tmp_path / "masks/2.png")
    for folder, sentence in ((tmp_path, "has 2 photographs"), (tmp_path / "absent", "absent does not exist")):
        with pytest.raises(SystemExit):
            prepare.main(["photos", str(folder)])
        assert sentence in capsys.readouterr().err
