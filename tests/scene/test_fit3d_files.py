"""Scenes of FiT3D's authors: run folders and packed files as their code writes them."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from fit3d_ns.scene import FeatureScene
from fit3d_ns.scene.ply import write_ply
from fit3d_ns.scene.splat_files import list_splats, read_model_name, write_fit3d
from tests.scene.conftest import DIM, EMBED


def write_run(scene, folder, iteration=30000):
    write_fit3d(scene, folder / f"point_cloud/iteration_{iteration}/point_cloud.ply", folder / f"chkpnt{iteration}.pth")
    (folder / "cfg_args").write_text("Namespace(sh_degree=3, low_sem_dim=64, model_name='clip_base', run_name='a')")
    return folder


def read_only_scene(path, data=None, keep_features=True):
    ((_, _, read),) = list_splats(path, data or path, keep_features)
    return read()


@pytest.mark.parametrize("bias", [False, True])
def test_run__renders_as_the_scene_did(make_scene, tmp_path, bias):
    scene = make_scene(bias=bias)
    run = write_run(scene, tmp_path / "run")
    state = torch.load(run / "chkpnt30000.pth", weights_only=True)
    assert list(state) == ["0.weight"] and state["0.weight"].shape == (EMBED, DIM + bias, 3, 3)
    splats = read_only_scene(run)
    # The quaternions' last bits are the only difference: they are normalised again in half precision.
    gaussians = replace(splats.gaussians, quats=scene.gaussians.quats)
    read = FeatureScene(gaussians, splats.decoder, scene.posed_capture, scene.backbone)
    view = scene.posed_capture.views[0]
    arguments = (view.camera_to_world, view.K, view.width, view.height, (3, 4))
    torch.testing.assert_close(
        read.render_features(*arguments), scene.render_features(*arguments), rtol=1e-4, atol=1e-4
    )
    assert splats.num_dropped == 0 and read_model_name(run) == "clip_base"
    assert read_only_scene(run, keep_features=False).gaussians.feature_dim == 0


def test_run__decodes_with_the_checkpoint_of_the_same_iteration(make_scene, tmp_path):
    scene = make_scene(bias=False)
    run = write_run(scene, write_run(scene, tmp_path / "run"), iteration=7000)
    torch.save({"0.weight": torch.ones(EMBED, DIM, 3, 3)}, run / "chkpnt7000.pth")
    assert not torch.equal(read_only_scene(run).decoder.weight, torch.ones(EMBED, DIM, 3, 3))
    (run / "chkpnt30000.pth").unlink()
    with pytest.raises(ValueError, match="has features without .*chkpnt30000.pth"):
        read_only_scene(run)
    # Inria's own runs have no features, and a checkpoint of another kind.
    plain = tmp_path / "inria"
    write_ply(scene.gaussians.with_features(torch.zeros(30, 0)), plain / "point_cloud/iteration_7/point_cloud.ply")
    torch.save((1, 2), plain / "chkpnt7.pth")
    assert read_only_scene(plain).decoder is None and read_model_name(plain) is None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"0.weight": torch.zeros(7, 3, 3, 3)}, "has 5 sem_. properties, chkpnt30000.pth takes 3 channels"),
        ({"blocks.0.weight": torch.zeros(3)}, "no 3x3 convolution `0.weight`"),
        ({"0.weight": torch.full((7, 5, 3, 3), float("nan"))}, "NaN or infinite"),
        (b"not a checkpoint", "not a readable checkpoint"),
    ],
)
def test_run__refuses_what_does_not_belong_together(make_scene, tmp_path, content, sentence):
    run = write_run(make_scene(bias=False), tmp_path)
    if isinstance(content, bytes):
        (run / "chkpnt30000.pth").write_bytes(content)
    else:
        torch.save(content, run / "chkpnt30000.pth")
    with pytest.raises(ValueError, match=sentence):
        read_only_scene(run)


def pack(scene):
    """A scene as FiT3D's `write_feat_gaussian.py` packs it: parameters, and what is activated with its graph."""
    gaussians = scene.gaussians
    raw = {
        name: nn.Parameter(getattr(gaussians, name).float())
        for name in ("means", "opacity_logits", "log_scales", "quats", "features")
    }
    rest = torch.zeros(30, 15, 3) if gaussians.sh_rest is None else gaussians.sh_rest.float()
    return {
        "feat_cnn": OrderedDict([("0.weight", scene.decoder.weight.detach())]),
        "means3D": raw["means"],
        "shs": torch.cat([nn.Parameter(gaussians.sh_dc.float()[:, None]), nn.Parameter(rest)], dim=1),
        "sem": raw["features"],
        "opacity": torch.sigmoid(raw["opacity_logits"][:, None]),
        "scales": torch.exp(raw["log_scales"]),
        "rotations": nn.functional.normalize(raw["quats"]),
    }


def test_packed__holds_the_scenes_that_have_a_folder(make_scene, tmp_path, capsys):
    scene = make_scene(bias=False, sh_degree=3)
    other = replace(scene, gaussians=scene.gaussians.select(torch.arange(30) != 4))
    packed = {"0a5c01": pack(scene), "7b6477": pack(scene), "c50d2d": pack(other) | {"shs": torch.zeros(29, 16, 3)}}
    packed["7b6477"]["scales"] = packed["7b6477"]["scales"].detach().clone()
    packed["7b6477"]["scales"][3] = 0.0
    torch.save(packed, tmp_path / "pretrained_feat_gaussians_train.pth")
    for name in ("0a5c01", "7b6477"):
        (tmp_path / "scenes" / name).mkdir(parents=True)
    listed = list_splats(tmp_path / "pretrained_feat_gaussians_train.pth", tmp_path / "scenes", True)
    assert [(name, data.name) for name, data, _ in listed] == [("0a5c01", "0a5c01"), ("7b6477", "7b6477")]
    assert "1 of the 3 scenes" in capsys.readouterr().err
    splats, dropped = (read() for _, _, read in listed)
    for name in ("means", "log_scales", "opacity_logits", "sh_dc", "sh_rest", "features", "quats"):
        expected, actual = getattr(scene.gaussians, name).float(), getattr(splats.gaussians, name).float()
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(splats.decoder.weight, scene.decoder.weight)
    assert splats.num_dropped == 0
    assert dropped.num_dropped == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sem": torch.zeros(30, 4)}, r"Scene a in .*p.pth has `sem` of torch.float32 \[30, 4\]; expected .*\[30, 5\]"),
        ({"scales": torch.zeros(29, 3)}, "has `scales` of"),
        ({"rotations": torch.zeros(30, 4).long()}, "has `rotations` of torch.int64"),
        ({"means3D": [1.0]}, "has `means3D` of list"),
        ({"shs": torch.zeros(30, 7, 3)}, "has `shs` of"),
        ({"opacity": torch.full((30, 1), 1.5)}, "opacities outside of 0 to 1"),
        ({"feat_cnn": {}}, "no 3x3 convolution"),
        ({"feat_cnn": {"0.weight": torch.zeros(7, 5, 3, 3).to_sparse()}}, "no 3x3 convolution"),
    ],
)
def test_packed__refuses_tensors_of_other_shapes(make_scene, tmp_path, change, sentence):
    torch.save({"a": pack(make_scene(bias=False)) | change}, tmp_path / "p.pth")
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=sentence):
        read_only_scene(tmp_path / "p.pth", tmp_path)


def test_packed__refuses_other_files(make_scene, tmp_path):
    path, packed = tmp_path / "p.pth", pack(make_scene(bias=False))
    for content in ({"model": {"blocks": torch.zeros(3)}}, {"../a": packed}, {"..": packed}, {"model": 3}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="is no scene with feat_cnn, means3D"):
            list_splats(path, tmp_path, True)
    for other in ([1, 2], {}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="holds no scenes"):
            list_splats(path, tmp_path, True)
    torch.save({"a": packed}, path)
    with pytest.raises(ValueError, match="no folder for any of the scenes in .*p.pth .a.;"):
        list_splats(path, tmp_path, True)
    # What needs code to be read is not read.
    path.write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ValueError, match="code from files is not run"):
        list_splats(path, tmp_path, True)
