"""Every reader of labelled sets on a miniature of its official layout, written here by hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fit3d_ns.probing.datasets import LabelledOptions, check_options, read_labelled_set
from fit3d_ns.probing.datasets.frames import (
    CLASS_NAMES,
    DepthConvention,
    LabelledFrame,
    LabelledSet,
    check_same_kind,
    compute_data_hash,
    join_sets,
    split_validation,
    warn_about_depth_unit,
)
from fit3d_ns.probing.probe_runs import resolve_scene_split
from tests.data.miniature_captures import edit_json, make_pose, write_json_file

SIZE = (12, 8)
"""Width and height of the miniature pictures."""


def write_image(path: Path, value: int = 90, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 10, 20)).save(path)
    return path


def write_map(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def label_map(*values: int, dtype: type = np.uint8, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A map whose columns cycle through the given values."""
    row = [values[column % len(values)] for column in range(size[0])]
    return np.tile(np.array(row, dtype=dtype), (size[1], 1))


def write_text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def labels_of(frame: LabelledFrame) -> list[int]:
    assert frame.load_labels is not None
    labels = frame.load_labels()
    assert labels.shape == frame.load_image().shape[:2] and labels.dtype == torch.uint8
    return labels.unique().tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "street"
    for split, names in (("train", ("a", "b", "c")), ("test", ("d",))):
        for name in names:
            write_image(root / "images" / split / f"{name}.jpg")
            write_map(root / "labels" / split / f"{name}.png", label_map(0, 1, 255))
            write_map(root / "depths" / split / f"{name}.png", label_map(0, 1500, 4000, dtype=np.uint16))
    (root / "classes.json").write_text(json.dumps({"classes": ["sky", "road"], "ignore_index": 255}))
    return root


def test_read_folder__splits_labels_and_depths(folder: Path) -> None:
    train = read_labelled_set(folder, "train", "segmentation")
    assert [frame.name for frame in train.frames] == ["train/a", "train/b", "train/c"]
    assert train.class_names == ("sky", "road") and labels_of(train.frames[0]) == [0, 1, 255]
    test = read_labelled_set(folder, "test", "depth", LabelledOptions(max_depth=6.0))
    assert len(test.frames) == 1 and test.depth.max_depth == 6.0
    assert test.frames[0].load_depth is not None
    torch.testing.assert_close(test.frames[0].load_depth()[0, :3], torch.tensor([0.0, 1.5, 4.0]))


def test_read_folder__names_may_hold_bytes_that_are_no_text(folder: Path) -> None:
    for path in folder.rglob("a.*"):
        path.rename(path.with_name(os.fsdecode(b"caf\xe9") + path.suffix))
    train = read_labelled_set(folder, "train", "segmentation")
    assert len(train.frames) == 3 and len(compute_data_hash(train)) == 16
    assert labels_of(train.frames[2]) == [0, 1, 255]


def test_read_folder__other_depth_scale(folder: Path) -> None:
    frame = read_labelled_set(folder, "test", "depth", LabelledOptions(depth_scale=256.0)).frames[0]
    assert frame.load_depth is not None
    torch.testing.assert_close(frame.load_depth()[0, 1], torch.tensor(1500 / 256))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "labels/train/b.png").unlink(), "b.jpg has no label map"),
        (lambda root: write_map(root / "labels/train/b.png", label_map(0, size=(6, 4))), "6x4.*must have one size"),
        (lambda root: (root / "classes.json").unlink(), "No class list"),
        (lambda root: (root / "classes.json").write_text('{"classes": ["a", "a"]}'), "'a' twice"),
        (lambda root: [path.unlink() for path in (root / "images/train").iterdir()], "train split is empty"),
    ],
)
def test_read_folder__names_the_missing_piece(folder: Path, change, message: str) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message):
        read_labelled_set(folder, "train", "segmentation")


def test_labels__values_outside_the_class_list_are_named_with_their_file(folder: Path) -> None:
    write_map(folder / "labels/train/b.png", label_map(0, 2))
    frame = read_labelled_set(folder, "train", "segmentation").frames[1]
    assert frame.load_labels is not None
    with pytest.raises(ValueError, match=r"b\.png has label 2 at 48 pixels, outside the 2 classes"):
        frame.load_labels()


def test_labels__colour_pictures_are_refused(folder: Path) -> None:
    write_image(folder / "labels/train/a.png")
    frame = read_labelled_set(folder, "train", "segmentation").frames[0]
    assert frame.load_labels is not None
    with pytest.raises(ValueError, match="colour picture"):
        frame.load_labels()


def test_depth__eight_bit_files_are_refused(folder: Path) -> None:
    write_map(folder / "depths/train/a.png", label_map(0, 200))
    frame = read_labelled_set(folder, "train", "depth").frames[0]
    assert frame.load_depth is not None
    with pytest.raises(ValueError, match=r"a\.png has pixel format L; write 16-bit grey"):
        frame.load_depth()


@pytest.mark.parametrize(("scale", "factor"), [(1.0, "0.001"), (1000.0, None), (1e6, "1000")])
def test_depth__a_wrong_unit_is_noticed_with_its_factor(
    folder: Path, scale: float, factor: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_about_depth_unit(read_labelled_set(folder, "train", "depth", LabelledOptions(depth_scale=scale)))
    said = capsys.readouterr().err
    assert said == "" if factor is None else f"multiplied by {factor} " in said


def test_ade20k__counts_from_one_and_ignores_zero(tmp_path: Path) -> None:
    root = tmp_path / "ADEChallengeData2016"
    for part in ("training", "validation"):
        write_image(root / "images" / part / "ADE_1.jpg")
        write_map(root / "annotations" / part / "ADE_1.png", label_map(0, 1, 150))
    rows = [f"{index}\t0.1\t1\t1\tclass {index}" for index in range(1, 151)]
    write_text(root / "objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tName", *rows)
    for path in (root, tmp_path):
        labelled_set = read_labelled_set(path, "test", "segmentation")
        assert labelled_set.name == "ade20k" and labelled_set.num_classes == 150
        assert labelled_set.class_names[149] == "class 150"
        assert labels_of(labelled_set.frames[0]) == [0, 149, 255]
    with pytest.raises(ValueError, match="no depth"):
        read_labelled_set(root, "test", "depth")
    (root / "annotations/training/ADE_1.png").unlink()
    with pytest.raises(ValueError, match="ADE_1.png is missing"):
        read_labelled_set(root, "train", "segmentation")


def test_scannetpp__the_authors_evaluation_folder(tmp_path: Path) -> None:
    """Lists of pairs, some without depth; labels count from 1, in folders of their own by scene."""
    for part, scene in (("training", "a"), ("validation", "b")):
        write_image(tmp_path / "images" / part / scene / "DSC1.JPG")
        write_map(tmp_path / "annotations" / part / scene / "DSC1.png", label_map(0, 1, 100))
        write_map(tmp_path / "depth" / scene / "DSC1.png", label_map(1500, dtype=np.uint16))
    for listing, part, scene in (("train", "training", "a"), ("val", "validation", "b")):
        pair = f"images/{part}/{scene}/DSC1.JPG"
        write_text(
            tmp_path / f"scannetpp_{listing}.txt", f"/{pair} /depth/{scene}/DSC1.png 518.8", f"{pair} None 518.8"
        )
    labels = read_labelled_set(tmp_path, "test", "segmentation")
    assert labels.name == "scannetpp" and labels.class_names[::99] == ("wall", "marker")
    assert [(frame.name, frame.group) for frame in labels.frames] == [("b/DSC1", "b")]
    assert labels_of(labels.frames[0]) == [0, 99, 255]
    depth = read_labelled_set(tmp_path, "train", "depth")
    assert [frame.name for frame in depth.frames] == ["images/training/a/DSC1"] and depth.depth.max_depth == 20.0
    assert depth.frames[0].load_depth is not None and float(depth.frames[0].load_depth().unique()) == 1.5


def test_voc__background_is_a_class_and_lists_choose(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for stem in ("2007_1", "2007_2", "2007_3"):
        write_image(root / "JPEGImages" / f"{stem}.jpg")
        palette = Image.fromarray(label_map(0, 20, 255), mode="P")
        palette.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
        (root / "SegmentationClass").mkdir(exist_ok=True)
        palette.save(root / "SegmentationClass" / f"{stem}.png")
    write_text(root / "ImageSets/Segmentation/train.txt", "2007_1", "2007_3")
    labelled_set = read_labelled_set(tmp_path, "train", "segmentation")
    assert [frame.name for frame in labelled_set.frames] == ["2007_1", "2007_3"] and labelled_set.num_classes == 21
    assert labels_of(labelled_set.frames[0]) == [0, 20, 255]
    with pytest.raises(ValueError, match=r"No such file: .*val\.txt"):
        read_labelled_set(tmp_path, "test", "segmentation")


def test_kitti__lists_scale_and_missing_depth(tmp_path: Path) -> None:
    name = "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png"
    depth = "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png"
    write_image(tmp_path / "raw" / name)
    write_map(tmp_path / "data_depth_annotated/val" / depth, label_map(0, 256, 2560, dtype=np.uint16))
    write_text(tmp_path / "kitti_eigen_test.txt", f"{name} {depth} 721.5377", f"{name} None 721.5377")
    labelled_set = read_labelled_set(tmp_path, "test", "depth")
    assert len(labelled_set.frames) == 1
    assert labelled_set.depth.max_depth == 80.0 and labelled_set.depth.evaluation_window == "garg"
    assert labelled_set.frames[0].group == "2011_09_26_drive_0002_sync"
    assert labelled_set.frames[0].load_depth is not None
    torch.testing.assert_close(labelled_set.frames[0].load_depth()[0, :3], torch.tensor([0.0, 1.0, 10.0]))
    write_text(tmp_path / "kitti_eigen_test.txt", f"{name} absent.png 721.5377")
    with pytest.raises(ValueError, match="depth map absent.png, which is not below"):
        read_labelled_set(tmp_path, "test", "depth")


@pytest.fixture
def scannet(tmp_path: Path) -> Path:
    for scene in ("scene0000_00", "scene0001_00"):
        top = tmp_path / "scannet_frames_25k" / scene
        write_image(top / "color/000100.jpg", size=(24, 16))
        write_map(top / "label/000100.png", label_map(0, 1, 40, size=(24, 16)))
        write_map(top / "depth/000100.png", label_map(0, 2000, dtype=np.uint16))
    write_text(tmp_path / "scannetv2_train.txt", "scene0000_00")
    write_text(tmp_path / "scannetv2_val.txt", "scene0001_00")
    return tmp_path


def test_scannet__nyu40_labels_and_reduced_photographs(scannet: Path) -> None:
    train = read_labelled_set(scannet, "train", "segmentation")
    assert [frame.name for frame in train.frames] == ["scene0000_00/000100"]
    assert train.class_names == CLASS_NAMES["nyu40"] and len(set(CLASS_NAMES["nyu40"])) == 40
    assert labels_of(train.frames[0]) == [0, 39, 255]
    test = read_labelled_set(scannet, "test", "depth")
    assert test.frames[0].group == "scene0001_00" and test.depth.evaluation_window == "eigen"
    assert test.frames[0].load_depth is not None
    assert test.frames[0].load_image().shape[:2] == test.frames[0].load_depth().shape == (8, 12)


def test_scannet__poses_where_tracking_was_not_lost(scannet: Path) -> None:
    pose = np.eye(4) + np.arange(16).reshape(4, 4) / 100
    for scene, values in (("scene0000_00", pose), ("scene0001_00", np.full((4, 4), -np.inf))):
        (scannet / "scannet_frames_25k" / scene / "pose").mkdir()
        np.savetxt(scannet / "scannet_frames_25k" / scene / "pose/000100.txt", values)
    first, second = (read_labelled_set(scannet, split, "depth").frames[0] for split in ("train", "test"))
    assert first.camera_to_world is not None and second.camera_to_world is None
    np.testing.assert_allclose(first.camera_to_world, pose[:3])
    assert first.world == scannet.resolve() / "scannet_frames_25k/scene0000_00"
    for damaged in ("", "1 2 x", "1 2 3"):
        (scannet / "scannet_frames_25k/scene0000_00/pose/000100.txt").write_text(damaged)
        assert read_labelled_set(scannet, "train", "depth").frames[0].camera_to_world is None


def test_scannet__raw_ids_need_their_table(scannet: Path) -> None:
    scene = scannet / "scannet_frames_25k/scene0000_00"
    write_map(scene / "label-filt/000100.png", label_map(0, 5, 1163, dtype=np.uint16, size=(24, 16)))
    for path in (scene / "label").iterdir():
        path.unlink()
    (scene / "label").rmdir()
    with pytest.raises(ValueError, match=r"scannetv2-labels\.combined\.tsv"):
        read_labelled_set(scannet, "train", "segmentation")
    write_text(scannet / "scannetv2-labels.combined.tsv", "id\traw_category\tnyu40id", "5\tx\t3", "1163\ty\t0")
    frame = read_labelled_set(scannet, "train", "segmentation").frames[0]
    assert labels_of(frame) == [2, 255]
    write_text(scannet / "scannetv2-labels.combined.tsv", "id\traw_category\tnyu40id", "5\tx\t3")
    frame = read_labelled_set(scannet, "train", "segmentation").frames[0]
    assert frame.load_labels is not None
    with pytest.raises(ValueError, match="label 1163, which the class list does not know"):
        frame.load_labels()


def test_scannet__missing_scene_and_list(scannet: Path) -> None:
    write_text(scannet / "scannetv2_train.txt", "scene0009_00")
    with pytest.raises(ValueError, match="names scene0009_00"):
        read_labelled_set(scannet, "train", "depth")
    (scannet / "scannetv2_val.txt").unlink()
    with pytest.raises(ValueError, match=r"No such file: .*scannetv2_val\.txt"):
        read_labelled_set(scannet, "test", "depth")


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    """Three frames of 6x4 pixels; raw class r is r // 2 of 40, which is 1 of 13 for even and 13 for odd numbers."""
    h5py = pytest.importorskip("h5py")
    from scipy.io import savemat

    images = np.zeros((3, 3, 6, 4), dtype=np.uint8)
    images[1, 0] = 200
    labels = np.zeros((3, 6, 4), dtype=np.uint16)
    labels[:, 1], labels[:, 2], labels[:, 3] = 4, 6, 894
    depths = np.full((3, 6, 4), 2.5, dtype=np.float32)
    depths[:, 0] = 0.0
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["labels"], file["depths"] = images, labels, depths
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1], [3]]), "testNdxs": np.array([[2]])})
    to_40 = np.array([[min((number + 1) // 2, 40) for number in range(894)]])
    savemat(tmp_path / "classMapping40.mat", {"mapClass": to_40})
    to_13 = np.array([[1 if number % 2 == 0 else 13 for number in range(1, 41)]])
    savemat(tmp_path / "class13Mapping.mat", {"classMapping13": {"labels1": to_13, "className": "x"}})
    return tmp_path


def test_nyu__labelled_file_is_transposed_and_mapped(nyu: Path) -> None:
    test = read_labelled_set(nyu, "test", "segmentation")
    assert [frame.name for frame in test.frames] == ["0002"] and test.class_names == CLASS_NAMES["nyu13"]
    frame = test.frames[0]
    assert frame.load_image().shape == (4, 6, 3) and int(frame.load_image()[0, 0, 0]) == 200
    # Raw 4 is class 2 of 40, which is 1 of 13; raw 6 is 3, which is 13; raw 894 is 40, which is 1; raw 0 is ignored.
    assert frame.load_labels is not None
    assert frame.load_labels()[0].tolist() == [255, 0, 12, 0, 255, 255]
    forty = read_labelled_set(nyu, "test", "segmentation", LabelledOptions(nyu_classes=40)).frames[0]
    assert forty.load_labels is not None
    assert forty.load_labels()[0].tolist() == [255, 1, 2, 39, 255, 255]


def test_nyu__depth_of_the_labelled_file_and_of_the_published_list(nyu: Path) -> None:
    train = read_labelled_set(nyu, "train", "depth")
    assert [frame.name for frame in train.frames] == ["0001", "0003"]
    assert train.depth == DepthConvention(0.001, 10.0, "eigen", (45, 472, 43, 608))
    assert train.frames[0].load_depth is not None
    assert train.frames[0].load_depth()[0, :2].tolist() == [0.0, 2.5]
    write_image(nyu / "kitchen_0028b/rgb_00045.jpg")
    write_map(nyu / "kitchen_0028b/sync_depth_00045.png", label_map(3000, dtype=np.uint16))
    write_text(nyu / "nyu_train.txt", "/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579")
    listed = read_labelled_set(nyu, "train", "depth")
    assert listed.name == "nyu" and listed.frames[0].group == "kitchen_0028b"
    assert listed.frames[0].load_depth is not None and float(listed.frames[0].load_depth()[0, 0]) == 3.0


def test_nyu__the_authors_evaluation_folder(tmp_path: Path) -> None:
    """Labels of 13 classes count from 1, 0 does not count; the folder is told by its name."""
    root = tmp_path / "eval_data/nyuv2"
    for part, name in (("training", "0003"), ("validation", "0001")):
        write_image(root / "images" / part / f"{name}.png")
        write_map(root / "annotations" / part / f"{name}.png", label_map(0, 1, 13))
    labels = read_labelled_set(root, "test", "segmentation")
    assert labels.name == "nyu13" and labels.class_names == CLASS_NAMES["nyu13"]
    assert [frame.name for frame in labels.frames] == ["0001"] and labels_of(labels.frames[0]) == [0, 12, 255]
    forty = LabelledOptions(nyu_classes=40)
    assert read_labelled_set(root, "train", "segmentation", forty).class_names == CLASS_NAMES["nyu40"]
    with pytest.raises(ValueError, match="has no nyu_depth_v2_labeled.mat"):
        read_labelled_set(root, "test", "depth")
    other = root.rename(tmp_path / "other")
    with pytest.raises(ValueError, match="no folder labels/"):
        read_labelled_set(other, "test", "segmentation")
    assert read_labelled_set(other, "test", "segmentation", LabelledOptions(layout="nyu")).num_classes == 13


def test_nyu__each_missing_piece_is_named(nyu: Path) -> None:
    (nyu / "class13Mapping.mat").unlink()
    with pytest.raises(ValueError, match=r"No .*class13Mapping\.mat"):
        read_labelled_set(nyu, "train", "segmentation")
    read_labelled_set(nyu, "train", "segmentation", LabelledOptions(nyu_classes=40))
    (nyu / "splits.mat").unlink()
    with pytest.raises(ValueError, match=r"No .*splits\.mat"):
        read_labelled_set(nyu, "train", "depth")


def test_nyu__tables_that_do_not_belong_together_are_named(nyu: Path) -> None:
    from scipy.io import savemat

    savemat(nyu / "class13Mapping.mat", {"classMapping13": {"labels1": np.array([[1, 2]]), "className": "x"}})
    with pytest.raises(ValueError, match="The class tables in .* is damaged or not what was expected"):
        read_labelled_set(nyu, "train", "segmentation")
    savemat(nyu / "class13Mapping.mat", {"classMapping13": np.empty((0, 0), dtype=object)})
    with pytest.raises(ValueError, match="class13Mapping.mat is damaged"):
        read_labelled_set(nyu, "train", "segmentation")


def test_lists__that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "kitti_eigen_test.txt").write_bytes(b"a.png \xff\xfe 721.5\n")
    with pytest.raises(ValueError, match="kitti_eigen_test.txt is damaged"):
        read_labelled_set(tmp_path, "test", "depth", LabelledOptions(layout="kitti"))


def test_nyu__a_split_that_cannot_be_read_is_named(nyu: Path) -> None:
    """Cut short anywhere, or of MATLAB's HDF5 format, which scipy does not read."""
    whole = (nyu / "splits.mat").read_bytes()
    hdf5 = b"MATLAB 7.3".ljust(124) + b"\x00\x02IM" + bytes(512)
    for content in (b"", whole[:3], whole[:100], whole[:130], whole[:160], hdf5):
        (nyu / "splits.mat").write_bytes(content)
        with pytest.raises(ValueError, match=r"splits\.mat cannot be read .*; download it again"):
            read_labelled_set(nyu, "train", "depth")


def test_scannetpp__one_scene_with_depth_masks_and_labels(scannetpp_scene: Path) -> None:
    dslr = scannetpp_scene / "dslr"
    # The miniature's depth belongs to its fisheye pictures; as pinhole ones nothing has to be undistorted.
    edit_json(dslr / "nerfstudio/transforms.json", camera_model="PINHOLE", k1=None)
    mask = np.full((8, 12), 255, dtype=np.uint8)
    mask[:, :3] = 0
    write_map(dslr / "undistorted_anon_masks/DSC00000.png", mask)
    for index in range(6):
        write_map(dslr / f"labels/DSC{index:05d}.png", label_map(0, 1))
    (dslr / "classes.json").write_text(json.dumps({"classes": ["wall", "chair"], "ignore_index": 255}))
    train = read_labelled_set(scannetpp_scene, "train", "depth")
    assert [frame.name for frame in train.frames] == [f"0a_5c_01/DSC0000{index}" for index in range(3)]
    assert train.depth.max_depth == 20.0 and train.is_sequence
    assert train.frames[0].load_depth is not None
    assert train.frames[0].load_depth()[0].tolist() == [0.0] * 3 + [1.5] * 9
    test = read_labelled_set(scannetpp_scene, "test", "segmentation")
    assert test.class_names == ("wall", "chair") and labels_of(test.frames[0]) == [0, 1]
    whole = read_labelled_set(scannetpp_scene, None, "segmentation")
    assert len(whole.frames) == 5 and labels_of(whole.frames[0]) == [0, 1, 255]


def test_scannetpp__fisheye_pictures_and_depth_are_undistorted_together(scannetpp_scene: Path) -> None:
    dslr = scannetpp_scene / "dslr"
    edit_json(dslr / "nerfstudio/transforms.json", k1=0.0, fl_x=6.0, fl_y=6.0, cx=6.0, cy=4.0)
    columns = np.tile(np.arange(12) * 100 + 1000, (8, 1)).astype(np.uint16)
    write_map(dslr / "render_depth/DSC00000.png", columns)
    picture = np.repeat((columns[..., None] - 1000) // 10, 3, axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(dslr / "resized_images/DSC00000.JPG", quality=100, subsampling=0)
    frame = read_labelled_set(scannetpp_scene, "train", "depth").frames[0]
    assert frame.load_depth is not None
    depth, image = frame.load_depth(), frame.load_image()
    # Both count the columns of the photograph: depth by nearest neighbour, colour between two columns.
    seen = image[..., 0].float() / 10
    assert ((depth - 1.0) * 10 - seen).abs().max() < 0.75
    assert depth[4, 0] > 1.0, "the pinhole camera sees less than the lens"


def test_scannetpp__official_root_with_the_toolkits_labels(scannetpp_scene: Path, tmp_path: Path) -> None:
    root = tmp_path / "scannetpp"
    (root / "data").mkdir(parents=True)
    scannetpp_scene.rename(root / "data/0a5c013435")
    write_text(root / "splits/nvs_sem_train.txt", "0a5c013435")
    write_text(root / "metadata/semantic_benchmark/top100.txt", "wall", "ceiling", "floor")
    with pytest.raises(ValueError, match="has no labels"):
        read_labelled_set(root, "train", "segmentation")
    for index in range(6):
        write_map(root / f"semantics/0a5c013435/DSC{index:05d}.JPG.png", label_map(2, 255))
    labelled_set = read_labelled_set(root, "train", "segmentation")
    assert labelled_set.name == "scannetpp" and labelled_set.class_names == ("wall", "ceiling", "floor")
    assert len(labelled_set.frames) == 5 and labels_of(labelled_set.frames[0]) == [2, 255]
    with pytest.raises(ValueError, match=r"No such file: .*nvs_sem_val\.txt"):
        read_labelled_set(root, "test", "segmentation")
    write_text(root / "splits/nvs_sem_train.txt", "0a5c013435", "ffffffffff")
    with pytest.raises(ValueError, match="names ffffffffff"):
        read_labelled_set(root, "train", "segmentation")


def test_scannetpp__wide_photographs_are_halved_with_their_depth_and_labels(
    scannetpp_scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1752x1168 becomes 876x584; here everything wider than ten pixels counts as wide."""
    monkeypatch.setattr("fit3d_ns.probing.datasets.scannet.HALVED_FROM_WIDTH", 10)
    dslr = scannetpp_scene / "dslr"
    edit_json(dslr / "nerfstudio/transforms.json", camera_model="PINHOLE", k1=None)
    for index in range(6):
        write_map(dslr / f"labels/DSC{index:05d}.png", label_map(0, 1, 1, 1))
    (dslr / "classes.json").write_text(json.dumps({"classes": ["wall", "chair"]}))
    frame = read_labelled_set(scannetpp_scene, "train", "depth").frames[0]
    assert frame.load_depth is not None
    assert frame.load_image().shape == (4, 6, 3) and frame.load_depth().shape == (4, 6)
    assert set(frame.load_depth().unique().tolist()) <= {0.0, 1.5}
    labels = read_labelled_set(scannetpp_scene, "train", "segmentation").frames[0].load_labels
    # The pixel at the centre of each two by two, rounded down: columns 1, 3, 5 ... of 0 1 1 1 0 1 1 1 ...
    assert labels is not None and set(labels()[0].tolist()) <= {0, 1} and labels().shape == (4, 6)


@pytest.fixture
def rig(tmp_path: Path) -> Path:
    """A capture of nerfstudio's layout: ten pairs of photographs of the same names, the last one marked as bad."""
    root = tmp_path / "rig"
    columns = np.tile(np.arange(12) * 100 + 1000, (8, 1)).astype(np.uint16)
    picture = np.repeat((columns[..., None] - 1000) // 10, 3, axis=-1).astype(np.uint8)
    entries = []
    for index, (side, number) in enumerate((side, number) for side in ("left", "right") for number in range(10)):
        name = f"images/{side}/{number}.png"
        write_map(root / name, picture)
        entry = {"file_path": name, "transform_matrix": make_pose(index), "mask_path": "mask.png"}
        entry |= {"depth_file_path": f"depth/{side}/{number}.png", "is_bad": index == 19}
        write_map(root / f"depth/{side}/{number}.png", columns)
        entries.append(entry)
    mask = np.full((8, 12), 255, dtype=np.uint8)
    mask[0] = 0
    write_map(root / "mask.png", mask)
    lens = {"fl_x": 6.0, "fl_y": 6.0, "cx": 6.0, "cy": 4.0, "w": 12, "h": 8, "camera_model": "OPENCV"}
    write_json_file(root / "transforms.json", {**lens, "frames": entries})
    return root


def test_capture__depth_of_any_layout_with_cameras(rig: Path) -> None:
    test = read_labelled_set(rig, "test", "depth", LabelledOptions(max_depth=3.0))
    # Every eighth of the sorted names is held out.
    assert [frame.name for frame in test.frames] == ["rig/images/left/0", "rig/images/left/8", "rig/images/right/6"]
    assert torch.equal(test.frames[1].camera_to_world, torch.tensor(make_pose(8))[:3])  # type: ignore[arg-type]
    assert test.name == "rig" and test.is_sequence and test.depth.max_depth == 3.0
    assert len(read_labelled_set(rig, "train", "depth").frames) == 16
    assert len(read_labelled_set(rig, None, "depth").frames) == 19
    frame = test.frames[0]
    assert frame.load_depth is not None
    assert frame.load_depth()[0].tolist() == [0.0] * 12
    torch.testing.assert_close(frame.load_depth()[1:], (1.0 + torch.arange(12) / 10).expand(7, 12))
    coarse = read_labelled_set(rig, "test", "depth", LabelledOptions(depth_scale=500.0)).frames[0]
    check_options([rig], "depth", LabelledOptions(depth_scale=500.0))
    assert coarse.load_depth is not None and torch.equal(coarse.load_depth(), 2.0 * frame.load_depth())
    assert coarse.world == rig.resolve()
    assert resolve_scene_split(rig, "test", []) is None and resolve_scene_split(rig, "test", [rig]) == "test"
    with pytest.raises(ValueError, match="capture, which has no segmentation but depth"):
        read_labelled_set(rig, "test", "segmentation")
    edit_json(rig / "transforms.json", k1=-0.1)
    frame = read_labelled_set(rig, "test", "depth").frames[0]
    assert frame.load_depth is not None
    seen = frame.load_image()[..., 0].float() / 100
    known = frame.load_depth() > 0
    # Both count the photograph's columns, of which the pinhole camera sees fewer.
    assert bool(known[2:].all()) and ((frame.load_depth() - 1.0 - seen)[known]).abs().max() < 0.075
    assert float(frame.load_depth()[4].max()) < 2.1
    entries = json.loads((rig / "transforms.json").read_text())["frames"]
    del entries[8]["depth_file_path"]
    edit_json(rig / "transforms.json", frames=entries)
    with pytest.raises(ValueError, match=r"left/8\.png has no depth map"):
        read_labelled_set(rig, "test", "depth")
    # A plain folder may have cameras as well.
    write_map(rig / "depths/left/0.png", label_map(500, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"1\.png has no depth map"):
        read_labelled_set(rig, "test", "depth")


def test_image_folder__classes_by_folder_name(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("zebra", "ant"):
            write_image(tmp_path / part / name / "1.png")
    train = read_labelled_set(tmp_path, "train", "classification")
    assert train.class_names == ("ant", "zebra")
    assert [(frame.name, frame.class_index) for frame in train.frames] == [("ant/1.png", 0), ("zebra/1.png", 1)]
    (tmp_path / "val/zebra/1.png").unlink()
    with pytest.raises(ValueError, match="zebra holds no pictures"):
        read_labelled_set(tmp_path, "test", "classification")


def test_read_labelled_set__unknown_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such data folder"):
        read_labelled_set(tmp_path / "absent", "train", "depth")
    with pytest.raises(ValueError, match="holds no labelled set"):
        read_labelled_set(tmp_path, "train", "depth")


def lay_out(root: Path, layout: str) -> None:
    """As little as each reader needs; single files are removed by the test below."""
    if layout == "ade20k":
        for part in ("training", "validation"):
            write_image(root / "images" / part / "a.jpg")
            write_map(root / "annotations" / part / "a.png", label_map(0, 1))
        write_text(root / "objectInfo150.txt", *(f"{index}\tname {index}" for index in range(1, 151)))
    elif layout == "voc":
        write_image(root / "JPEGImages/a.jpg")
        write_map(root / "SegmentationClass/a.png", label_map(0, 1))
        write_text(root / "ImageSets/Segmentation/train.txt", "a")
    elif layout == "kitti":
        write_image(root / "2011_09_26/d_drive_1_sync/image_02/data/1.png")
        write_map(root / "data_depth_annotated/train/d/1.png", label_map(256, dtype=np.uint16))
        write_text(root / "kitti_eigen_train.txt", "2011_09_26/d_drive_1_sync/image_02/data/1.png d/1.png 700")
    elif layout == "nyu":
        write_image(root / "kitchen/rgb_1.jpg")
        write_map(root / "kitchen/sync_depth_1.png", label_map(1000, dtype=np.uint16))
        write_text(root / "nyu_train.txt", "/kitchen/rgb_1.jpg /kitchen/sync_depth_1.png 518.9")
    elif layout == "scannet":
        write_image(root / "scene0000_00/color/1.jpg")
        write_map(root / "scene0000_00/depth/1.png", label_map(1000, dtype=np.uint16))
        write_map(root / "scene0000_00/label/1.png", label_map(0, 1))
        write_text(root / "scannetv2_train.txt", "scene0000_00")


@pytest.mark.parametrize(
    ("layout", "task", "missing", "message"),
    [
        ("ade20k", "segmentation", "objectInfo150.txt", "objectInfo150.txt is missing"),
        ("ade20k", "segmentation", "images/training/a.jpg", "images/training holds no images"),
        ("ade20k", "segmentation", "annotations/training/a.png", "a.png is missing"),
        ("voc", "segmentation", "SegmentationClass/a.png", "a.png is missing"),
        ("voc", "segmentation", "JPEGImages/a.jpg", "a.jpg is missing"),
        ("voc", "segmentation", "ImageSets/Segmentation/train.txt", "No such file: .*train.txt"),
        ("kitti", "depth", "kitti_eigen_train.txt", "No such file: .*kitti_eigen_train.txt"),
        ("kitti", "depth", "2011_09_26/d_drive_1_sync/image_02/data/1.png", "raw image 2011_09_26/.*1.png"),
        ("kitti", "depth", "data_depth_annotated/train/d/1.png", "depth map d/1.png, which is not below"),
        ("nyu", "depth", "kitchen/sync_depth_1.png", "sync_depth_1.png is missing"),
        ("nyu", "depth", "kitchen/rgb_1.jpg", "rgb_1.jpg is missing"),
        ("nyu", "depth", "nyu_train.txt", "has no nyu_depth_v2_labeled.mat"),
        ("scannet", "depth", "scannetv2_train.txt", "No such file: .*scannetv2_train.txt"),
        ("scannet", "depth", "scene0000_00/depth/1.png", "1.png is missing"),
        ("scannet", "segmentation", "scene0000_00/label/1.png", "1.png is missing"),
    ],
)
def test_readers__name_the_missing_piece(tmp_path: Path, layout: str, task: str, missing: str, message: str) -> None:
    lay_out(tmp_path, layout)
    options = LabelledOptions(layout=layout)  # type: ignore[arg-type]
    whole = read_labelled_set(tmp_path, "train", task, options)  # type: ignore[arg-type]
    assert len(whole.frames) == 1 and whole.frames[0].load_image().shape == (8, 12, 3)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=message):
        read_labelled_set(tmp_path, "train", task, options)  # type: ignore[arg-type]


def create_set(names: list[tuple[str, str]], is_sequence: bool, classes: tuple[str, ...] = ()) -> LabelledSet:
    def load() -> torch.Tensor:
        return torch.zeros(2, 2, 3, dtype=torch.uint8)

    frames = [LabelledFrame(name=name, load_image=load, group=group) for group, name in names]
    return LabelledSet("set", frames, classes, is_sequence=is_sequence)


@pytest.mark.parametrize("is_sequence", [True, False])
@pytest.mark.parametrize("num_groups", [1, 3, 20])
def test_split_validation__parts_are_disjoint_whole_and_of_the_asked_size(is_sequence: bool, num_groups: int) -> None:
    names = [(f"g{group:02d}", f"g{group:02d}/{frame:02d}") for group in range(num_groups) for frame in range(20)]
    train, held = split_validation(create_set(names, is_sequence), 0.1)
    kept, out = {frame.name for frame in train.frames}, {frame.name for frame in held.frames}
    assert not kept & out and kept | out == {name for _, name in names}
    assert len(out) == 2 * num_groups
    if num_groups == 20:
        assert not {frame.group for frame in train.frames} & {frame.group for frame in held.frames}
    elif is_sequence:
        assert {name[-2:] for name in out} == {"18", "19"}, "the end of each sequence"


@pytest.mark.parametrize("flag", ["depth_scale", "max_depth"])
@pytest.mark.parametrize("layout", ["nyu", "kitti", "scannet"])
def test_depth_options__official_sets_refuse_what_they_would_ignore(folder: Path, flag: str, layout: str) -> None:
    name = f"--{flag.replace('_', '-')}"
    given = {flag: 5.0}
    with pytest.raises(ValueError, match=f"{name} sets .* is in the layout {layout}, which has its own; leave it out"):
        check_options([folder], "depth", LabelledOptions(layout=layout, **given))  # type: ignore[arg-type]
    # A plain folder reads both, also beside an official set.
    check_options([folder], "depth", LabelledOptions(**given))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name} means nothing to the segmentation probe"):
        check_options([folder], "segmentation", LabelledOptions(**given))  # type: ignore[arg-type]


def test_depth_options__one_plain_folder_is_enough(folder: Path, scannet: Path) -> None:
    options = LabelledOptions(depth_scale=500.0)
    with pytest.raises(ValueError, match="--depth-scale"):
        check_options([scannet], "depth", options)
    check_options([scannet, folder], "depth", options)
    # The official set keeps its unit all the same.
    frame = read_labelled_set(scannet, "train", "depth", options).frames[0]
    assert frame.load_depth is not None
    torch.testing.assert_close(frame.load_depth()[0, 1], torch.tensor(2.0))


def test_nyu_classes__are_refused_where_no_nyu_is_read(folder: Path, nyu: Path) -> None:
    options = LabelledOptions(nyu_classes=40)
    check_options([folder, nyu], "segmentation", options)
    with pytest.raises(ValueError, match="--nyu-classes sets the class list of NYUv2, but .* is in the layout folder"):
        check_options([folder], "segmentation", options)
    with pytest.raises(ValueError, match="--nyu-classes means nothing to the depth probe"):
        check_options([nyu], "depth", options)


def test_depth_options__scenes_have_a_unit_but_no_range(scannetpp_scene: Path) -> None:
    with pytest.raises(ValueError, match="layout scannetpp"):
        check_options([scannetpp_scene], "depth", LabelledOptions(depth_scale=500.0))
    check_options([scannetpp_scene], "depth", LabelledOptions(max_depth=5.0))


def test_split_validation__one_frame_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="one training frame"):
        split_validation(create_set([("", "a")], False), 0.1)


def test_join_sets__other_classes_are_refused() -> None:
    first, other = create_set([("", "a")], False, ("x", "y")), create_set([("", "b")], False, ("x", "z"))
    with pytest.raises(ValueError, match="class 1 is 'y' and 'z'"):
        join_sets([first, other])
    with pytest.raises(ValueError, match="class 1 is 'y' and 'z'"):
        check_same_kind(first, other)


def test_compute_data_hash__changes_with_files_and_classes(folder: Path) -> None:
    before = compute_data_hash(read_labelled_set(folder, "train", "segmentation"))
    assert before == compute_data_hash(read_labelled_set(folder, "train", "segmentation"))
    assert before != compute_data_hash(read_labelled_set(folder, "test", "segmentation"))
    write_map(folder / "labels/train/a.png", np.random.default_rng(0).integers(0, 2, (8, 12)).astype(np.uint8))
    assert before != compute_data_hash(read_labelled_set(folder, "train", "segmentation"))
