from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fit3d_ns.lifting.feature_error import FeatureLoss, FeatureLossConfig, compute_masked_l1, evaluate_features
from fit3d_ns.scene.feature_decoder import FeatureDecoder
from tests.lifting.lifting_scene import EMBED_DIM, compute_dense_blending
from tests.lifting.lifting_scene import GRID as TOKEN_GRID

WIDTH, HEIGHT, GRID = 20, 12, (3, 5)


@pytest.fixture
def rendered():
    generator = torch.Generator().manual_seed(0)
    features_low = torch.randn(HEIGHT, WIDTH, 2, generator=generator)
    alphas = torch.rand(HEIGHT, WIDTH, generator=generator)
    tokens = torch.randn(*GRID, 4, generator=generator)
    mask = torch.rand(HEIGHT, WIDTH, generator=generator) > 0.3
    decoder = FeatureDecoder(2, 4, bias=True)
    with torch.no_grad():
        decoder.bias.copy_(torch.randn(4, generator=generator))
    return features_low, alphas, tokens, mask, decoder


def compute_by_full_maps(rendered, size, aware):
    """Decode everywhere, resize everything, average: what the loss must equal."""
    features_low, alphas, tokens, mask, decoder = rendered
    decoded = F.conv2d(features_low.permute(2, 0, 1)[None], decoder.weight, padding=1)
    decoded = decoded + decoder.bias[:, None, None] * alphas
    weights = (mask * alphas if aware else mask.float())[None, None]
    resize = lambda maps: F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0].detach().numpy()  # noqa: E731
    distance = np.abs(resize(decoded) - resize(tokens.permute(2, 0, 1)[None])).mean(axis=0)
    weights = resize(weights)[0]
    return (distance * weights).sum() / weights.sum()


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("multiple, size", [(1, GRID), (2, (6, 10)), (0, (HEIGHT, WIDTH))])
def test_feature_loss__equals_resized_full_maps(rendered, multiple, size, aware):
    features_low, alphas, tokens, mask, decoder = rendered
    loss = FeatureLoss(
        WIDTH, HEIGHT, GRID, FeatureLossConfig(multiple=multiple, alpha_weighting=aware), torch.device("cpu")
    )
    expected = compute_by_full_maps(rendered, size, aware)
    assert float(loss.compute(features_low, alphas, decoder, tokens, mask)) == pytest.approx(expected, rel=1e-4)


def test_feature_loss__features_at_its_pixels_suffice(rendered):
    features_low, alphas, tokens, mask, decoder = rendered
    # Patches of more than four pixels, of which four in each direction are read.
    tokens = tokens[:2, :3]
    loss = FeatureLoss(WIDTH, HEIGHT, (2, 3), FeatureLossConfig(multiple=1), torch.device("cpu"))
    rows, columns = loss.reader.pixels.unbind(dim=1)
    assert len(rows) < WIDTH * HEIGHT
    at_pixels = loss.compute(features_low[rows, columns], alphas, decoder, tokens, mask)
    torch.testing.assert_close(at_pixels, loss.compute(features_low, alphas, decoder, tokens, mask))
    assert FeatureLoss(WIDTH, HEIGHT, GRID, FeatureLossConfig(multiple=0), torch.device("cpu")).reader is None


def test_feature_loss__no_gradient_through_alpha(rendered):
    features_low, alphas, tokens, mask, decoder = rendered
    features_low.requires_grad_(True)
    alphas.requires_grad_(True)
    for multiple in (0, 1):
        loss = FeatureLoss(WIDTH, HEIGHT, GRID, FeatureLossConfig(multiple=multiple), torch.device("cpu"))
        loss.compute(features_low, alphas, decoder, tokens, mask).backward()
    assert alphas.grad is None
    assert features_low.grad.any() and decoder.weight.grad.any() and decoder.bias.grad.any()


def test_feature_loss__nothing_valid_is_zero_with_zero_gradients(rendered):
    features_low, alphas, tokens, mask, decoder = rendered
    features_low.requires_grad_(True)
    loss = FeatureLoss(WIDTH, HEIGHT, GRID, FeatureLossConfig(), torch.device("cpu"))
    value = loss.compute(features_low, alphas, decoder, tokens, torch.zeros_like(mask))
    value.backward()
    assert float(value.detach()) == 0.0 and not features_low.grad.any()


def test_compute_masked_l1__is_the_weighted_mean():
    predicted, target = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([[0.0, 0.0], [5.0, 9.0]])
    # Distances 1.5 and 2, weights 3 and 1.
    assert float(compute_masked_l1(predicted, target, torch.tensor([3.0, 1.0]))) == pytest.approx(6.5 / 4)


def test_feature_loss_config__refuses_negative_multiples():
    with pytest.raises(ValueError, match="multiple is -1"):
        FeatureLossConfig(multiple=-1)


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
        read = F.interpolate(maps, size=TOKEN_GRID, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        for row in range(TOKEN_GRID[0]):
            for column in range(TOKEN_GRID[1]):
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
    assert 0 < len(distances) < 2 * TOKEN_GRID[0] * TOKEN_GRID[1]
    metrics = evaluate_features(gaussians, features, decoder, views[:2], mean_token, token_reading="bilinear")
    assert metrics.num_tokens == len(distances)
    assert metrics.feature_l1 == pytest.approx(np.mean(distances), rel=1e-4)
    assert metrics.feature_cosine == pytest.approx(np.mean(cosines), rel=1e-4)
    assert metrics.mean_token_l1 == pytest.approx(np.mean(mean_distances), rel=1e-4)
    assert metrics.mean_token_cosine == pytest.approx(np.mean(mean_cosines), rel=1e-4)


def test_evaluate_features__says_when_nothing_is_covered(gaussians, views):
    away = replace(gaussians, means=gaussians.means + 100.0)
    decoder = FeatureDecoder(3, EMBED_DIM)
    mean_token = torch.zeros(EMBED_DIM)
    found = evaluate_features(away, torch.zeros(len(away), 3), decoder, views, mean_token, token_reading="area")
    assert found.num_tokens == 0 and np.isnan(found.feature_l1)
