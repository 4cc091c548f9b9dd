"""Colours of token maps that can be compared between columns and frames: one PCA basis, or matched clusters.

Both are fitted once to all frames of some columns and then paint any of those frames, so a clip never flickers and two
columns never swap colours. Rendered features fade to black where the scene is empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.analysis.pca import PcaAccumulator, PcaBasis, fit_colours, map_to_colours
from fit3d_ns.analysis.pictures import Picture, upscale
from fit3d_ns.analysis.similarity import Clusters, apply_kmeans, fit_kmeans, map_clusters_to_colours, match_clusters
from fit3d_ns.report.token_columns import FrameTokens, TokenColumn

MAX_SAMPLED_TOKENS = 20_000
"""Clusters and colour ranges of long clips are fitted to so many tokens, spread evenly over all frames."""


@dataclass(frozen=True)
class PcaColours:
    """The first three principal components as red, green and blue."""

    basis: PcaBasis
    """Fitted to the backbones' tokens of all columns together; rendered features are drawn by it, not fitted."""
    title: str = "PCA"
    """What labels call it."""

    def paint(self, column: int, frame: FrameTokens, size: tuple[int, int]) -> Picture:
        """A picture of one frame of any column, of `size` (height, width)."""
        coefficients, alphas = frame.project(self.basis.components, self.basis.mean)
        return upscale(map_to_colours(coefficients, self.basis, alphas), size)

    def describe(self) -> dict[str, Any]:
        """Share of the variance that the colours show."""
        return {"explained_share": self.basis.explained_share}


@dataclass(frozen=True)
class ClusterColours:
    """Clusters by cosine, each column's own, with the colours of the first column's clusters that they cover."""

    clusters: list[Clusters | None]
    """Those of each column, numbered as the first column's."""
    agreement: list[float | None]
    """Share of tokens that have the first column's colour."""
    num_clusters: int
    title: str = "k-means"
    """What labels call it."""

    def paint(self, column: int, frame: FrameTokens, size: tuple[int, int]) -> Picture:
        """A picture of one frame of a column, of `size` (height, width)."""
        clusters = self.clusters[column]
        assert clusters is not None
        # The cluster with the largest cosine is the one with the largest coefficient: centres are unit vectors.
        coefficients, alphas = frame.project(clusters.centres, clusters.mean)
        colours = map_clusters_to_colours(coefficients.argmax(dim=-1), self.num_clusters)
        return upscale(colours * (alphas > 0.5)[..., None], size)

    def describe(self) -> dict[str, Any]:
        """Share of tokens whose colour is the first column's, for each column."""
        return {"num_clusters": self.num_clusters, "agreement": self.agreement}


TokenColours = PcaColours | ClusterColours
"""What paints frames of the columns it was fitted to."""


def fit_pca_colours(columns: Sequence[TokenColumn]) -> PcaColours:
    """One basis for all backbones' tokens of the columns, one of which holds some."""
    shown = [column for column in columns if not column.is_empty]
    fitted = [column for column in shown if not column.is_rendered] or shown
    frames = [frame for column in fitted for frame in column.frames if frame is not None]
    embed_dim = frames[0].tokens.shape[-1]
    accumulator = PcaAccumulator(embed_dim)
    for frame in frames:
        accumulator.add(frame.rows)
    basis = accumulator.finish(min(3, embed_dim))
    return PcaColours(fit_colours(basis, _sample(frames)))


def fit_cluster_colours(columns: Sequence[TokenColumn], num_clusters: int, seed: int = 0) -> ClusterColours:
    """Clusters of columns of the same pictures, matched to those of the first column that holds tokens.

    ValueError where more clusters than tokens are asked for.
    """
    fitted: list[Clusters | None] = []
    agreement: list[float | None] = []
    reference: dict[int, Tensor] = {}
    for column in columns:
        frames = {index: frame for index, frame in enumerate(column.frames) if frame is not None}
        if not any(len(frame.rows) for frame in frames.values()):
            fitted.append(None)
            agreement.append(None)
            continue
        clusters = fit_kmeans(_sample([*frames.values()]), num_clusters, seed)
        # Of each frame the cluster of every token, -1 for those that do not count.
        own = {i: apply_kmeans(of.tokens.float(), clusters).where(of.is_covered, -1) for i, of in frames.items()}
        reference = reference or own
        pairs = [torch.stack([own[index], reference[index]]).flatten(1) for index in own.keys() & reference.keys()]
        joined = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *pairs], dim=1)
        ours, theirs = joined[:, (joined >= 0).all(dim=0)]
        renamed = match_clusters(ours, theirs, num_clusters)
        fitted.append(replace(clusters, centres=clusters.centres[renamed.argsort()]))
        agreement.append(float((renamed[ours] == theirs).double().mean()))
    return ClusterColours(fitted, agreement, num_clusters)


def _sample(frames: Sequence[FrameTokens]) -> Float[Tensor, "n embed"]:
    """Tokens that count, at most `MAX_SAMPLED_TOKENS`, evenly spread."""
    total = sum(frame.tokens.shape[0] * frame.tokens.shape[1] for frame in frames)
    step = -(-total // MAX_SAMPLED_TOKENS)
    # Another offset in each frame, so that a stride in step with the grid does not read the same columns always.
    return torch.cat([frame.rows[index % step :: step] for index, frame in enumerate(frames)])
