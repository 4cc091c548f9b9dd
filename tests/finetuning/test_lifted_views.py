from dataclasses import replace

import numpy as np
import torch
from finetuning_scene import DIM, HEIGHT, PATCH, WIDTH, create_scene, save_new_scene

from fit3d_ns.finetuning.lifted_views import average_lifted_views, find_lifted
from fit3d_ns.finetuning.scene_bank import SceneBank
from fit3d_ns.geometry.cameras import viewmats_from_camera_to_worlds
from fit3d_ns.lifting import view_average
from fit3d_ns.rasterization import project, rasterize_features
from fit3d_ns.scene import load_scene, save_scene


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
        for cell in set(cells):
            inside = [pixel for pixel, own in enumerate(cells) if own == cell]
            mean = (alphas[inside, None] * shown[inside]).sum(axis=0) / max(alphas[inside].sum(), 1e-12)
            for pixel in inside:
                sums += np.outer(blending[pixel] * alphas[pixel], mean)
                weights += blending[pixel] * alphas[pixel]
    return np.where(weights[:, None] > 0, sums / np.maximum(weights, 1e-12)[:, None], features)


def test_average_lifted_views__equals_loops_over_cells_and_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(view_average, "SAMPLES_PER_PATCH", 0)
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
    monkeypatch.setattr(view_average, "SAMPLES_PER_PATCH", 0)
    whole = average_lifted_views(scene).gaussians.features.float()
    assert torch.equal(sampled[3], scene.gaussians.features[3].float())
    assert not torch.equal(sampled, whole)
    # Against the features' own size: a quarter of the pixels tell nearly the same.
    assert (sampled - whole).norm() < 0.05 * whole.norm()


def test_average_lifted_views__only_views_that_were_lifted_count(tmp_path):
    scene = create_scene(tmp_path, num_frames=7)
    few = replace(scene, figures={"num_train_views": 2})
    assert len(find_lifted(scene)) == 6 and len(find_lifted(few)) == 2
    assert not torch.equal(average_lifted_views(scene).gaussians.features, average_lifted_views(few).gaussians.features)


def test_find_lifted__takes_the_record_before_what_figures_say(tmp_path, monkeypatch):
    """Names that no even choice of two would give, the held-out view among them."""
    monkeypatch.setattr(view_average, "SAMPLES_PER_PATCH", 0)
    names = ("images/5.png", "images/0.png")
    scene = replace(create_scene(tmp_path), figures={"num_train_views": 2}, lifted_views=names)
    save_scene(scene, tmp_path / "scene.safetensors")
    opened = load_scene(tmp_path / "scene.safetensors")
    assert [view.name for view in find_lifted(opened)] == list(names)
    expected = average_by_loop(opened, [opened.posed_capture.name_to_view[name] for name in names])
    np.testing.assert_allclose(average_lifted_views(opened).gaussians.features.float(), expected, rtol=2e-3, atol=2e-3)


def test_bank__prepares_a_scene_each_time_it_becomes_ready(tmp_path):
    paths = [save_new_scene(tmp_path, f"room{index}", seed=index) for index in range(2)]
    plain = SceneBank(paths)
    bank = SceneBank(paths, memory_gb=1.5 * plain.on_disk[0].num_bytes / 1e9, prepare=average_lifted_views)
    expected = [average_lifted_views(scene).gaussians.features for scene in plain.on_disk]
    for index in (0, 0, 1, 0):
        assert torch.equal(bank[index].gaussians.features, expected[index])
        assert bank[index].gaussians.features.shape[1] == DIM
    assert bank.num_loads == 3
    assert torch.equal(bank.on_disk[0].gaussians.features, plain.on_disk[0].gaussians.features)
