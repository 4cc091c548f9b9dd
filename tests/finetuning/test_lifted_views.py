"""Averaging a scene's features over its lifted views: by loops, under masks, and over which views."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from fit3d_ns.data.images import save_image
from fit3d_ns.finetuning.lifted_views import average_lifted_views, compute_average_hash, find_lifted
from fit3d_ns.geometry.cameras import viewmats_from_camera_to_worlds
from fit3d_ns.lifting import blending
from fit3d_ns.rasterization import project, rasterize_features
from fit3d_ns.scene import load_scene, save_scene
from tests.finetuning.finetuning_scene import HEIGHT, PATCH, WIDTH, create_lens, create_scene


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
        assert float(alphas[:17, :21].sum()) > 0.5 and float(alphas[:17, :21].sum()) == float(alphas.sum())

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
    _, alphas = replace(scene, gaussians=alone).render_features_low(
        view.camera_to_world, view.K, view.width, view.height
    )
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
    moved = [view.camera_to_world + 0.01 for view in scene.posed_capture.views]
    names += [compute_average_hash(replace(scene, posed_capture=scene.posed_capture.replace_camera_to_worlds(moved)))]
    # The held-out view takes no part.
    save_image(torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8), scene.posed_capture.views[6].frame.mask_path)
    assert compute_average_hash(scene) == names[0] == compute_average_hash(scene, max_views=64)
    save_image(torch.zeros(HEIGHT, WIDTH, 3, dtype=torch.uint8), scene.posed_capture.views[2].frame.mask_path)
    names += [compute_average_hash(scene)]
    assert len(set(names)) == len(names) == 5


def test_average_lifted_views__only_views_that_were_lifted_count(tmp_path):
    scene = create_scene(tmp_path, num_frames=7)
    few = replace(scene, metrics={"num_train_views": 2})
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
