"""The lifted views of a scene, averages over them against loops, and averages that are kept."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from fit3d_ns.analysis.correspondence import DepthView
from fit3d_ns.data.images import save_image
from fit3d_ns.finetuning import scene_bank, validation
from fit3d_ns.finetuning.draws import Draw, TrainingViews
from fit3d_ns.finetuning.scene_bank import SceneAverages, SceneBank
from fit3d_ns.finetuning.targets import TargetConfig, TargetRenderer, create_averages
from fit3d_ns.finetuning.validation import NO_AUGMENTATION, Validation
from fit3d_ns.geometry.cameras import viewmats_from_camera_to_worlds
from fit3d_ns.lifting import blending
from fit3d_ns.lifting.blending import find_lifted
from fit3d_ns.rasterization import project, rasterize_features
from fit3d_ns.scene import load_scene, save_scene
from fit3d_ns.utils.tensor_files import TensorStore
from tests.finetuning.finetuning_scene import (
    HEIGHT,
    PATCH,
    WIDTH,
    average_lifted_views,
    create_lens,
    create_scene,
    save_new_scene,
)


def blend_one_hot(scene, view):
    """R [H*W, N]: each Gaussian's weight in each pixel."""
    known = scene.activated
    info = project(
        known.means,
        known.quats,
        known.scales,
        known.opacities,
        viewmats_from_camera_to_worlds(view.camera_to_world)[None],
        view.K[None],
        view.width,
        view.height,
        eps2d=scene.eps2d,
    )
    weights = rasterize_features(torch.eye(scene.gaussians.num_gaussians), info)[0]
    return weights.reshape(HEIGHT * WIDTH, -1).double().numpy()


def average_by_loop(scene, views):
    features = scene.gaussians.features.double().numpy()
    sums, weights = np.zeros_like(features), np.zeros(len(features))
    cells = [(row // PATCH, column // PATCH) for row in range(HEIGHT) for column in range(WIDTH)]
    for view in views:
        blending = blend_one_hot(scene, view)
        alphas, shown = blending.sum(axis=1), blending @ features
        is_valid = scene.posed_capture.load_valid_mask(view).flatten()
        for cell in set(cells):
            inside = [pixel for pixel, own in enumerate(cells) if own == cell and is_valid[pixel]]
            mean = (alphas[inside, None] * shown[inside]).sum(axis=0) / max(alphas[inside].sum(), 1e-12)
            for pixel in inside:
                sums += np.outer(blending[pixel] * alphas[pixel], mean)
                weights += blending[pixel] * alphas[pixel]
    return np.where(weights[:, None] > 0, sums / np.maximum(weights, 1e-12)[:, None], features)


def compute_average_hash(scene, data_root=None, max_views=64):
    return SceneAverages([scene], TensorStore(0.0, None), data_root, max_views).compute_hash(0)


def test_average_lifted_views__equals_loops_over_cells_and_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(blending, "AVERAGING_SAMPLES", 0)
    scene = create_scene(tmp_path)
    expected = average_by_loop(scene, scene.posed_capture.select("train"))
    averaged = average_lifted_views(scene)
    # Features are kept in half precision.
    np.testing.assert_allclose(averaged.gaussians.features.float(), expected, rtol=2e-3, atol=2e-3)
    assert averaged.gaussians.means is scene.gaussians.means and averaged.decoder is scene.decoder


def test_average_lifted_views__few_samples_change_little_and_the_unseen_keep_theirs(tmp_path, monkeypatch):
    scene = create_scene(tmp_path)
    means = scene.gaussians.means.clone()
    means[3] = torch.tensor([0.0, 0.0, 50.0])
    scene = replace(scene, gaussians=replace(scene.gaussians, means=means))
    sampled = average_lifted_views(scene).gaussians.features.float()
    monkeypatch.setattr(blending, "AVERAGING_SAMPLES", 0)
    whole = average_lifted_views(scene).gaussians.features.float()
    assert torch.equal(sampled[3], scene.gaussians.features[3].float())
    assert not torch.equal(sampled, whole)
    # Against the features' own size: a quarter of the pixels tell nearly the same.
    assert (sampled - whole).norm() < 0.05 * whole.norm()


@pytest.mark.parametrize("samples", [0, 4])
def test_average_lifted_views__masked_pixels_contribute_nothing(tmp_path, monkeypatch, samples):
    """A Gaussian that only masked pixels show keeps its features, and whatever it carries reaches no other one."""
    monkeypatch.setattr(blending, "AVERAGING_SAMPLES", samples)
    scene = create_scene(tmp_path, num_frames=3, lens=create_lens(42, 34))
    for view in scene.posed_capture.views:
        mask = torch.full((34, 42, 3), 255, dtype=torch.uint8)
        mask[:17, :21] = 0
        save_image(mask, view.frame.mask_path)
    means, scales = scene.gaussians.means.clone(), scene.gaussians.log_scales.clone()
    # Small, and before the middle of the masked corner of every camera, which stand in a row.
    means[0], scales[0] = torch.tensor([-0.5, 0.55, 0.0]), -3.5
    for view in find_lifted(scene):
        alphas = blend(scene, means, scales, view)
        assert float(alphas.sum()) > 0.5 and int((alphas > 0).sum()) == int((alphas[:17, :21] > 0).sum())

    def average(carried):
        features = scene.gaussians.features.clone()
        features[0] = carried
        gaussians = replace(scene.gaussians, means=means, log_scales=scales, features=features)
        return average_lifted_views(replace(scene, gaussians=gaussians)).gaussians.features

    plain, loud = average(0.5), average(1000.0)
    assert torch.equal(plain[1:], loud[1:])
    assert bool((plain[0] == 0.5).all()) and bool((loud[0] == 1000.0).all())
    # The rest was averaged.
    assert not torch.allclose(plain[1:].float(), scene.gaussians.features[1:].float(), atol=0.1)


def blend(scene, means, scales, view):
    """Opacity [H, W] that the first Gaussian alone would have."""
    alone = replace(
        scene.gaussians,
        **{name: value[:1] for name, value in scene.gaussians.tensors().items()}
        | {"means": means[:1], "log_scales": scales[:1]},
    )
    _, alphas = replace(scene, gaussians=alone).render_features_low(view.camera)
    return alphas


def test_sample_mask__a_block_with_one_invalid_pixel_is_invalid():
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[4, 1] = mask[0, 7] = False
    expected = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    assert torch.equal(blending.sample_mask(mask, 4, 3), expected)
    assert torch.equal(blending.sample_mask(mask, 8, 6), mask.float())


def test_average_lifted_views__leaves_out_views_whose_mask_is_gone(tmp_path, capsys):
    scene = create_scene(tmp_path)
    expected = average_lifted_views(replace(scene, lifted_views=("images/1.png", "images/2.png", "images/4.png")))
    assert capsys.readouterr().err == ""
    for index in (0, 3):
        scene.posed_capture.views[index].frame.mask_path.unlink()
    found = average_lifted_views(scene)
    assert torch.equal(found.gaussians.features, expected.gaussians.features)
    assert "over 3 of its 5 lifted views" in capsys.readouterr().err


def test_average_lifted_views__finds_the_masks_of_a_capture_that_moved(tmp_path):
    scene = create_scene(tmp_path)
    expected, name = average_lifted_views(scene).gaussians.features, compute_average_hash(scene)
    shutil.move(tmp_path / "data", tmp_path / "new")
    assert torch.equal(average_lifted_views(scene, tmp_path / "new").gaussians.features, expected)
    assert compute_average_hash(scene, tmp_path / "new") == name


def test_compute_average_hash__changes_with_masks_and_views_and_nothing_else(tmp_path):
    scene = create_scene(tmp_path, num_frames=7)
    names = [compute_average_hash(scene), compute_average_hash(scene, max_views=3)]
    names += [compute_average_hash(replace(scene, lifted_views=("images/2.png", "images/6.png")))]
    capture = scene.posed_capture
    moved = [replace(view, camera_to_world=view.camera_to_world + 0.01) for view in capture.views]
    names += [compute_average_hash(replace(scene, posed_capture=replace(capture, views=moved)))]
    # The held-out view takes no part.
    save_image(torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8), scene.posed_capture.views[6].frame.mask_path)
    assert compute_average_hash(scene) == names[0] == compute_average_hash(scene, max_views=64)
    save_image(torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8), scene.posed_capture.views[2].frame.mask_path)
    names += [compute_average_hash(scene)]
    assert len(set(names)) == len(names) == 5


def test_average_lifted_views__only_views_that_were_lifted_count(tmp_path):
    scene = create_scene(tmp_path, num_frames=7)
    few = replace(scene, lifted_views=("images/2.png", "images/6.png"))
    assert len(find_lifted(scene)) == 6 and len(find_lifted(few)) == 2
    assert not torch.equal(average_lifted_views(scene).gaussians.features, average_lifted_views(few).gaussians.features)


def test_find_lifted__takes_the_record_before_what_figures_say(tmp_path, monkeypatch):
    """Names that no even choice of two would give, the held-out view among them."""
    monkeypatch.setattr(blending, "AVERAGING_SAMPLES", 0)
    names = ("images/5.png", "images/0.png")
    scene = replace(create_scene(tmp_path), metrics={"num_train_views": 2}, lifted_views=names)
    save_scene(scene, tmp_path / "scene.safetensors")
    opened = load_scene(tmp_path / "scene.safetensors")
    assert [view.name for view in find_lifted(opened)] == list(names)
    expected = average_by_loop(opened, [opened.posed_capture.name_to_view[name] for name in names])
    np.testing.assert_allclose(average_lifted_views(opened).gaussians.features.float(), expected, rtol=2e-3, atol=2e-3)


VISITS = (0, 0, 1, 2, 0, 1, 2, 1)
"""With room for one scene and a half, every change of scene loads one."""


def open_bank(paths, store, num_ready=1.5):
    bank = SceneBank(paths)
    bank = SceneBank(paths, memory_gb=num_ready * bank.on_disk[0].num_bytes / 1e9)
    bank.averages = SceneAverages(bank.on_disk, store)
    return bank


def save_rooms(folder):
    return [save_new_scene(folder, f"room{index}", seed=index) for index in range(3)]


@pytest.mark.parametrize("kept_in", ["memory", "disk", "both", "nothing"])
def test_averages__a_second_load_finds_what_the_first_one_computed(tmp_path, kept_in):
    paths = save_rooms(tmp_path)
    expected = [average_lifted_views(scene).gaussians.features for scene in SceneBank(paths).on_disk]
    size = expected[0].numel() * expected[0].element_size()
    # Room for all, none, one and a half, none.
    memory_gb = {"memory": 1.0, "disk": 0.0, "both": 1.5 * size / 1e9, "nothing": 0.0}[kept_in]
    store = TensorStore(memory_gb, tmp_path / "kept" if kept_in in ("disk", "both") else None)
    bank = open_bank(paths, store)
    for index in VISITS:
        scene = bank[index]
        assert scene.scene_id == f"room{index}" and scene.gaussians.features.dtype == torch.float16
        assert torch.equal(scene.gaussians.features, expected[index])
        # What rendering activates are the averaged ones.
        assert torch.equal(scene.features_and_one[:, :-1], expected[index].float())
        assert bank.num_bytes <= bank.max_bytes and store.memory.num_bytes <= store.memory.max_bytes
    assert bank.num_loads == 7
    assert bank.averages.num_averaged == (7 if kept_in == "nothing" else 3)
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == {"disk": 3, "both": 2}.get(kept_in, 0)
    original = SceneBank(paths).on_disk[0].gaussians.features
    assert torch.equal(bank.on_disk[0].gaussians.features, original) and not torch.equal(original, expected[0])


def test_averages__another_run_reads_them_and_makes_damaged_ones_anew(tmp_path, capsys):
    paths, config = save_rooms(tmp_path), TargetConfig(cache_folder=tmp_path / "shared")

    def average():
        bank = SceneBank(paths)
        bank.averages = create_averages(config, bank, tmp_path / "out")
        return [bank[index].gaussians.features.clone() for index in range(3)], bank.averages.num_averaged

    first, number = average()
    assert number == 3
    files = sorted((tmp_path / "shared" / "averages").rglob("*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:50])
    again, number = average()
    assert number == 1 and "is cut short (50 bytes)" in capsys.readouterr().err
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_averages__go_where_targets_go(tmp_path):
    bank = SceneBank(save_rooms(tmp_path))

    def find_store(**settings):
        averages = create_averages(TargetConfig(**settings), bank, tmp_path / "out")
        return None if averages is None else averages.store

    assert find_store(average_views=False) is None
    # On a CPU, in the output folder once memory is full; gone with the targets when training has ended.
    assert find_store().folder == tmp_path / "out" / "targets" / "averages" and not find_store().keep_on_disk
    assert find_store().memory.max_bytes == 4_000_000_000 and find_store(average_gb=0.5).memory.max_bytes == 500_000_000
    assert find_store(cache="none").folder is None and find_store(cache="memory").folder is None
    shared = find_store(cache_folder=tmp_path / "shared")
    assert shared.folder == tmp_path / "shared" / "averages" and shared.keep_on_disk
    bank.device = torch.device("cuda")
    # Targets are rendered anew there, but averages are not made anew at every visit of a scene.
    assert find_store().folder is not None and find_store(cache="none").folder is None
    with pytest.raises(ValueError, match=r"average_gb is -1"):
        TargetConfig(average_gb=-1.0)


def test_averages__another_mask_is_another_average_and_another_target(tmp_path):
    """Nothing that was kept under the old mask is taken for the new one."""
    scene = create_scene(tmp_path)
    save_scene(scene, tmp_path / "scene.safetensors")

    def render():
        bank = SceneBank([tmp_path / "scene.safetensors"])
        bank.averages = SceneAverages(bank.on_disk, TensorStore(0.0, tmp_path / "kept"))
        views = TrainingViews(bank.on_disk, [("train",)])
        targets = TargetRenderer(bank, views, TargetConfig(), TensorStore(0.0, tmp_path / "targets"))
        sample = views.load_sample(Draw(0, 0, 0), NO_AUGMENTATION, PATCH, 0, targets.rules[0])
        return targets.render(sample).features, targets.num_rendered, bank.averages.num_averaged

    first, *numbers = render()
    assert numbers == [1, 1]
    again, *numbers = render()
    assert numbers == [0, 0] and torch.equal(first, again)
    # Another view's mask: this one's own target changes through the average alone.
    mask = torch.zeros(32, 40, 3, dtype=torch.uint8)
    mask[:, :20] = 255
    save_image(mask, scene.posed_capture.views[3].frame.mask_path)
    changed, *numbers = render()
    assert numbers == [1, 1] and not torch.equal(first, changed)


def test_validation__depth_alone_averages_nothing(tmp_path, monkeypatch):
    """Where all targets are kept, a validation renders depth only; and depth is the same before and after averaging."""
    paths = save_rooms(tmp_path)
    depths: list[DepthView] = []
    create = validation.create_depth_view
    monkeypatch.setattr(validation, "create_depth_view", lambda *args: depths.append(create(*args)) or depths[-1])

    def compute_tokens(images):
        return images.new_ones(1, (images.shape[2] // PATCH) * (images.shape[3] // PATCH), 16)

    def validate(bank):
        views = TrainingViews(bank.on_disk, [("train",)] * 3)
        cache = TensorStore(0.0, tmp_path / "targets")
        targets = TargetRenderer(bank, views, TargetConfig(), cache)
        figures = Validation(targets, PATCH, 2).evaluate(compute_tokens)
        return figures, [depth.depth for depth in depths[-6:]]

    bank = open_bank(paths, TensorStore(1.0, None))
    first, before = validate(bank)
    assert bank.averages.num_averaged == 3
    bank = open_bank(paths, TensorStore(0.0, None))
    monkeypatch.setattr(scene_bank, "average_over_views", None)
    again, after = validate(bank)
    assert bank.num_loads == 3 and bank.averages.num_averaged == 0
    assert first["feature_l1"] == again["feature_l1"]
    assert all(torch.equal(one, other) and float(one.max()) > 0 for one, other in zip(before, after, strict=True))


def test_bank__averages_a_scene_that_was_loaded_for_its_depth_without_loading_it_again(tmp_path):
    paths = save_rooms(tmp_path)
    bank = open_bank(paths, TensorStore(0.0, None), num_ready=2.5)
    original = bank.on_disk[0].gaussians.features
    assert torch.equal(bank.get_geometry(0).gaussians.features, original)
    assert bank.get_geometry(0).activated is not None and bank.averages.num_averaged == 0
    averaged = bank[0]
    assert not torch.equal(averaged.gaussians.features, original) and bank.get_geometry(0) is averaged
    assert bank[0] is averaged and (bank.num_loads, bank.averages.num_averaged) == (1, 1)
    # A scene that left is as it was on disk when it returns.
    assert bank[1] is not None and bank[2] is not None
    assert list(bank._ready) == [1, 2] and torch.equal(bank.get_geometry(0).gaussians.features, original)
    assert torch.equal(bank[0].gaussians.features, averaged.gaussians.features) and bank.averages.num_averaged == 4


def test_averages__leave_one_out_averages_over_all_lifted_views_and_else_over_64(tmp_path):
    paths = [save_new_scene(tmp_path, f"room{number}", num_frames=number + 1) for number in (64, 66)]
    bank = SceneBank(paths)
    some, every = (
        create_averages(TargetConfig(leave_one_out=leave_one_out), bank, tmp_path) for leave_one_out in (False, True)
    )
    assert some.compute_hash(0) == every.compute_hash(0) and some.compute_hash(1) != every.compute_hash(1)
