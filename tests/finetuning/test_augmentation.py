from dataclasses import replace

import pytest
import torch

from fit3d_ns.data.images import load_mask, save_image
from fit3d_ns.features import compute_patch_grid
from fit3d_ns.finetuning.draws import Augmentation, AugmentationConfig, Draw, ImageWindow, draw_augmentation
from fit3d_ns.finetuning.training_views import TrainingViews
from fit3d_ns.scene import read_at_tokens
from tests.finetuning.finetuning_scene import HEIGHT, PATCH, WIDTH, create_scene

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
    full, _ = scene.render_features_low(view.camera_to_world, view.K, view.width, view.height)
    # A corner on the grid of 16 x 16 tiles, where splats are cut.
    window = ImageWindow(left=16, top=0, crop_width=24, crop_height=32, width=24, height=32)
    cropped, _ = scene.render_features_low(view.camera_to_world, window.apply_to_K(view.K), 24, 32)
    assert float(full[:, 16:].abs().max()) > 0.5
    torch.testing.assert_close(cropped, full[:, 16:], rtol=0.0, atol=2e-3)
