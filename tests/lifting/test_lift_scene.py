"""Whole scenes: worlds of a PLY, what is lifted, what is kept, and going on after an interruption."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fit3d_ns.features import FeatureCache, compute_feature_key, describe_backbone
from fit3d_ns.lifting import lift_scene as lift_scene_module
from fit3d_ns.lifting.config import LiftConfig, LiftSceneConfig
from fit3d_ns.lifting.lift_scene import LiftSetup, forecast_lift, lift_scene
from fit3d_ns.lifting.ply_sources import read_ply_source
from fit3d_ns.lifting.sources import PlyConfig, compare_with_photographs, read_scene_source
from fit3d_ns.lifting.views import choose_views
from fit3d_ns.scene import Gaussians, load_scene, save_scene
from fit3d_ns.scene.ply import write_ply
from fit3d_ns.utils import progress
from tests.lift_capture import BACKBONE, COLMAP_TO_WORLD, move_gaussians, write_capture, write_gaussians

CONFIG = LiftConfig(feature_dim=6, max_passes=3, seconds_per_checkpoint=0.0)


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    """The folder of the photographs, and the Gaussians in the world of its transforms.json."""
    root = tmp_path_factory.mktemp("lift") / "ring"
    return root, write_capture(root)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return FeatureCache(tmp_path_factory.mktemp("tokens"), describe_backbone(BACKBONE))


@pytest.fixture(scope="module")
def source(capture):
    root, raw = capture
    return read_ply_source(write_gaussians(root / "dataset.ply", raw), root, PlyConfig())


@pytest.fixture(scope="module")
def scene(source, cache):
    return lift_scene(source, LiftSetup(cache, CONFIG))[0]


def move_to_colmap(raw):
    matrix = np.array(COLMAP_TO_WORLD)
    return move_gaussians(raw, matrix[:, :3].T, -matrix[:, :3].T @ matrix[:, 3], 1.0)


def test_lift_scene__beats_the_mean_token_on_held_out_views(scene):
    figures = scene.metrics
    assert figures["num_train_views"] == 10 and figures["num_eval_views"] == 2
    assert figures["feature_cosine"] > figures["feature_cosine_mean_token"] + 0.2
    assert figures["feature_l1"] < 0.9 * figures["feature_l1_mean_token"]
    # 8-bit photographs of the same Gaussians, which went through half precision.
    assert figures["photograph_psnr"] > 35


def test_lift_scene__figures_are_those_of_the_file(scene, cache, tmp_path):
    save_scene(scene, tmp_path / "ring.safetensors")
    loaded = load_scene(tmp_path / "ring.safetensors")
    cosines = []
    for view in loaded.posed_capture.select("test"):
        image = loaded.posed_capture.load_image(view)
        tokens = cache.load(compute_feature_key(image)).float()
        size = (tokens.shape[0], tokens.shape[1])
        features, alphas = loaded.render_features_with_alpha(view.camera, size)
        covered = alphas > 0.5
        cosines.append(torch.nn.functional.cosine_similarity(features, tokens, dim=-1)[covered])
    assert float(torch.cat(cosines).mean()) == pytest.approx(scene.metrics["feature_cosine"], abs=1e-4)
    assert loaded.token_reading == CONFIG.token_reading and not loaded.backbone.is_random
    assert loaded.pca is not None and int(loaded.gaussians.num_views.int().max()) <= 10


def test_lift_scene__records_the_views_that_it_lifted(source, scene, cache):
    assert list(scene.lifted_views) == [view.name for view in source.capture.select("train")]
    few, _ = lift_scene(source, LiftSetup(cache, CONFIG, LiftSceneConfig(views=3)))
    train = [view.name for view in source.capture.select("train")]
    # The middles of three equal parts of ten.
    assert list(few.lifted_views) == [train[1], train[5], train[8]]


@pytest.mark.parametrize("world", ["dataset", "colmap", "training", "training of nerfstudio's own dataparser"])
def test_read_ply_source__every_world_shows_the_same_pictures(capture, source, tmp_path, world):
    root, raw = capture
    angle, scale, shift = 0.7, 0.35, np.array([0.4, -1.0, 0.2])
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [0, 0, -1], [np.sin(angle), np.cos(angle), 0]])
    name = world.split()[0]
    if world == "colmap":
        raw = move_to_colmap(raw)
    elif name == "training":
        raw = move_gaussians(raw, rotation, shift, scale)
        matrix = np.concatenate([rotation, shift[:, None]], axis=1)
        if world != name:
            matrix = matrix @ np.concatenate([np.array(COLMAP_TO_WORLD), [[0, 0, 0, 1]]])
        transforms = {"transform": matrix.tolist(), "scale": scale}
        (tmp_path / "dataparser_transforms.json").write_text(json.dumps(transforms))
    moved = read_ply_source(write_gaussians(tmp_path / "moved.ply", raw), root, PlyConfig(ply_world=name))
    fit, expected = compare_with_photographs(moved), compare_with_photographs(source)
    # Half precision of quaternions and scales falls differently in another world.
    assert fit.psnr == pytest.approx(expected.psnr, abs=6.0) and fit.psnr > 30
    assert fit.coverage == pytest.approx(expected.coverage, abs=5e-3)


# 12 dB, where the soft colours of this capture pass in any world and the better one tells, and more than they reach.
@pytest.mark.parametrize("smallest_psnr", [12.0, 25.0])
def test_read_ply_source__refuses_the_wrong_world_and_names_the_right_one(capture, tmp_path, smallest_psnr):
    root, raw = capture
    ply = write_gaussians(tmp_path / "colmap.ply", move_to_colmap(raw))
    with pytest.raises(ValueError, match=r"in the dataset world .*; --ply-world colmap gives \d+\.\d dB: use that"):
        read_ply_source(ply, root, PlyConfig(smallest_psnr=smallest_psnr))
    read_ply_source(ply, root, PlyConfig(smallest_psnr=0.0))


def test_read_ply_source__says_when_no_world_fits(capture, tmp_path):
    root, raw = capture
    ply = write_gaussians(tmp_path / "other.ply", {**raw, "means": raw["means"] + 100.0})
    with pytest.raises(
        ValueError, match=r"nothing of it is in view.*tried dataset, colmap, training, gsplat\); check --ply-world"
    ):
        read_ply_source(ply, root, PlyConfig())


def test_read_ply_source__asks_for_another_world_where_colmaps_is_unknown(capture, tmp_path):
    root, raw = capture
    content = json.loads((root / "transforms.json").read_text())
    del content["applied_transform"]
    (root / "plain.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not say where COLMAP's world lies"):
        read_ply_source(write_gaussians(tmp_path / "a.ply", raw), root / "plain.json", PlyConfig(ply_world="colmap"))


def test_read_ply_source__drops_and_counts_broken_gaussians(capture, tmp_path):
    # Three Gaussians are there twice: it need not look like the photographs.
    (root, raw), config = capture, PlyConfig(smallest_psnr=0.0)
    broken = {name: torch.cat([tensor, tensor[:3]]) for name, tensor in raw.items()}
    ply = write_gaussians(tmp_path / "broken.ply", broken)
    content = bytearray(ply.read_bytes())
    start = len(content) - 3 * (len(content) - content.index(b"end_header\n") - 11) // 43
    # x of the third-last is NaN; log-scales of the last one overflow when they are activated.
    content[start : start + 4] = np.float32("nan").tobytes()
    ply.write_bytes(content)
    broken["log_scales"][-1] = 500.0
    read = read_ply_source(ply, root, config)
    assert read.num_dropped == 1 and read.gaussians.num_gaussians == 42
    read = read_ply_source(write_gaussians(tmp_path / "huge.ply", broken), root, config)
    assert read.num_dropped == 1 and read.gaussians.num_gaussians == 42


def test_lift_scene__resumed_equals_uninterrupted(source, scene, cache, tmp_path):
    state = tmp_path / "ring.safetensors.lift-state"
    calls = []

    def interrupt(name, done, total):
        calls.append(name)
        if name == "solve 2" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lift_scene(source, LiftSetup(cache, CONFIG), state_path=state, progress=interrupt)
    assert state.is_file()
    passes = []
    resumed, _ = lift_scene(
        source, LiftSetup(cache, CONFIG), state_path=state, progress=lambda name, *_: passes.append(name)
    )
    assert passes[0] == "solve 2" and "basis" not in passes and not state.exists()
    for name, tensor in scene.gaussians.tensors().items():
        assert torch.equal(resumed.gaussians.tensors()[name], tensor), name
    assert torch.equal(resumed.decoder.weight, scene.decoder.weight)
    assert resumed.metrics["is_resumed"] and not scene.metrics["is_resumed"]
    assert resumed.metrics["feature_cosine"] == scene.metrics["feature_cosine"]


def test_lift_scene__refuses_an_interrupted_lift_of_another_backbone(source, cache, tmp_path):
    state = tmp_path / "state"

    def interrupt(name, done, total):
        if name == "weighted sum" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lift_scene(source, LiftSetup(cache, CONFIG), state_path=state, progress=interrupt)
    other = describe_backbone(BACKBONE, None, "imagenet")
    with pytest.raises(ValueError, match="belongs to a lift with another backbone"):
        lift_scene(source, LiftSetup(FeatureCache(cache.directory, other), CONFIG), state_path=state)


def test_lift_scene__dropping_unseen_gaussians_changes_no_lifted_view(capture, cache, tmp_path):
    root, raw = capture
    # Far behind the shell, nothing sees them.
    hidden = {name: torch.cat([tensor, tensor[:5]]) for name, tensor in raw.items()}
    hidden["means"][-5:] = torch.tensor([0.0, 0.0, 40.0])
    with_hidden = read_ply_source(write_gaussians(tmp_path / "hidden.ply", hidden), root, PlyConfig())
    kept, _ = lift_scene(with_hidden, LiftSetup(cache, CONFIG))
    dropped, _ = lift_scene(with_hidden, LiftSetup(cache, CONFIG, LiftSceneConfig(drop_unseen=True)))
    number = dropped.metrics["num_dropped_unseen_gaussians"]
    assert number == kept.metrics["num_unseen_gaussians"] >= 5
    assert dropped.gaussians.num_gaussians == kept.gaussians.num_gaussians - number
    assert dropped.metrics["largest_change_by_dropping"] == 0.0
    for view in dropped.posed_capture.select("train"):
        pictures = [
            lifted.render_features(view.camera_to_world, view.K, view.width, view.height, (3, 4))
            for lifted in (kept, dropped)
        ]
        assert torch.equal(*pictures)


def test_read_scene_source__lifts_a_scene_file_as_its_source(source, scene, cache, tmp_path):
    save_scene(scene, tmp_path / "ring.safetensors")
    again, _ = lift_scene(read_scene_source(tmp_path / "ring.safetensors"), LiftSetup(cache, CONFIG))
    torch.testing.assert_close(again.gaussians.features, scene.gaussians.features, rtol=1e-2, atol=1e-2)  # half
    assert again.metrics["feature_cosine"] == pytest.approx(scene.metrics["feature_cosine"], abs=1e-3)


def test_read_ply_source__keeps_directional_colour(source, tmp_path, capture):
    root, raw = capture
    rest = torch.randn(len(raw["means"]), 8, 3, generator=torch.Generator().manual_seed(1)) * 0.01
    gaussians = Gaussians.from_raw(**raw, sh_rest=rest)
    write_ply(gaussians, tmp_path / "sh.ply")
    assert torch.equal(read_ply_source(tmp_path / "sh.ply", root, PlyConfig()).gaussians.sh_rest, gaussians.sh_rest)


def test_choose_views__evenly_and_never_a_test_view(source):
    lifted, held_out = choose_views(source.capture, 2)
    assert len(lifted) == 2 and all(view.split == "train" for view in lifted)
    assert [view.split for view in held_out] == ["test", "test"]


def test_lift_scene__refuses_more_dimensions_than_tokens_have(source, cache):
    with pytest.raises(ValueError, match="feature_dim 193 exceeds the width 192"):
        lift_scene(source, LiftSetup(cache, LiftConfig(feature_dim=193)))


def test_lift_scene__says_when_no_view_sees_anything(source, cache):
    far = replace(source, gaussians=replace(source.gaussians, means=source.gaussians.means + 100.0))
    with pytest.raises(ValueError, match="None of the 10 views sees a Gaussian"):
        lift_scene(far, LiftSetup(cache, CONFIG))


def test_forecast__counts_views_and_passes(source, scene, cache, monkeypatch):
    """`scene` has filled the cache. By a clock of which each look takes a second, every pass over a view takes one."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    for module in (lift_scene_module, progress):
        monkeypatch.setattr(module, "time", clock)
    forecast = forecast_lift(source, LiftSetup(cache, CONFIG))
    assert (forecast.num_gaussians, forecast.num_views, forecast.num_held_out) == (40, 10, 2)
    assert forecast.is_cached and forecast.solve_seconds > 0 and forecast.memory_mb > 0
    more = forecast_lift(source, LiftSetup(cache, replace(CONFIG, max_passes=CONFIG.max_passes + 57)))
    assert more.solve_seconds - forecast.solve_seconds == 57 * forecast.num_views


def test_forecast__knows_the_size_of_the_file(source, cache, tmp_path):
    """Many Gaussians with directional colour, so that what the header takes does not count."""
    many = {name: tensor.repeat_interleave(50, dim=0) for name, tensor in source.gaussians.tensors().items()}
    many["sh_rest"] = torch.zeros(2000, 15, 3, dtype=torch.float16)
    large = replace(source, gaussians=replace(source.gaussians, **many))
    lifted, _ = lift_scene(large, LiftSetup(cache, LiftConfig(feature_dim=6, max_passes=0)))
    for include_sh in (False, True):
        setup = LiftSetup(cache, LiftConfig(feature_dim=6, max_passes=0), include_sh=include_sh)
        forecast = forecast_lift(large, setup)
        save_scene(lifted, tmp_path / "large.safetensors", include_sh=include_sh)
        size = (tmp_path / "large.safetensors").stat().st_size / 1e6
        assert forecast.file_mb == pytest.approx(size, rel=0.1)  # frames and names in the header


def test_lift_scene__says_where_renderings_do_not_look_like_the_photographs(source, cache, capsys):
    shuffled = source.gaussians.sh_dc.flip(0) - 3.0
    wrong = replace(source, gaussians=replace(source.gaussians, sh_dc=shuffled.to(source.gaussians.sh_dc.dtype)))
    lift_scene(wrong, LiftSetup(cache, LiftConfig(feature_dim=4, max_passes=0)))
    assert "dB from their photographs (below 12)" in capsys.readouterr().err
    lift_scene(source, LiftSetup(cache, LiftConfig(feature_dim=4, max_passes=0)))
    assert "dB from their photographs" not in capsys.readouterr().err
