"""Which tokens are alike, by cosine: clusters of them, and the similarity of all to one."""

import colorsys
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Features = Float[Tensor, "*batch embed"]
Labels = Int[Tensor, "*batch"]
Token = Float[Tensor, " embed"]


@dataclass(frozen=True)
class Clusters:
    """Directions that represent groups of features."""

    centres: Float[Tensor, "clusters embed"]
    """Unit vectors, the largest cluster first."""
    mean: Token
    """Subtracted before directions are compared; zero if features were not centred."""


def fit_kmeans(features: Features, num_clusters: int, seed: int = 0, centre: bool = True) -> Clusters:
    """Groups features by direction with scikit-learn's k-means (k-means++ start) on unit vectors.

    On the unit sphere squared distance is 2 - 2 cosine, so assignments go by cosine. With `centre` the mean is
    subtracted first: what all features share hides differences. ValueError for more clusters than features.
    """
    from sklearn.cluster import KMeans

    rows = features.detach().reshape(-1, features.shape[-1]).float()
    if not 1 <= num_clusters <= rows.shape[0]:
        raise ValueError(f"{num_clusters} clusters of {rows.shape[0]} features; take from 1 to as many as features.")
    mean = rows.mean(dim=0) if centre else torch.zeros_like(rows[0])
    unit = F.normalize(rows - mean, dim=1)
    fitted = KMeans(num_clusters, n_init=4, random_state=seed).fit(unit.cpu().numpy())
    centres = F.normalize(torch.from_numpy(fitted.cluster_centers_).to(unit), dim=1)
    # Numbered by size, so that colours do not depend on the start.
    sizes = torch.bincount(torch.from_numpy(fitted.labels_).long(), minlength=num_clusters)
    return Clusters(centres[sizes.argsort(descending=True, stable=True).to(centres.device)], mean)


def apply_kmeans(features: Features, clusters: Clusters) -> Labels:
    """The cluster with the largest cosine to each feature."""
    return ((features - clusters.mean.to(features)) @ clusters.centres.to(features).T).argmax(dim=-1)


def map_clusters_to_colours(labels: Labels, num_clusters: int) -> Float[Tensor, "*batch 3"]:
    """A colour in [0, 1] for each cluster, or class: hues apart by the golden ratio, in turn light, dark and pale."""
    looks = ((0.75, 0.95), (0.85, 0.6), (0.45, 0.85))
    palette = [colorsys.hsv_to_rgb(i * 0.618034 % 1.0, *looks[i % 3]) for i in range(num_clusters)]
    return torch.tensor(palette, device=labels.device)[labels]


def match_clusters(labels: Labels, reference: Labels, num_clusters: int) -> Int[Tensor, " clusters"]:
    """Renames clusters so that as many tokens as possible carry the number they have in `reference`.

    The one-to-one renaming with the largest overlap (Hungarian algorithm): `match_clusters(...)[labels]` is comparable
    with `reference`, another clustering of the same tokens, whose colours it then shares.
    """
    from scipy.optimize import linear_sum_assignment

    pairs = labels.flatten().long() * num_clusters + reference.flatten().long()
    overlap = torch.bincount(pairs, minlength=num_clusters**2).reshape(num_clusters, num_clusters)
    _, renamed = linear_sum_assignment(overlap.cpu().numpy(), maximize=True)
    return torch.from_numpy(renamed).to(labels.device)


def compute_similarity(tokens: Features, query: Token, mean: Token | None = None) -> Float[Tensor, "*batch"]:
    """Cosine in [-1, 1] of every token to `query`; with `mean` both are taken relative to it."""
    if mean is not None:
        tokens, query = tokens - mean, query - mean
    return F.cosine_similarity(tokens, query.expand_as(tokens), dim=-1)


def map_similarity_to_colours(similarity: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch 3"]:
    """Blue for -1, white for 0, red for 1: the same in every picture."""
    positive, negative = similarity.clamp(0.0, 1.0), (-similarity).clamp(0.0, 1.0)
    return torch.stack([1.0 - negative, 1.0 - positive - negative, 1.0 - positive], dim=-1)
