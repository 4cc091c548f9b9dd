"""From a photograph to what a ViT is shown, and from its tokens back to the pixels they came from.

An image of height H and width W is resized to the largest multiple of the patch size that fits into it (paper code,
`forward_2d_model`), so its patch grid is (h, w) = (H // p, W // p). Pixel coordinates are (x, y) with pixel centres
at +0.5, so the image spans [0, W] x [0, H]; token coordinates are (column, row) with token centres at +0.5 as well.
The resize keeps the image's borders in place, hence both frames differ by one factor per axis: x = column * W / w.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

ResizeRule = Literal["bilinear", "bilinear-antialias"]
"""`bilinear` samples four pixels, as both of the paper's stages do (cv2 and `F.interpolate` without antialias); the
image shrinks by less than one patch, so there is little to alias. `bilinear-antialias` widens the filter by the scale
factor, which matters for images of a few patches only."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Channel means of ImageNet's images in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Channel deviations of ImageNet's images in [0, 1]."""


def compute_patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Number of patch rows and columns of an image.

    Raises:
        ValueError: The image is smaller than one patch.
    """
    if height < patch_size or width < patch_size:
        raise ValueError(
            f"Image of {width}x{height} pixels is smaller than one patch of {patch_size}x{patch_size}; "
            "give a larger image or a backbone with smaller patches."
        )
    return height // patch_size, width // patch_size


def fit_to_patch_grid(
    images: Float[Tensor, "batch channels height width"], patch_size: int, resize_rule: ResizeRule = "bilinear"
) -> Float[Tensor, "batch channels fitted_height fitted_width"]:
    """Resizes to the floor multiple of the patch size; images that are one already are returned as they are."""
    height, width = images.shape[-2:]
    rows, columns = compute_patch_grid(height, width, patch_size)
    size = (rows * patch_size, columns * patch_size)
    if size == (height, width):
        return images
    antialias = resize_rule == "bilinear-antialias"
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=antialias)


def normalize_images(
    images: Float[Tensor, "batch 3 height width"], mean: Float[Tensor, "3"], std: Float[Tensor, "3"]
) -> Float[Tensor, "batch 3 height width"]:
    """Subtracts the channel means and divides by the channel deviations."""
    return (images - mean[:, None, None]) / std[:, None, None]


def compute_token_centers(
    height: int, width: int, patch_grid: tuple[int, int], device: torch.device | str = "cpu"
) -> Float[Tensor, "h w 2"]:
    """Where each token looks: the centre of its patch in the image before the resize.

    Args:
        height: Height of the image as it was given to the extractor, in pixels.
        width: Its width.
        patch_grid: Rows and columns of tokens.
        device: Where the result is made.

    Returns:
        (x, y) in pixels, pixel centres at +0.5, float32.
    """
    rows, columns = patch_grid
    y = (torch.arange(rows, device=device, dtype=torch.float64) + 0.5) * (height / rows)
    x = (torch.arange(columns, device=device, dtype=torch.float64) + 0.5) * (width / columns)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x, grid_y], dim=-1).float()


def compute_token_footprints(
    height: int, width: int, patch_grid: tuple[int, int], device: torch.device | str = "cpu"
) -> Float[Tensor, "h w 4"]:
    """The rectangle of each token's patch in the image before the resize: (x0, y0, x1, y1) in pixels.

    Footprints tile the image: the union covers [0, width] x [0, height] without overlap.
    """
    rows, columns = patch_grid
    half = torch.tensor([width / columns / 2, height / rows / 2], device=device, dtype=torch.float64)
    centers = compute_token_centers(height, width, patch_grid, device).double()
    return torch.cat([centers - half, centers + half], dim=-1).float()


def compute_token_coordinates(
    xy: Float[Tensor, "*batch 2"], height: int, width: int, patch_grid: tuple[int, int]
) -> Float[Tensor, "*batch 2"]:
    """Inverse of `compute_token_centers`: pixel coordinates to (column, row) on the token grid, token centres at +0.5.

    The patch that holds a pixel is the floor of the result; minus 0.5 it indexes the token map for interpolation.
    """
    rows, columns = patch_grid
    return xy * xy.new_tensor([columns / width, rows / height])
