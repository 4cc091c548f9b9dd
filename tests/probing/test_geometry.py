"""Where pixels go: padding, resizing, windows and augmentation, tested by images that say where they are."""

import colorsys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fit3d_ns.probing.datasets.frames import IGNORE_INDEX, DepthConvention, LabelledFrame, LabelledSet
from fit3d_ns.probing.inputs import (
    EVALUATION,
    TRAINING,
    DepthInputs,
    SegmentationInputs,
    average_windows,
    choose_crop_size,
    choose_short_side,
    distort_colours,
    draw_varied_window,
    list_windows,
    rotate,
    shift_colours,
)
from fit3d_ns.probing.pictures import PatchFit, PictureKey, resize_map, sample_nearest
from tests.probing.probe_backbones import MeanColourBackbones


def create_positions(height: int, width: int) -> np.ndarray:
    """Red says the column, green the row, in pixels."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def create_frame(height: int, width: int, name: str = "a") -> LabelledFrame:
    """Labels are 1 in the right half; depth in metres is one more than the column."""
    labels = (torch.arange(width) >= width / 2).to(torch.uint8).expand(height, width).contiguous()
    depth = (torch.arange(width) + 1.0).expand(height, width).contiguous()
    return LabelledFrame(
        name=name,
        load_image=lambda: torch.from_numpy(create_positions(height, width)),
        load_labels=lambda: labels.clone(),
        load_depth=lambda: depth.clone(),
    )


@pytest.mark.parametrize("size", [(16, 24), (17, 26), (19, 25), (18, 23)])
def test_patch_fit__pad_puts_tokens_back_where_they_came_from(size: tuple[int, int]) -> None:
    height, width = size
    backbones = MeanColourBackbones()
    image = torch.from_numpy(create_positions(height, width)).permute(2, 0, 1)[None].float()
    fit = backbones.create_fit(height, width)
    left, right, top, bottom = fit.padding
    assert (width + left + right) % 4 == 0 and (height + top + bottom) % 4 == 0
    assert 0 <= right - left <= 1 and 0 <= bottom - top <= 1
    # Away from the border, the mean colour of a patch is the position of its centre, and so is bilinear upsampling.
    tokens = backbones(image).maps[0, 0, 0].permute(2, 0, 1)[None]
    restored = fit.restore(tokens)[0]
    assert restored.shape == (3, height, width)
    inner = (slice(6, height - 6), slice(6, width - 6))
    expected = torch.from_numpy(create_positions(height, width)).permute(2, 0, 1).float()
    torch.testing.assert_close(restored[:2, inner[0], inner[1]], expected[:2, inner[0], inner[1]])


def test_patch_fit__padding_is_the_mean_and_targets_do_not_count_there() -> None:
    fit = PatchFit(5, 6, 4)
    images = fit.fit_images(torch.zeros(1, 3, 5, 6), (0.1, 0.2, 0.3))
    assert images.shape == (1, 3, 8, 8)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([0.1, 0.2, 0.3]))
    assert bool((images[0, :, 1:6, 1:7] == 0).all())
    targets = fit.fit_targets(torch.zeros(5, 6, dtype=torch.uint8), IGNORE_INDEX)
    assert int((targets == IGNORE_INDEX).sum()) == 64 - 30 and bool((targets[1:6, 1:7] == 0).all())


def test_patch_fit__stretch_and_resize_keep_targets() -> None:
    targets = torch.zeros(5, 6)
    for rule in ("pad-stretch", "resize"):
        fit = PatchFit(5, 6, 4, rule)
        assert torch.equal(fit.fit_targets(targets, 7.0), targets)
        assert fit.restore(torch.ones(1, 2, 2, 2)).shape == (1, 2, 5, 6)
    assert PatchFit(5, 6, 4, "resize").fit_images(torch.zeros(1, 3, 5, 6), (0.0, 0.0, 0.0)).shape == (1, 3, 5, 6)


def test_sample_nearest__takes_the_pixel_at_the_centre_of_each_cell() -> None:
    values = torch.arange(12.0).expand(3, 12)
    assert sample_nearest(values, (3, 4))[0].tolist() == [1.0, 4.0, 7.0, 10.0]
    assert sample_nearest(values, (3, 12)).equal(values)
    assert sample_nearest(torch.arange(2.0).expand(1, 2), (1, 4))[0].tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("size", "side", "stride"),
    [((512, 683), 512, 341), ((512, 512), 512, 341), ((512, 2048), 512, 341), ((5, 20), 6, 4), ((7, 7), 3, 3)],
)
def test_list_windows__as_published_and_covering_everything(size, side, stride) -> None:
    height, width = size
    windows = list_windows(height, width, side, stride)
    # mmsegmentation's arithmetic, written out.
    expected = []
    for row in range(max(height - side + stride - 1, 0) // stride + 1):
        for column in range(max(width - side + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + side, height), min(column * stride + side, width)
            expected.append((max(bottom - side, 0), max(right - side, 0), bottom, right))
    found = [(item.top, item.left, item.top + item.height, item.left + item.width) for item in windows]
    assert found == expected
    count = torch.zeros(height, width)
    for window in windows:
        count[window.slices] += 1
    assert int(count.min()) >= 1


def test_average_windows__every_pixel_is_the_mean_of_its_windows() -> None:
    windows = list_windows(4, 9, 4, 3)
    constant = [torch.full((2, 4, 4), 3.5) for _ in windows]
    assert bool((average_windows(constant, windows, 4, 9) == 3.5).all())
    numbered = [torch.full((1, 4, 4), float(index)) for index in range(len(windows))]
    # Windows begin at columns 0, 3 and 5.
    assert average_windows(numbered, windows, 4, 9)[0, 0].tolist() == [0, 0, 0, 0.5, 1, 1.5, 1.5, 2, 2]


def create_inputs(short_side: int = 16, crop: int = 16) -> SegmentationInputs:
    return SegmentationInputs(MeanColourBackbones(), short_side, crop, crop * 2 // 3)


@pytest.mark.parametrize("is_flipped", [False, True])
def test_segmentation_inputs__labels_stay_with_their_pixels(is_flipped: bool) -> None:
    frame = create_frame(16, 40)
    pictures = create_inputs()
    assert [window.left for window in pictures.list_windows(frame)] == [0, 10, 20, 24]
    for number, window in enumerate(pictures.list_windows(frame)):
        picture = pictures.load(frame, PictureKey("x", is_flipped, number))
        columns = (picture.image[0, 0] * 255).round()
        expected = torch.arange(window.left, window.left + 16.0)
        assert columns.tolist() == (expected.flip(0) if is_flipped else expected).tolist()
        # Four labels per token of four pixels: one for each pixel.
        assert picture.target[0].tolist() == (columns >= 20).int().tolist()


def test_segmentation_inputs__augmentation_keeps_labels_and_pixels_together() -> None:
    grey = torch.full((32, 40, 3), 80, dtype=torch.uint8)
    grey[:, 20:] = 180
    frame, pictures = replace(create_frame(32, 40), load_image=lambda: grey.clone()), create_inputs(32, 24)
    sizes = set()
    for seed in range(12):
        picture = pictures.augment(frame, np.random.default_rng(seed))
        assert picture.image.shape == (3, 24, 24) and picture.target.shape == (24, 24)
        again = pictures.augment(frame, np.random.default_rng(seed))
        assert torch.equal(again.image, picture.image) and torch.equal(again.target, picture.target)
        counted = picture.target != IGNORE_INDEX
        sizes.add(int(counted.sum()))
        ramp = picture.image.sum(dim=0)[counted.any(1)][0]
        labels = picture.target[counted.any(1)][0]
        # The colours change, but brightness still tells left from right: label 1 lies on the brighter side.
        if bool((labels == 0).any()) and bool((labels == 1).any()):
            assert ramp[labels == 1].mean() > ramp[labels == 0].mean()
    assert len(sizes) > 1, "small scales leave a padded border that does not count"


def test_choose_short_side__twice_small_images_and_512_for_large_ones() -> None:
    assert choose_short_side(LabelledSet("s", [create_frame(30, 40)]), 16) == 48
    assert choose_short_side(LabelledSet("s", [create_frame(300, 400)]), 14) == 512


def test_draw_varied_window__avoids_dominating_classes() -> None:
    labels = np.zeros((20, 20), dtype=np.uint8)
    labels[:, 16:] = 1
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(50):
        window = draw_varied_window(labels, 8, 0.75, generator)
        shares.append((labels[window.slices] == 0).mean())
    # Two of thirteen windows are varied enough: eleven tries find one of them in five cases of six.
    assert 0.7 < np.mean(np.array(shares) < 0.75) < 1.0


def test_rotate__a_full_turn_and_a_quarter_turn() -> None:
    image = create_positions(9, 9)
    depth = np.arange(81, dtype=np.float32).reshape(9, 9)
    turned, moved = rotate(image, depth, 90.0)
    np.testing.assert_array_equal(moved, np.rot90(depth, -1))
    np.testing.assert_allclose(turned.astype(int), np.rot90(image, -1).astype(int), atol=1)


def test_colour_changes__keep_sizes_and_average_out() -> None:
    image = np.full((6, 6, 3), (120, 100, 80), dtype=np.uint8)
    generator = np.random.default_rng(0)
    changed = np.stack([distort_colours(image, generator) for _ in range(200)])
    assert changed.dtype == np.uint8 and 90 < changed.mean() < 110 and changed.std() > 5


def test_shift_colours__by_hand() -> None:
    """Whether at all; gamma, brightness, and a factor for each channel."""
    image = np.full((6, 6, 3), (120, 100, 80), dtype=np.uint8)
    brightness = (0.5, 1.5)
    assert np.array_equal(shift_colours(image, brightness, ScriptedDraws([], [0.49, 1.0, 1.0, 1.0])), image)
    assert np.array_equal(shift_colours(image, brightness, ScriptedDraws([], [0.5])), image)
    half = shift_colours(image, brightness, ScriptedDraws([], [0.0, 1.0, 0.5, 1.1]))
    np.testing.assert_allclose(half[0, 0], [66, 55, 44], atol=1)
    # The public code raises 0..255 to the gamma: 127 ** 0.9 is 78, not 136.
    grey = np.full((2, 2, 3), 127, np.uint8)
    dark = shift_colours(grey, brightness, ScriptedDraws([], [0.0, 0.9, 1.0, 1.0]))
    assert abs(int(dark[0, 0, 0]) - round(127**0.9)) <= 1


class ScriptedDraws(np.random.Generator):
    """Gives the numbers it was told to give."""

    def __init__(self, integers: list[int], uniforms: list[float]) -> None:
        super().__init__(np.random.PCG64(0))
        self._integers, self._uniforms = iter(integers), iter(uniforms)

    def integers(self, *bounds: int) -> int:  # type: ignore[override]
        low, high = (0, bounds[0]) if len(bounds) == 1 else bounds
        value = next(self._integers)
        assert low <= value < high
        return value

    def uniform(self, low: float, high: float, size: int | None = None) -> Any:  # type: ignore[override]
        value = next(self._uniforms)
        assert low <= value <= high
        return value if size is None else np.full(size, value)

    def random(self) -> float:  # type: ignore[override]
        return next(self._uniforms)


@pytest.mark.parametrize(
    ("integers", "uniforms", "change"),
    [
        # Brightness or not; contrast first or last; then contrast, saturation, hue, each or not.
        ([1, 1, 0, 0, 0], [-32.0], lambda rgb: [max(value - 32, 0) for value in rgb]),
        ([1, 1, 0, 0, 0], [32.0], lambda rgb: [min(value + 32, 255) for value in rgb]),
        ([0, 1, 1, 0, 0], [1.5], lambda rgb: [min(1.5 * value, 255) for value in rgb]),
        ([0, 0, 0, 0, 1], [0.5], lambda rgb: [0.5 * value for value in rgb]),
        ([0, 1, 0, 1, 0], [0.5], lambda rgb: change_hsv(rgb, saturation=0.5)),
        ([0, 1, 0, 0, 1, -18], [], lambda rgb: change_hsv(rgb, turn=-18 / 180)),
        ([0, 1, 0, 0, 1, 17], [], lambda rgb: change_hsv(rgb, turn=17 / 180)),
        ([0, 0, 0, 0, 0], [], lambda rgb: rgb),
    ],
)
def test_distort_colours__each_step_by_hand(integers, uniforms, change) -> None:
    colours = [(120, 100, 80), (250, 10, 40), (5, 200, 130)]
    image = np.array(colours, dtype=np.uint8)[None].repeat(2, axis=0)
    before = image.copy()
    changed = distort_colours(image, ScriptedDraws(integers, uniforms))
    expected = [change(colour) for colour in colours]
    # 8-bit hue and saturation are rounded, to two degrees and a 255th, on the way.
    np.testing.assert_allclose(changed[0].astype(float), expected, atol=5.0)
    np.testing.assert_array_equal(image, before)


def change_hsv(rgb: tuple[int, int, int], saturation: float = 1.0, turn: float = 0.0) -> list[float]:
    hue, old, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    return [255 * channel for channel in colorsys.hsv_to_rgb((hue + turn) % 1.0, min(old * saturation, 1.0), value)]


def test_choose_crop_size__as_published_or_the_smallest_image() -> None:
    def choose(size: tuple[int, int], short_side: int | None = None, **convention: object) -> tuple[int, int]:
        frames = [create_frame(*size), create_frame(size[0] + 50, size[1])]
        return choose_crop_size(LabelledSet("s", frames, depth=DepthConvention(**convention)), short_side)  # type: ignore[arg-type]

    assert choose((480, 640)) == (416, 544)
    assert choose((240, 600)) == (240, 544)
    # The second image is narrower after resizing: 290x320 becomes 480x530.
    assert choose((240, 320), short_side=480) == (416, 530)
    # KITTI's pictures are cut to 352x1216 first, NYU's to 427x565.
    assert choose((375, 1242), bottom_crop=(352, 1216)) == (352, 704)
    assert choose((480, 640), train_crop=(45, 472, 43, 608)) == (416, 544)


def test_depth_inputs__kittis_benchmark_crop() -> None:
    pictures = create_depth_inputs(DepthConvention(bottom_crop=(352, 1216), max_depth=80.0))
    rows = (torch.arange(375) % 256).to(torch.uint8)[:, None, None].expand(375, 1242, 3)
    frame = replace(create_frame(375, 1242), load_image=lambda: rows)
    depth = pictures.load_depth(frame)
    # KBCrop: the last 352 rows, the middle 1216 columns, rounded to the left.
    assert depth.shape == (352, 1216) and depth[0, 0] == 1 + int((1242 - 1216) / 2)
    assert pictures.load_image(frame)[0, 0, 0] == 375 - 352


def create_depth_inputs(convention: DepthConvention, short_side: int | None = None) -> DepthInputs:
    return DepthInputs(MeanColourBackbones(), convention, short_side, (8, 12))


@pytest.mark.parametrize("is_flipped", [False, True])
def test_depth_inputs__depth_stays_with_its_pixels(is_flipped: bool) -> None:
    frame = create_frame(10, 18)
    picture = create_depth_inputs(DepthConvention(max_depth=50.0)).load(frame, PictureKey("x", is_flipped, EVALUATION))
    columns = (picture.image[0, 0] * 255).round() + 1
    # Ten by eighteen pixels are padded to twelve by twenty, two values per token of four pixels: every second pixel,
    # from the second of the padded row on, which is the first of the image.
    assert picture.target.shape == (6, 10)
    assert picture.target[2].tolist() == [*columns[::2].tolist(), 0.0]
    assert bool((picture.target[5] == 0).all()), "the lowest row is padding"


def test_depth_inputs__benchmark_crops() -> None:
    frame = create_frame(20, 30)
    pictures = create_depth_inputs(DepthConvention(bottom_crop=(12, 20), train_crop=(2, 10, 4, 16)))
    image = pictures.load_image(frame)
    # The lower twelve rows, the middle twenty columns.
    assert image.shape == (12, 20, 3) and image[0, 0].tolist() == [5, 8, 0] and image[-1, -1].tolist() == [24, 19, 0]
    assert pictures.load_depth(frame)[0, 0] == 6.0
    training = pictures.load(frame, PictureKey("x", False, TRAINING))
    assert training.image.shape == (3, 8, 12)
    assert (training.image[:2, 0, 0] * 255).round().tolist() == [9, 10]


def test_depth_inputs__augmentation_keeps_depth_and_pixels_together() -> None:
    frame = create_frame(24, 40)
    pictures = create_depth_inputs(DepthConvention(max_depth=50.0, brightness_range=(1.0, 1.0)))
    for seed in range(8):
        picture = pictures.augment(frame, np.random.default_rng(seed))
        assert picture.image.shape == (3, 8, 12) and picture.target.shape == (8, 12)
        known = picture.target > 0
        red, depth = picture.image[0][known] * 255, picture.target[known] - 1
        # Colours change by up to a fifth, rotation by 2.5 degrees moves a pixel at most.
        correlation = torch.corrcoef(torch.stack([red, depth]))[0, 1]
        assert float(correlation) > 0.95


def test_resize_map__keeps_what_has_the_size_already() -> None:
    maps = torch.rand(1, 2, 3, 4)
    assert resize_map(maps, (3, 4)) is maps
