"""Scenes lifted together: one basis, one decoder, one set of colours; and going on after an interruption."""

import dataclasses
from functools import partial

import pytest
import torch

from fit3d_ns.analysis.pca import PcaAccumulator
from fit3d_ns.features import FeatureCache, describe_backbone
from fit3d_ns.lifting import shared_lift as module
from fit3d_ns.lifting.config import LiftConfig, LiftSceneConfig
from fit3d_ns.lifting.decoder_fit import fit_decoder, fit_token_basis
from fit3d_ns.lifting.lift_scene import LiftSetup, lift_scene
from fit3d_ns.lifting.ply_sources import read_ply_source
from fit3d_ns.lifting.shared_lift import LiftTask, lift_together
from fit3d_ns.lifting.solver import solve_features
from fit3d_ns.lifting.sources import PlyConfig
from fit3d_ns.lifting.views import choose_views
from fit3d_ns.scene import load_scene, save_scene
from tests.lift_capture import BACKBONE, write_capture, write_gaussians

CONFIG, OPTIONS = LiftConfig(feature_dim=6, max_passes=2), LiftSceneConfig()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return FeatureCache(tmp_path_factory.mktemp("tokens"), describe_backbone(BACKBONE))


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Two captures of different Gaussians."""
    found = []
    for name, seed in (("left", 5), ("right", 6)):
        root = tmp_path_factory.mktemp("shared") / name
        raw = write_capture(root, seed=seed)
        found.append(partial(read_ply_source, write_gaussians(root / "cloud.ply", raw), root, PlyConfig()))
    return found


@pytest.fixture
def tasks(readers, tmp_path):
    return [
        LiftTask(read, tmp_path / f"{name}.safetensors") for read, name in zip(readers, ("left", "right"), strict=True)
    ]


def work_on_each(paths, work):
    for index in range(len(paths)):
        work(index)
    return {}


def lift(tasks, cache, config=CONFIG, mine=None, **kwargs):
    setup = LiftSetup(cache, config, OPTIONS)
    assert lift_together(tasks, setup, mine or tasks, work_on_each, **kwargs) == ({}, [])
    return [load_scene(task.output_path) for task in tasks]


def test_lift_together__is_one_decoder_of_all_statistics_on_one_basis(tasks, cache):
    reported = []
    scenes = lift(tasks, cache, on_scene=lambda scene, path: reported.append((scene.metrics["feature_l1"], path)))
    statistics, sources = [], [task.read() for task in tasks]
    setup = LiftSetup(cache, CONFIG, OPTIONS)
    views = [setup.load_views(s.capture, choose_views(s.capture, None)[0]) for s in sources]
    sums = PcaAccumulator(192)
    for view in [view for lifted in views for view in lifted]:
        sums.add(view.read_tokens(torch.device("cpu")))
    basis = fit_token_basis(sums, 6)
    for source, lifted in zip(sources, views, strict=True):
        result = solve_features(source.activate(), lifted, CONFIG, basis=basis)
        statistics.append(result.decoder_statistics)
    expected = fit_decoder(statistics, basis, CONFIG.decoder_ridge)
    for scene in scenes:
        torch.testing.assert_close(scene.decoder.weight, expected.weight.detach(), rtol=1e-3, atol=1e-4)
    first, second = scenes
    assert torch.equal(first.decoder.weight, second.decoder.weight)
    assert torch.equal(first.pca.components, second.pca.components)
    assert torch.equal(first.pca.colour_low, second.pca.colour_low)
    assert not torch.equal(first.gaussians.features, second.gaussians.features)
    assert [path for _, path in reported] == [task.output_path for task in tasks]
    # No state and no statistics stay behind.
    assert sorted(path.name for path in tasks[0].output_path.parent.iterdir()) == [
        "left.safetensors",
        "right.safetensors",
    ]


def test_lift_together__figures_are_those_of_the_shared_decoder(tasks, cache):
    scenes = lift(tasks, cache)
    for scene, task in zip(scenes, tasks, strict=True):
        alone, _ = lift_scene(task.read(), LiftSetup(cache, CONFIG))
        assert scene.metrics["num_scenes_sharing_decoder"] == 2
        assert scene.lifted_views == alone.lifted_views == tuple(v.name for v in scene.posed_capture.select("train"))
        assert scene.metrics["feature_l1"] < scene.metrics["feature_l1_mean_token"]
        assert scene.metrics["feature_l1_mean_token"] == pytest.approx(alone.metrics["feature_l1_mean_token"])
        # A shared basis of six directions keeps less of a scene than six of its own.
        assert scene.metrics["explained_share"] < alone.metrics["explained_share"]
        assert scene.metrics["feature_l1"] != alone.metrics["feature_l1"]


def test_lift_together__interrupted_goes_on_without_lifting_again(tasks, cache, monkeypatch):
    whole = lift(tasks, cache)
    for task in tasks:
        task.output_path.unlink()
    solve, calls = module.lift_scene, []

    def interrupted(source, *args, **kwargs):
        calls.append(source.capture.scene_id)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(source, *args, **kwargs)

    monkeypatch.setattr(module, "lift_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lift(tasks, cache)
    assert tasks[0].get_path("decoder-sums").is_file() and not tasks[1].get_path("decoder-sums").exists()
    resumed = lift(tasks, cache)
    assert calls == ["left", "right", "right"]
    for scene, expected in zip(resumed, whole, strict=True):
        assert torch.equal(scene.gaussians.features, expected.gaussians.features)
        assert torch.equal(scene.decoder.weight, expected.decoder.weight)


def test_lift_together__other_settings_lift_again(tasks, cache, monkeypatch):
    monkeypatch.setattr(module, "fit_decoder", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lift(tasks, cache)
    monkeypatch.undo()
    found, solve = [], module.lift_scene
    monkeypatch.setattr(module, "lift_scene", lambda *args, **kwargs: found.append(1) or solve(*args, **kwargs))
    lift(tasks, cache, LiftConfig(feature_dim=5, max_passes=2))
    assert len(found) == 2 and load_scene(tasks[0].output_path).gaussians.feature_dim == 5


def test_lift_together__finished_scenes_are_not_lifted_again(tasks, cache, monkeypatch):
    lift(tasks, cache)
    before = [(task.output_path.read_bytes(), task.output_path.stat().st_mtime_ns) for task in tasks]
    monkeypatch.setattr(module, "fit_token_basis", lambda *args: pytest.fail("lifted again"))
    lift(tasks, cache)
    assert before == [(task.output_path.read_bytes(), task.output_path.stat().st_mtime_ns) for task in tasks]
    monkeypatch.undo()
    # Another set of scenes shares another decoder.
    lift(tasks[:1], cache)
    assert load_scene(tasks[0].output_path).metrics["num_scenes_sharing_decoder"] == 1


@pytest.mark.parametrize("ending", ["another lift's", "cut short"])
def test_lift_together__a_file_that_is_no_longer_its_own_is_lifted_again(tasks, cache, monkeypatch, ending):
    """Features of another basis under the shared decoder would be noise, and nobody would be told."""
    whole = lift(tasks, cache)
    monkeypatch.setattr(module, "fit_decoder", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lift(tasks, cache, overwrite=True)
    monkeypatch.undo()
    task = tasks[0]
    if ending == "another lift's":
        # Same settings, without the shared basis.
        save_scene(lift_scene(task.read(), LiftSetup(cache, CONFIG, OPTIONS))[0], task.output_path)
    else:
        task.output_path.write_bytes(task.output_path.read_bytes()[:-100])
    for scene, expected in zip(lift(tasks, cache), whole, strict=True):
        assert torch.equal(scene.gaussians.features, expected.gaussians.features)
        assert scene.metrics["feature_l1"] == expected.metrics["feature_l1"]


def test_lift_together__processes_that_share_out_scenes_make_what_one_makes(tasks, cache, monkeypatch):
    """Whoever comes to find the last sums adds them up, in the same order."""
    whole = lift(tasks, cache)
    for task in tasks:
        task.output_path.unlink()
    setup, calls, solve = LiftSetup(cache, CONFIG, OPTIONS), [], module.lift_scene
    monkeypatch.setattr(module, "lift_scene", lambda source, *a, **k: calls.append(1) or solve(source, *a, **k))
    left, right = tasks

    def do(task):
        return lift_together(tasks, setup, [task], work_on_each)

    assert do(left) == ({}, ["right.safetensors.token-sums"])
    # The second finds all sums, and lifts its scene.
    assert do(right) == ({}, ["left.safetensors.decoder-sums"]) and len(calls) == 1
    assert do(right) == ({}, ["left.safetensors.decoder-sums"]) and len(calls) == 1
    assert do(left) == ({}, [])
    assert left.get_path("decoder-sums").is_file(), "the other scene still needs what they share"
    # Once more each changes nothing.
    assert do(left) == do(right) == do(left) == ({}, []) and len(calls) == 2
    for task, expected in zip(tasks, whole, strict=True):
        scene = load_scene(task.output_path)
        for name, tensor in expected.gaussians.tensors().items():
            assert torch.equal(scene.gaussians.tensors()[name], tensor), name
        assert torch.equal(scene.decoder.weight, expected.decoder.weight)
        assert torch.equal(scene.pca.components, expected.pca.components)
        assert scene.metrics["feature_l1"] == expected.metrics["feature_l1"]
        assert scene.metrics["lift_hash"] == expected.metrics["lift_hash"]
    assert {path.suffix for path in left.output_path.parent.iterdir()} == {".safetensors"}


def test_lift_together__one_changed_scene_lifts_all_again(tasks, cache, readers):
    lift(tasks, cache)
    decoder = load_scene(tasks[0].output_path).decoder.weight
    other = [
        tasks[0],
        LiftTask(lambda: dataclasses.replace(readers[1](), rasterize_mode="antialiased"), tasks[1].output_path),
    ]
    first, second = lift(other, cache)
    assert torch.equal(first.decoder.weight, second.decoder.weight) and not torch.equal(first.decoder.weight, decoder)


def test_lift_together__refuses_nothing(cache):
    with pytest.raises(ValueError, match="no scene"):
        lift([], cache)
