import math

import pytest
import torch

from fit3d_ns.analysis.temporal_consistency import compute_temporal_consistency

MODULE = "fit3d_ns.analysis.temporal_consistency"
PATCH = 8


def create_clip(shift: int, num_frames: int = 4, height: int = 96, width: int = 128) -> list[torch.Tensor]:
    """A smooth random texture that moves to the left by `shift` pixels a frame."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 12, width // 12 + 8, generator=generator)
    texture = torch.nn.functional.interpolate(coarse, scale_factor=12, mode="bicubic", align_corners=False)[0]
    pixels = (texture.clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0)
    return [pixels[:, index * shift : index * shift + width].contiguous() for index in range(num_frames)]


def extract_mean_colours(pixels: torch.Tensor) -> torch.Tensor:
    """Tokens that move with the picture: the mean colour of each patch."""
    pooled = torch.nn.functional.avg_pool2d(pixels.float().permute(2, 0, 1)[None] / 255, PATCH)
    return pooled[0].permute(1, 2, 0)


def test_compute_temporal_consistency__tokens_that_move_with_the_texture_stay_themselves() -> None:
    images = create_clip(PATCH)
    maps = [extract_mean_colours(image) for image in images]
    metrics = compute_temporal_consistency([maps], images)[0]
    # The texture moves by one patch, so a token's new place is another token's centre.
    assert metrics.centred_cosine > 0.97
    assert metrics.num_pairs == 3
    # One column of sixteen leaves the picture.
    assert 0.8 < metrics.followed_share <= 15 / 16


def test_compute_temporal_consistency__tokens_that_stay_in_place_disagree_when_the_texture_moves() -> None:
    images = create_clip(PATCH)
    generator = torch.Generator().manual_seed(1)
    fixed = torch.randn(12, 16, 32, generator=generator)
    metrics = compute_temporal_consistency([[fixed] * len(images)], images)[0]
    # Cosines of random tokens of width 32 have a deviation of 1 / sqrt(32) around 0; the mean is over hundreds.
    assert abs(metrics.centred_cosine) < 0.1


def test_compute_temporal_consistency__a_still_clip_is_perfect_and_a_constant_offset_lifts_only_the_plain_cosine() -> (
    None
):
    images = [create_clip(0)[0]] * 3
    generator = torch.Generator().manual_seed(2)
    still = torch.randn(12, 16, 8, generator=generator)
    changing = [torch.randn(12, 16, 8, generator=generator) + 100.0 for _ in images]
    perfect, offset = compute_temporal_consistency([[still] * 3, changing], images)
    assert perfect.centred_cosine == pytest.approx(1.0, abs=1e-5) and perfect.followed_share == 1.0
    assert offset.mean_cosine > 0.99 and abs(offset.centred_cosine) < 0.1


def test_compute_temporal_consistency__what_looks_different_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    image = create_clip(0)[0]
    images = [image, 255 - image]
    maps = [extract_mean_colours(image) for image in images]
    # Only greys in the middle of the range look alike in the negative.
    assert compute_temporal_consistency([maps], images)[0].followed_share < 0.5
    monkeypatch.setattr(f"{MODULE}.MAX_GREY_DIFFERENCE", 1.0)
    monkeypatch.setattr(f"{MODULE}.MAX_ROUND_TRIP", 1e9)
    assert compute_temporal_consistency([maps], images)[0].followed_share > 0.9


def test_compute_temporal_consistency__half_precision_maps_are_taken() -> None:
    images = create_clip(PATCH)
    maps = [extract_mean_colours(image) for image in images]
    full, half = compute_temporal_consistency([maps, [tokens.half() for tokens in maps]], images)
    assert half.centred_cosine == pytest.approx(full.centred_cosine, abs=2e-3)  # half precision has 11 bits


def test_compute_temporal_consistency__nothing_followed_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    images = create_clip(0, num_frames=2)
    maps = [extract_mean_colours(image) for image in images]
    # No distance is below zero.
    monkeypatch.setattr(f"{MODULE}.MAX_ROUND_TRIP", -1.0)
    metrics = compute_temporal_consistency([maps], images)[0]
    assert metrics.num_points == 0 and math.isnan(metrics.centred_cosine)
