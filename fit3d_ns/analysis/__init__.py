"""Pure functions on feature maps: PCA, clusters, similarity, multi-view consistency, pictures."""

from fit3d_ns.analysis.consistency import ConsistencyConfig, compute_consistency, create_pairs
from fit3d_ns.analysis.consistency_report import ConsistencyFigures, ConsistencyReport, pool_consistency
from fit3d_ns.analysis.correspondence import (
    CovisiblePoints,
    DepthView,
    MatchErrors,
    create_grid_points,
    find_covisible,
    find_matches,
    find_nearest,
    measure_match_errors,
    sample_tokens,
)
from fit3d_ns.analysis.kmeans import Clusters, apply_kmeans, fit_kmeans, map_clusters_to_colours, match_clusters
from fit3d_ns.analysis.pca import (
    PcaAccumulator,
    PcaBasis,
    apply_pca,
    compute_effective_rank,
    fit_colours,
    fit_mapped_pca,
    fit_pca,
    invert_pca,
    map_to_colours,
)
from fit3d_ns.analysis.pictures import PanelConfig, compose_panel, draw_pca, save_picture, upscale
from fit3d_ns.analysis.ratio_matches import RatioMatches, find_ratio_matches
from fit3d_ns.analysis.similarity import compute_similarity, map_similarity_to_colours, pick_token
from fit3d_ns.analysis.temporal_consistency import TemporalConfig, TemporalFigures, compute_temporal_consistency

__all__ = [
    "Clusters",
    "ConsistencyConfig",
    "ConsistencyFigures",
    "ConsistencyReport",
    "CovisiblePoints",
    "DepthView",
    "MatchErrors",
    "PanelConfig",
    "PcaAccumulator",
    "PcaBasis",
    "RatioMatches",
    "TemporalConfig",
    "TemporalFigures",
    "apply_kmeans",
    "apply_pca",
    "compose_panel",
    "compute_consistency",
    "compute_effective_rank",
    "compute_similarity",
    "compute_temporal_consistency",
    "create_grid_points",
    "create_pairs",
    "draw_pca",
    "find_covisible",
    "find_matches",
    "find_nearest",
    "find_ratio_matches",
    "fit_colours",
    "fit_kmeans",
    "fit_mapped_pca",
    "fit_pca",
    "invert_pca",
    "map_clusters_to_colours",
    "map_similarity_to_colours",
    "map_to_colours",
    "match_clusters",
    "measure_match_errors",
    "pick_token",
    "pool_consistency",
    "sample_tokens",
    "save_picture",
    "upscale",
]
