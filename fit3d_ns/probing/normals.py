"""The surface normal probe: one linear layer on patch tokens, solved in closed form, against normals of known depth.

The layer is fitted by ridge regression (scikit-learn's) to each token's mean normal, weighted by the share of its
pixels that have one; its strength is the one that is best on the last fifth of each training scene's views, after which
it is fitted to all of them. Predictions are read between tokens bilinearly, and every pixel of the test views that has
a normal counts. Nothing is drawn at random, so that all seeds give the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.correspondence import DepthView
from fit3d_ns.analysis.normals import compute_normals, measure_angles, summarise_angles
from fit3d_ns.probing.frozen_features import Assembly, FrozenBackbones
from fit3d_ns.probing.multiview import SceneViews, ViewsConfig, load_views
from fit3d_ns.probing.pictures import resize_map
from fit3d_ns.utils.progress import notice

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths that are tried, as multiples of the mean square of the centred tokens' channels."""
VALIDATION_SHARE = 0.2
"""Share of a training scene's views, the last ones, that choose the strength."""


@dataclass(frozen=True)
class _Samples:
    """Tokens, their mean normals, and the share of each token's pixels that have one."""

    tokens: Float[np.ndarray, "samples channels"]
    normals: Float[np.ndarray, "samples 3"]
    weights: Float[np.ndarray, " samples"]


class NormalsProbe:
    """Angular errors of one assembly, trained on some scenes and measured on others."""

    def __init__(
        self,
        config: ViewsConfig,
        train: Sequence[Path],
        test: Sequence[Path],
        backbones: FrozenBackbones,
        assembly: Assembly,
        device: torch.device | str = "cpu",
    ) -> None:
        for paths, flag in ((train, "--train"), (test, "--test")):
            if not paths:
                raise ValueError(f"A normals probe needs captures with depth, or scene files; name some with {flag}.")
        scenes = {
            path: load_views(path, config, backbones, assembly, device) for path in dict.fromkeys([*train, *test])
        }
        common = [path.name for path in test if path in train]
        if common:
            notice(f"{', '.join(common)}: trained on and measured alike; the metrics flatter.")
        self.train, self.test = [scenes[path] for path in train], [scenes[path] for path in test]

    def compute(self) -> dict[str, Any]:
        """Metrics over the pixels of all test scenes, with those of each scene below `per_scene`."""
        # Imported when it is needed: scikit-learn takes a second.
        from sklearn.linear_model import Ridge

        def fit(samples: _Samples, strength: float) -> Any:
            centred = samples.tokens - samples.tokens.mean(axis=0)
            alpha = strength * len(centred) * float(np.mean(centred**2))
            return Ridge(alpha=alpha).fit(samples.tokens, samples.normals, sample_weight=samples.weights)

        def score(layer: Any, samples: _Samples) -> float:
            angles = measure_angles(torch.from_numpy(layer.predict(samples.tokens)), torch.from_numpy(samples.normals))
            return float(np.average(angles.numpy(), weights=samples.weights))

        kept, held = (_join([_split(scene)[part] for scene in self.train]) for part in (0, 1))
        errors = {strength: score(fit(kept, strength), held) for strength in STRENGTHS}
        chosen = min(errors, key=lambda strength: errors[strength])
        layer = fit(_join(self.train), chosen)
        per_scene: dict[str, dict[str, Any]] = {}
        angles = []
        for number, scene in enumerate(self.test):
            angles.append(_measure(scene, layer))
            name = scene.scene_id if scene.scene_id not in per_scene else f"{scene.scene_id} ({number})"
            per_scene[name] = summarise_angles(angles[-1])
        return {**summarise_angles(torch.cat(angles)), "ridge_strength": chosen, "per_scene": per_scene}


def _split(scene: SceneViews) -> tuple[SceneViews, SceneViews]:
    """The first views of a scene, and at least one of the last."""
    first = len(scene.token_maps) - max(round(VALIDATION_SHARE * len(scene.token_maps)), 1)
    return scene.take(slice(None, first)), scene.take(slice(first, None))


def _join(scenes: Sequence[SceneViews]) -> _Samples:
    """All tokens with at least one known normal; ValueError where there is none."""
    tokens, normals, weights = [], [], []
    for scene in scenes:
        for token_map, view in zip(scene.token_maps, scene.depth_views, strict=True):
            mean, share = _average_normals(view, (token_map.shape[0], token_map.shape[1]))
            is_known = share > 0
            tokens.append(token_map[is_known])
            normals.append(F.normalize(mean[is_known], dim=-1))
            weights.append(share[is_known])
    joined = [torch.cat(values).double().numpy() for values in (tokens, normals, weights)]
    if not len(joined[0]):
        raise ValueError(f"No pixel of {', '.join(scene.scene_id for scene in scenes)} has a normal; check the depth.")
    return _Samples(*joined)


def _average_normals(view: DepthView, grid: tuple[int, int]) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w"]]:
    """Mean over each token's pixels of the known normals, and the share of pixels that have one."""
    normals, known = compute_normals(view)
    # (H, W, 4) -> (1, 4, H, W) -> (h, w, 4)
    stacked = torch.cat([normals, known[..., None].float()], dim=-1).permute(2, 0, 1)[None]
    pooled = F.adaptive_avg_pool2d(stacked, grid)[0].permute(1, 2, 0)
    return pooled[..., :3], pooled[..., 3]


def _measure(scene: SceneViews, layer: Any) -> Float[Tensor, " pixels"]:
    """Errors in degrees at all pixels of a scene that have a normal."""
    errors = []
    for token_map, view in zip(scene.token_maps, scene.depth_views, strict=True):
        normals, known = compute_normals(view)
        h, w, _ = token_map.shape
        predicted = torch.from_numpy(layer.predict(token_map.flatten(0, 1).double().numpy())).float().view(h, w, 3)
        # (h, w, 3) -> (1, 3, h, w) -> (H, W, 3)
        full = resize_map(predicted.permute(2, 0, 1)[None], (known.shape[0], known.shape[1]))[0].permute(1, 2, 0)
        errors.append(measure_angles(full[known], normals[known]))
    angles = torch.cat(errors)
    if not len(angles):
        raise ValueError(f"No pixel of {scene.scene_id} has a normal; check the depth.")
    return angles
