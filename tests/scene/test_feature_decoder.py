"""The token reading against `F.interpolate` and a loop; the decoder against convolution at full resolution."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fit3d_ns.scene.feature_decoder import FeatureDecoder, create_token_reader, read_at_tokens

SIZES = [
    ((12, 18), (3, 4)),
    ((13, 17), (4, 5)),
    ((9, 8), (9, 8)),
    ((5, 6), (11, 7)),
    ((4, 3), (1, 1)),
    ((48, 50), (3, 3)),
]


def make_maps(height, width, dim, dtype, batch=()):
    generator = torch.Generator().manual_seed(height * 100 + width)
    features = torch.randn(*batch, height, width, dim, generator=generator, dtype=dtype)
    alphas = torch.rand(*batch, height, width, generator=generator, dtype=dtype)
    return features, alphas


def make_decoder(dim, embed, dtype, bias=True):
    generator = torch.Generator().manual_seed(dim * 10 + embed)
    weight = torch.randn(embed, dim, 3, 3, generator=generator, dtype=dtype)
    return FeatureDecoder.from_weights(weight, torch.randn(embed, generator=generator, dtype=dtype) if bias else None)


def decode_at_tokens(decoder, features, alphas, size, rule="bilinear"):
    """The fast way: only the pixels that are read, only the tokens decoded."""
    reader = create_token_reader(features.shape[1], features.shape[0], size, rule)
    gathered = None if alphas is None else reader.gather(alphas[..., None])[..., 0]
    return decoder.decode_pixels(reader.gather(features), gathered, reader)


def decode_literally(decoder, features, alphas, size):
    """Convolution at full resolution, bias weighted by alpha, then bilinear resize without antialias."""
    high = F.conv2d(features.permute(2, 0, 1)[None], decoder.weight, padding=1)
    if decoder.bias is not None:
        high = high + decoder.bias[:, None, None] * alphas
    return F.interpolate(high, size=size, mode="bilinear", align_corners=False, antialias=False)[0].permute(1, 2, 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("image", "size"), SIZES)
def test_decode_pixels__equals_full_resolution_then_bilinear(image, size, bias):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        features, alphas = make_maps(*image, 5, dtype)
        decoder = make_decoder(5, 7, dtype, bias)
        expected = decode_literally(decoder, features, alphas, size)
        actual = decode_at_tokens(decoder, features, alphas, size)
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize(("image", "size"), SIZES)
def test_decode_pixels__area_equals_a_loop_over_patch_footprints(image, size):
    features, alphas = make_maps(*image, 2, torch.float64)
    decoder = make_decoder(2, 3, torch.float64)
    high = decoder(features, alphas).detach().numpy()
    expected = np.zeros((*size, 3))
    for i in range(size[0]):
        for j in range(size[1]):
            top, bottom = i * image[0] / size[0], (i + 1) * image[0] / size[0]
            left, right = j * image[1] / size[1], (j + 1) * image[1] / size[1]
            for y in range(image[0]):
                for x in range(image[1]):
                    covered = max(0.0, min(bottom, y + 1) - max(top, y)) * max(0.0, min(right, x + 1) - max(left, x))
                    expected[i, j] += high[y, x] * covered
            expected[i, j] /= (bottom - top) * (right - left)
    actual = decode_at_tokens(decoder, features, alphas, size, "area").detach().numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-10)


@pytest.mark.parametrize("rule", ["bilinear", "area"])
def test_decode_pixels__reads_only_the_listed_pixels(rule):
    features, alphas = make_maps(40, 58, 3, torch.float64)
    reader = create_token_reader(58, 40, (3, 4), rule)
    unread = torch.ones(40, 58, dtype=torch.bool)
    unread[reader.pixels[:, 0], reader.pixels[:, 1]] = False
    spoilt = torch.where(unread[..., None], torch.nan, features)
    decoder = make_decoder(3, 4, torch.float64)
    actual = decode_at_tokens(decoder, spoilt, alphas, (3, 4), rule)
    assert torch.equal(actual, decode_at_tokens(decoder, features, alphas, (3, 4), rule))
    if rule == "bilinear":
        # Four rows and columns around each token centre and no others.
        assert reader.pixels.shape[0] == (3 * 4) * (4 * 4)


def test_decode_pixels__each_listed_pixel_matters():
    features, alphas = make_maps(13, 17, 1, torch.float64)
    features.requires_grad_(True)
    reader = create_token_reader(17, 13, (4, 5))
    decode_at_tokens(make_decoder(1, 1, torch.float64), features, alphas, (4, 5)).abs().sum().backward()
    touched = {tuple(pixel) for pixel in features.grad[..., 0].nonzero().tolist()}
    assert touched == {tuple(pixel) for pixel in reader.pixels.tolist()}


def test_decode_pixels__gradients_equal_those_of_the_literal_computation():
    features, alphas = make_maps(11, 14, 3, torch.float64)
    gradients = []
    for literal in (True, False):
        decoder, leaf = make_decoder(3, 4, torch.float64), features.clone().requires_grad_(True)
        tokens = (
            decode_literally(decoder, leaf, alphas, (3, 4))
            if literal
            else decode_at_tokens(decoder, leaf, alphas, (3, 4))
        )
        tokens.square().sum().backward()
        gradients.append([leaf.grad, decoder.weight.grad, decoder.bias.grad])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_forward__batches_and_empty_pixels():
    features, alphas = make_maps(6, 8, 3, torch.float64, batch=(2,))
    decoder = make_decoder(3, 5, torch.float64)
    decoded = decoder(features, alphas)
    assert torch.equal(decoded[1], decoder(features[1], alphas[1]))
    nothing = decoder(torch.zeros_like(features), torch.zeros_like(alphas))
    assert torch.equal(nothing, torch.zeros(2, 6, 8, 5, dtype=torch.float64))


def test_from_matrix__decodes_regression_on_neighbourhoods():
    """A decoder fitted by least squares on neighbourhoods reproduces the one that made the tokens."""
    features, alphas = make_maps(24, 24, 2, torch.float64)
    decoder = make_decoder(2, 3, torch.float64, bias=False)
    tokens = decode_at_tokens(decoder, features, None, (12, 12)).detach()
    reader = create_token_reader(24, 24, (12, 12))
    neighbourhoods = reader.read_neighbourhoods(reader.gather(features)).flatten(-2)
    solution = torch.linalg.lstsq(neighbourhoods.flatten(0, 1), tokens.flatten(0, 1)).solution
    fitted = FeatureDecoder.from_matrix(solution)
    torch.testing.assert_close(fitted.weight, decoder.weight, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(fitted.matrix, solution, rtol=0.0, atol=0.0)


def test_from_pca__decodes_coefficients_to_the_reconstruction():
    components = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0][
        :2
    ]
    mean = torch.arange(6, dtype=torch.float64)
    coefficients, _ = make_maps(5, 7, 2, torch.float64)
    decoded = FeatureDecoder.from_pca(components, mean)(coefficients, torch.ones(5, 7, dtype=torch.float64))
    torch.testing.assert_close(decoded, coefficients @ components + mean)


def test_project__equals_decoding_then_projecting():
    features, alphas = make_maps(9, 8, 4, torch.float64)
    decoder = make_decoder(4, 6, torch.float64)
    components, mean = torch.randn(3, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = (decoder(features, alphas) - alphas[..., None] * mean) @ components.T
    torch.testing.assert_close(decoder.project(components, mean)(features, alphas), expected)


def test_default_start__is_the_convolution_of_pytorch():
    torch.manual_seed(3)
    decoder = FeatureDecoder(4, 6)
    torch.manual_seed(3)
    assert torch.equal(decoder.weight, torch.nn.Conv2d(4, 6, 3, bias=False).weight)
    assert decoder.bias is None


@pytest.mark.parametrize(("image", "size"), SIZES)
def test_read_at_tokens__bilinear_equals_interpolate(image, size):
    features, _ = make_maps(*image, 3, torch.float32)
    expected = F.interpolate(features.permute(2, 0, 1)[None], size=size, mode="bilinear")[0].permute(1, 2, 0)
    torch.testing.assert_close(read_at_tokens(features, size), expected, rtol=1e-4, atol=1e-5)


def test_read_at_tokens__area_keeps_the_mean():
    features, _ = make_maps(13, 17, 3, torch.float64)
    tokens = read_at_tokens(features, (4, 5), "area")
    torch.testing.assert_close(tokens.mean(dim=(0, 1)), features.mean(dim=(0, 1)))


def test_errors__name_the_channels_and_the_missing_alpha():
    decoder = make_decoder(3, 4, torch.float32)
    with pytest.raises(ValueError, match="takes 3 channels, the features have 2"):
        decoder(torch.zeros(4, 4, 2), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="give `alphas`"):
        decoder(torch.zeros(4, 4, 3))
    with pytest.raises(ValueError, match="all must be at least 1"):
        create_token_reader(4, 4, (0, 2))


def test_decode_before_rendering__equals_decoding_after():
    # Any linear rendering will do: pixels as weighted sums of Gaussians.
    generator = torch.Generator().manual_seed(3)
    features, weights = torch.randn(40, 32, generator=generator), torch.rand(6 * 5, 40, generator=generator)
    alphas = torch.rand(6, 5, generator=generator)
    decoder = FeatureDecoder.from_weights(
        torch.randn(3, 32, 3, 3, generator=generator), torch.randn(3, generator=generator)
    )
    own, last = decoder.decode_before_rendering(features)
    assert own.shape == (40, 27)
    expected = decoder((weights @ features).reshape(6, 5, 32), alphas)
    torch.testing.assert_close(last((weights @ own).reshape(6, 5, 27), alphas), expected, rtol=1e-4, atol=1e-3)
