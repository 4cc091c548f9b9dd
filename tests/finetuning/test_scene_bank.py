"""Finding scene files, the bank's memory budget, and photographs that moved or are gone."""

import gc
import json
import os
import shutil
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from fit3d_ns.features import describe_backbone
from fit3d_ns.finetuning.draws import TrainingViews
from fit3d_ns.finetuning.scene_bank import SceneBank, compute_scene_hash, find_scenes, prepare_scene_files
from fit3d_ns.scene import FeatureDecoder, Gaussians, load_scene, save_scene
from fit3d_ns.utils.tensor_files import open_tensors, save_tensors
from tests.finetuning.finetuning_scene import BACKBONE, create_scene, save_new_scene

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc")


def test_find_scenes__takes_files_globs_runs_and_folders(tmp_path):
    for name in ("scenes/a.safetensors", "scenes/b.safetensors", "more/[c].safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for run in ("runs/x/fit3d-features/1", "runs/y/fit3d-features/2"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "nerfstudio_models").mkdir()
        (tmp_path / run / "config.yml").touch()
    a, b, c = tmp_path / "scenes/a.safetensors", tmp_path / "scenes/b.safetensors", tmp_path / "more/[c].safetensors"
    x, y = (tmp_path / run / "config.yml" for run in ("runs/x/fit3d-features/1", "runs/y/fit3d-features/2"))
    assert find_scenes([b, tmp_path / "scenes/*.safetensors", c]) == [b, a, c]
    assert find_scenes([tmp_path / "scenes"]) == [a, b]
    assert find_scenes([tmp_path / "runs", tmp_path / "runs/y/fit3d-features/2"]) == [x, y]
    assert find_scenes([tmp_path / "**/config.yml"]) == [x, y]
    with pytest.raises(ValueError, match=r"nowhere/\*.safetensors matches nothing"):
        find_scenes(["nowhere/*.safetensors"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no scene file and no nerfstudio run"):
        find_scenes([tmp_path / "empty"])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="notes.txt is not a scene file"):
        find_scenes([tmp_path / "notes.txt"])


def test_prepare_scene_files__exports_a_run_once_and_again_when_it_has_changed(tmp_path):
    scene = create_scene(tmp_path)
    run = tmp_path / "run"
    (run / "nerfstudio_models").mkdir(parents=True)
    (run / "config.yml").touch()
    checkpoint = run / "nerfstudio_models" / "step-000000010.ckpt"
    checkpoint.write_bytes(b"1")
    loads = []

    def load_run(config):
        loads.append(config)
        return scene

    first = prepare_scene_files([run / "config.yml"], tmp_path / "out", load_run)
    assert prepare_scene_files([run / "config.yml"], tmp_path / "out", load_run) == first
    assert loads == [run / "config.yml"] and load_scene(first[0]).scene_id == "room"
    checkpoint.write_bytes(b"12")
    second = prepare_scene_files([run / "config.yml"], tmp_path / "out", load_run)
    assert second != first and len(loads) == 2


def test_bank__keeps_the_budget_and_drops_the_least_recently_used(tmp_path):
    paths = [save_new_scene(tmp_path, f"room{index}", seed=index) for index in range(4)]
    one = load_scene(paths[0]).num_bytes
    bank = SceneBank(paths, memory_gb=2.5 * one / 1e9)
    for index, ready in ((0, [0]), (1, [0, 1]), (0, [1, 0]), (2, [0, 2]), (3, [2, 3]), (3, [2, 3]), (0, [3, 0])):
        scene = bank[index]
        assert scene.scene_id == f"room{index}"
        # Rendering makes the activated copy, which must leave with its scene.
        assert scene.activated.means.shape[0] == scene.gaussians.num_gaussians
        assert list(bank._ready) == ready and bank.num_bytes <= bank.max_bytes
    assert bank.num_loads == 5
    assert all("activated" not in vars(scene) for scene in bank.on_disk)


def test_bank__counts_the_bytes_that_a_ready_scene_holds(tmp_path):
    scene = SceneBank([save_new_scene(tmp_path)])[0]
    activated = scene.activated
    held = [*scene.gaussians.tensors().values(), scene.decoder.weight]
    held += [activated.means, activated.quats, activated.scales, activated.opacities, scene.features_and_one]
    assert scene.num_bytes == pytest.approx(sum(tensor.numel() * tensor.element_size() for tensor in held), rel=0.01)


@needs_proc
def test_bank__scene_files_stay_on_disk_until_they_are_read(tmp_path):
    """Opening must map the file: its pages belong to no heap. Linux tells by the map's name."""
    path = save_new_scene(tmp_path)
    bank = SceneBank([path])
    address = bank.on_disk[0].gaussians.features.data_ptr()
    with open("/proc/self/maps") as file:
        for line in file:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= address < end:
                assert str(path) in line
                return
    pytest.fail("the features lie nowhere")


def test_bank__tensors_of_ready_scenes_never_exceed_the_budget(tmp_path, monkeypatch):
    """Counted where they are made: what rendering made for a scene that left must be gone before the next is made."""
    paths = [save_new_scene(tmp_path, f"room{index}", seed=index, num_gaussians=2000) for index in range(5)]
    bank = SceneBank(paths, memory_gb=2.5 * load_scene(paths[0]).num_bytes / 1e9)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in bank.on_disk[0].gaussians.tensors().values())
    alive, peaks, activate = [], [], Gaussians.activate

    def count(gaussians, *settings):
        made = activate(gaussians, *settings)
        features_and_one = 4 * (gaussians.feature_dim + 1) * gaussians.num_gaussians
        size = sum(value.numel() * value.element_size() for value in made.geometry) + features_and_one
        alive.append((weakref.ref(made), size))
        peaks.append(sum(stored + size for reference, size in alive if reference() is not None))
        return made

    monkeypatch.setattr(Gaussians, "activate", count)
    generator = torch.Generator().manual_seed(0)
    for index in torch.randint(5, (40,), generator=generator).tolist():
        view = bank[index].posed_capture.views[0]
        bank[index].render_features(view.camera_to_world, view.K, view.width, view.height, (4, 5))
    assert bank.num_loads == len(peaks) > 10
    # The budget holds two, and two are held.
    assert bank.max_bytes * 0.7 < max(peaks) <= bank.max_bytes


@needs_proc
def test_bank__opening_many_scenes_maps_them_and_reads_next_to_nothing(tmp_path):
    """Resident memory grows by a small part of the files, also after each was named by its content."""
    first = save_new_scene(tmp_path, num_gaussians=400_000)
    paths = [first] + [first.with_name(f"copy{index}.safetensors") for index in range(3)]
    for path in paths[1:]:
        shutil.copyfile(first, path)
    before, mapped = measure_resident(), measure_resident(field=2)
    bank = SceneBank(paths)
    opened = measure_resident() - before
    names = {compute_scene_hash(scene) for scene in bank.on_disk}
    named = measure_resident() - before
    total = sum(path.stat().st_size for path in paths)
    assert len(names) == 1 and total > 60e6
    # The system pages in 64 kB around each byte that is asked for, which is much of files this small.
    assert opened < 0.1 * total and named < 0.35 * total, (opened, named, total)
    # What is read does show: the figure above measures what it should. Pages of files alone are counted here, because
    # memory that earlier tests have freed may go back to the system meanwhile.
    sums = [float(tensor.float().sum()) for scene in bank.on_disk for tensor in scene.gaussians.tensors().values()]
    assert len(sums) == 36 and measure_resident(field=2) - mapped > 0.9 * total


def measure_resident(field=1):
    """Bytes of this process in memory, file pages included (alone with field 2); what earlier tests left is freed."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * os.sysconf("SC_PAGE_SIZE")


def test_fingerprint__changes_with_everything_a_target_is_made_from(tmp_path):
    scene = create_scene(tmp_path, num_gaussians=3000)
    gaussians, decoder = scene.gaussians, scene.decoder

    def name(changed):
        save_scene(changed, tmp_path / "scene.safetensors")
        return compute_scene_hash(load_scene(tmp_path / "scene.safetensors"))

    names = [name(scene), name(replace(scene, eps2d=0.2))]
    for field in gaussians.tensors():
        changed = (getattr(gaussians, field).float() * 0.5 + 0.1).to(getattr(gaussians, field).dtype)
        if field == "num_views":
            changed = torch.full_like(gaussians.num_views, 2)
        names.append(name(replace(scene, gaussians=replace(gaussians, **{field: changed}))))
    moved = FeatureDecoder.from_weights(decoder.weight, decoder.bias + 1.0)
    names.append(name(replace(scene, decoder=moved)))
    names.append(name(replace(scene, lifted_views=("images/0.png",))))
    one = gaussians.features.clone()
    # Far from the stretches that are read.
    one[600] += 1.0
    names.append(name(replace(scene, gaussians=replace(gaussians, features=one))))
    assert len(set(names)) == len(names) == 14
    assert name(scene) == names[0]


def test_bank__refuses_a_scene_beyond_the_budget_and_no_scene_at_all(tmp_path):
    with pytest.raises(ValueError, match="--scene-memory-gb"):
        SceneBank([save_new_scene(tmp_path)], memory_gb=1e-6)
    with pytest.raises(ValueError, match="no scenes"):
        SceneBank([])


def test_bank__refuses_files_cut_in_half_and_of_a_newer_schema(tmp_path):
    path = save_new_scene(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"room.safetensors is cut short"):
        SceneBank([path])
    path.write_bytes(whole)
    file = open_tensors(path)
    header = json.loads(file.metadata["fit3d_scene"])
    newer = {"fit3d_scene": json.dumps({**header, "schema_version": 99})}
    save_tensors(path, {name: tensor.clone() for name, tensor in file.tensors.items()}, newer)
    with pytest.raises(ValueError, match="schema 99"):
        SceneBank([path])


def test_check_backbones__names_scene_and_both_sides(tmp_path):
    bank = SceneBank([save_new_scene(tmp_path)])
    own = describe_backbone(BACKBONE)
    bank.check_backbones(own)
    other = replace(own, backbone="other_vit", weights_hash="ffff", mean=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError) as error:
        bank.check_backbones(other)
    for part in ("room.safetensors", BACKBONE, "other_vit", own.weights_hash, "ffff", "(0.4, 0.5, 0.6)"):
        assert part in str(error.value)


def test_views__photographs_that_moved_are_found_below_the_data_root(tmp_path):
    scene = create_scene(tmp_path)
    shutil.move(tmp_path / "data", tmp_path / "new")
    with pytest.raises(ValueError, match="--data-root"):
        TrainingViews([scene], [("train",)])
    for root in (tmp_path / "new" / "room", tmp_path / "new"):
        views = TrainingViews([scene], [("train",)], data_root=root)
        assert views.views_per_scene == [5]
        assert views.views[0][0].frame.image_path == tmp_path / "new" / "room" / "images" / "0.png"
    with pytest.raises(ValueError, match="called room .*--data-root"):
        TrainingViews([scene], [("train",)], data_root=tmp_path)


def test_views__missing_photographs_are_skipped_and_counted_or_refused(tmp_path, capsys):
    scene = create_scene(tmp_path)
    scene.posed_capture.views[2].frame.image_path.unlink()
    views = TrainingViews([scene], [("train",)])
    assert views.num_missing == 1 and views.views_per_scene == [4]
    assert [view.name for view in views.views[0]] == [f"images/{index}.png" for index in (0, 1, 3, 4)]
    assert "Skipping 1 views" in capsys.readouterr().err
    with pytest.raises(ValueError, match="images/2.png of scene room is gone"):
        TrainingViews([scene], [("train",)], is_strict=True)


def test_views__held_out_views_train_only_if_they_are_asked_for(tmp_path):
    scene = create_scene(tmp_path, num_test=2)
    assert TrainingViews([scene], [("train",)]).views_per_scene == [4]
    assert TrainingViews([scene, scene], [("train", "test"), ()]).views_per_scene == [6, 0]
    with pytest.raises(ValueError, match="no views of split val"):
        TrainingViews([scene], [("val",)])
