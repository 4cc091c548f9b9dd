"""The low-dimensional space in which features live: a PCA of the tokens of one scene, or of many that share it.

A token t [E] has coordinates z = (t - mean) @ components.T [D]; `analysis.pca` does the arithmetic.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.analysis.pca import PcaAccumulator, PcaBasis, apply_pca
from fit3d_ns.scene.token_grid import sum_over_cells


def add_view_tokens(
    sums: PcaAccumulator, tokens: Float[Tensor, "h w embed"], mask: Float[Tensor, "height width"]
) -> None:
    """Counts a view's tokens, each by the share of its patch that lies under the valid mask."""
    grid = (tokens.shape[0], tokens.shape[1])
    pixels = mask[..., None]
    covered = sum_over_cells(pixels, grid) / sum_over_cells(torch.ones_like(pixels), grid).clamp(min=1.0)
    sums.add(tokens, covered[..., 0])


def fit_token_basis(tokens: PcaAccumulator, feature_dim: int, *, centred: bool = True) -> PcaBasis:
    """The `feature_dim` leading principal directions of accumulated tokens.

    Args:
        tokens: Sums over tokens, weighted by how much of each lies under the valid mask.
        centred: False leaves the mean at zero and keeps most of the second moment instead of the variance, for
            decoders without a bias.

    Raises:
        ValueError: No token was counted, or `feature_dim` exceeds the tokens' width.
    """
    embed_dim = tokens.sum_features.shape[0]
    if feature_dim > embed_dim:
        raise ValueError(f"feature_dim {feature_dim} exceeds the tokens' width {embed_dim}; choose at most that.")
    if not tokens.sum_weights > 0:
        raise ValueError("No token lies under a valid mask, so there is nothing to fit a basis to; check the masks.")
    if centred:
        return tokens.finish(feature_dim)
    uncentred = merge_accumulators([tokens])
    uncentred.sum_features = torch.zeros_like(uncentred.sum_features)
    return uncentred.finish(feature_dim)


def merge_accumulators(accumulators: Iterable[PcaAccumulator]) -> PcaAccumulator:
    """The sums over the tokens of many scenes, for a basis they share; the given ones stay as they are.

    Raises:
        ValueError: There are none, or they are of backbones of different widths.
    """
    given = list(accumulators)
    if not given:
        raise ValueError("No scene was given to share a basis between.")
    widths = {item.sum_features.shape[0] for item in given}
    if len(widths) > 1:
        raise ValueError(
            f"Tokens of widths {sorted(widths)} do not add up; a shared basis needs scenes of one backbone."
        )
    merged = PcaAccumulator(widths.pop(), given[0].sum_features.device)
    for item in given:
        merged.sum_weights += item.sum_weights
        merged.sum_features += item.sum_features
        merged.sum_products += item.sum_products
    return merged


def project_tokens(tokens: Float[Tensor, "*batch embed"], basis: PcaBasis) -> Float[Tensor, "*batch dim"]:
    """Coordinates of tokens in the basis.

    Raises:
        ValueError: The tokens are of another width.
    """
    if tokens.shape[-1] != basis.mean.shape[0]:
        raise ValueError(
            f"The basis is made for tokens of width {basis.mean.shape[0]}, these have {tokens.shape[-1]}; "
            "use a basis of the same backbone."
        )
    return apply_pca(tokens, basis)
