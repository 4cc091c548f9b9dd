"""Targets against the literal computation of the public code, and against lifts made anew."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fit3d_ns.data.images import load_image
from fit3d_ns.features import create_token_model
from fit3d_ns.finetuning.draws import AugmentationConfig, Draw, TrainingViews, draw_augmentation
from fit3d_ns.finetuning.scene_bank import SceneBank
from fit3d_ns.finetuning.targets import TargetConfig, TargetRenderer, create_target_store
from fit3d_ns.geometry.cameras import viewmats_from_camera_to_worlds
from fit3d_ns.rasterization import backproject_features, project
from fit3d_ns.scene import FeatureDecoder, save_scene
from fit3d_ns.utils.tensor_files import TensorStore
from tests.finetuning.finetuning_scene import (
    BACKBONE,
    DISTORTED,
    EMBED,
    PATCH,
    create_lens,
    create_scene,
    save_new_scene,
)

PLAIN = AugmentationConfig(flip_probability=0.0)


def open_scene(path, config=None, store=None, **settings):
    bank = SceneBank([path])
    views = TrainingViews(bank.on_disk, [("train",)])
    return bank, views, TargetRenderer(bank, views, config or TargetConfig(), store, **settings)


def load(views, targets, view=0, augmentation=PLAIN, epoch=0):
    return views.load_sample(Draw(epoch, 0, view), augmentation, PATCH, 0, targets.rules[0])


def render_literally(scene, sample):
    """Full-size rendering, 3x3 convolution, F.interpolate without antialias (public code)."""
    view, grid = sample.view, sample.patch_grid
    low, alphas = scene.render_features_low(view.camera)
    bias = scene.decoder.bias
    decoded = F.conv2d(low.permute(2, 0, 1)[None], scene.decoder.weight, padding=1)
    if bias is not None:
        decoded = decoded + bias[:, None, None] * alphas
    maps = torch.cat([decoded, alphas[None, None]], dim=1).detach()
    resized = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)[0]
    return resized[:-1].permute(1, 2, 0), resized[-1]


@pytest.mark.parametrize("lens", [None, create_lens(45, 37)], ids=["whole patches", "odd size"])
def test_target__equals_full_resolution_then_bilinear(tmp_path, lens):
    bank, views, targets = open_scene(save_new_scene(tmp_path, lens=lens), TargetConfig(weight_by_opacity=False))
    sample = load(views, targets)
    target = targets.render(sample)
    features, _ = render_literally(bank[0], sample)
    torch.testing.assert_close(target.features, features, rtol=1e-4, atol=1e-4)
    # The mask stays fractional, as the public code's bilinear resize leaves it.
    mask = views.captures[0].load_valid_mask(sample.view).float()[None, None]
    expected = F.interpolate(mask, size=sample.patch_grid, mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(target.weights, expected)
    assert target.features.shape == (*sample.patch_grid, EMBED)


def test_target__area_reading_averages_each_patch(tmp_path):
    config = TargetConfig(token_reading="area", weight_by_opacity=False)
    bank, views, targets = open_scene(save_new_scene(tmp_path), config)
    sample = load(views, targets)
    scene, view = bank[0], sample.view
    low, alphas = scene.render_features_low(view.camera)
    decoded = scene.decoder(low, alphas).detach()
    expected = decoded.unflatten(1, (-1, PATCH)).unflatten(0, (-1, PATCH)).mean(dim=(1, 3))
    torch.testing.assert_close(targets.render(sample).features, expected, rtol=1e-4, atol=1e-4)


def test_target__opacity_weighs_tokens(tmp_path):
    bank, views, targets = open_scene(save_new_scene(tmp_path))
    sample = load(views, targets)
    _, alphas = render_literally(bank[0], sample)
    assert float(alphas.min()) < 0.9
    torch.testing.assert_close(targets.render(sample).weights, alphas * sample.mask, rtol=1e-4, atol=1e-5)


def test_target__flips_with_its_image(tmp_path):
    bank, views, targets = open_scene(save_new_scene(tmp_path))
    plain = load(views, targets)
    flipped = load(views, targets, augmentation=AugmentationConfig(flip_probability=1.0))
    torch.testing.assert_close(flipped.image, plain.image.flip(-1))
    torch.testing.assert_close(targets.render(flipped).features, targets.render(plain).features.flip(1))
    torch.testing.assert_close(targets.render(flipped).weights, targets.render(plain).weights.flip(1))


def test_target__variance_lowers_weights_by_the_formula(tmp_path):
    path = save_new_scene(tmp_path)
    bank, views, targets = open_scene(path, TargetConfig(weight_by_opacity=False))
    sample = load(views, targets)
    scene = bank[0]
    # A scene whose features are the relative variance and whose decoder passes them on renders the same map.
    variance, weight = scene.gaussians.feature_variance.float(), scene.gaussians.blend_weight
    relative = variance / ((variance * weight).sum() / weight.sum())
    centre = torch.zeros(EMBED, 1, 3, 3)
    centre[:, 0, 1, 1] = 1.0
    carrier = replace(
        scene,
        gaussians=replace(scene.gaussians, features=relative[:, None].half()),
        decoder=FeatureDecoder.from_weights(centre),
    )
    features, _ = render_literally(carrier, sample)
    expected = sample.mask / (1.0 + 2.0 * features[..., 0])
    _, _, weighing = open_scene(path, TargetConfig(weight_by_opacity=False, variance_weight=2.0))
    torch.testing.assert_close(weighing.render(sample).weights, expected, rtol=2e-3, atol=1e-3)


def test_target__cropped_and_scaled_images_have_targets_of_their_own_grid(tmp_path):
    bank, views, targets = open_scene(save_new_scene(tmp_path))
    config = AugmentationConfig(min_crop=0.6, min_scale=1.2, max_scale=1.8)
    sample = load(views, targets, augmentation=config)
    assert sample.augmentation == draw_augmentation(config, 40, 32, PATCH, 0, sample.draw)
    target = targets.render(sample)
    assert target.weights.shape == (sample.image.shape[1] // PATCH, sample.image.shape[2] // PATCH)
    moved = replace(sample.view, K=sample.augmentation.window.apply_to_K(sample.view.K))
    moved = replace(moved, width=sample.image.shape[2], height=sample.image.shape[1])
    features, _ = render_literally(bank[0], replace(sample, view=moved))
    flipped = features.flip(1) if sample.augmentation.flip else features
    torch.testing.assert_close(target.features, flipped, rtol=1e-4, atol=1e-4)


def test_cache__gives_back_what_was_rendered_and_renders_once(tmp_path):
    path = save_new_scene(tmp_path)
    for memory_gb, folder in ((1.0, None), (0.0, tmp_path / "targets"), (600e-9, tmp_path / "mixed")):
        store = TensorStore(memory_gb, folder)
        _, views, targets = open_scene(path, store=store)
        first = [targets.render(load(views, targets, view)) for view in range(3)]
        again = [targets.render(load(views, targets, view)) for view in range(3)]
        assert targets.num_rendered == 3
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.features, other.features) and torch.equal(one.weights, other.weights)
        _, _, plain = open_scene(path)
        # Half precision keeps 11 bits.
        torch.testing.assert_close(first[0].features, plain.render(load(views, plain)).features, rtol=1e-3, atol=1e-4)


def test_cache__serves_a_copied_scene_and_not_a_changed_one(tmp_path):
    path = save_new_scene(tmp_path)
    folder = tmp_path / "targets"
    _, views, targets = open_scene(path, store=TensorStore(0.0, folder, keep_on_disk=True))
    targets.render(load(views, targets))
    copied = tmp_path / "elsewhere.safetensors"
    copied.write_bytes(path.read_bytes())
    _, views, targets = open_scene(copied, store=TensorStore(0.0, folder))
    targets.render(load(views, targets))
    assert targets.num_rendered == 0
    scene = SceneBank([path]).on_disk[0]
    save_scene(replace(scene, gaussians=replace(scene.gaussians, features=scene.gaussians.features * 2)), copied)
    _, views, targets = open_scene(copied, store=TensorStore(0.0, folder))
    targets.render(load(views, targets))
    assert targets.num_rendered == 1


def test_cache__renders_again_what_is_damaged(tmp_path, capsys):
    path, folder = save_new_scene(tmp_path), tmp_path / "targets"
    _, views, targets = open_scene(path, store=TensorStore(0.0, folder))
    expected = targets.render(load(views, targets))
    (file,) = folder.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(targets.render(load(views, targets)).features, expected.features)
    assert "is cut short (50 bytes)" in capsys.readouterr().err


def test_cache__is_of_use_on_cpus_alone_unless_asked_for(tmp_path):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert create_target_store(TargetConfig(), cpu, tmp_path) is not None
    assert create_target_store(TargetConfig(), cuda, tmp_path) is None
    assert create_target_store(TargetConfig(cache="memory"), cuda, tmp_path).folder is None
    kept = create_target_store(TargetConfig(cache_folder=tmp_path / "shared"), cuda, tmp_path)
    assert kept.keep_on_disk and kept.folder == tmp_path / "shared"


def test_target__features_that_are_not_finite_name_scene_and_view(tmp_path):
    scene = create_scene(tmp_path)
    overflowing = FeatureDecoder.from_weights(torch.full_like(scene.decoder.weight, 3e38))
    save_scene(replace(scene, decoder=overflowing), tmp_path / "broken.safetensors")
    _, views, targets = open_scene(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="room/images/0.png.*not finite"):
        targets.render(load(views, targets))


def test_stages__feed_the_backbone_the_same_pixels_of_distorted_photographs(tmp_path):
    """Stage I hands `PosedCapture.load_image` to the extractor; stage II must show the backbone just that."""
    scene = create_scene(tmp_path, lens=DISTORTED)
    save_scene(scene, tmp_path / "scene.safetensors")
    _, views, targets = open_scene(tmp_path / "scene.safetensors")
    sample = load(views, targets)
    lifted_from = scene.posed_capture.load_image(scene.posed_capture.views[0])
    assert torch.equal((sample.image.permute(1, 2, 0) * 255.0).round().to(torch.uint8), lifted_from)
    assert not torch.equal(lifted_from, load_image(scene.posed_capture.views[0].frame.image_path))


def lift_by_weighted_sum(scene, views, tokens_low):
    """The weighted sum over views of their own token values, by the rasterizer's adjoint; features and weights."""
    gaussians = scene.activated
    numerator, denominator = 0.0, 0.0
    for view, low in zip(views, tokens_low, strict=True):
        info = project(
            gaussians.means,
            gaussians.quats,
            gaussians.scales,
            gaussians.opacities,
            viewmats_from_camera_to_worlds(view.camera_to_world)[None],
            view.K[None],
            view.width,
            view.height,
        )
        spread = F.interpolate(low.permute(2, 0, 1)[None], size=(view.height, view.width), mode="nearest-exact")
        sums, weights = backproject_features(spread[0].permute(1, 2, 0)[None], info)
        numerator, denominator = numerator + sums, denominator + weights
    return numerator / denominator[:, None].clamp(min=1e-9), denominator


def test_leave_one_out__moves_towards_a_lift_without_the_view(tmp_path):
    """The scene is lifted from the backbone's own tokens; leaving a view out must bring back most of the difference."""
    scene = create_scene(tmp_path, bias=False, num_test=0, num_gaussians=25)
    scene = replace(
        scene,
        gaussians=replace(scene.gaussians, opacity_logits=torch.full_like(scene.gaussians.opacity_logits, 4.0)),
    )
    for view in scene.posed_capture.views:
        view.frame.mask_path.unlink()
    capture = replace(
        scene.posed_capture,
        views=[replace(view, frame=replace(view.frame, mask_path=None)) for view in scene.posed_capture.views],
    )
    original = create_token_model(BACKBONE).eval().requires_grad_(False)
    matrix = scene.decoder.weight.sum(dim=(2, 3))
    tokens = []
    for view in capture.views:
        image = capture.load_image(view).permute(2, 0, 1)[None].float() / 255.0
        tokens.append(original(image).maps[0].detach() @ torch.linalg.pinv(matrix).T)
    everything, weights = lift_by_weighted_sum(scene, capture.views, tokens)
    without, _ = lift_by_weighted_sum(scene, capture.views[1:], tokens[1:])

    def with_features(features):
        gaussians = replace(scene.gaussians, features=features.half(), blend_weight=weights)
        return replace(scene, gaussians=gaussians, posed_capture=capture)

    save_scene(with_features(everything), tmp_path / "lifted.safetensors")
    config = TargetConfig(weight_by_opacity=False)
    _, views, plain = open_scene(tmp_path / "lifted.safetensors", config)
    _, _, leaving = open_scene(tmp_path / "lifted.safetensors", replace(config, leave_one_out=True), original=original)
    sample = load(views, plain)
    save_scene(with_features(without), tmp_path / "without.safetensors")
    _, _, expected = open_scene(tmp_path / "without.safetensors", config)
    goal = expected.render(sample).features
    before = (plain.render(sample).features - goal).norm()
    after = (leaving.render(sample).features - goal).norm()
    assert float(after) < 0.5 * float(before)
    # What is kept of it is of this photograph.
    kept = replace(leaving, store=TensorStore(1.0, None), num_rendered=0)
    for turn in (0, 90, 90):
        photograph = Image.open(sample.view.frame.image_path)
        photograph.rotate(turn).save(sample.view.frame.image_path)
        kept.render(sample)
    assert kept.num_rendered == 3
    kept.render(sample)
    assert kept.num_rendered == 3


@pytest.mark.parametrize(
    ("split", "recorded", "lifted"),
    [("test", ("images/0.png", "images/1.png", "images/2.png"), None), ("train", ("images/2.png",), 2)],
    ids=["held out", "left out by --views"],
)
def test_leave_one_out__a_view_that_was_not_lifted_changes_nothing(tmp_path, split, recorded, lifted):
    scene = create_scene(tmp_path, num_test=3)
    save_scene(replace(scene, lifted_views=recorded), tmp_path / "scene.safetensors")
    original = create_token_model(BACKBONE).eval().requires_grad_(False)
    bank = SceneBank([tmp_path / "scene.safetensors"])
    views = TrainingViews(bank.on_disk, [(split,)])
    plain = TargetRenderer(bank, views, TargetConfig())
    leaving = TargetRenderer(bank, views, TargetConfig(leave_one_out=True), original=original)
    for view in range(3):
        sample = load(views, plain, view)
        found, expected = leaving.render(sample), plain.render(sample)
        if view == lifted:
            assert float((found.features - expected.features).abs().max()) > 1e-3
            continue
        torch.testing.assert_close(found.features, expected.features)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-5)
