"""Metrics on views that are not trained on: distance to the rendered targets, and consistency between views.

- `feature_l1`, `feature_cosine`: the backbone's tokens against the scene's rendered features, over tokens weighted as
  in training. The original's own distance on the same views is measured as well.
- Multi-view consistency (`analysis/consistency.py`): co-visible tokens of pairs of views, from measured depth where the
  capture has it and from the scene's rendered depth elsewhere. Pairs stay within a scene; means over scenes are
  weighted by points, so the table says what a random co-visible token sees.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.consistency import ConsistencyConfig, compute_consistency, create_pairs, pool_consistency
from fit3d_ns.analysis.pca import fit_pca, map_to_colours
from fit3d_ns.analysis.pictures import COLOUR_WORDS, append_legend, compose_panel, draw_pca, save_picture
from fit3d_ns.features import TokenModel
from fit3d_ns.finetuning.draws import AugmentationConfig, Draw, Sample
from fit3d_ns.finetuning.losses import compute_l1_sum
from fit3d_ns.finetuning.optimization import compute_outputs
from fit3d_ns.finetuning.targets import TargetRenderer
from fit3d_ns.scene import create_depth_view
from fit3d_ns.utils.package_files import fill_template
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.selection import select_evenly

MAX_PAIRS_PER_SCENE = 60
"""Pairs of views that are compared in each scene, drawn at random but always the same ones."""
MAX_ROWS = 4
"""Views in the comparison picture, from as many scenes as there are."""
_DISTANCES = ("feature_l1", "feature_cosine")
NO_AUGMENTATION = AugmentationConfig(flip_probability=0.0)

ComputeTokens = Callable[[Tensor], Tensor]
"""Images [1, 3, H, W] in [0, 1] to patch tokens [1, h*w, E]."""


class Validation:
    """A fixed set of views of some scenes, and what the original backbone reaches on them.

    At most `max_views` of each scene's `targets.views` are taken, evenly spread; `kind` says what to call them.
    """

    original: dict[str, Any]
    """What `evaluate` found of it; set by `measure_original`."""

    def __init__(self, targets: TargetRenderer, patch_size: int, max_views: int, kind: str = "views"):
        self.targets, self.patch_size = targets, patch_size
        self.draws = {
            scene: [Draw(0, scene, view) for view in select_evenly(range(number), max_views)]
            for scene, number in enumerate(targets.views.views_per_scene)
            if number > 0
        }
        self.num_views = sum(len(draws) for draws in self.draws.values())
        self.label = f"{self.num_views} views: {kind}"

    def load_sample(self, draw: Draw) -> Sample:
        """A view as it is, without augmentation."""
        rule = self.targets.rules[draw.scene]
        return self.targets.views.load_sample(draw, NO_AUGMENTATION, self.patch_size, 0, rule)

    @torch.no_grad()
    def evaluate(self, compute_tokens: ComputeTokens) -> dict[str, Any]:
        """Metrics of a backbone, given as the function from images to its tokens.

        `feature_l1`, `feature_cosine` and `consistency` are over all scenes' tokens; `per_scene` has those of each.
        """
        bank, captures = self.targets.bank, self.targets.views.captures
        per_scene: dict[str, dict[str, Any]] = {}
        reports: list[dict[str, Any]] = []
        sums = torch.zeros(3, dtype=torch.float64)
        for scene, draws in self.draws.items():
            own, maps, depth_views = torch.zeros(3, dtype=torch.float64), [], []
            for draw in draws:
                sample = self.load_sample(draw)
                tokens = compute_tokens(sample.image[None].to(bank.device)).float()
                target = self.targets.render(sample)
                features, weights = target.features.flatten(0, 1)[None], target.weights.flatten()[None]
                cosine = F.cosine_similarity(tokens, features, dim=-1)
                # Where nothing counts nothing may leak in either: 0 * NaN is NaN.
                cosine_sum = torch.where(weights > 0, cosine * weights, 0.0).sum()
                parts = compute_l1_sum(tokens, features, weights).sum(), cosine_sum, weights.sum()
                own += torch.stack([part.double().cpu() for part in parts])
                # (1, h*w, e) -> (h, w, e)
                maps.append(tokens[0].unflatten(0, sample.patch_grid).cpu())
                depth_views.append(create_depth_view(captures[scene], sample.view, partial(bank.get_geometry, scene)))
            pairs = create_pairs(len(draws), max_pairs=MAX_PAIRS_PER_SCENE)
            report = compute_consistency(maps, depth_views, pairs, ConsistencyConfig())
            reports.append(report)
            sums += own
            name = captures[scene].scene_id
            name = name if name not in per_scene else f"{name} ({scene})"
            per_scene[name] = {**_divide(own), "num_views": len(draws), "consistency": report}
        return {**_divide(sums), "consistency": pool_consistency(reports), "per_scene": per_scene}

    def measure_original(self, original: TokenModel) -> None:
        """Measures what every later step is compared with."""
        notice(f"Measuring the original backbone on {self.label}")
        self.original = self.evaluate(read_tokens_of(original))

    def validate_step(self, token_model: TokenModel, step: int) -> dict[str, float]:
        """Measures the backbone between two steps, says what was found, and returns curves to log."""
        found, original = self.evaluate(read_tokens_of(token_model)), self.original
        pairs = [("feature L1", original["feature_l1"], found["feature_l1"])]
        pairs += [("feature cosine", original["feature_cosine"], found["feature_cosine"])]
        for name, key in (("centred cosine", "centred_cosine"), ("recall within 10 px", "recall_10px")):
            pairs.append((f"{name} between views", original["consistency"][key], found["consistency"][key]))
        words = ", ".join(f"{name} {before:.3f} → {after:.3f}" for name, before, after in pairs)
        notice(f"Step {step}, on {self.label}: {words} (original → now).")
        return self.collect_curves(found)

    def collect_curves(self, found: dict[str, Any]) -> dict[str, float]:
        """What is logged of a backbone's metrics."""
        both = {"validation/": found, "validation/original_": self.original}
        curves = {f"{start}{key}": metrics[key] for start, metrics in both.items() for key in _DISTANCES}
        for key in ("mean_cosine", "centred_cosine", "recall_10px", "effective_rank"):
            curves[f"consistency/{key}"] = found["consistency"][key]
        return {key: value for key, value in curves.items() if math.isfinite(value)}

    def compare(self, finetuned: dict[str, Any]) -> dict[str, Any]:
        """The part of the report that sets fine-tuned against original."""
        both = {"original": self.original, "finetuned": finetuned}
        return {
            "consistency": {"views": self.label, **{name: metrics["consistency"] for name, metrics in both.items()}},
            "validation": {name: {key: metrics[key] for key in _DISTANCES} for name, metrics in both.items()},
            "validation_per_scene": {name: metrics["per_scene"] for name, metrics in both.items()},
        }


def read_tokens_of(token_model: TokenModel) -> ComputeTokens:
    """A backbone as `Validation.evaluate` takes it."""
    return lambda images: compute_outputs(token_model, images).patch_tokens


@torch.no_grad()
def save_comparison(validation: Validation, original: ComputeTokens, finetuned: ComputeTokens, path: Path) -> None:
    """Writes a PNG with one view per row: photograph, original tokens, fine-tuned tokens and the lifted scene.

    All are drawn in the colours of one PCA basis, fitted to both backbones' tokens of the rows together; the scene,
    whose values at the tokens are the targets, at every pixel.
    """
    by_scene = list(validation.draws.values())
    # First the first view of every scene, then the middle ones.
    chosen = [draws[0] for draws in by_scene] + [draws[len(draws) // 2] for draws in by_scene if len(draws) > 1]
    bank, maps, rows = validation.targets.bank, [], []
    samples = [validation.load_sample(draw) for draw in chosen[:MAX_ROWS]]
    for sample in samples:
        found = [compute(sample.image[None].to(bank.device)) for compute in (original, finetuned)]
        maps.append([tokens[0].float().cpu().unflatten(0, sample.patch_grid) for tokens in found])
    basis = fit_pca(torch.cat([tokens.flatten(0, 1) for row in maps for tokens in row]), 3)
    for sample, row in zip(samples, maps, strict=True):
        lifted, alphas = bank[sample.draw.scene].render_coefficients(sample.camera, basis.components, basis.mean)
        # (3, h, w) -> (h, w, 3)
        image = sample.image.permute(1, 2, 0)
        pictures = [draw_pca(tokens, basis, (image.shape[0], image.shape[1])) for tokens in row]
        rows.append([image, *pictures, map_to_colours(lifted, basis, alphas).cpu()])
    panel = compose_panel(rows, ["photograph", "original", "fine-tuned", "lifted"], [one.name for one in samples])
    save_picture(append_legend(panel, [(torch.eye(3), COLOUR_WORDS)]), path)


def format_consistency(original: dict[str, Any], finetuned: dict[str, Any]) -> str:
    """A Markdown table: original against fine-tuned, one row per bin of angles."""
    return fill_template(Path(__file__).with_name("consistency.md"), before=original, after=finetuned)


def _divide(sums: Float[Tensor, "3"]) -> dict[str, float]:
    l1, cosine, weight = sums.tolist()
    weight = weight if weight > 0 else float("nan")
    return {"feature_l1": l1 / weight, "feature_cosine": cosine / weight}
