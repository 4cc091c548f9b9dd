"""The surface normal probe: one linear layer on patch tokens, solved in closed form, against normals of known depth.

The layer is fitted by ridge regression (scikit-learn's) to each token's mean normal, weighted by the share of its
pixels that have one; its strength is the one that is best on the last fifth of each training scene's views, after which
it is fitted to all of them. Predictions are read between tokens bilinearly, and every pixel of the test views that has
a normal counts. Nothing is drawn at random, so that all seeds give the same.

The DPT head instead is trained on the mean angle by AdamW with probe3d's values (rate 5e-4, batches of 8, warm-up over
15 % of the steps, then a cosine), and reads four layers before the final norm.

Normals are unit vectors in OpenCV's camera axes (x right, y down, z forwards), towards the camera. They are the cross
product of the differences between a pixel's surface points at a step to the left and right, above and below; the step
is a few pixels, because measured depth is noisy. Along a plane 1 / z is linear in the image, so where its second
difference is not small an edge lies between, and the pixel has no normal.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.correspondence import DepthView
from fit3d_ns.probing.frozen_features import Assembler, Assembly, FrozenFeatures
from fit3d_ns.probing.head_probe import resolve_iterations
from fit3d_ns.probing.head_trainer import LossSum, OptimizationConfig, Schedule, train_head
from fit3d_ns.probing.heads import DPTHead
from fit3d_ns.probing.multiview import SceneViews, ViewsConfig
from fit3d_ns.probing.pictures import resize_map
from fit3d_ns.probing.samples import Batch, iterate_draws
from fit3d_ns.utils.limits import Limits
from fit3d_ns.utils.selection import derive_seed

STEPS_PER_WIDTH = 80
"""The step is this part of the width: 4 pixels of 320."""
LARGEST_BEND = 0.1
"""Largest second difference of 1 / z, as a multiple of 1 / z."""
THRESHOLDS = (11.25, 22.5, 30.0)
"""Degrees within which normals count as right (Fouhey et al. 2013, probe3d)."""
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge strengths that are tried, as multiples of the mean square of the centred tokens' channels."""
VALIDATION_SHARE = 0.2
"""Share of a training scene's views, the last ones, that choose the strength."""

LEARNING_RATE, WEIGHT_DECAY, BATCH_SIZE, WARMUP_SHARE = 5e-4, 0.01, 8, 0.15
"""probe3d's, for the DPT head."""
MOST_ITERATIONS, LARGEST_COSINE = 38_400, 1.0 - 1e-4
_Scenes = Sequence[SceneViews]
_Samples = tuple[Float[np.ndarray, "samples channels"], Float[np.ndarray, "samples 3"], Float[np.ndarray, " samples"]]
"""Tokens, their mean normals, and the share of each token's pixels that have one."""


@dataclass(frozen=True)
class NormalsConfig(ViewsConfig):
    """Which views take part, and the head."""

    head: Literal["linear", "dpt"] = "linear"
    """`dpt` is trained on four layers, as probe3d does."""
    num_iterations: Annotated[int | None, Limits(at_least=1)] = None
    """Steps of the DPT head's training; None: 60 epochs, at least 800 and at most 38,400."""


def measure_normals(train: Sequence[SceneViews], test: Sequence[SceneViews]) -> dict[str, Any]:
    """Errors over the pixels of all test scenes, with those of each scene below `per_scene`."""
    # Imported when it is needed: scikit-learn takes a second.
    from sklearn.linear_model import Ridge

    def fit(samples: _Samples, strength: float) -> Any:
        tokens, normals, weights = samples
        alpha = strength * len(tokens) * float(np.mean((tokens - tokens.mean(axis=0)) ** 2))
        return Ridge(alpha=alpha).fit(tokens, normals, sample_weight=weights)

    def score(layer: Any, samples: _Samples) -> float:
        tokens, normals, weights = samples
        angles = measure_angles(torch.from_numpy(layer.predict(tokens)), torch.from_numpy(normals))
        return float(np.average(angles.numpy(), weights=weights))

    kept, held = (_join([_split(scene)[part] for scene in train]) for part in (0, 1))
    errors = {strength: score(fit(kept, strength), held) for strength in STRENGTHS}
    chosen = min(errors, key=lambda strength: errors[strength])
    layer = fit(_join(train), chosen)

    def predict(scene: SceneViews, index: int) -> Float[Tensor, "3 h w"]:
        tokens = scene.token_maps[index]
        found = torch.from_numpy(layer.predict(tokens.flatten(0, 1).double().numpy())).float()
        # (h*w, 3) -> (3, h, w)
        return found.T.unflatten(1, tokens.shape[:2])

    return {**_measure(test, predict), "ridge_strength": chosen}


def measure_dpt_normals(
    config: NormalsConfig, assembly: Assembly, accelerator: Any, seed: int, train: _Scenes, test: _Scenes
) -> dict[str, Any]:
    """The same errors of a DPT head, which is trained first; the views' `features` have four layers."""
    torch.manual_seed(derive_seed(seed, "normals head"))
    head = DPTHead(Assembler(assembly, train[0].features[0].maps.shape[-1], "none"))
    pairs = [pair for scene in train for pair in zip(scene.features, scene.depth_views, strict=True)]
    known_normals = [(features, compute_normals(view)[0].permute(2, 0, 1)) for features, view in pairs]
    known_normals = [pair for pair in known_normals if bool(pair[1].any())]
    if not known_normals:
        raise ValueError(f"No pixel of {', '.join(scene.scene_id for scene in train)} has a normal; check the depth.")
    num_iterations = resolve_iterations(config.num_iterations, MOST_ITERATIONS, len(known_normals), BATCH_SIZE)

    def iterate_batches() -> Iterator[Batch]:
        for draws in iterate_draws(len(known_normals), BATCH_SIZE, num_iterations, seed):
            chosen = [known_normals[index] for _, index in draws]
            # Scenes may have pictures of other sizes.
            chosen = [item for item in chosen if item[1].shape == chosen[0][1].shape]
            both = zip(*((features.maps, features.class_tokens) for features, _ in chosen), strict=True)
            yield FrozenFeatures(*map(torch.cat, both)), torch.stack([normals for _, normals in chosen])

    def compute_loss(predictions: Tensor, targets: Tensor, iteration: int) -> LossSum:
        known = targets.any(dim=1)
        restored = resize_map(predictions, (targets.shape[-2], targets.shape[-1]))
        cosine = F.cosine_similarity(restored, targets, dim=1)[known]
        # At 1 the angle has no gradient.
        return LossSum(cosine.clamp(-LARGEST_COSINE, LARGEST_COSINE).acos().sum(), known.sum().float())

    schedule = Schedule("cosine", num_iterations, round(WARMUP_SHARE * num_iterations))
    optimization = OptimizationConfig(schedule, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY)
    title = f"Normals, DPT head, seed {seed}"
    train_head(head, iterate_batches(), compute_loss, optimization, accelerator=accelerator, title=title)
    with torch.no_grad():
        return _measure(test, lambda scene, index: head(scene.features[index].to(accelerator.device))[0].cpu())


def compute_normals(view: DepthView) -> tuple[Float[Tensor, "height width 3"], Bool[Tensor, "height width"]]:
    """Unit normals at pixel centres, and where they are known; zeros elsewhere."""
    depth = view.usable_depth.double()
    height, width = depth.shape
    step = max(round(width / STEPS_PER_WIDTH), 1)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1).double() @ torch.linalg.inv(view.K.double()).T
    points = depth[..., None] * rays
    normals, known = torch.zeros_like(points), torch.zeros_like(depth, dtype=torch.bool)
    if min(height, width) <= 2 * step:
        return normals.float(), known
    rows, columns = slice(step, height - step), slice(step, width - step)
    before, after = slice(None, -2 * step), slice(2 * step, None)
    across = points[rows, after] - points[rows, before]
    down = points[after, columns] - points[before, columns]
    inverse = torch.where(depth > 0, 1.0 / depth.clamp(min=1e-12), torch.inf)
    middle = inverse[rows, columns]
    bend = (inverse[rows, before] + inverse[rows, after] - 2.0 * middle).abs()
    bend = torch.maximum(bend, (inverse[before, columns] + inverse[after, columns] - 2.0 * middle).abs())
    # inf - inf is NaN, which is not smaller either.
    known[rows, columns] = (bend <= LARGEST_BEND * middle) & middle.isfinite()
    normals[rows, columns] = F.normalize(torch.linalg.cross(down, across), dim=-1)
    normals *= -torch.sign((normals * rays).sum(dim=-1, keepdim=True)) * known[..., None]
    return normals.float(), known


def measure_angles(
    predicted: Float[Tensor, "*pixels 3"], normals: Float[Tensor, "*pixels 3"]
) -> Float[Tensor, "*pixels"]:
    """Degrees between vectors, of which the predicted ones may have any length."""
    cosine = F.cosine_similarity(predicted.double(), normals.double(), dim=-1)
    return torch.rad2deg(torch.acos(cosine.clamp(-1.0, 1.0))).float()


def summarise_angles(angles: Float[Tensor, " pixels"]) -> dict[str, float]:
    """`mean`, `median` and `rmse` in degrees, and the share of pixels within each of `THRESHOLDS`: `within_11.25`."""
    values = angles.double()
    shares = {f"within_{threshold:g}": float((values < threshold).double().mean()) for threshold in THRESHOLDS}
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "rmse": float(values.square().mean().sqrt()),
        **shares,
        "num_pixels": len(values),
    }


def _split(scene: SceneViews) -> list[SceneViews]:
    """The first views of a scene, and at least one of the last."""
    first = len(scene.token_maps) - max(round(VALIDATION_SHARE * len(scene.token_maps)), 1)
    parts = slice(None, first), slice(first, None)
    return [replace(scene, token_maps=scene.token_maps[part], depth_views=scene.depth_views[part]) for part in parts]


def _join(scenes: Sequence[SceneViews]) -> _Samples:
    """All tokens with at least one known normal; ValueError where there is none."""
    tokens, normals, weights = [], [], []
    for scene in scenes:
        for token_map, view in zip(scene.token_maps, scene.depth_views, strict=True):
            known_normals, known = compute_normals(view)
            # (H, W, 4) -> (1, 4, H, W) -> (h, w, 4): each token's mean normal, and the share of pixels that have one.
            stacked = torch.cat([known_normals, known[..., None].float()], dim=-1).permute(2, 0, 1)[None]
            pooled = F.adaptive_avg_pool2d(stacked, (token_map.shape[0], token_map.shape[1]))[0].permute(1, 2, 0)
            is_known = pooled[..., 3] > 0
            tokens.append(token_map[is_known])
            normals.append(F.normalize(pooled[is_known, :3], dim=-1))
            weights.append(pooled[is_known, 3])
    joined: Any = tuple(torch.cat(values).double().numpy() for values in (tokens, normals, weights))
    if not len(joined[0]):
        raise ValueError(f"No pixel of {', '.join(scene.scene_id for scene in scenes)} has a normal; check the depth.")
    return joined


def _measure(test: Sequence[SceneViews], predict: Callable[[SceneViews, int], Tensor]) -> dict[str, Any]:
    """Errors at all pixels that have a normal, and below `per_scene` each scene's; views are predicted as [3, h, w]."""
    per_scene: dict[str, dict[str, Any]] = {}
    angles: list[Tensor] = []
    for number, scene in enumerate(test):
        errors = []
        for index, view in enumerate(scene.depth_views):
            normals, known = compute_normals(view)
            # (3, h, w) -> (1, 3, h, w) -> (H, W, 3)
            full = resize_map(predict(scene, index)[None], (known.shape[0], known.shape[1]))[0].permute(1, 2, 0)
            errors.append(measure_angles(full[known], normals[known]))
        angles.append(torch.cat(errors))
        if not len(angles[-1]):
            raise ValueError(f"No pixel of {scene.scene_id} has a normal; check the depth.")
        name = scene.scene_id if scene.scene_id not in per_scene else f"{scene.scene_id} ({number})"
        per_scene[name] = summarise_angles(angles[-1])
    return {**summarise_angles(torch.cat(angles)), "per_scene": per_scene}
