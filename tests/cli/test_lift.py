"""`fit3d-lift` from its arguments to its files, and every way in which a user can go wrong."""

import json
from importlib import metadata
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from fit3d_ns.cli import lift as module
from fit3d_ns.cli.command import create_main
from fit3d_ns.features import describe_backbone
from fit3d_ns.lifting import lift_scene
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.scene import Gaussians, load_scene
from fit3d_ns.scene.ply import write_ply
from fit3d_ns.scene.scene_file import compute_stage1_hours
from fit3d_ns.synthetic.synthesize import SynthesisConfig, synthesize_scenes
from fit3d_ns.utils.results import load_result
from tests.lift_capture import BACKBONE, move_gaussians, write_capture, write_gaussians


def run_main(capsys, words):
    """Exit code, standard output and standard error of the command."""
    try:
        module.main([str(word) for word in words])
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    root = tmp_path_factory.mktemp("command") / "ring"
    raw = write_capture(root)
    return root, write_gaussians(root / "point_cloud.ply", raw), raw


@pytest.fixture
def run(capture, tmp_path, capsys):
    """Runs the command on the capture; returns exit code, standard output and standard error."""
    root, ply, _ = capture

    def call(*arguments, name="out/ring.safetensors", source=("--ply", ply, "--data", root)):
        words = [*source, "--output-path", tmp_path / name, "--backbone", BACKBONE]
        words += ["--feature-cache", root.parent / "tokens", "--max-passes", 2, "--device", "cpu", *arguments]
        return run_main(capsys, words)

    return call


def test_lift__writes_the_scene_and_every_metric(run, tmp_path):
    code, out, _ = run("--feature-dim", 5, "--views", 8, "--drop-unseen")
    assert code == 0
    scene = load_scene(tmp_path / "out" / "ring.safetensors")
    assert scene.gaussians.feature_dim == 5 and scene.backbone.backbone == BACKBONE
    figures = tmp_path / "out" / "ring.json"
    assert f"Scene: {tmp_path / 'out' / 'ring.safetensors'}\nMetrics: {figures}" in out and "held-out cosine" in out
    record, content = load_result(figures), json.loads(figures.read_text())
    assert record.kind == "lift" and not record.is_random and record.versions["torch"] == metadata.version("torch")
    metrics = record.metrics
    assert metrics["feature_cosine"] > metrics["feature_cosine_mean_token"] + 0.15
    assert metrics["feature_l1"] < metrics["feature_l1_mean_token"]
    assert metrics["num_train_views"] == 8 and metrics["num_eval_views"] == 2 and len(metrics["residuals"]) == 2
    assert set(metrics["seconds"]) >= {"tokens", "weighted_sum", "conjugate_gradients", "decoder", "evaluation"}
    assert metrics["num_gaussians"] + metrics["num_dropped_unseen_gaussians"] == 40
    assert metrics["num_invalid_gaussians"] == 0 and metrics["peak_memory_mb"] > 0
    assert metrics["lift"]["feature_dim"] == 5 and metrics["lift"]["max_passes"] == 2
    assert record.settings["source"] == "PLY point_cloud.ply in the dataset world"
    assert content["num_gaussians"] == scene.gaussians.num_gaussians and content["num_views"]["train"] == 10
    # What is written once is not left behind twice: no state, no temporary file.
    assert sorted(path.name for path in figures.parent.iterdir()) == ["ring.json", "ring.safetensors"]


def test_lift__reads_a_moved_scene_again(run, capture, tmp_path):
    root, _, raw = capture
    assert run("--feature-dim", 4)[0] == 0
    moved = tmp_path / "moved"
    (moved / "images").mkdir(parents=True)
    for path in (root / "images").iterdir():
        (moved / "images" / path.name).write_bytes(path.read_bytes())
    first = ("--scene", tmp_path / "out" / "ring.safetensors", "--data", moved)
    code, _, _ = run("--feature-dim", 6, name="again.safetensors", source=first)
    assert code == 0
    again = load_scene(tmp_path / "again.safetensors")
    assert again.gaussians.feature_dim == 6 and again.posed_capture.root == moved


def test_lift__finds_the_photographs_of_several_moved_scenes_below_one_folder(run, capture, tmp_path):
    root, _, _ = capture
    for name in ("a", "b"):
        assert run("--feature-dim", 4, name=f"{name}.safetensors")[0] == 0
    (tmp_path / "disk").mkdir()
    root.rename(tmp_path / "disk" / root.name)
    try:
        scenes = ("--scene", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        assert "--data-root" in run(name="lost", source=scenes)[2]
        assert run(name="all", source=(*scenes, "--data-root", tmp_path / "disk"))[0] == 0
    finally:
        (tmp_path / "disk" / root.name).rename(root)
    again = load_scene(tmp_path / "all" / "b.safetensors")
    assert again.posed_capture.root == tmp_path / "disk" / root.name


def test_lift__one_scene_goes_into_a_folder_too(run, capture, tmp_path):
    _, ply, _ = capture
    (tmp_path / "v1.0").mkdir()
    for folder in ("new", "v1.0"):
        assert run("--output-path", tmp_path / folder)[0] == 0
        assert (tmp_path / folder / f"{ply.stem}.safetensors").is_file()


@pytest.mark.parametrize("shared", [(), ("--shared-decoder",)])
def test_lift__several_scenes_go_into_a_folder(run, tmp_path, shared):
    for name in ("a", "b"):
        assert run("--feature-dim", 4, name=f"{name}.safetensors")[0] == 0
    first = ("--scene", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    code, out, err = run("--feature-dim", 6, *shared, name="all", source=first)
    assert code == 0, err
    scenes = [load_scene(tmp_path / "all" / f"{name}.safetensors") for name in ("a", "b")]
    assert [scene.gaussians.feature_dim for scene in scenes] == [6, 6]
    for name, scene in zip(("a", "b"), scenes, strict=True):
        figures = load_result(tmp_path / "all" / f"{name}.json")
        assert figures.metrics["feature_l1"] == scene.metrics["feature_l1"]
        assert ("num_scenes_sharing_decoder" in figures.metrics) == bool(shared)
        assert f"Scene: {tmp_path / 'all' / name}.safetensors" in out
    names = {f"{name}{kind}" for name in ("a", "b") for kind in (".json", ".safetensors", ".log")}
    assert {path.name for path in (tmp_path / "all").iterdir()} == names
    code, out, _ = run("--feature-dim", 6, *shared, "--dry-run", name="all", source=first)
    assert code == 0 and "2 scenes: about" in out


def test_lift__refuses_what_only_one_scene_can_have(run, capture, tmp_path):
    root, _, _ = capture
    assert run("--feature-dim", 4, name="a.safetensors")[0] == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    a, again = tmp_path / "a.safetensors", tmp_path / "other" / "a.safetensors"
    assert "must be a folder" in run(source=("--scene", a, a))[2]
    assert "Two scenes would be written as a.safetensors" in run(name="all", source=("--scene", a, again))[2]
    assert "the folder of one scene" in run(name="all", source=("--scene", a, again, "--data", root))[2]
    assert not (tmp_path / "all").exists()


def test_name_run__is_the_experiment(tmp_path):
    run = tmp_path / "outputs" / "kitchen" / "splatfacto" / "2024-01-01"
    run.mkdir(parents=True)
    (run / "nerfstudio_models").mkdir()
    (run / "config.yml").touch()
    assert module.name_run(run) == module.name_run(run / "config.yml") == "kitchen"
    # A run is also found from a folder above it.
    assert module.name_run(run.parent) == module.name_run(run.parents[1]) == "kitchen"


def test_lift__takes_the_backbone_of_the_scene_it_lifts_again(run, capture, tmp_path, capsys):
    root, _, _ = capture
    assert run("--feature-dim", 4, "--normalization", "imagenet", name="a.safetensors")[0] == 0
    words = ["--scene", tmp_path / "a.safetensors", "--output-path", tmp_path / "b.safetensors", "--feature-dim", 5]
    words += ["--feature-cache", root.parent / "tokens", "--max-passes", 1, "--device", "cpu"]
    module.main([str(word) for word in words])
    first, second = (load_scene(tmp_path / f"{name}.safetensors").backbone for name in ("a", "b"))
    assert first == second and second.backbone == BACKBONE and second.normalization == "imagenet"
    assert "as the source has them" in capsys.readouterr().err
    # What is asked for wins, with the backbone's own normalization.
    module.main([str(word) for word in (*words, "--backbone", BACKBONE)])
    assert load_scene(tmp_path / "b.safetensors").backbone.normalization == "timm"


def test_lift__dry_run_predicts_and_writes_nothing(run, tmp_path):
    code, out, _ = run("--feature-dim", 4, "--dry-run")
    assert code == 0
    assert "40 Gaussians, 10 views to lift, 2 held out" in out and "Time: about" in out and "Memory: about" in out
    assert not (tmp_path / "out").exists()


def test_lift__interrupted_goes_on(run, tmp_path, monkeypatch):
    arguments = ("--feature-dim", 4, "--seconds-per-checkpoint", 0)
    assert run(*arguments, name="whole.safetensors")[0] == 0
    solve = lift_scene.lift_scene

    def interrupt(name, done, total):
        if name == "solve 1" and done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(lift_scene, "lift_scene", lambda *args, **kwargs: solve(*args, **kwargs, progress=interrupt))
    code, _, err = run(*arguments)
    assert code == 130 and "the same command goes on from there" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ring.safetensors.lift-state"]
    monkeypatch.setattr(lift_scene, "lift_scene", solve)
    code, _, err = run(*arguments, "--normalization", "imagenet")
    assert code == 1 and "belongs to a lift with another backbone" in err
    code, _, err = run(*arguments)
    assert code == 0 and "Going on with the interrupted lift" in err
    whole, resumed = load_scene(tmp_path / "whole.safetensors"), load_scene(tmp_path / "out" / "ring.safetensors")
    assert torch.equal(whole.gaussians.features, resumed.gaussians.features)


def test_lift__a_finished_one_is_lifted_again_only_for_another_lift(run, capture, tmp_path):
    path, record = tmp_path / "out" / "ring.safetensors", tmp_path / "out" / "ring.json"

    def lift_again(*arguments):
        before = path.stat().st_mtime_ns
        code, _, err = run("--feature-dim", 4, *arguments)
        assert code == 0 and ("lifted already" in err) == (path.stat().st_mtime_ns == before)
        return path.stat().st_mtime_ns != before

    assert run("--feature-dim", 4)[0] == 0
    text = record.read_text()
    assert not lift_again() and record.read_text() == text
    # Where the state lies and how often it is written is no other lift.
    assert not lift_again("--seconds-per-checkpoint", 7)
    assert lift_again("--max-passes", 1) and not lift_again("--max-passes", 1) and lift_again("--overwrite")
    assert lift_again("--drop-unseen") and lift_again("--include-sh")
    # Killed between the two files.
    record.unlink()
    assert run("--feature-dim", 4, "--include-sh")[0] == 0 and record.is_file()


def test_lift__flags_are_the_fields_of_the_lift():
    parsed = []
    main = create_main("fit3d-lift", module.LiftCommand, parsed.append)
    main(["--ply", "a.ply", "--output-path", "b.safetensors"])
    assert parsed[0].lift == LiftConfig()
    main(["--ply", "a.ply", "--output-path", "b.safetensors", "--feature-dim", "32", "--ply-world", "colmap"])
    assert parsed[1].lift.feature_dim == 32 and parsed[1].from_ply.ply_world == "colmap"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--feature-dim", 500), "feature_dim 500 exceeds the width 192"),
        (("--views", 0), "views is 0"),
        (("--feature-dim", 0), "feature_dim is 0"),
        (("--scene", "x.safetensors"), "--ply and --scene are given"),
        (("--ply-world", "training"), "--dataparser-transforms"),
        (("--output-path", "scene.ply"), "must end in .safetensors"),
        (("--backbone", "no_such_vit"), "no_such_vit"),
        (("--data", "nowhere"), "No such scene: nowhere"),
        (("--ply", "nowhere.ply"), "PLY file nowhere.ply is missing"),
        (("--shared-decoder",), "must be a folder"),
    ],
)
def test_lift__says_in_one_sentence_what_is_wrong(run, tmp_path, arguments, sentence):
    code, out, err = run(*arguments)
    assert code != 0 and sentence in " ".join(err.split()) and "Traceback" not in err and not out
    assert not (tmp_path / "out").exists()


def test_lift__asks_for_cameras_and_for_a_source(run, capture):
    _, ply, _ = capture
    assert "with --data" in run(source=("--ply", ply))[2]
    assert "none is given" in run(source=())[2]


def test_lift__says_what_a_ply_lacks(run, capture, tmp_path):
    root, ply, _ = capture
    content = ply.read_bytes()
    for name, changed, sentence in (
        ("cloud.ply", content.replace(b"float opacity", b"float opaqueX"), "has no `opacity`"),
        ("cut.ply", content[:-100], "damaged or cut short"),
        ("rest.ply", content.replace(b"float nx", b"float f_rest_0"), "belong to no SH degree"),
    ):
        (tmp_path / name).write_bytes(changed)
        code, _, err = run(source=("--ply", tmp_path / name, "--data", root))
        assert code == 1 and sentence in " ".join(err.split())


def test_lift__names_a_run_that_is_not_there(run, tmp_path):
    pytest.importorskip("nerfstudio")
    code, _, err = run(source=("--load-config", tmp_path / "no_run"))
    assert code == 1 and "no_run" in err and "config.yml" in err


def test_lift__takes_a_run_as_its_gaussians_and_corrected_cameras(run, capture, tmp_path, monkeypatch):
    """A run's raw parameters, by splatfacto's names, lift to what the same Gaussians in a PLY lift to."""
    run_reader = pytest.importorskip("fit3d_ns.plugin.run_reader")
    root, _, raw = capture
    arguments = ("--feature-dim", 4)
    assert run(*arguments, name="ply.safetensors")[0] == 0
    expected = load_scene(tmp_path / "ply.safetensors")
    broken = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in raw.items()}
    broken["means"][-1] = float("nan")
    splat_run = run_reader.SplatRun(
        config_path=tmp_path / "2024-01-01" / "config.yml",
        config=SimpleNamespace(
            method_name="splatfacto-big", pipeline=SimpleNamespace(model=SimpleNamespace(sh_degree=3))
        ),
        step=29999,
        gauss_params={
            "means": broken["means"],
            "quats": 3.0 * broken["quats"],
            "scales": broken["log_scales"],
            "opacities": broken["opacity_logits"][:, None],
            "features_dc": broken["sh_dc"],
            "features_rest": torch.zeros(41, 0, 3),
        },
        state={},
        run_state={},
        capture=expected.posed_capture,
        rasterize_mode="classic",
    )
    asked = []
    monkeypatch.setattr(run_reader, "read_run", lambda path, data, trust: asked.append((path, data)) or splat_run)
    config = tmp_path / "2024-01-01"
    code, _, err = run(*arguments, name="run.safetensors", source=("--load-config", config, "--data", root))
    assert code == 0 and asked == [(config, root)] and "Left out 1 Gaussians" in err
    lifted = load_scene(tmp_path / "run.safetensors")
    # Quaternions of another length are normalised to other last bits of half precision.
    torch.testing.assert_close(lifted.gaussians.features, expected.gaussians.features, rtol=1e-2, atol=2e-2)
    record = load_result(tmp_path / "run.json")
    assert record.metrics["source"] == "splatfacto-big run 2024-01-01, step 29999"
    assert record.metrics["num_invalid_gaussians"] == 1


def test_surface__lifts_several_scenes_without_training_and_goes_on(tmp_path, capsys):
    synthesize_scenes(SynthesisConfig(tmp_path / "rooms", num_frames=9, width=96, height=64))
    rooms = [tmp_path / "rooms" / name for name in ("room_00", "room_01")]

    def call(*arguments):
        words = ["--surface", "depth", "--output-dir", tmp_path / "out", "--backbone", BACKBONE, "--feature-dim", 5]
        words += ["--feature-cache", tmp_path / "tokens", "--max-passes", 1, "--device", "cpu", *arguments]
        code, _, errors = run_main(capsys, words)
        return code, errors

    # One scene of a folder is written into the folder too, so that a list may grow.
    assert call("--data", rooms[0])[0] == 0
    first = (tmp_path / "out" / "room_00.safetensors").read_bytes()
    code, err = call("--data", *rooms)
    assert code == 0 and f"{tmp_path / 'out' / 'room_00.safetensors'} is lifted already" in err
    assert (tmp_path / "out" / "room_00.safetensors").read_bytes() == first
    scene = load_scene(tmp_path / "out" / "room_01.safetensors")
    assert scene.gaussians.sh_rest is None and scene.metrics["photograph_psnr"] > 15
    assert scene.metrics["source"].startswith("surface of depth")
    # Stage I's time is known: what the geometry took counts as its training.
    assert set(scene.metrics["training_seconds"]) == {"setup", "colour"}
    assert compute_stage1_hours(scene.metrics) > 0
    code, err = call("--data", rooms[0], "--cell-pixels", 8)
    assert code == 0 and "lifted already" not in err
    # Depth that was measured again counts as other depth, even in files of the same size.
    depth_path = sorted((rooms[1] / "dslr" / "render_depth").iterdir())[0]
    depth, size = cv2.imread(str(depth_path), cv2.IMREAD_UNCHANGED), depth_path.stat().st_size
    depth[:4] = 0
    smaller = cv2.imencode(".png", depth, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes()
    depth_path.write_bytes(smaller.ljust(size, b"\0"))
    assert depth_path.stat().st_size == size
    code, err = call("--data", rooms[1])
    assert code == 0 and "lifted already" not in err
    # So does a photograph.
    for photograph in (rooms[1] / "dslr").glob("*_images/*0.JPG"):
        size, pixels = photograph.stat().st_size, cv2.imread(str(photograph))
        smaller = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
        photograph.write_bytes(smaller.ljust(size, b"\0"))
        assert photograph.stat().st_size == size
    code, err = call("--data", rooms[1])
    assert code == 0 and "lifted already" not in err
    for arguments, message in [
        (("--data", rooms[0], "--ply-world", "colmap"), "--ply-world belongs to --ply"),
        (("--data", rooms[0], "--rasterize-mode", "antialiased"), "--rasterize-mode belongs to --ply"),
        (("--data", rooms[0], "--mesh", "a.ply"), "--mesh belongs to --surface mesh or points"),
        ((), "--surface needs the folders of the scenes with --data"),
        (("--data", *rooms, "--surface", "mesh", "--mesh", "a.ply"), "--mesh is the file of one scene"),
        (("--data", rooms[0], "--ply", "a.ply"), "--surface and --ply are given"),
        (("--data", rooms[0], rooms[0]), "Two scenes would be written as room_00.safetensors"),
    ]:
        code, err = call(*arguments)
        assert code == 1 and message in " ".join(err.split())


@pytest.fixture(scope="module")
def fit3d(tmp_path_factory):
    """A scene as FiT3D's authors prepare it, a run of their code on it, and the scene among two in a packed file."""
    root = tmp_path_factory.mktemp("fit3d")
    raw, scene = write_capture(root / "ring"), root / "scenes" / "0a5c013435"
    scene.mkdir(parents=True)
    (root / "ring" / "images").rename(scene / "images")
    meta = json.loads((root / "ring" / "transforms.json").read_text())
    frames = [{**frame, "file_path": frame["file_path"].removeprefix("images/")} for frame in meta["frames"]]
    camera = {key: meta[key] for key in ("camera_model", "fl_x", "fl_y", "cx", "cy", "w", "h")}
    content = {**camera, "frames": frames[:9], "test_frames": frames[9:]}
    (scene / "transforms_train.json").write_text(json.dumps(content))
    # Their code exchanges the first two axes and turns the third around.
    flip = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    raw = move_gaussians(raw, flip, np.zeros(3), 1.0)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(len(raw["means"]), 6, generator=generator)
    weight = torch.randn(describe_backbone(BACKBONE).embed_dim, 6, 3, 3, generator=generator)
    run = root / "output" / "example_gaussian_0a5c013435"
    write_ply(Gaussians.from_raw(**raw, features=features), run / "point_cloud/iteration_30000/point_cloud.ply", 3)
    torch.save({"0.weight": weight}, run / "chkpnt30000.pth")
    (run / "cfg_args").write_text(f"Namespace(model_name='{BACKBONE}', sh_degree=3)")
    packed = {
        **{"feat_cnn": {"0.weight": weight}, "means3D": raw["means"], "sem": features},
        **{"shs": torch.nn.functional.pad(raw["sh_dc"][:, None], (0, 0, 0, 15))},
        **{"opacity": raw["opacity_logits"].sigmoid()[:, None], "scales": raw["log_scales"].exp()},
        **{"rotations": torch.nn.functional.normalize(raw["quats"])},
    }
    torch.save({scene.name: packed, "7b6477cb95": packed}, root / "pretrained_feat_gaussians_train.pth")
    return root, scene, run, features, weight


def test_fit3d__a_run_becomes_a_scene_file_without_lifting(fit3d, tmp_path, capsys, monkeypatch):
    _, data, run, features, weight = fit3d
    monkeypatch.setattr(module, "create_extractor", lambda *_: pytest.fail("the ViT is not needed"))
    path = tmp_path / "scene.safetensors"
    words = ["--ply", run, "--data", data, "--output-path", path, "--device", "cpu", "--feature-cache", tmp_path / "no"]
    code, out, err = run_main(capsys, words)
    assert code == 0, err
    assert "Features and decoder as they were" in out and f"Features of {BACKBONE}, as the source has them" in err
    scene = load_scene(path)
    torch.testing.assert_close(scene.gaussians.features.float(), features, rtol=1e-3, atol=1e-3)
    assert torch.equal(scene.decoder.weight, weight)
    # ImageNet's mean, as their code gives it to every backbone; and the photographs are seen where they were taken.
    assert scene.backbone.backbone == BACKBONE and scene.backbone.mean == pytest.approx((0.485, 0.456, 0.406))
    assert scene.metrics["photograph_psnr"] > 30 and scene.lifted_views is None
    assert [view.split for view in scene.posed_capture.views] == ["train"] * 9 + ["test"] * 3
    code, out, err = run_main(capsys, words)
    assert code == 0 and "is lifted already" in err
    code, out, err = run_main(capsys, [*words, "--dry-run"])
    assert code == 0 and "nothing is lifted" in out


def test_fit3d__a_packed_file_becomes_a_folder_of_scenes(fit3d, tmp_path, capsys):
    root, data, _, features, _ = fit3d
    words = ["--ply", root / "pretrained_feat_gaussians_train.pth", "--data", data.parent, "--device", "cpu"]
    words += ["--output-path", tmp_path / "out", "--feature-cache", tmp_path / "no"]
    code, _, err = run_main(capsys, words)
    assert code == 1 and "does not say whose features it holds; name the ViT with --backbone" in err
    code, _, err = run_main(capsys, [*words, "--backbone", BACKBONE])
    assert code == 0 and "1 of the 2 scenes" in err, err
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["0a5c013435.safetensors"]
    scene = load_scene(tmp_path / "out" / "0a5c013435.safetensors")
    torch.testing.assert_close(scene.gaussians.features.float(), features, rtol=1e-3, atol=1e-3)
    assert scene.metrics["photograph_psnr"] > 30
    code, _, err = run_main(capsys, [*words, "--backbone", "dinov2_base"])
    assert code == 1 and "the decoder belongs to another backbone" in err
