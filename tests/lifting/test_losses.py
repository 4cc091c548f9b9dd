import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fit3d_ns.lifting import FeatureLoss, FeatureLossConfig, compute_masked_l1
from fit3d_ns.scene.feature_decoder import FeatureDecoder

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
    loss = FeatureLoss(WIDTH, HEIGHT, GRID, FeatureLossConfig(multiple=multiple, accumulation_aware=aware))
    expected = compute_by_full_maps(rendered, size, aware)
    assert float(loss.compute(features_low, alphas, decoder, tokens, mask)) == pytest.approx(expected, rel=1e-4)


def test_feature_loss__features_at_its_pixels_suffice(rendered):
    features_low, alphas, tokens, mask, decoder = rendered
    # Patches of more than four pixels, of which four in each direction are read.
    tokens = tokens[:2, :3]
    loss = FeatureLoss(WIDTH, HEIGHT, (2, 3), FeatureLossConfig(multiple=1))
    rows, columns = loss.pixels.unbind(dim=1)
    assert len(rows) < WIDTH * HEIGHT
    at_pixels = loss.compute(features_low[rows, columns], alphas, decoder, tokens, mask)
    torch.testing.assert_close(at_pixels, loss.compute(features_low, alphas, decoder, tokens, mask))
    assert FeatureLoss(WIDTH, HEIGHT, GRID, FeatureLossConfig(multiple=0)).pixels is None


def test_feature_loss__no_gradient_through_alpha(rendered):
    features_low, alphas, tokens, mask, decoder = rendered
    features_low.requires_grad_(True)
    alphas.requires_grad_(True)
    for multiple in (0, 1):
        loss = FeatureLoss(WIDTH, HEIGHT, GRID, FeatureLossConfig(multiple=multiple))
        loss.compute(features_low, alphas, decoder, tokens, mask).backward()
    assert alphas.grad is None
    assert features_low.grad.any() and decoder.weight.grad.any() and decoder.bias.grad.any()


def test_feature_loss__nothing_valid_is_zero_with_zero_gradients(rendered):
    features_low, alphas, tokens, mask, decoder = rendered
    features_low.requires_grad_(True)
    loss = FeatureLoss(WIDTH, HEIGHT, GRID, FeatureLossConfig())
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
