import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from fit3d_ns.finetuning.draws import AugmentationConfig, DrawSequence, SamplingConfig, create_order, draw_augmentation

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


def test_sequence__refuses_scenes_without_views():
    with pytest.raises(ValueError, match="no training views"):
        DrawSequence([0, 0], SamplingConfig())
