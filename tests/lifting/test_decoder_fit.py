import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fit3d_ns.analysis.pca import PcaAccumulator, PcaBasis
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.decoder_fit import DecoderStatistics, fit_decoder, fit_token_basis
from fit3d_ns.lifting.solver import solve_features
from fit3d_ns.scene import FeatureDecoder
from fit3d_ns.scene.feature_decoder import create_token_reader

WIDTH, HEIGHT, GRID = 30, 24, (8, 10)


def create_basis(dim: int = 2, embed: int = 5) -> PcaBasis:
    orthonormal = np.linalg.qr(np.random.default_rng(0).normal(size=(embed, embed)))[0]
    return PcaBasis(
        mean=torch.arange(float(embed)),
        components=torch.from_numpy(orthonormal[:dim]).float(),
        explained_variance=torch.ones(dim),
        total_variance=float(embed),
        colour_low=torch.zeros(3),
        colour_high=torch.ones(3),
    )


def add_view(statistics: DecoderStatistics, seed: int, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """A view whose tokens are what the convolution `weight` and `bias` make of a random map, by `conv2d`."""
    generator = torch.Generator().manual_seed(seed)
    features_low = torch.randn(HEIGHT, WIDTH, 2, generator=generator)
    alphas = torch.rand(HEIGHT, WIDTH, generator=generator)
    decoded = F.conv2d(features_low.permute(2, 0, 1)[None], weight, padding=1) + bias[:, None, None] * alphas
    tokens = F.interpolate(decoded, size=GRID, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    reader = create_token_reader(WIDTH, HEIGHT, GRID)
    statistics.add(
        reader.read_neighbourhoods(reader.gather(features_low)),
        reader.read(reader.gather(alphas[..., None]))[..., 0],
        tokens,
        torch.rand(GRID, generator=generator) + 0.1,
    )


def test_fit_decoder__finds_the_convolution_that_made_the_tokens():
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(5, 2, 3, 3, generator=generator), torch.randn(5, generator=generator)
    scenes = [DecoderStatistics.create(2, 5, bias=True) for _ in range(2)]
    for seed, statistics in enumerate(scenes):
        add_view(statistics, seed, weight, bias)
    for given in (scenes[:1], scenes):
        decoder = fit_decoder(given, create_basis(), ridge=0.0)
        # The smallest ridge leaves a pull of 1e-6.
        torch.testing.assert_close(decoder.weight.data, weight, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(decoder.bias.data, bias, rtol=1e-3, atol=1e-3)


def test_fit_decoder__ridge_pulls_towards_pca():
    basis = create_basis()
    pca = FeatureDecoder.from_pca(basis.components, basis.mean)
    assert torch.equal(pca.weight[:, :, 1, 1], basis.components.T) and torch.equal(pca.bias, basis.mean)
    statistics = DecoderStatistics.create(2, 5, bias=True)
    add_view(statistics, 0, torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(5))
    distances = [
        float((fit_decoder([statistics], basis, ridge).matrix - pca.matrix).detach().norm())
        for ridge in (0.0, 0.1, 10.0, 1e6)
    ]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-4
    assert torch.equal(fit_decoder([statistics], basis, float("inf")).weight, pca.weight)


def test_fit_decoder__without_bias():
    weight = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(3))
    statistics = DecoderStatistics.create(2, 5, bias=False)
    add_view(statistics, 0, weight, torch.zeros(5))
    decoder = fit_decoder([statistics], create_basis(), ridge=0.0)
    assert decoder.bias is None
    torch.testing.assert_close(decoder.weight.data, weight, rtol=1e-3, atol=1e-3)


def test_solve_features__decoder_is_the_weighted_ridge_solution(gaussians, views):
    """Against numpy: regress the tokens on the full convolution's unfolded patches, resized like any map."""
    from tests.lifting.lifting_scene import GRID as TOKEN_GRID
    from tests.lifting.lifting_scene import compute_dense_blending

    config = LiftConfig(feature_dim=2, max_passes=2, decoder_ridge=0.05, token_reading="bilinear")
    result = solve_features(gaussians, views, config)
    inputs, tokens, weights = [], [], []
    for view in views:
        blending, alphas = compute_dense_blending(gaussians, view)
        low = (blending @ result.features.double()).permute(2, 0, 1)[None]
        # (1, d*9, H*W): unfold's channel order is (d, ky, kx).
        unfolded = F.unfold(low, 3, padding=1).reshape(1, 18, *alphas.shape)
        maps = torch.cat([unfolded, alphas[None, None], (alphas * view.load_mask())[None, None]], dim=1)
        read = F.interpolate(maps, size=TOKEN_GRID, mode="bilinear", align_corners=False)[0].flatten(1).T.numpy()
        inputs.append(read[:, :19])
        weights.append(read[:, 19])
        tokens.append(view.load_tokens().double().flatten(0, 1).numpy())
    x, t, w = np.concatenate(inputs), np.concatenate(tokens), np.concatenate(weights)[:, None]
    start = np.zeros((19, 8))
    start[[4, 13]], start[18] = result.basis.components.numpy(), result.basis.mean.numpy()
    gram = x.T @ (w * x)
    penalty = np.full(19, gram.diagonal()[:18].mean())
    penalty[18] = gram[18, 18]
    expected = start + np.linalg.solve(gram + 0.05 * np.diag(penalty), x.T @ (w * (t - x @ start)))
    weight = result.decoder.weight.flatten(2).flatten(1).T.numpy()
    # Float32 products of nearly collinear taps.
    np.testing.assert_allclose(weight, expected[:18], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(result.decoder.bias.numpy(), expected[18], rtol=1e-3, atol=1e-3)


def test_fit_token_basis__equals_svd_of_weighted_tokens():
    random = np.random.default_rng(0)
    tokens, weights = random.normal(size=(40, 6)) * np.arange(1, 7) + 3.0, random.random(40)
    sums = PcaAccumulator(6)
    for part in (slice(0, 25), slice(25, 40)):
        sums.add(torch.from_numpy(tokens[part]).float(), torch.from_numpy(weights[part]).float())
    basis = fit_token_basis(sums, 2)
    mean = (tokens * weights[:, None]).sum(axis=0) / weights.sum()
    _, singular, directions = np.linalg.svd((tokens - mean) * np.sqrt(weights)[:, None])
    np.testing.assert_allclose(basis.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(np.abs(basis.components @ directions[:2].T), np.eye(2), atol=1e-4)
    np.testing.assert_allclose(basis.explained_share, (singular[:2] ** 2).sum() / (singular**2).sum(), rtol=1e-5)
    assert all(row[row.abs().argmax()] > 0 for row in basis.components)
    uncentred = fit_token_basis(sums, 2, centred=False)
    directions = np.linalg.svd(tokens * np.sqrt(weights)[:, None])[2]
    np.testing.assert_allclose(np.abs(uncentred.components @ directions[:2].T), np.eye(2), atol=1e-4)
    assert not uncentred.mean.any()


def test_fit_token_basis__says_what_does_not_fit():
    with pytest.raises(ValueError, match="No token lies under a valid mask"):
        fit_token_basis(PcaAccumulator(4), 2)
