"""Clusters against the directions they were made from, similarity against numpy, renamings against all of them."""

import itertools

import numpy as np
import pytest
import torch

from fit3d_ns.analysis.similarity import (
    apply_kmeans,
    compute_similarity,
    fit_kmeans,
    map_clusters_to_colours,
    map_similarity_to_colours,
    match_clusters,
)


def test_kmeans__finds_directions_whatever_their_length():
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(3, 8)
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    lengths = 1 + 9 * torch.rand(60, 1, generator=generator)
    features = lengths * (directions[labels] + 0.02 * torch.randn(60, 8, generator=generator))
    clusters = fit_kmeans(features, 3, centre=False)
    # Clusters are numbered by size, so labels come back as they were made.
    assert torch.equal(apply_kmeans(features, clusters), labels)
    torch.testing.assert_close(clusters.centres, directions, atol=0.05, rtol=0.0)
    assert apply_kmeans(features.reshape(6, 10, 8), clusters).shape == (6, 10)
    assert map_clusters_to_colours(labels, 3).unique(dim=0).shape[0] == 3
    with pytest.raises(ValueError, match="9 clusters of 4 features"):
        fit_kmeans(features[:4], 9)


def test_kmeans__centring_removes_what_all_share():
    features = torch.tensor([[100.0, 1.0], [100.0, 2.0], [100.0, -1.0], [100.0, -2.0]])
    labels = apply_kmeans(features, fit_kmeans(features, 2))
    assert labels[0] == labels[1] != labels[2] == labels[3]


def test_similarity__is_the_cosine_to_the_picked_token():
    tokens = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    query = tokens[1, 2]
    similarity = compute_similarity(tokens, query)
    assert similarity[1, 2] == pytest.approx(1.0)
    expected = np.dot(tokens[0, 1], query) / np.linalg.norm(tokens[0, 1]) / np.linalg.norm(query)
    assert similarity[0, 1].item() == pytest.approx(float(expected), rel=1e-5)
    shifted = compute_similarity(tokens + 5.0, query + 5.0, mean=torch.full((4,), 5.0))
    torch.testing.assert_close(shifted, similarity, rtol=1e-4, atol=1e-5)
    colours = map_similarity_to_colours(torch.tensor([-1.0, 0.0, 1.0]))
    assert colours.tolist() == [[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]


def test_match_clusters__undoes_a_permutation() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 5, (6, 7), generator=generator)
    permutation = torch.tensor([3, 0, 4, 1, 2])
    labels = permutation[reference]
    assert torch.equal(match_clusters(labels, reference, 5)[labels], reference)


def test_match_clusters__finds_the_largest_overlap_of_all_renamings() -> None:
    generator = torch.Generator().manual_seed(1)
    labels, reference = torch.randint(0, 4, (2, 60), generator=generator)
    best = max(int((torch.tensor(renamed)[labels] == reference).sum()) for renamed in itertools.permutations(range(4)))
    renamed = match_clusters(labels, reference, 4)
    assert sorted(renamed.tolist()) == [0, 1, 2, 3]
    assert int((renamed[labels] == reference).sum()) == best
