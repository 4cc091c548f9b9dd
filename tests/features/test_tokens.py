"""Where tokens come from: images that carry their own pixel coordinates, sent through the real resize and real ViTs."""

import pytest
import torch

from fit3d_ns.features import compute_patch_grid, create_extractor
from fit3d_ns.features.tokens import fit_to_patch_grid


def _position_coded_image(height, width):
    """Red holds x, green holds y of every pixel centre, in pixels; blue is 1."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])


def _compute_token_centres(height, width, patch_grid):
    """(x, y) of each token in the image before the resize, by the module's docstring."""
    rows, columns = patch_grid
    return torch.tensor(
        [[((j + 0.5) * width / columns, (i + 0.5) * height / rows) for j in range(columns)] for i in range(rows)]
    )


def _make_patch_averaging(model):
    """Turns a ViT into one whose token is the mean colour of its patch: blocks add nothing, no position embedding."""
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
        if model.pos_embed is not None:
            model.pos_embed.zero_()
        kernel = model.patch_embed.proj.weight.zero_()
        for channel in range(3):
            kernel[channel, channel] = 1 / kernel[channel, channel].numel()
        model.patch_embed.proj.bias.zero_()


@pytest.mark.parametrize(("height", "width"), [(584, 876), (61, 45), (30, 200), (28, 42), (47, 16)])
def test_fit_to_patch_grid__patches_stand_at_the_token_centres(height, width):
    fitted = fit_to_patch_grid(_position_coded_image(height, width)[None], 14)
    rows, columns = compute_patch_grid(height, width, 14)
    assert fitted.shape == (1, 3, rows * 14, columns * 14)
    means = torch.nn.functional.avg_pool2d(fitted, 14)[0, :2].permute(1, 2, 0)
    # Coordinates up to 876 through a float32 interpolation.
    torch.testing.assert_close(means, _compute_token_centres(height, width, (rows, columns)), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(61, 45), (30, 100)])
def test_token_centres__are_what_real_vits_see(tiny_backbone, height, width):
    extractor = create_extractor(tiny_backbone, norm=False)
    _make_patch_averaging(extractor.model)
    scale = torch.tensor([width, height, 1.0])[:, None, None]
    tokens = extractor((_position_coded_image(height, width) / scale)[None])
    mean, std = torch.tensor(extractor.mean), torch.tensor(extractor.std)
    seen = (tokens.maps[0, :, :, :3] * std + mean) * scale[:, 0, 0]
    centres = _compute_token_centres(height, width, tokens.patch_grid)
    torch.testing.assert_close(seen[..., :2], centres, rtol=1e-4, atol=1e-3)


def test_fit_to_patch_grid__leaves_fitting_images_alone():
    images = torch.rand(1, 3, 28, 42)
    assert fit_to_patch_grid(images, 14) is images


@pytest.mark.parametrize(("height", "width"), [(13, 100), (100, 13)])
def test_compute_patch_grid__refuses_images_smaller_than_a_patch(height, width):
    with pytest.raises(ValueError, match=f"{width}x{height} pixels is smaller than one patch of 14x14"):
        compute_patch_grid(height, width, 14)


def test_compute_patch_grid__of_the_paper():
    # ScanNet++ images at half size, section 4.1 of the paper with its code: 574x868 and 576x864 after the resize.
    assert compute_patch_grid(584, 876, 14) == (41, 62)
    assert compute_patch_grid(584, 876, 16) == (36, 54)
