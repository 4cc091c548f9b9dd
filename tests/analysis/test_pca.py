"""PCA against numpy's singular value decomposition."""

import numpy as np
import pytest
import torch

from fit3d_ns.analysis.pca import (
    PcaAccumulator,
    apply_pca,
    compute_effective_rank,
    fit_colours,
    fit_pca,
    map_to_colours,
)


def make_features(num=200, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)[:dim]
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) * spread @ rotation + 10.0


def decompose_with_numpy(features, num_components):
    centred = features.numpy() - features.numpy().mean(axis=0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:num_components]
    signs = np.sign([row[np.abs(row).argmax()] for row in directions])
    return directions * signs[:, None], values[:num_components] ** 2 / len(features), (values**2).sum() / len(features)


def test_fit_pca__equals_singular_value_decomposition():
    features = make_features()
    directions, variance, total = decompose_with_numpy(features, 3)
    basis = fit_pca(features, 3)
    np.testing.assert_allclose(basis.components, directions, atol=1e-5)
    np.testing.assert_allclose(basis.explained_variance, variance, rtol=1e-5)
    assert basis.total_variance == pytest.approx(total)
    assert basis.explained_share == pytest.approx(variance.sum() / total)
    np.testing.assert_allclose(basis.mean, features.mean(dim=0), rtol=1e-6)


def test_accumulator__batches_weights_and_sums_of_processes():
    features = make_features(90).float()
    weights = torch.randint(0, 4, (90,), generator=torch.Generator().manual_seed(1)).float()
    parts = [PcaAccumulator(6), PcaAccumulator(6)]
    parts[0].add(features[:30].reshape(5, 6, 6), weights[:30].reshape(5, 6))
    parts[1].add(features[60:], weights[60:])
    parts[1].add(features[30:60], weights[30:60])
    for name in ("sum_weights", "sum_features", "sum_products"):
        getattr(parts[0], name).add_(getattr(parts[1], name))
    repeated = features.double().repeat_interleave(weights.long(), dim=0)
    directions, variance, _ = decompose_with_numpy(repeated, 2)
    basis = parts[0].finish(2)
    np.testing.assert_allclose(basis.components, directions, atol=1e-4)
    np.testing.assert_allclose(basis.explained_variance, variance, rtol=1e-4)


def test_apply_pca__all_components_lose_nothing():
    features = make_features()
    basis = fit_pca(features, 6)
    restored = apply_pca(features, basis) @ basis.components.double() + basis.mean
    torch.testing.assert_close(restored, features, rtol=1e-5, atol=1e-4)


def test_colours__are_fixed_by_percentiles_and_not_by_the_frame():
    features = make_features(1000, 3)
    features[0] = 1e6 * torch.ones(3)
    features[1:] -= features[1:].mean(dim=0)
    basis = fit_colours(fit_pca(features[1:], 3), features)
    coefficients = apply_pca(features, basis).numpy()
    np.testing.assert_allclose(basis.colour_low, np.percentile(coefficients, 1, axis=0, method="lower"), rtol=1e-4)
    np.testing.assert_allclose(basis.colour_high, np.percentile(coefficients, 99, axis=0, method="higher"), rtol=1e-4)
    colours = map_to_colours(torch.from_numpy(coefficients), basis)
    assert torch.equal(map_to_colours(torch.from_numpy(coefficients[5:6]), basis), colours[5:6])
    assert colours.min() == 0.0 and colours.max() == 1.0
    # Half of the range is drawn as half of the brightness.
    middle = (basis.colour_low + basis.colour_high) / 2
    torch.testing.assert_close(map_to_colours(middle, basis), torch.full((3,), 0.5))


def test_colours__one_component_is_enough():
    features = make_features(50, 2)
    colours = map_to_colours(apply_pca(features, fit_pca(features, 1)), fit_pca(features, 1))
    assert colours.shape == (50, 3) and not colours[:, 1:].any()


@pytest.mark.parametrize(("dim", "rank"), [(5, 3), (4, 1)])
def test_effective_rank__of_a_ball_is_its_dimension(dim, rank):
    # Plus and minus each axis: all non-zero singular values are equal.
    axes = torch.cat([torch.eye(dim)[:rank], -torch.eye(dim)[:rank]]) * 3.0
    assert compute_effective_rank([axes + 7.0]) == pytest.approx(rank, rel=1e-4)


def test_effective_rank__equals_the_entropy_of_numpys_singular_values():
    features = make_features()
    values = np.linalg.svd(features.numpy() - features.numpy().mean(axis=0), compute_uv=False)
    shares = values / values.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert compute_effective_rank([features]) == pytest.approx(expected, rel=1e-6)
    assert compute_effective_rank([features[:50].reshape(5, 10, 6), features[50:]]) == pytest.approx(expected, rel=1e-6)


def test_errors__nothing_to_analyse():
    with pytest.raises(ValueError, match="all weights are zero"):
        fit_pca(torch.ones(0, 3), 2)
