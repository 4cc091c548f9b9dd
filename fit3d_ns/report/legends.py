"""Legends below a panel: named colours, and bars from one value to another. Drawn with Pillow, as the panels are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from fit3d_ns.analysis.pictures import BACKGROUND, GAP, INK, LABEL_HEIGHT, load_font, to_pixels

_SWATCH = 14
_BAR_WIDTH = 160


@dataclass(frozen=True)
class LegendEntry:
    """A strip of colours with words behind it."""

    colours: Float[Tensor, "steps 3"]
    """One colour for a swatch, many for a bar, in [0, 1]."""
    text: str
    """What they mean."""


def append_legend(panel: Image.Image, entries: Sequence[LegendEntry]) -> Image.Image:
    """The panel with entries below, in lines as wide as the panel; entries wider than the panel widen it."""
    font = load_font()
    measure = ImageDraw.Draw(panel)
    widths = [_strip_width(entry) + 5 + int(measure.textlength(entry.text, font=font)) + 14 for entry in entries]
    total_width = max(panel.width, *(width + 2 * GAP for width in widths)) if entries else panel.width
    places, x, line = [], GAP, 0
    for width in widths:
        if x > GAP and x + width > total_width:
            x, line = GAP, line + 1
        places.append((x, panel.height + line * LABEL_HEIGHT))
        x += width
    lines = line + 1 if entries else 0
    height = panel.height + lines * LABEL_HEIGHT + (GAP if lines else 0)
    whole = Image.new("RGB", (total_width, height), BACKGROUND)
    whole.paste(panel, (0, 0))
    draw = ImageDraw.Draw(whole)
    for entry, (left, top) in zip(entries, places, strict=True):
        width = _strip_width(entry)
        whole.paste(_draw_strip(entry.colours, width), (left, top + 1))
        draw.rectangle((left, top + 1, left + width - 1, top + _SWATCH), outline=(90, 90, 90))
        draw.text((left + width + 5, top + 1), entry.text, fill=INK, font=font)
    return whole


def _strip_width(entry: LegendEntry) -> int:
    return _SWATCH if len(entry.colours) == 1 else _BAR_WIDTH


def _draw_strip(colours: Float[Tensor, "steps 3"], width: int) -> Image.Image:
    positions = torch.from_numpy(np.linspace(0, len(colours) - 1, width).round().astype(np.int64))
    return Image.fromarray(to_pixels(colours[positions][None].expand(_SWATCH, width, 3)))
