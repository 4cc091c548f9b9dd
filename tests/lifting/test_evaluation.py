from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fit3d_ns.lifting import LiftConfig, compute_leave_one_out, evaluate_features, solve_features
from fit3d_ns.scene.feature_decoder import FeatureDecoder
from tests.lifting.lifting_scene import EMBED_DIM, GRID, compute_dense_blending


def test_evaluate_features__equals_loop_over_tokens(gaussians, views):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(gaussians), 3, generator=generator)
    decoder = FeatureDecoder(3, EMBED_DIM, bias=True).requires_grad_(False)
    decoder.bias.copy_(torch.randn(EMBED_DIM, generator=generator))
    mean_token = torch.randn(EMBED_DIM, generator=generator)
    distances, cosines, mean_distances, mean_cosines = [], [], [], []
    for view in views[:2]:
        blending, alphas = (tensor.float() for tensor in compute_dense_blending(gaussians, view))
        low = (blending @ features).permute(2, 0, 1)[None]
        high = F.conv2d(low, decoder.weight, padding=1) + decoder.bias[:, None, None] * alphas
        maps = torch.cat([high[0], alphas[None], view.load_mask().float()[None]])[None]
        read = F.interpolate(maps, size=GRID, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                *token, alpha, mask = read[row, column].tolist()
                if alpha <= 0.5 or mask <= 0.5:
                    continue
                expected = view.load_tokens()[row, column].numpy()
                for guess, l1, cosine in (
                    (np.array(token), distances, cosines),
                    (mean_token.numpy(), mean_distances, mean_cosines),
                ):
                    l1.append(np.abs(guess - expected).mean())
                    cosine.append(guess @ expected / np.linalg.norm(guess) / np.linalg.norm(expected))
    assert 0 < len(distances) < 2 * GRID[0] * GRID[1]
    metrics = evaluate_features(gaussians, features, decoder, views[:2], mean_token, token_reading="bilinear")
    assert metrics.num_tokens == len(distances)
    assert metrics.feature_l1 == pytest.approx(np.mean(distances), rel=1e-4)
    assert metrics.feature_cosine == pytest.approx(np.mean(cosines), rel=1e-4)
    assert metrics.mean_token_l1 == pytest.approx(np.mean(mean_distances), rel=1e-4)
    assert metrics.mean_token_cosine == pytest.approx(np.mean(mean_cosines), rel=1e-4)


def test_evaluate_features__says_when_nothing_is_covered(gaussians, views):
    away = replace(gaussians, means=gaussians.means + 100.0)
    decoder = FeatureDecoder(3, EMBED_DIM)
    with pytest.raises(ValueError, match="No token of the evaluated views is covered"):
        mean_token = torch.zeros(EMBED_DIM)
        evaluate_features(away, torch.zeros(len(away), 3), decoder, views, mean_token, token_reading="area")


def test_compute_leave_one_out__equals_lifting_without_the_view(gaussians, views):
    config = LiftConfig(feature_dim=3, max_passes=0)
    whole = solve_features(gaussians, views, config)
    for left_out in range(len(views)):
        others = [view for index, view in enumerate(views) if index != left_out]
        expected = solve_features(gaussians, others, config, basis=whole.basis)
        features = compute_leave_one_out(gaussians, views[left_out], whole)
        torch.testing.assert_close(features, expected.features, rtol=1e-3, atol=1e-4)


def test_compute_leave_one_out__is_zero_where_only_that_view_saw(gaussians, views):
    means = gaussians.means.clone()
    # Far to the right: only the view that is moved there sees it.
    means[4] = torch.tensor([40.0, 0.0, 4.0])
    viewmat = torch.eye(4)
    viewmat[0, 3] = -40.0
    alone = replace(views[0], viewmat=viewmat)
    moved = replace(gaussians, means=means)
    result = solve_features(moved, [*views[1:], alone], LiftConfig(feature_dim=3, max_passes=0))
    assert result.num_views[4] == 1 and result.features[4].any()
    assert not compute_leave_one_out(moved, alone, result)[4].any()


def test_compute_leave_one_out__refuses_other_gaussians(gaussians, views):
    result = solve_features(gaussians, views, LiftConfig(feature_dim=3, max_passes=0))
    with pytest.raises(ValueError, match="made for 10 Gaussians, not 9"):
        compute_leave_one_out(gaussians.select(torch.arange(10) < 9), views[0], result)
