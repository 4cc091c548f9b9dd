import math
import shutil
import struct
from pathlib import Path

import pytest
import torch

from fit3d_ns.data.colmap import _NUM_PARAMETERS, read_colmap_points, write_colmap_points
from fit3d_ns.data.frames import PointCloud
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.geometry.cameras import project_points, viewmats_from_camera_to_worlds
from tests.data.miniature_captures import HEIGHT, WIDTH, write_picture

pytest.importorskip("pycolmap")

XYZ = [[1.5, -2.0, 3.25], [0.0, 4.0, -1.0]]
RGB = [[1, 2, 3], [250, 128, 0]]
CLOUD = PointCloud(torch.tensor(XYZ), torch.tensor(RGB, dtype=torch.uint8))
NAMES = [f"{index}.png" for index in range(9)] + ["upper/9.png"]


def write_model(folder: Path, camera: str = f"PINHOLE {WIDTH} {HEIGHT} 10 11 5.5 4.25", points: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.txt").write_text(f"# comment\n1 {camera}\n")
    lines = []
    for index, name in enumerate(NAMES):
        # A turn by 90 degrees about z, quaternion wxyz, and a translation that names the image.
        half = math.sqrt(0.5)
        lines += [f"{index + 1} {half:.17g} 0 0 {half:.17g} {index} 0 5 1 {name}", ""]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    (folder / "points3D.txt").write_text("".join(f"{index + 1} {index} 2 3 9 8 7 0\n" for index in range(points)))


@pytest.fixture
def colmap_scene(tmp_path: Path) -> Path:
    scene = tmp_path / "colmap_scene"
    for name in NAMES:
        write_picture(scene / "images" / name)
    write_model(scene / "sparse" / "0")
    return scene


def test_read_colmap__poses_see_points_where_colmap_does(colmap_scene: Path) -> None:
    capture = read_capture(colmap_scene)
    assert capture.layout == "colmap" and not capture.is_metric
    assert [frame.image_path.name for frame in capture.frames] == [*(f"{index}.png" for index in range(9)), "9.png"]
    assert [index for index, frame in enumerate(capture.frames) if frame.split == "test"] == [0, 8]
    assert capture.points is not None and capture.points.xyz.tolist() == [[0.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    frame = capture.frames[4]
    assert frame.lens.model == "pinhole"
    pixels, depth = project_points(
        torch.tensor([[1.0, 2.0, 3.0]]), viewmats_from_camera_to_worlds(frame.camera_to_world), frame.lens.K
    )
    # R turns (x, y) into (-y, x): camera coordinates are (-2 + 4, 1, 3 + 5).
    torch.testing.assert_close(depth, torch.tensor([8.0]))
    torch.testing.assert_close(pixels, torch.tensor([[5.5 + 10 * 2 / 8, 4.25 + 11 * 1 / 8]]))


@pytest.mark.parametrize(
    ("camera", "model", "distortion"),
    [
        ("SIMPLE_PINHOLE 12 8 10 6 4", "pinhole", ()),
        ("SIMPLE_RADIAL 12 8 10 6 4 0.1", "opencv", (0.1,)),
        ("RADIAL 12 8 10 6 4 0.1 0.2", "opencv", (0.1, 0.2)),
        ("OPENCV 12 8 10 10 6 4 0.1 0.2 0.3 0.4", "opencv", (0.1, 0.2, 0.3, 0.4)),
        ("OPENCV_FISHEYE 12 8 10 10 6 4 0.1 0.2 0.3 0.4", "fisheye", (0.1, 0.2, 0.3, 0.4)),
        ("SIMPLE_RADIAL_FISHEYE 12 8 10 6 4 0.1", "fisheye", (0.1,)),
        ("SIMPLE_FISHEYE 12 8 10 6 4", "fisheye", ()),
        ("FISHEYE 12 8 10 10 6 4", "fisheye", ()),
    ],
)
def test_read_colmap__camera_models(colmap_scene: Path, camera: str, model: str, distortion: tuple[float, ...]) -> None:
    import pycolmap

    folder = colmap_scene / "sparse" / "0"
    write_model(folder, camera)
    if not hasattr(pycolmap.CameraModelId, camera.split()[0]):  # Before COLMAP 4.
        with pytest.raises(ValueError, match="Camera model does not exist"):
            read_capture(colmap_scene)
        return
    for _ in range(2):
        lens = read_capture(colmap_scene).frames[0].lens
        assert (lens.model, lens.distortion) == (model, distortion)
        assert (lens.fx, lens.fy, lens.cx, lens.cy) == (10.0, 10.0, 6.0, 4.0)
        # The same as COLMAP writes it by default.
        pycolmap.Reconstruction(str(folder)).write_binary(str(folder))


def test_read_colmap__every_camera_model_has_its_number_of_parameters() -> None:
    import pycolmap

    # `create` before COLMAP 4.
    create = getattr(pycolmap.Camera, "create_from_model_id", pycolmap.Camera.create)
    for name, number in pycolmap.CameraModelId.__members__.items():
        if int(number.value) >= 0:
            camera = create(1, number, 10.0, WIDTH, HEIGHT)
            assert len(camera.params) == _NUM_PARAMETERS[int(number.value)], name


def test_read_colmap__binary_model_under_colmap(colmap_scene: Path) -> None:
    import pycolmap

    text = colmap_scene / "sparse" / "0"
    expected = read_capture(colmap_scene)
    binary = colmap_scene / "colmap" / "sparse" / "0"
    binary.mkdir(parents=True)
    pycolmap.Reconstruction(str(text)).write_binary(str(binary))
    for file in text.iterdir():
        file.unlink()
    capture = read_capture(colmap_scene)
    assert "colmap/sparse/0" in capture.description
    for ours, theirs in zip(capture.frames, expected.frames, strict=True):
        assert ours.image_path == theirs.image_path
        torch.testing.assert_close(ours.camera_to_world, theirs.camera_to_world)
    assert capture.points is not None and expected.points is not None
    # COLMAP may write points in any order.
    assert sorted(capture.points.xyz.tolist()) == sorted(expected.points.xyz.tolist())
    (binary / "points3D.bin").write_bytes(struct.pack("<Q", 0))
    assert read_capture(colmap_scene).points is None


def test_read_colmap__masks_by_name_or_stem(colmap_scene: Path) -> None:
    write_picture(colmap_scene / "masks" / "0.png.png", 255, mode="L")
    write_picture(colmap_scene / "masks" / "upper" / "9.png", 255, mode="L")
    write_picture(colmap_scene / "masks" / "3.jpg", 255, mode="L")
    capture = read_capture(colmap_scene)
    frames = capture.frames
    assert frames[0].mask_path == colmap_scene / "masks" / "0.png.png"
    assert frames[1].mask_path is None
    assert frames[3].mask_path == colmap_scene / "masks" / "3.jpg"
    assert frames[9].mask_path == colmap_scene / "masks" / "upper" / "9.png"
    assert "; 3 have masks" in capture.description
    # Windows writes names of photographs in folders so.
    images = colmap_scene / "sparse" / "0" / "images.txt"
    images.write_text(images.read_text().replace("upper/9.png", "upper\\9.png"))
    assert read_capture(colmap_scene).frames[9].mask_path == colmap_scene / "masks" / "upper" / "9.png"


def test_read_colmap__refuses_masks_that_belong_to_no_photograph(colmap_scene: Path) -> None:
    write_picture(colmap_scene / "masks" / "mask_0.png", 255, mode="L")
    with pytest.raises(ValueError, match=r"No mask in .*masks has a photograph's name, as 0.png.png would"):
        read_capture(colmap_scene)


def test_read_colmap__photographs_in_linked_folders_and_with_other_suffixes(colmap_scene: Path) -> None:
    (colmap_scene / "images").rename(colmap_scene.parent / "drive")
    for name in ("left", "right"):
        (colmap_scene / "images").mkdir(exist_ok=True)
        (colmap_scene / "images" / name).symlink_to(
            colmap_scene.parent / "drive" / ("upper" if name == "right" else "")
        )
    (colmap_scene / "images" / "left" / "8.png").rename(colmap_scene / "images" / "left" / "8.JPG")
    # A link in a circle ends somewhere.
    (colmap_scene.parent / "drive" / "round").symlink_to(colmap_scene.parent / "drive")
    images = colmap_scene / "sparse" / "0" / "images.txt"
    text = images.read_text().replace("upper/", "right/")
    for index in range(9):
        text = text.replace(f" {index}.png", f" left/{index}.png")
    images.write_text(text)
    capture = read_capture(colmap_scene)
    assert len(capture.frames) == 10 and "missing" not in capture.description
    # By the other link, `left/upper/9.png` is one more photograph.
    assert capture.description.endswith("; 1 photographs are in none.")


def test_read_colmap__names_may_begin_at_the_capture_itself(colmap_scene: Path) -> None:
    images = colmap_scene / "sparse" / "0" / "images.txt"
    expected = [frame.image_path for frame in read_capture(colmap_scene).frames]
    text = images.read_text().replace("upper/", "images/upper/")
    for index in range(9):
        text = text.replace(f" {index}.png", f" images/{index}.png")
    images.write_text(text)
    assert [frame.image_path for frame in read_capture(colmap_scene).frames] == expected


def test_read_colmap__refuses_what_is_wrong(colmap_scene: Path) -> None:
    model = colmap_scene / "sparse" / "0"
    write_model(model, "FOV 12 8 10 10 6 4 0.9")
    with pytest.raises(ValueError, match="camera model FOV; known are SIMPLE_PINHOLE"):
        read_capture(colmap_scene)
    write_model(model, "PINHOLE 13 8 10 10 6 4")
    with pytest.raises(ValueError, match="is 12x8, its camera says 13x8"):
        read_capture(colmap_scene)
    write_model(model)
    (colmap_scene / "images" / "3.png").unlink()
    with pytest.raises(ValueError, match="Image .*3.png is missing, as 1 of"):
        read_capture(colmap_scene, is_strict=True)
    (model / "images.txt").write_text("# none\n")
    with pytest.raises(ValueError, match="no registered images"):
        read_capture(colmap_scene)
    (model / "images.txt").unlink()
    with pytest.raises(ValueError, match="has no images.txt"):
        read_capture(colmap_scene)


def test_read_colmap__refuses_a_model_without_an_image_folder(tmp_path: Path) -> None:
    write_model(tmp_path / "scene" / "sparse" / "0")
    with pytest.raises(ValueError, match="no photographs; put them into its folder `images`"):
        read_capture(tmp_path / "scene")


def test_read_colmap__names_that_leave_the_folder_are_refused(colmap_scene: Path) -> None:
    images = colmap_scene / "sparse" / "0" / "images.txt"
    images.write_text(images.read_text().replace(" 0.png", " ../0.png"))
    with pytest.raises(ValueError, match="climbs out of"):
        read_capture(colmap_scene)


def pack_colmap_points() -> bytes:
    """COLMAP's documented binary: the first point has a track of two elements, the second none."""
    first = struct.pack("<Q3d3BdQ", 7, *XYZ[0], *RGB[0], 0.5, 2) + struct.pack("<4i", 1, 2, 3, 4)
    return struct.pack("<Q", 2) + first + struct.pack("<Q3d3BdQ", 9, *XYZ[1], *RGB[1], 0.1, 0)


def test_read_colmap_points__binary_skips_tracks(tmp_path: Path) -> None:
    (tmp_path / "points3D.bin").write_bytes(pack_colmap_points())
    cloud = read_colmap_points(tmp_path)
    assert cloud is not None and cloud.xyz.tolist() == XYZ and cloud.rgb.tolist() == RGB
    (tmp_path / "points3D.bin").write_bytes(pack_colmap_points()[:-9])
    with pytest.raises(ValueError, match="cut short or damaged: fewer than 2 records"):
        read_colmap_points(tmp_path)


def test_read_colmap_points__text_with_dark_colours_and_tracks(tmp_path: Path) -> None:
    (tmp_path / "points3D.txt").write_text("# comment\n\n1 1.5 -2 3.25 1 0 1 0.5 8 9 8 9\n2 0 4 -1 0 1 1 0\n")
    cloud = read_colmap_points(tmp_path)
    assert cloud is not None and cloud.xyz.tolist() == XYZ
    assert cloud.rgb.tolist() == [[1, 0, 1], [0, 1, 1]]
    (tmp_path / "points3D.txt").write_text("1 2 3\n")
    with pytest.raises(ValueError, match="is not a COLMAP points3D file"):
        read_colmap_points(tmp_path)


def test_write_colmap_points__round_trip_and_binary_first(tmp_path: Path) -> None:
    assert read_colmap_points(tmp_path) is None
    write_colmap_points(CLOUD, tmp_path / "points3D.txt")
    cloud = read_colmap_points(tmp_path)
    assert cloud is not None and torch.equal(cloud.xyz, CLOUD.xyz) and torch.equal(cloud.rgb, CLOUD.rgb)
    (tmp_path / "points3D.bin").write_bytes(struct.pack("<Q", 0))
    assert read_colmap_points(tmp_path) is None


def test_read_colmap__takes_the_model_with_most_images_and_names_the_others(colmap_scene: Path) -> None:
    sparse = colmap_scene / "sparse"
    # As COLMAP numbers them: the first model is not always the largest.
    shutil.copytree(sparse / "0", sparse / "1")
    lines = (sparse / "0" / "images.txt").read_text().splitlines(keepends=True)
    header = [line for line in lines if line.startswith("#")]
    kept = [line for line in lines if not line.startswith("#")]
    (sparse / "0" / "images.txt").write_text("".join(header + kept[:4]))
    (sparse / "1" / "images.txt").write_text("".join(header + kept[2:]))
    write_picture(colmap_scene / "images" / "lonely.png")
    capture = read_capture(colmap_scene)
    assert f"COLMAP model {sparse / '1'}" in capture.description
    assert (
        "of 2 models it has most images, left out are 0 with 2 images; 1 photographs are in none" in capture.description
    )
    assert len(capture.frames) == len(kept) // 2 - 1
