"""`fit3d-prepare scannetpp` on a miniature of the official download whose depth and classes have closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from plyfile import PlyData, PlyElement

from fit3d_ns.cli import prepare
from fit3d_ns.probing.datasets import read_labelled_set
from fit3d_ns.probing.datasets import scannetpp_maps as maps
from fit3d_ns.utils.results import load_result

WIDTH, HEIGHT, FOCAL, CENTRE = 96, 64, 50.0, (47.3, 32.6)
DISTORTION = (-0.03, -0.004, -0.002, 0.0005)
ROOM = np.array([[0.0, 0.0, 0.0], [5.0, 4.0, 2.6]])
TABLE = np.array([[2.0, 1.5, 0.0], [3.1, 2.2, 0.8]])
CLASSES = ["wall", "ceiling", "floor", "table"]
WALL, CEILING, FLOOR, DESK = range(4)
TO_WORLD = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""From the mesh's world to that of the transforms file."""


def place_cameras(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Centres and world-to-camera rotations (OpenCV) in the mesh's world, z up."""
    cameras = []
    for index in range(count):
        angle = 0.4 + 2.1 * index
        forward = np.array([np.cos(angle), np.sin(angle), -0.35])
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        centre = np.array([2.5 - 1.4 * np.cos(angle), 2.0 - 1.2 * np.sin(angle), 1.5])
        cameras.append((centre, np.stack([right, np.cross(forward, right), forward])))
    return cameras


def compute_rays() -> np.ndarray:
    """(x, y, 1) of all pixels: theta of r = theta (1 + k1 theta^2 + ...) by Newton's method."""
    columns, rows = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    x, y = (columns - CENTRE[0]) / FOCAL, (rows - CENTRE[1]) / FOCAL
    r = np.hypot(x, y)
    theta, powers = r.copy(), np.arange(1, 10, 2)
    k = np.array([1.0, *DISTORTION])
    for _ in range(20):
        value = (k * theta[..., None] ** powers).sum(axis=-1) - r
        theta -= value / (k * powers * theta[..., None] ** (powers - 1)).sum(axis=-1)
    return np.stack([x * np.tan(theta) / r, y * np.tan(theta) / r, np.ones_like(r)], axis=-1)


def compute_truth(centre: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth and classes of the room and its table, by slabs."""
    rays = compute_rays() @ rotation
    with np.errstate(divide="ignore"):
        low, high = ((bounds - centre) / rays for bounds in ROOM)
        enter, leave = np.sort([(bounds - centre) / rays for bounds in TABLE], axis=0)
    exits = np.maximum(low, high)
    depth, axis = exits.min(axis=-1), exits.argmin(axis=-1)
    labels = np.where(axis < 2, WALL, np.where(rays[..., 2] > 0, CEILING, FLOOR))
    table = np.where(enter.max(axis=-1) < leave.min(axis=-1), enter.max(axis=-1), np.inf)
    is_table = (table > 0) & (table < depth)
    return np.where(is_table, table, depth), np.where(is_table, DESK, labels)


def build_mesh() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corners, triangles, and the side of room (0-5) or table (6-11) that a corner belongs to; -x +x -y +y -z +z."""
    points, faces, sides = [], [], []
    for number, box in enumerate((ROOM, TABLE)):
        for axis in range(3):
            for end in range(2):
                u, v = np.meshgrid(np.linspace(0, 1, 9), np.linspace(0, 1, 7))
                spots = np.zeros((63, 3))
                spots[:, axis], spots[:, axis - 2], spots[:, axis - 1] = end, u.ravel(), v.ravel()
                corner = (np.arange(63).reshape(7, 9)[:-1, :-1]).reshape(-1, 1) + sum(map(len, points))
                points.append(box[0] + spots * (box[1] - box[0]))
                faces += [corner + [0, 1, 10], corner + [0, 10, 9]]
                sides.append(np.full(63, 6 * number + 2 * axis + end))
    return np.concatenate(points), np.concatenate(faces), np.concatenate(sides)


@pytest.fixture
def download(tmp_path: Path) -> Path:
    root = tmp_path / "scannetpp"
    scene = root / "data/0a5c013435"
    for folder in (scene / "dslr/nerfstudio", scene / "dslr/resized_images", scene / "scans"):
        folder.mkdir(parents=True)
    frames = []
    for index, (centre, rotation) in enumerate(place_cameras(5)):
        name = f"DSC{index:05d}.JPG"
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = TO_WORLD @ rotation.T * [1.0, -1.0, -1.0], TO_WORLD @ centre
        frames.append({"file_path": name, "transform_matrix": pose.tolist(), "is_bad": index == 4})
        Image.new("RGB", (WIDTH, HEIGHT)).save(scene / "dslr/resized_images" / name)
    camera = {"fl_x": FOCAL, "fl_y": FOCAL, "cx": CENTRE[0], "cy": CENTRE[1], "w": WIDTH, "h": HEIGHT}
    camera |= dict(zip(("k1", "k2", "k3", "k4"), DISTORTION, strict=True)) | {"camera_model": "OPENCV_FISHEYE"}
    lists = {"frames": frames[:3], "test_frames": frames[3:], "has_mask": False}
    (scene / "dslr/nerfstudio/transforms.json").write_text(json.dumps(camera | lists))
    points, faces, sides = build_mesh()
    trimesh.Trimesh(points, faces, process=False).export(scene / "scans/mesh_aligned_0.05.ply")
    # Segments' numbers are arbitrary; the table is in the room's wall too, and the smaller object counts.
    groups = [
        ("office desk", range(6, 12)),
        ("wall", (0, 1, 2, 3, 6, 7, 8, 9, 10, 11)),
        ("CEILING", [5]),
        ("floor", [4]),
    ]
    groups = [
        {"id": i, "label": label, "segments": [7 + 3 * side for side in own]} for i, (label, own) in enumerate(groups)
    ]
    (scene / "scans/segments.json").write_text(json.dumps({"segIndices": (7 + 3 * sides).tolist()}))
    (scene / "scans/segments_anno.json").write_text(json.dumps({"segGroups": groups}))
    metadata = root / "metadata/semantic_benchmark"
    metadata.mkdir(parents=True)
    (metadata / "top100.txt").write_text("\n".join(CLASSES) + "\n")
    (metadata / "map_benchmark.csv").write_text(
        "class,count,semantic_map_to\nwall,9,\noffice desk,5,table\nCEILING,1,ceiling\nfloor,1,None\n"
    )
    return root


def test_prepare__maps_equal_the_closed_form_and_are_read_by_the_probes(download: Path, capsys) -> None:
    prepare.main(["scannetpp", str(download)])
    scene = download / "data/0a5c013435"
    seen = set()
    for index, camera in enumerate(place_cameras(4)):
        depth, labels = compute_truth(*camera)
        files = [scene / "dslr" / kind / f"DSC{index:05d}.png" for kind in ("render_depth", "labels")]
        made_depth, made_labels = (np.array(Image.open(path)).astype(np.int64) for path in files)
        # Half a millimetre may be rounded up or down.
        assert np.abs(made_depth - 1000.0 * depth).max() <= 0.5 + 1e-3
        # The benchmark's table takes the floor for none of the classes.
        np.testing.assert_array_equal(made_labels, np.where(labels == FLOOR, 255, labels))
        seen |= set(np.unique(made_labels))
    assert seen == {WALL, CEILING, DESK, 255}
    assert not (scene / "dslr/labels/DSC00004.png").exists()
    record = load_result(scene / "dslr/prepare.json")
    assert record.metrics["frames_made"] == 4 and record.metrics["covered"] == 1.0
    assert "4 of 4 frames" in capsys.readouterr().out
    # Readers undistort both, with the photographs.
    depths, labels = (read_labelled_set(scene, "train", task) for task in ("depth", "segmentation"))
    assert labels.class_names == tuple(CLASSES) and len(depths.frames) == len(labels.frames) == 3
    assert (depths.frames[0].load_depth() > 0).all()
    assert set(labels.frames[0].load_labels().unique().tolist()) <= seen


def test_prepare__labels_lie_on_the_fisheye_pictures_where_undistorted_ones_are_there_too(download: Path) -> None:
    prepare.main(["scannetpp", str(download), "--jobs", "1"])
    scene = download / "data/0a5c013435"
    expected = read_labelled_set(scene, "train", "segmentation").frames[0].load_labels()
    dslr = scene / "dslr"
    meta = json.loads((dslr / "nerfstudio/transforms.json").read_text())
    pinhole = {key: value for key, value in meta.items() if key[0] != "k"} | {"camera_model": "PINHOLE"}
    (dslr / "nerfstudio/transforms_undistorted.json").write_text(json.dumps(pinhole))
    (dslr / "undistorted_images").symlink_to(dslr / "resized_images")
    assert torch.equal(read_labelled_set(scene, "train", "segmentation").frames[0].load_labels(), expected)


def test_prepare__goes_on_where_it_was_stopped(download: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dslr, rendered = download / "data/0a5c013435/dslr", []
    render = maps.AnnotatedMesh.render

    def note(mesh, frame):
        rendered.append(frame.image_path.stem)
        return render(mesh, frame)

    save, saved = maps.save_index_map, []

    def stop(labels, path):
        # While the labels of the third frame are written, half of them.
        if len(saved) == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        saved.append(path)
        save(labels, path)

    monkeypatch.setattr(maps.AnnotatedMesh, "render", note)
    monkeypatch.setattr(maps, "save_index_map", stop)
    with pytest.raises(SystemExit):
        prepare.main(["scannetpp", str(download), "--jobs", "1"])
    assert [path.name for path in sorted(dslr.glob("labels/*.png"))] == ["DSC00000.png", "DSC00001.png"]
    assert not list(dslr.glob("*/.*")) and len(list(dslr.glob("render_depth/*"))) >= 3
    first = (dslr / "labels/DSC00000.png").stat().st_mtime_ns
    rendered.clear()
    monkeypatch.setattr(maps, "save_index_map", save)
    for _ in range(2):
        prepare.main(["scannetpp", str(download), "--jobs", "2"])
    assert sorted(rendered) == ["DSC00002", "DSC00003"]
    assert (dslr / "labels/DSC00000.png").stat().st_mtime_ns == first
    assert len(list(dslr.glob("labels/*.png"))) == len(list(dslr.glob("render_depth/*.png"))) == 4


def test_prepare__labels_of_the_semantic_mesh_stand_in_for_the_annotation(download: Path, capsys) -> None:
    """Each vertex has the number of a word, or -100; the table's word is renamed, the floor has none."""
    scene = download / "data/0a5c013435"
    for name in ("segments.json", "segments_anno.json"):
        (scene / "scans" / name).unlink()
    points, faces, sides = build_mesh()
    labels = np.select([sides >= 6, sides == 5, sides == 4], [3, 0, -100], 2)
    vertices = np.empty(len(points), [("x", "f4"), ("y", "f4"), ("z", "f4"), ("label", "i4")])
    vertices["x"], vertices["y"], vertices["z"], vertices["label"] = *points.T, labels
    triangles = np.empty(len(faces), [("vertex_indices", "i4", (3,))])
    triangles["vertex_indices"] = faces
    path = scene / "scans/mesh_aligned_0.05_semantic.ply"
    PlyData([PlyElement.describe(vertices, "vertex"), PlyElement.describe(triangles, "face")]).write(path)
    words = ["scannetpp", str(download)]
    with pytest.raises(SystemExit):
        prepare.main(words)
    assert "_semantic.ply or metadata/semantic_classes.txt is damaged" in capsys.readouterr().err
    (download / "metadata/semantic_classes.txt").write_text("CEILING\nlamp\nwall\noffice desk\n")
    prepare.main([*words, "--overwrite"])
    for index, camera in enumerate(place_cameras(4)):
        expected = compute_truth(*camera)[1]
        made = np.array(Image.open(scene / f"dslr/labels/DSC{index:05d}.png"))
        np.testing.assert_array_equal(made, np.where(expected == FLOOR, 255, expected))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("data/0a5c013435/scans/mesh_aligned_0.05.ply", "mesh_aligned_0.05.ply is missing"),
        ("data/0a5c013435/scans/segments_anno.json", "of the mesh alone: --depth-only"),
        ("metadata/semantic_benchmark/top100.txt", "give --classes"),
        ("data/0a5c013435/dslr/nerfstudio/transforms.json", "No camera file"),
    ],
)
def test_prepare__says_what_is_missing(download: Path, missing: str, message: str, capsys) -> None:
    (download / missing).unlink()
    with pytest.raises(SystemExit):
        prepare.main(["scannetpp", str(download)])
    assert message in capsys.readouterr().err
    assert not (download / "data/0a5c013435/dslr/render_depth").exists()


def test_prepare__other_classes_are_made_only_where_that_is_asked_for(download: Path, tmp_path: Path, capsys) -> None:
    scene, words = download / "data/0a5c013435", ["scannetpp", str(download)]
    prepare.main([*words, "--depth-only"])
    assert not (scene / "dslr/labels").exists()
    prepare.main(words)
    (tmp_path / "few.txt").write_text("table\nfloor\n")
    words += ["--classes", str(tmp_path / "few.txt"), "--scenes", "0a5c013435"]
    with pytest.raises(SystemExit):
        prepare.main(words)
    assert "--overwrite makes it again" in capsys.readouterr().err
    prepare.main([*words, "--overwrite"])
    assert set(np.unique(np.array(Image.open(scene / "dslr/labels/DSC00000.png")))) <= {1, 255}
    (scene / "scans/segments.json").write_text(json.dumps({"segIndices": [1, 2]}))
    with pytest.raises(SystemExit):
        prepare.main([*words, "--overwrite"])
    assert "has 2 vertices, the mesh 756" in capsys.readouterr().err
