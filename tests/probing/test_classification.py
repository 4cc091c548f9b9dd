"""Random resized crops of the classification probe: in the picture, in the published ranges, and shown as drawn."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from fit3d_ns.probing.classification import ClassificationInputs, draw_resized_window
from fit3d_ns.probing.datasets.frames import LabelledFrame
from fit3d_ns.probing.pictures import Window

SIZES = [(224, 224), (375, 500), (500, 333), (64, 41), (9, 11), (30, 200), (200, 20), (5, 400)]


@pytest.mark.parametrize("size", SIZES)
def test_draw_resized_window__stays_in_the_picture_and_in_the_published_ranges(size: tuple[int, int]) -> None:
    height, width = size
    for seed in range(300):
        window = draw_resized_window(height, width, np.random.default_rng(seed))
        assert 0 <= window.top and 0 <= window.left and 0 < window.height and 0 < window.width
        assert window.top + window.height <= height and window.left + window.width <= width
        # Sides are rounded to pixels, by half a pixel at most.
        ratios = (window.width - 0.5) / (window.height + 0.5), (window.width + 0.5) / max(window.height - 0.5, 0.5)
        assert ratios[0] <= 4 / 3 and ratios[1] >= 3 / 4, window
        areas = (window.width - 0.5) * (window.height - 0.5), (window.width + 0.5) * (window.height + 0.5)
        assert areas[0] <= height * width
        # Where no allowed ratio leaves 8 % of the area (400 x 5), the largest window that has one is taken.
        largest = min(height, width / 0.75) * min(width, height * 4 / 3)
        assert areas[1] >= min(0.08 * height * width, largest - 1), window


@pytest.mark.parametrize("size", [(240, 240), (150, 400), (380, 160)])
def test_draw_resized_window__is_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    picture = torch.zeros(3, height, width)
    torch.manual_seed(0)
    theirs, ours = [], []
    for seed in range(3000):
        theirs.append(RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]))
        window = draw_resized_window(height, width, np.random.default_rng(seed))
        ours.append((window.top, window.left, window.height, window.width))
    for name, first, second in zip(
        ("top", "left", "height", "width"), np.array(ours).T, np.array(theirs).T, strict=True
    ):
        for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
            difference = np.quantile(first, quantile) - np.quantile(second, quantile)
            # Quantiles of three thousand draws vary by about a hundredth of the range.
            assert abs(difference) < 0.05 * max(size), (name, quantile)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((10, 100), Window(0, 43, 10, 13)), ((100, 9), Window(44, 0, 12, 9)), ((8, 8), Window(0, 0, 8, 8))],
)
def test_draw_resized_window__the_middle_where_nothing_fits(size: tuple[int, int], expected: Window) -> None:
    found = draw_resized_window(*size, np.random.default_rng(0), num_tries=0)
    assert found == expected
    picture = torch.zeros(3, *size)
    # An area larger than the picture never fits, which sends torchvision there as well.
    theirs = RandomResizedCrop.get_params(picture, [50.0, 51.0], [3 / 4, 4 / 3])
    assert theirs == (found.top, found.left, found.height, found.width)


def test_augment__shows_the_drawn_window_and_its_mirror_image() -> None:
    rows, columns = np.mgrid[0:160, 0:240]
    positions = torch.from_numpy(np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8))
    frame = LabelledFrame("a", lambda: positions, class_index=2)
    flips = set()
    for seed in range(40):
        window = draw_resized_window(160, 240, np.random.default_rng(seed))
        shown = ClassificationInputs(40, 32).augment(frame, np.random.default_rng(seed))
        assert shown.image.shape == (3, 32, 32) and int(shown.target) == 2
        assert 0.0 <= float(shown.image.min()) and float(shown.image.max()) <= 1.0
        red, green = 255 * shown.image[0].mean(dim=0), 255 * shown.image[1].mean(dim=1)
        # Each pixel shows the middle of a thirty-second of the window.
        steps = (np.arange(32) + 0.5) / 32
        expected = window.left + window.width * steps - 0.5, window.top + window.height * steps - 0.5
        is_flipped = bool(red[0] > red[-1])
        flips.add(is_flipped)
        # Positions are whole numbers, and cubic interpolation leans at the edges.
        np.testing.assert_allclose(red.flip(0) if is_flipped else red, expected[0], atol=1.0)
        np.testing.assert_allclose(green, expected[1], atol=1.0)
    assert flips == {False, True}
