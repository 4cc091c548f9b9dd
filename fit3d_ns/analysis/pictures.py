"""Pictures of feature maps: upscaling, and labelled panels with legends in one PNG. Images are [H, W, 3] in [0, 1]."""

from collections.abc import Sequence
from itertools import accumulate, zip_longest
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.pca import PcaBasis, apply_pca, map_to_colours
from fit3d_ns.utils.files import write_atomically

GAP = 6
"""Pixels between pictures of a panel and around them."""
LABEL_HEIGHT = 18
"""Height in pixels of the strip for a label."""
COLOUR_WORDS = "strongest three components as red, green, blue: like colours mean like features, also between columns"
"""Says what PCA pictures with one basis for a row show."""
_FONT_SIZE = LABEL_HEIGHT - 6
_SWATCH = 14
_BAR_WIDTH = 160

Picture = Float[Tensor, "height width 3"]
LegendEntry = tuple[Float[Tensor, "steps 3"], str]
"""A strip of colours in [0, 1], one for a swatch and many for a bar, and what they mean."""


def draw_pca(tokens: Float[Tensor, "h w embed"], basis: PcaBasis, size: tuple[int, int]) -> Picture:
    """Token map in the basis' fixed colours, upscaled to (height, width)."""
    return upscale(map_to_colours(apply_pca(tokens, basis), basis), size)


def upscale(
    image: Float[Tensor, "h w channels"], size: tuple[int, int], mode: str = "nearest-exact"
) -> Float[Tensor, "height width channels"]:
    """Resizes to (height, width); every token becomes a block, exactly where its patch is. `area` is for photos."""
    # (h, w, c) -> (1, c, h, w) and back
    return F.interpolate(image.permute(2, 0, 1)[None], size=size, mode=mode)[0].permute(1, 2, 0)


def compose_panel(
    rows: Sequence[Sequence[Float[Tensor, "..."] | None]],
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
) -> Image.Image:
    """Puts images [H, W, 3] in [0, 1] into rows and columns, with a label above each of them or none.

    Columns are as wide as their widest image; None leaves a place empty.
    """
    pictures = [[None if image is None else to_pixels(image) for image in row] for row in rows]
    columns = zip_longest(*pictures)
    widths = [max((picture.shape[1] for picture in column if picture is not None), default=1) for column in columns]
    heights = [max((picture.shape[0] for picture in row if picture is not None), default=1) for row in pictures]
    row_strip = LABEL_HEIGHT if row_labels else 0
    # The last one is where the panel ends.
    lefts = [*accumulate((width + GAP for width in widths), initial=GAP)]
    top = GAP + (LABEL_HEIGHT if column_labels else 0)
    total_height = top + sum(height + GAP + row_strip for height in heights)
    panel = Image.new("RGB", (lefts[-1], total_height), "white")
    draw = ImageDraw.Draw(panel)
    for label, left, width in zip(column_labels, lefts, widths, strict=False):
        _write(draw, label, left, GAP, width)
    for index, row in enumerate(pictures):
        if row_labels:
            _write(draw, row_labels[index], GAP, top, panel.width - 2 * GAP)
        for picture, left in zip(row, lefts, strict=False):
            if picture is not None:
                panel.paste(Image.fromarray(picture), (left, top + row_strip))
        top += row_strip + heights[index] + GAP
    return panel


def append_legend(panel: Image.Image, entries: Sequence[LegendEntry]) -> Image.Image:
    """The panel with entries below, in lines as wide as the panel; entries wider than the panel widen it."""
    if not entries:
        return panel
    font, measure = ImageFont.load_default(size=_FONT_SIZE), ImageDraw.Draw(panel)
    strip_widths = [_SWATCH if len(colours) == 1 else _BAR_WIDTH for colours, _ in entries]
    lengths = [int(measure.textlength(text, font=font)) for _, text in entries]
    widths = [width + 5 + length + 14 for width, length in zip(strip_widths, lengths, strict=True)]
    total_width = max(panel.width, *(width + 2 * GAP for width in widths))
    places, x, line = [], GAP, 0
    for width in widths:
        if x > GAP and x + width > total_width:
            x, line = GAP, line + 1
        places.append((x, panel.height + line * LABEL_HEIGHT))
        x += width
    whole = Image.new("RGB", (total_width, panel.height + (line + 1) * LABEL_HEIGHT + GAP), "white")
    whole.paste(panel, (0, 0))
    draw = ImageDraw.Draw(whole)
    for (colours, text), (left, top), width in zip(entries, places, strip_widths, strict=True):
        steps = torch.from_numpy(np.linspace(0, len(colours) - 1, width).round().astype(np.int64))
        strip = to_pixels(colours[steps][None].expand(_SWATCH, width, 3))
        whole.paste(Image.fromarray(strip), (left, top + 1))
        draw.rectangle((left, top + 1, left + width - 1, top + _SWATCH), outline=(90, 90, 90))
        draw.text((left + width + 5, top + 1), text, fill="black", font=font)
    return whole


def save_picture(image: Picture | Image.Image, path: Path) -> None:
    """Writes a PNG atomically."""
    picture = Image.fromarray(to_pixels(image)) if isinstance(image, Tensor) else image
    with write_atomically(Path(path)) as temporary:
        picture.save(temporary, format="PNG")


def draw_words(text: str, size: tuple[int, int]) -> Picture:
    """A grey picture of (height, width) that says something, where there is nothing to show yet."""
    picture = Image.new("RGB", (size[1], size[0]), (90, 90, 90))
    font = ImageFont.load_default(size=max(min(size[1] // 16, 28), 8))
    ImageDraw.Draw(picture).text((size[1] / 2, size[0] / 2), text, fill="white", font=font, anchor="mm")
    return torch.from_numpy(np.array(picture)).float() / 255.0


def to_pixels(image: Picture) -> np.ndarray:
    """[0, 1] to 8 bits, rounded; NaN becomes black."""
    return (image.detach().cpu().float().nan_to_num(0.0).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).numpy()


def _write(draw: ImageDraw.ImageDraw, label: str, left: int, y: int, width: int) -> None:
    """Writes a label, cut with an ellipsis where it is wider than its place."""
    font = ImageFont.load_default(size=_FONT_SIZE)
    while label and draw.textlength(label, font=font) > width:
        label = label[:-2] + "…" if len(label) > 2 else ""
    draw.text((left, y + 1), label, fill="black", font=font)
