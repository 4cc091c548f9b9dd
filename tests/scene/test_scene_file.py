"""The scene file: what goes in comes out, on disk as promised; damaged and foreign files get one sentence."""

import json
import struct
from dataclasses import replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fit3d_ns.features import describe_backbone
from fit3d_ns.scene import FeatureDecoder, load_scene, save_scene
from fit3d_ns.scene.scene_file import compute_stage1_hours, find_geometry_seconds


def rewrite_header(path, change):
    """Writes the file again with the scene's JSON changed."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fit3d_scene"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    change(header, tensors)
    save_file(tensors, path, metadata={"fit3d_scene": json.dumps(header)})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scenes" / "room.safetensors"


@pytest.mark.parametrize("bias", [True, False])
def test_round_trip__keeps_every_value(make_scene, path, bias):
    scene = make_scene(bias=bias, token_reading="area", rasterize_mode="antialiased", eps2d=0.1)
    save_scene(scene, path)
    loaded = load_scene(path)
    for name, tensor in scene.gaussians.tensors().items():
        read = getattr(loaded.gaussians, name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
    assert torch.equal(loaded.decoder.weight, scene.decoder.weight)
    assert (loaded.decoder.bias is None) == (not bias)
    if bias:
        assert torch.equal(loaded.decoder.bias, scene.decoder.bias)
    assert torch.equal(loaded.pca.components, scene.pca.components)
    assert torch.equal(loaded.pca.colour_high, scene.pca.colour_high)
    assert loaded.pca.total_variance == scene.pca.total_variance
    assert loaded.backbone == scene.backbone
    assert (loaded.token_reading, loaded.rasterize_mode, loaded.eps2d) == ("area", "antialiased", 0.1)
    assert loaded.metrics == {"psnr": 20.5}
    assert loaded.posed_capture.metric_scale == 1.0


def test_round_trip__remembers_where_weights_lie(make_scene, path, tmp_path):
    folder = tmp_path / "deep" / "ft"
    folder.mkdir(parents=True)
    model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 0}))
    scene = make_scene()
    for name, weights in ((str(folder), None), ("test_vit", folder / "model.safetensors")):
        backbone = describe_backbone(name, weights)
        decoder = FeatureDecoder(scene.gaussians.feature_dim, backbone.embed_dim)
        save_scene(replace(scene, backbone=backbone, decoder=decoder, pca=None), path)
        found = load_scene(path).backbone
        assert found.with_weights(None).identity == backbone.identity
        assert str(tmp_path) not in json.dumps(found.to_metadata()), "records carry no path of this machine"
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="which is gone; say with --backbone or --backbone-weights"):
        found.with_weights(None)
    assert found.with_weights(moved / "model.safetensors").identity == backbone.identity


def test_round_trip__renders_to_the_same_bits(make_scene, path):
    scene = make_scene()
    save_scene(scene, path)
    loaded, view = load_scene(path), scene.posed_capture.views[0]
    arguments = (view.camera_to_world, view.K, view.width, view.height)
    assert torch.equal(loaded.render_features(*arguments, (3, 4)), scene.render_features(*arguments, (3, 4)))
    assert torch.equal(loaded.render_rgb(*arguments), scene.render_rgb(*arguments))


def test_round_trip__keeps_the_capture(make_scene, path):
    scene = make_scene()
    save_scene(scene, path)
    loaded = load_scene(path).capture()
    for read, view in zip(loaded.views, scene.posed_capture.views, strict=True):
        assert torch.equal(read.camera_to_world, view.camera_to_world)
        assert torch.equal(read.K, view.K)
        assert (read.name, read.split, read.width, read.height) == (view.name, view.split, view.width, view.height)
        assert read.frame.lens == view.frame.lens
        assert read.frame.image_path == view.frame.image_path
        assert read.frame.mask_path == view.frame.mask_path
        assert torch.equal(read.frame.camera_to_world, view.frame.camera_to_world)
    assert torch.equal(loaded.load_image(loaded.views[1]), scene.posed_capture.load_image(scene.posed_capture.views[1]))


@pytest.mark.parametrize("names", [None, (), ("images/2.png", "images/0.png")])
def test_round_trip__keeps_which_views_were_lifted(make_scene, path, names):
    save_scene(make_scene(lifted_views=names), path)
    assert load_scene(path).lifted_views == names


def test_file__of_an_earlier_version_does_not_say_which_views_were_lifted(make_scene, path):
    save_scene(make_scene(lifted_views=("images/0.png",)), path)
    rewrite_header(path, lambda header, tensors: header.pop("lifted_views"))
    loaded = load_scene(path)
    assert loaded.lifted_views is None and loaded.metrics == {"psnr": 20.5}


def test_errors__a_lifted_view_that_the_capture_does_not_have(make_scene, path):
    save_scene(make_scene(), path)
    rewrite_header(path, lambda header, tensors: header.update(lifted_views=["images/0.png", "images/9.png"]))
    with pytest.raises(ValueError, match=r"not a whole scene file.*no view images/9.png"):
        load_scene(path)


def test_file__bytes_per_gaussian_are_170_at_64_dimensions(make_scene, path):
    scene = make_scene(num_gaussians=10)
    wide = replace(scene.gaussians, features=torch.zeros(10, 64, dtype=torch.float16))
    assert wide.bytes_per_gaussian == 170
    save_scene(scene, path)
    # 5 dimensions instead of 64; the header and the decoder come on top.
    with safe_open(path, framework="pt") as file:
        sizes = [file.get_tensor(name).nbytes for name in scene.gaussians.tensors()]
    assert sum(sizes) == 10 * (170 - 2 * 59)


def test_file__holds_harmonics_only_on_request(make_scene, path):
    scene = make_scene(sh_degree=1)
    save_scene(scene, path)
    assert load_scene(path).gaussians.sh_rest is None
    save_scene(scene, path, include_sh=True)
    assert torch.equal(load_scene(path).gaussians.sh_rest, scene.gaussians.sh_rest)


def test_file__is_mapped_and_never_written_through(make_scene, path):
    save_scene(make_scene(), path)
    before = path.read_bytes()
    loaded = load_scene(path)
    loaded.gaussians.means.zero_()
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.tmp"))


def test_file__carries_paths_relative_to_the_root(make_scene, path):
    save_scene(make_scene(), path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fit3d_scene"])
    assert [view["image"] for view in header["capture"]["views"]] == ["images/0.png", "images/1.png", "images/2.png"]
    assert header["capture"]["views"][0]["mask"] == "masks/0.png"
    assert len(header["capture"]["lenses"]) == 1


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.999])
def test_errors__a_file_that_was_cut(make_scene, path, share):
    save_scene(make_scene(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"room.safetensors is cut short.*again"):
        load_scene(path)


def test_errors__files_of_other_kinds(make_scene, path, tmp_path):
    with pytest.raises(ValueError, match="No such scene file"):
        load_scene(path)
    with pytest.raises(ValueError, match="is a folder"):
        load_scene(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("These are only some notes.")
    with pytest.raises(ValueError, match="is not a scene file"):
        load_scene(text)
    weights = tmp_path / "vit.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 4)}, weights)
    with pytest.raises(ValueError, match="holds tensors but no scene"):
        load_scene(weights)
    (tmp_path / "broken.safetensors").write_bytes(struct.pack("<Q", 20) + b"{" + b"x" * 40)
    with pytest.raises(ValueError, match="is damaged .*header"):
        load_scene(tmp_path / "broken.safetensors")


def test_errors__newer_schema_and_missing_pieces(make_scene, path):
    save_scene(make_scene(), path)
    rewrite_header(path, lambda header, tensors: header.update(schema_version=99))
    with pytest.raises(ValueError, match="scene schema 99, this one reads up to 1; update"):
        load_scene(path)
    rewrite_header(path, lambda header, tensors: header.update(schema_version=1))
    rewrite_header(path, lambda header, tensors: tensors.pop("quats"))
    with pytest.raises(ValueError, match="not a whole scene file.*quats"):
        load_scene(path)


def test_errors__a_path_that_leaves_the_root(make_scene, path):
    save_scene(make_scene(), path)
    rewrite_header(path, lambda header, tensors: header["capture"]["views"][0].update(image="../../secret.png"))
    with pytest.raises(ValueError, match="leaves the capture's root"):
        load_scene(path)


def test_save__leaves_the_old_file_when_it_fails(make_scene, path, monkeypatch):
    scene = make_scene()
    save_scene(scene, path)
    before = path.read_bytes()

    def fail(*arguments, **keywords):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr("fit3d_ns.utils.tensor_files.save_file", fail)
    with pytest.raises(ValueError, match="room.safetensors cannot be written: the disk is full"):
        save_scene(scene, path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_stage1_hours__of_a_run_leave_out_what_only_measures_or_shows() -> None:
    seconds = {"setup": 100.0, "colour": 3000.0, "solve": 500.0, "evaluation": 777.0, "viewer": 5.0}
    assert compute_stage1_hours({"seconds": seconds}) == pytest.approx(1.0)


def test_stage1_hours__of_a_lift_count_the_run_it_stands_on() -> None:
    run = {"seconds": {"setup": 100.0, "colour": 3000.0, "solve": 400.0, "features": 50.0}}
    lift = {"seconds": {"tokens": 200.0, "conjugate_gradients": 300.0, "photographs": 9.0}}
    metrics = {**lift, "training_seconds": find_geometry_seconds(run)}
    # The run's own solve is not what this scene's features come from.
    assert metrics["training_seconds"] == {"setup": 100.0, "colour": 3000.0}
    assert compute_stage1_hours(metrics) == pytest.approx(1.0)
    # A scene lifted from this one stands on the same run.
    assert find_geometry_seconds(metrics) == metrics["training_seconds"]


def test_stage1_hours__unknown_without_the_training_of_the_geometry() -> None:
    assert compute_stage1_hours({"seconds": {"tokens": 200.0}, "training_seconds": {}}) is None
    assert compute_stage1_hours({}) is None and find_geometry_seconds({"seconds": None}) == {}
