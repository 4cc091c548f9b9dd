"""Figures on held-out views against loops over views and tokens."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fit3d_ns.analysis.consistency import compute_consistency, create_pairs
from fit3d_ns.analysis.correspondence import DepthView
from fit3d_ns.data.images import save_depth
from fit3d_ns.features import create_extractor, describe_backbone
from fit3d_ns.finetuning.backbone_folder import write_card
from fit3d_ns.finetuning.draws import TrainingViews
from fit3d_ns.finetuning.scene_bank import SceneBank
from fit3d_ns.finetuning.targets import TargetConfig, TargetRenderer
from fit3d_ns.finetuning.validation import Validation, format_consistency
from fit3d_ns.scene import create_depth_view, save_scene
from fit3d_ns.scene.feature_scene import MIN_DEPTH_ALPHA
from tests.finetuning.finetuning_scene import BACKBONE, HEIGHT, PATCH, WIDTH, create_lens, create_scene, save_new_scene


@pytest.fixture
def bank(tmp_path):
    paths = [save_new_scene(tmp_path, "small"), save_new_scene(tmp_path, "large", lens=create_lens(48, 40), seed=1)]
    return SceneBank(paths)


def validate(bank, max_views=3, splits=("train", "test")):
    views = TrainingViews(bank.on_disk, [splits] * len(bank.on_disk))
    return Validation(TargetRenderer(bank, views, TargetConfig()), PATCH, max_views)


def test_validation__is_the_weighted_mean_over_all_tokens_of_all_views(bank):
    extractor = create_extractor(BACKBONE)
    validation = validate(bank)
    figures = validation.evaluate(lambda images: extractor(images).patch_tokens)
    l1 = cosine = total = 0.0
    for scene in (bank[0], bank[1]):
        views = scene.posed_capture.views
        for index in (1, 3, 5):
            view = views[index]
            image = scene.posed_capture.load_image(view).permute(2, 0, 1)[None].float() / 255.0
            tokens = extractor(image).maps[0]
            grid = tuple(tokens.shape[:2])
            features, alphas = scene.render_features_with_alpha(view.camera, grid)
            mask = scene.posed_capture.load_valid_mask(view).float()[None, None]
            weights = F.interpolate(mask, size=grid, mode="bilinear")[0, 0] * alphas
            l1 += float(((tokens - features).abs().mean(dim=-1) * weights).sum())
            cosine += float((F.cosine_similarity(tokens, features, dim=-1) * weights).sum())
            total += float(weights.sum())
    assert validation.num_views == 6
    assert figures["feature_l1"] == pytest.approx(l1 / total, rel=1e-4)
    assert figures["feature_cosine"] == pytest.approx(cosine / total, rel=1e-4)
    assert set(figures["per_scene"]) == {"small", "large"}


def test_validation__consistency_of_one_scene_is_the_analysis_on_rendered_depth(bank):
    extractor = create_extractor(BACKBONE)
    validation = validate(bank)
    figures = validation.evaluate(lambda images: extractor(images).patch_tokens)
    scene, maps, depth_views = bank[0], [], []
    for index in (1, 3, 5):
        view = scene.posed_capture.views[index]
        image = scene.posed_capture.load_image(view).permute(2, 0, 1)[None].float() / 255.0
        maps.append(extractor(image).maps[0])
        depth, alphas = scene.render_depth(view.camera)
        depth = torch.where(alphas >= MIN_DEPTH_ALPHA, depth, 0.0)
        mask = scene.posed_capture.load_valid_mask(view)
        depth_views.append(DepthView(depth, view.K, view.camera_to_world, mask))
    expected = compute_consistency(maps, depth_views, create_pairs(3))
    assert expected["num_points"] > 0
    found = figures["per_scene"]["small"]["consistency"]
    for key in ("mean_cosine", "centred_cosine", "l1", "recall_10px", "num_points", "effective_rank"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key
    # Pooled over scenes by points.
    scenes = [part["consistency"] for part in figures["per_scene"].values()]
    points = [part["num_points"] for part in scenes]
    pooled = sum(part["l1"] * number for part, number in zip(scenes, points, strict=True)) / sum(points)
    assert figures["consistency"]["l1"] == pytest.approx(pooled)
    assert figures["consistency"]["num_points"] == sum(points)
    assert math.isnan(figures["consistency"]["by_angle"]["60-180"]["l1"])


def test_validation__takes_measured_depth_where_the_capture_has_it(tmp_path):
    """In millimetres on disk, in units of the frame in use; a scene without depth files renders its own."""
    scene = create_scene(tmp_path)
    measured = torch.full((HEIGHT, WIDTH), 1.9)
    measured[:10] = 0.0
    save_depth(measured, tmp_path / "data" / "room" / "depth.png")
    capture = scene.posed_capture
    with_depth = [
        replace(view, frame=replace(view.frame, depth_path=tmp_path / "data" / "room" / "depth.png"))
        for view in capture.views
    ]
    for metric_scale, expected in ((2.5, measured * 2.5), (None, None)):
        changed = replace(scene, posed_capture=replace(capture, views=with_depth, metric_scale=metric_scale))
        save_scene(changed, tmp_path / "scene.safetensors")
        validation = validate(SceneBank([tmp_path / "scene.safetensors"]))
        sample = validation.load_sample(validation.draws[0][0])
        capture_used, bank = validation.targets.views.captures[0], validation.targets.bank
        view, found = sample.view, create_depth_view(capture_used, sample.view, lambda bank=bank: bank.get_geometry(0))
        if expected is None:
            depth, alphas = scene.render_depth(view.camera._replace(width=WIDTH, height=HEIGHT))
            expected = torch.where(alphas >= MIN_DEPTH_ALPHA, depth, 0.0)
        torch.testing.assert_close(found.depth, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(found.valid_mask, capture.load_valid_mask(view))


def test_validation__a_backbone_that_says_what_the_scene_shows_has_no_distance(bank):
    validation = validate(bank, splits=("test",))
    answers = []
    for draws in validation.draws.values():
        for draw in draws:
            view = validation.targets.views.views[draw.scene][draw.view]
            grid = (view.height // PATCH, view.width // PATCH)
            answers.append(
                bank[draw.scene].render_features(view.camera_to_world, view.K, view.width, view.height, grid)
            )
    remaining = iter(answers)
    figures = validation.evaluate(lambda images: next(remaining).flatten(0, 1)[None])
    assert figures["feature_l1"] == pytest.approx(0.0, abs=1e-5)
    assert figures["feature_cosine"] == pytest.approx(1.0, abs=1e-5)


def test_card__has_the_figures_and_what_got_worse(bank):
    extractor = create_extractor(BACKBONE)
    figures = validate(bank).evaluate(lambda images: extractor(images).patch_tokens)["consistency"]
    report = {
        "num_images": 10,
        "steps": 5,
        "images_per_step": 2,
        "seconds": 1.0,
        "loss_first": 2.0,
        "loss_last": None,
        "settings": {
            "trainable": {"train": "all"},
            "optimization": {"learning_rate": 1e-5},
            "anchors": {"wise_ft": []},
        },
        "consistency": {"views": "6 views", "original": figures, "finetuned": figures},
        "versions": {"torch": "2"},
    }
    description = replace(describe_backbone(BACKBONE), is_random=False)
    licences = ["apache-2.0", "mit"]
    card = write_card(description, report, licences, ["a", "b"])
    assert "license: apache-2.0" in card and "10 images of 2 scenes: a, b." in card
    assert "| optimization.learning_rate | 1e-05 |" in card and "unknown at the end" in card
    assert format_consistency(figures, figures) in card and "nan" not in card
    assert "lower than the original's: nothing that was compared." in card
    report["consistency"]["finetuned"] = {**figures, "recall_10px": figures["recall_10px"] - 0.1}
    assert "lower than the original's: recall 10px." in write_card(description, report, licences, ["a"])
    assert "0.3 of the fine-tuned and 0.7 of the original" in write_card(description, report, licences, ["a"], 0.3)
