"""`ColouredSplats`: splats of a lifted scene and what they can be coloured by.

A splat's own feature is what the decoder makes of a map that shows nothing else. Its taps then add up to a matrix M:
about the mean token the feature is M f + c, with the bias minus that mean as c. Where [M c] = Q R, the D + 1 numbers
R [f 1] have the same cosines and distances.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns.analysis import similarity
from fit3d_ns.analysis.pca import apply_pca, map_to_colours
from fit3d_ns.features import FeatureExtractor
from fit3d_ns.features.text_tower import TextTower
from fit3d_ns.lifting.blending import AVERAGING_SAMPLES, find_usable, sample_camera
from fit3d_ns.lifting.token_spreading import spread_tokens
from fit3d_ns.rasterization import backproject_features
from fit3d_ns.rasterization.projection import rotations_from_quats
from fit3d_ns.report.token_columns import MAX_AVERAGED_VIEWS, extract_tokens, resize
from fit3d_ns.scene import FeatureScene, Gaussians, PosedCapture
from fit3d_ns.utils.limits import Limited, Limits
from fit3d_ns.utils.progress import track
from fit3d_ns.utils.selection import select_evenly

SplatColours = Literal["photograph", "features", "clusters", "similarity", "variance", "comparison"]
_MAX_SAMPLE = 20_000
Colours = Float[Tensor, "num_gaussians 3"]


@dataclass(frozen=True)
class ViewerConfig(Limited):
    """What of a scene is shown."""

    colours: SplatColours | None = None
    """What splats are coloured by at first; the page has a menu. `features` is their PCA, `clusters` their k-means,
    `similarity` to a splat in the middle or --text, `variance` how far the lifted views disagree. `comparison` puts
    copies beside one another: features of the photographs by the original and by --finetuned, and the lifted ones."""
    max_splats: Annotated[int, Limits(at_least=1)] = 300_000
    """Most splats to show, at least 1: those that make up most of the views; 32 bytes each per copy and change."""
    finetuned: tuple[str, ...] = ()
    """Fine-tuned backbones (folders of fit3d-finetune) to compare."""
    text: str = ""
    """Words to look for, in scenes of CLIP or SigLIP with --text-model; the page can ask for others."""
    text_model: str | None = None
    """The model of transformers, a folder or a name on the hub, whose image tower the scene's backbone is."""
    backbone_weights: Path | None = None
    """File with the original's weights, if it is no longer where the scene says."""
    data_root: Path | None = None
    """Where the photographs are now, if they were moved: a capture's folder or one above several."""


def find_heaviest(gaussians: Gaussians, count: int) -> tuple[Bool[Tensor, " num_gaussians"], float]:
    """The splats that make up most of the lifted views (or most opacity), and the share that they do."""
    weight = gaussians.blend_weight.double()
    weight = weight if bool(weight.any()) else gaussians.opacity_logits.double().sigmoid()
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept[weight.topk(min(count, len(weight))).indices] = True
    return kept, float(weight[kept].sum() / weight.sum())


class ColouredSplats:
    """Splats of a scene and what they can be coloured by."""

    def __init__(self, scene: FeatureScene) -> None:
        """ValueError for a scene without Gaussians, or without the PCA that fixes its mean token and its colours."""
        if scene.pca is None or not scene.gaussians.num_gaussians:
            raise ValueError(f"Scene {scene.scene_id} has no Gaussians or no PCA colours; lift or export it again.")
        self.scene, self.pca, self.opacities = scene, scene.pca, scene.activated.opacities
        _, quats, scales, _ = scene.activated.geometry
        # Flat splats keep a thickness that survives being squared.
        scales = torch.maximum(scales, 1e-3 * scales.amax(dim=1, keepdim=True)).double()
        self._rotations, self._scales = rotations_from_quats(quats.double()), scales[:, None, :]
        axes = self._rotations * self._scales
        self.covariances = axes @ axes.transpose(1, 2)
        weight, bias = scene.decoder.weight.detach(), scene.decoder.bias
        offset = -self.pca.mean if bias is None else bias.detach() - self.pca.mean
        self._Q, R = torch.linalg.qr(torch.cat([weight.sum(dim=(2, 3)), offset[:, None]], dim=1))
        self.features = scene.features_and_one @ R.T
        """[N, D + 1]; the module says what they are."""

    def colour(self, colours: SplatColours, num_clusters: int = 0, cosines: Any = None) -> Colours:
        """A colour in [0, 1] for each splat; `cosines` are what `similarity` shows."""
        if colours == "photograph":
            return (0.5 + 0.5 / math.sqrt(math.pi) * self.scene.gaussians.sh_dc.float()).clamp(0.0, 1.0)
        if colours in ("features", "comparison"):
            return map_to_colours(self.features @ (self.pca.components[:3] @ self._Q).T, self.pca)
        if colours == "clusters":
            sample = self.features[select_evenly(range(len(self.features)), _MAX_SAMPLE)]
            clusters = similarity.fit_kmeans(sample, min(num_clusters, len(sample)), centre=False)
            return similarity.map_clusters_to_colours(similarity.apply_kmeans(self.features, clusters), num_clusters)
        if colours == "similarity":
            return similarity.map_similarity_to_colours(cosines)
        variance = self.scene.gaussians.feature_variance.float()
        low, high = variance.sort().values[[int(share * (len(variance) - 1)) for share in (0.01, 0.99)]]
        return similarity.map_similarity_to_colours((variance - low) / (high - low).clamp(min=1e-12))

    def compare_with_token(self, token: Float[Tensor, " embed"]) -> Float[Tensor, " num_gaussians"]:
        """Cosine of each splat's feature to a token of the scene's backbone, about the mean token."""
        centred = token.to(self._Q) - self.pca.mean
        # What of the token no splat can have makes all cosines smaller.
        query = self._Q.T @ centred
        return similarity.compute_similarity(self.features, query) * (query.norm() / centred.norm().clamp(min=1e-12))

    def compare_with_text(self, tower: TextTower, words: str) -> Float[Tensor, " num_gaussians"]:
        """From 0 for the usual splat to 1 for those that words fit best: cosines to texts are all alike."""
        rows = self.features.split(_MAX_SAMPLE)
        cosines = torch.cat([tower(chunk @ self._Q.T + self.pca.mean, words) for chunk in rows])
        usual, best = cosines.sort().values[[int(share * (len(cosines) - 1)) for share in (0.5, 0.99)]]
        return ((cosines - usual) / (best - usual).clamp(min=1e-12)).clamp(0.0, 1.0)

    def colour_by_photographs(self, extractor: FeatureExtractor, capture: PosedCapture) -> Colours:
        """Each splat in the PCA colour of a backbone's token in the photograph that shows most of it.

        Nothing is averaged: where photographs disagree, colours of neighbours do.
        """
        basis = replace(self.pca, components=self.pca.components[:3])
        coefficients, most = torch.zeros_like(self.covariances[:, 0]).float(), torch.zeros_like(self.features[:, :1])
        for view in track(select_evenly(find_usable(self.scene, capture), MAX_AVERAGED_VIEWS), "Reading photographs"):
            tokens = extract_tokens(extractor, resize(capture.load_image(view), None))
            tokens = apply_pca(tokens.to(most), basis)
            grid: Any = tokens.shape[:2]
            camera, eps2d = sample_camera(view.camera, self.scene.eps2d, grid, AVERAGING_SAMPLES)
            spread = spread_tokens(tokens, camera.width, camera.height, "nearest")
            sums, weights = backproject_features(spread[None], self.scene.activated.project(camera, eps2d=eps2d))
            coefficients = torch.where(weights[:, None] > most, sums / weights[:, None], coefficients)
            most = torch.maximum(most, weights[:, None])
        # Grey where no photograph looks.
        return torch.where(most > 0, map_to_colours(coefficients, self.pca), 0.8)

    def pick(self, origin: Float[Tensor, "3"], direction: Float[Tensor, "3"]) -> tuple[float, int]:
        """How far along a ray it has lost half of its light, and the splat; infinity and 0 where it never does."""
        # Where a splat is a unit sphere, the ray passes it most closely at `along`.
        to_sphere = (self._rotations / self._scales).transpose(1, 2)
        start = (to_sphere @ (origin.to(to_sphere) - self.scene.gaussians.means)[..., None])[..., 0]
        ray = to_sphere @ direction.to(to_sphere)
        along = -(start * ray).sum(dim=1) / ray.square().sum(dim=1)
        squared = (start + along[:, None] * ray).square().sum(dim=1)
        order = along.argsort()
        light = torch.cumprod(1.0 - (self.opacities * torch.exp(-0.5 * squared) * (along > 0))[order], dim=0)
        picked = int(order[(light <= 0.5).int().argmax()])
        return (float(along[picked]), picked) if bool(light[-1] <= 0.5) else (math.inf, 0)
