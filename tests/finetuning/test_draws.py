"""Which image comes when, and how it is varied: both hang on seed and position alone."""

import hashlib
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from fit3d_ns.data.images import load_mask, save_image
from fit3d_ns.features import compute_patch_grid
from fit3d_ns.finetuning.draws import (
    Augmentation,
    AugmentationConfig,
    Draw,
    DrawSequence,
    ImageWindow,
    SamplingConfig,
    TrainingViews,
    create_order,
    draw_augmentation,
)
from fit3d_ns.geometry.cameras import Camera
from fit3d_ns.scene import read_at_tokens
from tests.finetuning.finetuning_scene import HEIGHT, PATCH, WIDTH, create_scene

VARIED = AugmentationConfig(min_crop=0.5, jitter=0.2)
SIZES = [37, 5, 0, 18]
EVERY = {(scene, view) for scene, size in enumerate(SIZES) for view in range(size)}


@pytest.mark.parametrize("images_per_visit", [0, 1, 7, 100])
@pytest.mark.parametrize("scenes_at_once", [1, 3])
def test_epoch__draws_each_image_exactly_once(images_per_visit, scenes_at_once):
    config = SamplingConfig(images_per_visit=images_per_visit, scenes_at_once=scenes_at_once)
    sequence = DrawSequence(SIZES, config)
    for epoch in range(2):
        draws = [sequence[epoch * len(EVERY) + index] for index in range(len(EVERY))]
        assert Counter((draw.scene, draw.view) for draw in draws) == Counter(EVERY)
        assert {draw.epoch for draw in draws} == {epoch}


def test_epoch__grouping_lets_a_scene_serve_consecutive_draws():
    config = SamplingConfig(images_per_visit=8, scenes_at_once=1)
    order = create_order([64, 64, 64], config, epoch=0)
    changes = int((np.diff(order[:, 0]) != 0).sum())
    # 192 images in visits of 8 are 24 visits; without grouping two thirds of 191 neighbours would differ.
    assert changes <= 23
    ungrouped = create_order([64, 64, 64], SamplingConfig(images_per_visit=0), epoch=0)
    assert int((np.diff(ungrouped[:, 0]) != 0).sum()) > 90


def test_epoch__scenes_at_once_are_mixed():
    order = create_order([64] * 4, SamplingConfig(images_per_visit=8, scenes_at_once=4), epoch=0)
    scenes_in_window = [len(set(order[start : start + 32, 0])) for start in range(0, 256, 32)]
    assert max(scenes_in_window) > 1


def test_uniform__draws_images_independently():
    order = create_order([30, 10], SamplingConfig(sampling="uniform", images_per_visit=0), epoch=3)
    counts = Counter(map(tuple, order.tolist()))
    assert len(order) == 40 and max(counts.values()) > 1 and len(counts) < 40


def test_scenes__short_and_long_scenes_are_drawn_alike():
    sizes = [2000, 20, 0]
    order = create_order(sizes, SamplingConfig(sampling="scenes"), epoch=0)
    share = float((order[:, 0] == 1).mean())
    # Binomial with 2020 draws: six deviations are 0.067.
    assert abs(share - 0.5) < 0.067
    assert (order[order[:, 0] == 1, 1] < 20).all() and not (order[:, 0] == 2).any()


def test_order__hangs_on_seed_and_epoch_alone():
    config = SamplingConfig(seed=7)
    first = create_order(SIZES, config, 4)
    np.testing.assert_array_equal(first, create_order(SIZES, config, 4))
    assert (first != create_order(SIZES, config, 5)).any()
    assert (first != create_order(SIZES, SamplingConfig(seed=8), 4)).any()
    # Any access order gives the same sequence.
    forwards, backwards = DrawSequence(SIZES, config), DrawSequence(SIZES, config)
    positions = [0, 61, 5, 150, 59]
    expected = {position: forwards[position] for position in sorted(positions)}
    assert {position: backwards[position] for position in positions} == expected


@pytest.mark.parametrize("rule", ["uniform", "scenes"])
@pytest.mark.parametrize("images_per_visit", [0, 16])
def test_iid__repeats_of_an_image_in_an_epoch_are_varied_anew(rule, images_per_visit):
    """And each in the same way again, in whatever order and by whichever process it is asked for."""
    config = SamplingConfig(sampling=rule, images_per_visit=images_per_visit, seed=3)
    number = sum(SIZES)
    sequence = DrawSequence(SIZES, config)
    draws = [sequence[position] for position in range(2 * number)]
    assert len(set(draws)) == 2 * number
    varied = [draw_augmentation(VARIED, 40, 32, 8, 3, draw) for draw in draws]
    by_image = defaultdict(list)
    for draw, augmentation in zip(draws[:number], varied, strict=False):
        by_image[draw.scene, draw.view].append(augmentation)
    repeated = [augmentations for augmentations in by_image.values() if len(augmentations) > 1]
    assert len(repeated) > 5
    # Jitter is continuous: no two draws of different numbers are alike.
    assert all(len(set(augmentations)) == len(augmentations) for augmentations in repeated)
    other = DrawSequence(SIZES, config)
    for position in (2 * number - 1, 0, number, 7):
        assert other[position] == draws[position]
        assert draw_augmentation(VARIED, 40, 32, 8, 3, other[position]) == varied[position]


def test_epoch__augmentation_hangs_on_seed_epoch_and_frame_as_ever():
    """Runs of earlier versions go on to the same weights: the generator's seed, by hashlib, from those four alone."""
    sequence = DrawSequence(SIZES, SamplingConfig(seed=3))
    for position in range(0, 2 * sum(SIZES), 7):
        draw = sequence[position]
        text = f"3/augmentation/{draw.epoch}/{draw.scene}/{draw.view}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        side, *_, flip = torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[:5].tolist()
        found = draw_augmentation(VARIED, 400, 320, 8, 3, draw)
        assert found.flip == (flip < 0.5) and found.window.crop_width == round(400 * (0.5 + 0.5 * side))


ALL = AugmentationConfig(flip_probability=0.5, min_crop=0.5, min_scale=0.7, max_scale=1.6, jitter=0.3)


def code_positions(width, height):
    """An image whose channels hold column and row of each pixel centre."""
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([columns, rows])


def test_augmentation__is_a_function_of_seed_epoch_and_frame():
    def draw(seed, epoch, scene, view):
        return draw_augmentation(ALL, WIDTH, HEIGHT, PATCH, seed, Draw(epoch, scene, view))

    torch.manual_seed(0)
    first = draw(1, 2, 3, 4)
    torch.rand(5)
    assert first == draw(1, 2, 3, 4)
    others = [draw(2, 2, 3, 4), draw(1, 3, 3, 4), draw(1, 2, 4, 4), draw(1, 2, 3, 5)]
    assert all(first != other for other in others)


def test_augmentation__defaults_flip_half_of_the_images_and_nothing_else():
    draws = [draw_augmentation(AugmentationConfig(), 40, 32, 8, 0, Draw(0, 0, view)) for view in range(400)]
    assert {augmentation.window for augmentation in draws} == {ImageWindow(0, 0, 40, 32, 40, 32)}
    # Six deviations of a fair coin thrown 400 times.
    assert abs(sum(augmentation.flip for augmentation in draws) - 200) < 60
    image = torch.rand(3, 32, 40)
    plain = next(augmentation for augmentation in draws if not augmentation.flip)
    assert torch.equal(plain.apply_to_image(image), image)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_window__camera_and_image_show_the_same(scale):
    window = ImageWindow(left=6, top=4, crop_width=20, crop_height=16, width=int(20 * scale), height=int(16 * scale))
    shown = window.apply_to_map(code_positions(WIDTH, HEIGHT))
    K = torch.tensor([[35.0, 0.0, 19.3], [0.0, 36.0, 16.8], [0.0, 0.0, 1.0]])
    # The ray of each shown pixel, by the window's camera, meets the original image where the position code says.
    pixels = torch.cat([code_positions(window.width, window.height), torch.ones(1, window.height, window.width)])
    rays = torch.linalg.solve(window.apply_to_K(K), pixels.flatten(1))
    expected = (K @ rays)[:2].unflatten(1, (window.height, window.width))
    # At the border the resize mixes in no pixel from outside, so position codes bend there.
    inner = (slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(shown[inner], expected[inner], rtol=1e-4, atol=1e-3)


def test_augmentation__windows_stay_inside_and_hold_a_patch():
    config = AugmentationConfig(min_crop=0.1, min_scale=0.2, max_scale=1.0)
    for view in range(100):
        window = draw_augmentation(config, WIDTH, HEIGHT, PATCH, 0, Draw(0, 0, view)).window
        assert 0 <= window.left <= WIDTH - window.crop_width and 0 <= window.top <= HEIGHT - window.crop_height
        assert min(compute_patch_grid(window.height, window.width, PATCH)) >= 1


def test_augmentation__flip_mirrors_image_and_tokens_alike():
    flip = Augmentation(ImageWindow(0, 0, 40, 32, 40, 32), flip=True)
    columns = code_positions(40, 32)[:1].expand(3, -1, -1)
    image = flip.apply_to_image(columns)
    tokens = flip.apply_to_tokens(columns[0].unfold(0, 8, 8).unfold(1, 8, 8).mean(dim=(2, 3)))
    of_flipped_image = image[0].unfold(0, 8, 8).unfold(1, 8, 8).mean(dim=(2, 3))
    torch.testing.assert_close(tokens, of_flipped_image)
    assert tokens[0, 0] > tokens[0, -1]


def test_augmentation__jitter_changes_colours_and_no_geometry():
    config = AugmentationConfig(flip_probability=0.0, jitter=0.4)
    augmentation = draw_augmentation(config, 40, 32, 8, 0, Draw(0, 0, 0))
    image = torch.full((3, 32, 40), 0.2)
    image[:, 8:16, 8:16] = torch.tensor([0.7, 0.3, 0.4])[:, None, None]
    shown = augmentation.apply_to_image(image)
    assert augmentation.window == ImageWindow(0, 0, 40, 32, 40, 32)
    assert not torch.allclose(shown, image, atol=1e-3) and 0.0 <= shown.min() and shown.max() <= 1.0
    # Constant regions stay constant: nothing moved.
    assert float(shown[:, 8:16, 8:16].std(dim=(1, 2)).max()) < 1e-6


@pytest.mark.parametrize(
    "settings", [{"flip_probability": 1.5}, {"min_crop": 0.0}, {"jitter": 1.0}, {"min_scale": 2.0, "max_scale": 1.0}]
)
def test_augmentation__refuses_impossible_settings(settings):
    with pytest.raises(ValueError):
        AugmentationConfig(**settings)


def test_mask__is_cropped_scaled_and_flipped_with_its_image_and_not_jittered(tmp_path):
    """The photographs' masked pixels are painted, so that the shown image says where the mask must be."""
    scene = create_scene(tmp_path, num_frames=4)
    for view in scene.posed_capture.views:
        mask = load_mask(view.frame.mask_path)
        save_image((mask[..., None] * 255).to(torch.uint8).expand(-1, -1, 3), view.frame.image_path)
    views = TrainingViews([scene], [("train",)])
    shapes = set()
    for epoch in range(6):
        draw = Draw(epoch, 0, epoch % 3)
        sample = views.load_sample(draw, replace(ALL, jitter=0.0), PATCH, 0, "area")
        shown = read_at_tokens(sample.image[0][..., None], sample.patch_grid, "area")[..., 0]
        torch.testing.assert_close(sample.augmentation.apply_to_tokens(sample.mask), shown, rtol=1e-4, atol=1e-5)
        jittered = views.load_sample(draw, ALL, PATCH, 0, "area")
        assert torch.equal(jittered.mask, sample.mask) and not torch.equal(jittered.image, sample.image)
        shapes.add((sample.augmentation.flip, sample.augmentation.window))
    assert {flip for flip, _ in shapes} == {True, False} and len(shapes) == 6


def test_crop__target_of_a_cropped_camera_is_the_crop_of_the_full_rendering(tmp_path):
    scene = create_scene(tmp_path)
    # Splats of few pixels: large ones beside the crop are linearised elsewhere, by gsplat's rule for narrow cameras.
    small = replace(scene.gaussians, log_scales=torch.full_like(scene.gaussians.log_scales, -2.8))
    scene, view = replace(scene, gaussians=small), scene.posed_capture.views[0]
    full, _ = scene.render_features_low(view.camera)
    # A corner on the grid of 16 x 16 tiles, where splats are cut.
    window = ImageWindow(left=16, top=0, crop_width=24, crop_height=32, width=24, height=32)
    cropped, _ = scene.render_features_low(Camera(view.camera_to_world, window.apply_to_K(view.K), 24, 32))
    assert float(full[:, 16:].abs().max()) > 0.5
    torch.testing.assert_close(cropped, full[:, 16:], rtol=0.0, atol=2e-3)
