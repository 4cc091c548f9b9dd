"""Figures on views that are not trained on: distance to the rendered targets, and consistency between views.

- `feature_l1`, `feature_cosine`: of the backbone's tokens against the scene's rendered features, over tokens weighted
  as in training. The original's own distance on the same views stands beside it.
- Multi-view consistency (`analysis/consistency.py`): co-visible tokens of pairs of views, from measured depth where the
  capture has it and from the scene's rendered depth elsewhere. Pairs stay within a scene; means over scenes are
  weighted by points, so the table says what a random co-visible token sees.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.analysis.consistency import ConsistencyConfig, compute_consistency, create_pairs, pool_consistency
from fit3d_ns.finetuning.augmentation import AugmentationConfig
from fit3d_ns.finetuning.losses import compute_cosine_sum, compute_l1_sum
from fit3d_ns.finetuning.sampling import Draw
from fit3d_ns.finetuning.scene_bank import SceneBank
from fit3d_ns.finetuning.targets import TargetRenderer
from fit3d_ns.finetuning.training_views import TrainingViews
from fit3d_ns.scene import create_depth_view

ComputeTokens = Callable[[Tensor], Tensor]
"""Images [1, 3, H, W] in [0, 1] to patch tokens [1, h*w, E]."""

MAX_PAIRS_PER_SCENE = 60
"""Pairs of views that are compared in each scene, drawn at random but always the same ones."""

NO_AUGMENTATION = AugmentationConfig(flip_probability=0.0)


@dataclass(frozen=True)
class ValidationFigures:
    """Figures of one backbone."""

    feature_l1: float
    """Mean absolute difference per channel to the rendered targets."""
    feature_cosine: float
    """Mean cosine to the rendered targets."""
    consistency: dict[str, Any]
    """As `compute_consistency` gives it, pooled over scenes."""
    per_scene: dict[str, dict[str, Any]]
    """Both distances and the consistency of each scene."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Validation:
    """A fixed set of views of some scenes."""

    def __init__(self, bank: SceneBank, views: TrainingViews, targets: TargetRenderer, patch_size: int, max_views: int):
        """Args:
        bank: The scenes.
        views: The views that may be validated, by scene; scenes without any are left out.
        targets: Renders the same targets as in training, from the same views.
        patch_size: Of the backbone.
        max_views: Views per scene, evenly spread over its list.
        """
        self.bank = bank
        self.views = views
        self.targets = targets
        self.patch_size = patch_size
        self.draws = {
            scene: [Draw(0, scene, view) for view in spread_evenly(number, max_views)]
            for scene, number in enumerate(views.views_per_scene)
            if number > 0
        }

    @property
    def num_views(self) -> int:
        """Views of all scenes."""
        return sum(len(draws) for draws in self.draws.values())

    @torch.no_grad()
    def evaluate(self, compute_tokens: ComputeTokens) -> ValidationFigures:
        """Figures of a backbone, given as the function from images to its tokens."""
        per_scene: dict[str, dict[str, Any]] = {}
        reports: list[dict[str, Any]] = []
        sums = torch.zeros(3, dtype=torch.float64)
        for scene, draws in self.draws.items():
            own, maps, depth_views = torch.zeros(3, dtype=torch.float64), [], []
            for draw in draws:
                sample = self.views.load_sample(draw, NO_AUGMENTATION, self.patch_size, 0, self.targets.rules[scene])
                tokens = compute_tokens(sample.image[None].to(self.bank.device)).float()
                target = self.targets.render(sample)
                compared = tokens, target.features.flatten(0, 1)[None], target.weights.flatten()[None]
                figures = compute_l1_sum(*compared).sum(), compute_cosine_sum(*compared).sum(), target.weights.sum()
                own += torch.stack([figure.double().cpu() for figure in figures])
                # (1, h*w, e) -> (h, w, e)
                maps.append(tokens[0].unflatten(0, sample.grid).cpu())
                get_geometry = partial(self.bank.get_geometry, scene)
                depth_views.append(create_depth_view(self.views.captures[scene], sample.view, get_geometry))
            pairs = create_pairs(len(draws), max_pairs=MAX_PAIRS_PER_SCENE)
            report = compute_consistency(maps, depth_views, pairs, ConsistencyConfig())
            reports.append(report)
            sums += own
            name = self.views.captures[scene].scene_id
            name = name if name not in per_scene else f"{name} ({scene})"
            per_scene[name] = {**_divide(own), "num_views": len(draws), "consistency": report}
        return ValidationFigures(**_divide(sums), consistency=pool_consistency(reports), per_scene=per_scene)


def spread_evenly(number: int, at_most: int) -> list[int]:
    """At most so many indices below `number`, evenly spread, the first always among them."""
    if number <= at_most:
        return list(range(number))
    return [index * number // at_most for index in range(at_most)]


def format_consistency(original: dict[str, Any], finetuned: dict[str, Any]) -> str:
    """A Markdown table: original against fine-tuned, one row per bin of angles."""
    lines = [
        "| angle (degrees) | centred cosine | cosine | L1 | recall within 10 px | points |",
        "|---|---|---|---|---|---|",
    ]
    rows = [("all", original, finetuned)]
    rows += [(name, original["by_angle"][name], finetuned["by_angle"][name]) for name in original["by_angle"]]
    for name, before, after in rows:
        if not before["num_points"]:
            continue
        pairs = [
            f"{before[key]:.3f} → {after[key]:.3f}" for key in ("centred_cosine", "mean_cosine", "l1", "recall_10px")
        ]
        lines.append(f"| {name} | {' | '.join(pairs)} | {before['num_points']} |")
    return "\n".join(lines)


def _divide(sums: Float[Tensor, "3"]) -> dict[str, float]:
    l1, cosine, weight = sums.tolist()
    weight = weight if weight > 0 else float("nan")
    return {"feature_l1": l1 / weight, "feature_cosine": cosine / weight}
