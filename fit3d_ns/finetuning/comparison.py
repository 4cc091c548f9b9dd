"""A picture to look at: photograph, original tokens, fine-tuned tokens and targets, in the colours of one PCA basis."""

from pathlib import Path

import torch

from fit3d_ns.analysis.pca import fit_pca
from fit3d_ns.analysis.pictures import compose_panel, draw_pca, save_picture
from fit3d_ns.finetuning.validation import NO_AUGMENTATION, ComputeTokens, Validation

MAX_ROWS = 4
"""Views in the picture, from as many scenes as there are."""


@torch.no_grad()
def save_comparison(validation: Validation, original: ComputeTokens, finetuned: ComputeTokens, path: Path) -> None:
    """Writes a PNG with one view per row; the basis is fitted to both backbones' tokens of the rows together.

    Args:
        validation: The views to show.
        original: From images to the original backbone's tokens.
        finetuned: From images to the fine-tuned backbone's tokens.
        path: The PNG.
    """
    by_scene = list(validation.draws.values())
    # First the first view of every scene, then the middle ones.
    chosen = [draws[0] for draws in by_scene] + [draws[len(draws) // 2] for draws in by_scene if len(draws) > 1]
    images, maps, names = [], [], []
    for draw in chosen[:MAX_ROWS]:
        rule = validation.targets.rules[draw.scene]
        sample = validation.views.load_sample(draw, NO_AUGMENTATION, validation.patch_size, 0, rule)
        batch = sample.image[None].to(validation.bank.device)
        tokens = [compute(batch)[0].float().cpu().unflatten(0, sample.grid) for compute in (original, finetuned)]
        maps.append([*tokens, validation.targets.render(sample).features.cpu()])
        # (3, h, w) -> (h, w, 3)
        images.append(sample.image.permute(1, 2, 0))
        names.append(sample.name)
    basis = fit_pca(torch.cat([tokens.flatten(0, 1) for row in maps for tokens in row[:2]]), 3)
    rows = [
        [image, *(draw_pca(tokens, basis, (image.shape[0], image.shape[1])) for tokens in row)]
        for image, row in zip(images, maps, strict=True)
    ]
    save_picture(compose_panel(rows, ["image", "original", "fine-tuned", "lifted (target)"], names), path)
