"""Pictures of feature maps: upscaling, and labelled panels in one PNG. Images are [H, W, 3] in [0, 1]."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.pca import PcaBasis, apply_pca, map_to_colours
from fit3d_ns.utils.files import write_atomically

Resampling = Literal["nearest", "bilinear"]


@dataclass(frozen=True)
class PanelConfig:
    """Layout of a panel, in pixels."""

    gap: int = 6
    """Space between pictures and around them."""
    label_height: int = 18
    """Height of the strip for labels."""
    background: int = 255
    """Grey of the ground, 0-255; labels are black on light grounds and white on dark ones."""


def draw_pca(
    tokens: Float[Tensor, "h w embed"],
    basis: PcaBasis,
    size: tuple[int, int] | None = None,
    resampling: Resampling = "nearest",
) -> Float[Tensor, "height width 3"]:
    """Token map in the basis' fixed colours, upscaled to `size` (height, width) if given."""
    colours = map_to_colours(apply_pca(tokens, basis.truncate(3)), basis)
    return colours if size is None else upscale(colours, size, resampling)


def upscale(
    image: Float[Tensor, "h w channels"], size: tuple[int, int], resampling: Resampling = "nearest"
) -> Float[Tensor, "height width channels"]:
    """Resizes to (height, width); `nearest` shows every token as a block, exactly where its patch is."""
    mode = "nearest-exact" if resampling == "nearest" else "bilinear"
    return F.interpolate(image.permute(2, 0, 1)[None], size=size, mode=mode)[0].permute(1, 2, 0)


def compose_panel(
    rows: Sequence[Sequence[Float[Tensor, "..."] | None]],
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    config: PanelConfig | None = None,
) -> Image.Image:
    """Puts images into rows and columns with labels above the columns and above the rows.

    Args:
        rows: Images [H, W, 3] in [0, 1]; None leaves a place empty. Columns are as wide as their widest image.
        column_labels: One for each column, or none.
        row_labels: One for each row, or none; written above the row.
        config: Layout.

    Raises:
        ValueError: There is no image, or the labels are not as many as rows or columns.
    """
    config = config or PanelConfig()
    pictures = [[None if image is None else to_pixels(image) for image in row] for row in rows]
    num_columns = max((len(row) for row in pictures), default=0)
    if not any(picture is not None for row in pictures for picture in row):
        raise ValueError("No image to put into the panel.")
    if (column_labels and len(column_labels) != num_columns) or (row_labels and len(row_labels) != len(pictures)):
        raise ValueError(
            f"{len(column_labels)} column and {len(row_labels)} row labels for {num_columns} columns and "
            f"{len(pictures)} rows; give one each or none."
        )
    widths = [1] * num_columns
    for row in pictures:
        for column, picture in enumerate(row):
            widths[column] = max(widths[column], 1 if picture is None else picture.shape[1])
    heights = [max((picture.shape[0] for picture in row if picture is not None), default=1) for row in pictures]
    strip = config.label_height
    top = config.gap + (strip if column_labels else 0)
    total_height = top + sum(heights) + config.gap * len(heights) + (strip * len(heights) if row_labels else 0)
    panel = Image.new(
        "RGB", (config.gap + sum(width + config.gap for width in widths), total_height), (config.background,) * 3
    )
    draw = ImageDraw.Draw(panel)
    lefts = [config.gap + sum(width + config.gap for width in widths[:column]) for column in range(num_columns)]
    for label, left, width in zip(column_labels, lefts, widths, strict=False):
        _write(draw, label, left, config.gap, width, config)
    y = top
    for index, row in enumerate(pictures):
        if row_labels:
            _write(draw, row_labels[index], config.gap, y, panel.width - 2 * config.gap, config)
            y += strip
        for picture, left in zip(row, lefts, strict=False):
            if picture is not None:
                panel.paste(Image.fromarray(picture), (left, y))
        y += heights[index] + config.gap
    return panel


def save_picture(image: Float[Tensor, "height width 3"] | Image.Image, path: Path) -> None:
    """Writes a PNG atomically."""
    picture = Image.fromarray(to_pixels(image)) if isinstance(image, Tensor) else image
    with write_atomically(Path(path)) as temporary:
        picture.save(temporary, format="PNG")


def to_pixels(image: Float[Tensor, "height width 3"]) -> np.ndarray:
    """[0, 1] to 8 bits, rounded; NaN becomes black."""
    return (image.detach().cpu().float().nan_to_num(0.0).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).numpy()


def _write(draw: ImageDraw.ImageDraw, label: str, left: int, y: int, width: int, config: PanelConfig) -> None:
    """Writes a label, cut with an ellipsis where it is wider than its place."""
    font = ImageFont.load_default(size=max(config.label_height - 6, 8))
    text = label
    while text and draw.textlength(text, font=font) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    draw.text((left, y + 1), text, fill=(0, 0, 0) if config.background > 127 else (255, 255, 255), font=font)
