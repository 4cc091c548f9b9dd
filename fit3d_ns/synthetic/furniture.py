"""Furniture of the synthetic rooms, each piece a list of solids.

A piece stands on the floor of its own frame: x along the wall behind it, y away from the wall, z up, the wall at
y = 0, in metres. `place` puts it into the room.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fit3d_ns.synthetic.materials import Colour, Material
from fit3d_ns.synthetic.ray_tracing import Shape, Solid

CLASSES = (
    "wall",
    "floor",
    "ceiling",
    "door",
    "window",
    "curtain",
    "rug",
    "table",
    "chair",
    "sofa",
    "bed",
    "cabinet",
    "shelf",
    "books",
    "lamp",
    "picture",
    "plant",
    "screen",
)
"""Names of the label indices 0, 1, ..."""

_WOODS: tuple[tuple[Colour, Colour, Colour], ...] = (
    ((0.62, 0.42, 0.24), (0.48, 0.30, 0.16), (0.75, 0.72, 0.65)),
    ((0.80, 0.66, 0.45), (0.68, 0.52, 0.33), (0.25, 0.22, 0.20)),
    ((0.36, 0.23, 0.15), (0.26, 0.16, 0.10), (0.82, 0.74, 0.50)),
    ((0.86, 0.84, 0.80), (0.76, 0.73, 0.68), (0.35, 0.33, 0.32)),
)
_CLOTHS: tuple[tuple[Colour, Colour, Colour], ...] = (
    ((0.20, 0.36, 0.55), (0.33, 0.50, 0.68), (0.92, 0.86, 0.70)),
    ((0.62, 0.24, 0.20), (0.76, 0.40, 0.32), (0.94, 0.88, 0.78)),
    ((0.28, 0.45, 0.32), (0.42, 0.58, 0.42), (0.90, 0.80, 0.45)),
    ((0.55, 0.50, 0.44), (0.70, 0.65, 0.58), (0.30, 0.28, 0.40)),
    ((0.50, 0.30, 0.50), (0.64, 0.46, 0.62), (0.95, 0.85, 0.60)),
)


class Palette:
    """Draws materials for one room; pieces of one style share their wood."""

    def __init__(self, numbers: np.random.Generator) -> None:
        self.numbers = numbers
        self._style = self._choose(_WOODS)

    def wood(self, pattern: str = "wood", scale: float = 0.07) -> Material:
        """The room's wood, or now and then another one."""
        colours = self._style if self.numbers.random() < 0.6 else self._choose(_WOODS)
        return Material(pattern, colours, scale, self.seed())

    def cloth(self, pattern: str | None = None, scale: float = 0.1) -> Material:
        """A cover of two colours."""
        chosen = pattern or str(self.numbers.choice(["fabric", "checks", "stripes", "fabric"]))
        return Material(chosen, self._choose(_CLOTHS), scale, self.seed(), grain=0.15)

    def seed(self) -> int:
        """A number that tells solids apart."""
        return int(self.numbers.integers(1 << 30))

    def _choose(self, options: Sequence[tuple[Colour, Colour, Colour]]) -> tuple[Colour, Colour, Colour]:
        return options[int(self.numbers.integers(len(options)))]


def box(label: str, material: Material, low: Colour, high: Colour) -> Solid:
    """A box between two corners of the piece's frame."""
    return _solid("box", label, material, low, high)


def place(piece: Sequence[Solid], x: float, y: float, yaw: float, z: float = 0.0) -> list[Solid]:
    """Turns a piece about its origin and moves it there."""
    cosine, sine = math.cos(yaw), math.sin(yaw)
    return [
        replace(
            solid,
            centre=(
                x + cosine * solid.centre[0] - sine * solid.centre[1],
                y + sine * solid.centre[0] + cosine * solid.centre[1],
                z + solid.centre[2],
            ),
            yaw=solid.yaw + yaw,
        )
        for solid in piece
    ]


def build_table(palette: Palette, width: float, depth: float, is_round: bool = False) -> list[Solid]:
    """A table top on legs, 0.74 m high, its middle over the origin."""
    top, leg = palette.wood(scale=0.09), palette.wood()
    shape: Shape = "cylinder" if is_round else "box"
    solids = [_solid(shape, "table", top, (-width / 2, -depth / 2, 0.70), (width / 2, depth / 2, 0.74))]
    inset = 0.3 if is_round else 0.08
    for side_x in (-1, 1):
        for side_y in (-1, 1):
            x, y = side_x * (width / 2 - inset), side_y * (depth / 2 - inset)
            solids.append(_solid("box", "table", leg, (x - 0.035, y - 0.035, 0.0), (x + 0.035, y + 0.035, 0.70)))
    return solids


def build_chair(palette: Palette) -> list[Solid]:
    """A chair facing +y, its seat's middle over the origin."""
    frame, seat = palette.wood(), palette.cloth(scale=0.06)
    solids = [
        box("chair", seat, (-0.22, -0.22, 0.43), (0.22, 0.22, 0.48)),
        box("chair", seat, (-0.20, -0.24, 0.62), (0.20, -0.20, 0.92)),
    ]
    for x in (-0.19, 0.19):
        solids.append(box("chair", frame, (x - 0.025, 0.15, 0.0), (x + 0.025, 0.20, 0.43)))
        solids.append(box("chair", frame, (x - 0.025, -0.24, 0.0), (x + 0.025, -0.20, 0.90)))
    return solids


def build_sofa(palette: Palette) -> list[Solid]:
    """A sofa of 1.9 x 0.85 m with cushions."""
    cover = palette.cloth("fabric", scale=0.16)
    solids = [
        box("sofa", cover, (-0.95, 0.02, 0.08), (0.95, 0.85, 0.32)),
        box("sofa", cover, (-0.95, 0.02, 0.32), (0.95, 0.22, 0.82)),
        box("sofa", cover, (-0.95, 0.02, 0.32), (-0.77, 0.85, 0.58)),
        box("sofa", cover, (0.77, 0.02, 0.32), (0.95, 0.85, 0.58)),
    ]
    seat = replace(cover, seed=palette.seed())
    for x in (-0.385, 0.385):
        solids.append(box("sofa", seat, (x - 0.375, 0.22, 0.32), (x + 0.375, 0.83, 0.45)))
    for x in (-0.55, 0.5):
        cushion = palette.cloth(scale=0.07)
        solids.append(_solid("ellipsoid", "sofa", cushion, (x - 0.22, 0.18, 0.44), (x + 0.22, 0.42, 0.82)))
    return solids


def build_bed(palette: Palette) -> list[Solid]:
    """A bed of 2.0 x 0.95 m along the wall, its head at -x."""
    wood = palette.wood()
    sheet = Material("fabric", ((0.88, 0.87, 0.84), (0.8, 0.8, 0.8), (1.0, 1.0, 1.0)), 0.3, palette.seed())
    return [
        box("bed", wood, (-1.0, 0.03, 0.1), (1.0, 0.95, 0.3)),
        box("bed", wood, (-1.05, 0.03, 0.0), (-1.0, 0.95, 0.95)),
        box("bed", wood, (1.0, 0.03, 0.0), (1.05, 0.95, 0.5)),
        box("bed", sheet, (-0.98, 0.05, 0.3), (0.98, 0.93, 0.5)),
        box("bed", palette.cloth("checks", scale=0.12), (-0.35, 0.04, 0.3), (0.99, 0.96, 0.55)),
        _solid("ellipsoid", "bed", palette.cloth("stripes", scale=0.06), (-0.95, 0.15, 0.44), (-0.5, 0.83, 0.66)),
    ]


def build_cabinet(palette: Palette, width: float, height: float, depth: float, panel: float) -> list[Solid]:
    """A closed cabinet with fronts of `panel` metres height on a dark base."""
    base = Material("plain", ((0.12, 0.10, 0.09),) * 3, grain=0.1, seed=palette.seed())
    return [
        box("cabinet", base, (-width / 2 + 0.02, 0.02, 0.0), (width / 2 - 0.02, depth - 0.04, 0.07)),
        box("cabinet", palette.wood("panels", panel), (-width / 2, 0.02, 0.07), (width / 2, depth, height)),
    ]


def build_shelf(palette: Palette) -> list[Solid]:
    """A shelf of 1.0 x 0.3 x 1.85 m, full of books."""
    wood, depth, height, rows = palette.wood(), 0.30, 1.85, 5
    solids = [
        box("shelf", wood, (-0.5, 0.02, 0.0), (-0.47, depth, height)),
        box("shelf", wood, (0.47, 0.02, 0.0), (0.5, depth, height)),
        box("shelf", wood, (-0.47, 0.02, 0.0), (0.47, 0.05, height)),
    ]
    for row in range(rows + 1):
        z = row * (height - 0.03) / rows
        solids.append(box("shelf", wood, (-0.47, 0.05, z), (0.47, depth, z + 0.03)))
    for row in range(rows):
        z, x = row * (height - 0.03) / rows + 0.03, -0.46
        while x < 0.25:
            width = float(palette.numbers.uniform(0.2, 0.38))
            top = z + float(palette.numbers.uniform(0.2, 0.29))
            solids.append(_stack_of_books(palette, (x, 0.07, z), (min(x + width, 0.46), depth - 0.03, top)))
            x += width + float(palette.numbers.uniform(0.01, 0.12))
    return solids


def build_desk(palette: Palette) -> list[Solid]:
    """A desk of 1.2 x 0.6 m with a screen, books and a chair."""
    solids = place(build_table(palette, 1.2, 0.6), 0.0, 0.33, 0.0)
    display = Material(
        "display", ((0.1, 0.25, 0.45), (0.3, 0.55, 0.7), (1.0, 1.0, 1.0)), seed=palette.seed(), grain=0.0
    )
    dark = Material("plain", ((0.1, 0.1, 0.11),) * 3, grain=0.1)
    solids.append(box("screen", display, (-0.3, 0.16, 0.84), (0.3, 0.19, 1.20)))
    solids.append(_solid("cylinder", "screen", dark, (-0.1, 0.08, 0.74), (0.1, 0.26, 0.76)))
    solids.append(box("screen", dark, (-0.03, 0.14, 0.76), (0.03, 0.16, 0.95)))
    solids.append(_stack_of_books(palette, (0.36, 0.1, 0.74), (0.56, 0.3, 0.98)))
    return solids + place(build_chair(palette), 0.05, 0.78, math.pi + float(palette.numbers.uniform(-0.3, 0.3)))


def build_plant(palette: Palette, height: float = 1.3) -> list[Solid]:
    """A pot with a bush of leaves, its middle 0.25 m from the wall."""
    pot = Material("checks", ((0.70, 0.38, 0.26), (0.78, 0.5, 0.36), (0.9, 0.8, 0.6)), 0.09, palette.seed())
    stem = Material("plain", ((0.32, 0.24, 0.14),) * 3, seed=palette.seed())
    width = 0.15 * min(1.0, 0.4 + 0.6 * height)
    solids = [
        _solid("cylinder", "plant", pot, (-width, 0.25 - width, 0.0), (width, 0.25 + width, 0.24 * height)),
        _solid("cylinder", "plant", stem, (-0.02, 0.23, 0.0), (0.02, 0.27, 0.75 * height)),
    ]
    for _ in range(7):
        x, y = (palette.numbers.uniform(-0.11, 0.11, 2) * min(1.0, height) + [0.0, 0.26]).tolist()
        z, size = (
            palette.numbers.uniform(0.45, 0.88) * height,
            palette.numbers.uniform(0.1, 0.15) * min(1.0, 0.25 + 0.75 * height),
        )
        green = ((0.16, 0.36, 0.14), (0.30, 0.52, 0.20), (0.55, 0.70, 0.30))
        leaves = Material("leaves", green, 0.06, palette.seed(), grain=0.3)
        low, high = (x - size, y - size, z - size), (x + size, y + size, z + size)
        solids.append(_solid("ellipsoid", "plant", leaves, low, high))
    return solids


def build_floor_lamp(palette: Palette) -> list[Solid]:
    """A lamp with a shade at 1.5 m, its middle 0.25 m from the wall."""
    metal = Material("plain", ((0.30, 0.29, 0.28),) * 3, grain=0.1)
    glow = ((1.0, 0.93, 0.75), (0.95, 0.85, 0.62), (0.9, 0.7, 0.4))
    shade = Material("stripes", glow, 0.06, emission=1.0, grain=0.08)
    return [
        _solid("cylinder", "lamp", metal, (-0.14, 0.11, 0.0), (0.14, 0.39, 0.03)),
        _solid("cylinder", "lamp", metal, (-0.02, 0.23, 0.03), (0.02, 0.27, 1.40)),
        _solid("cylinder", "lamp", shade, (-0.18, 0.07, 1.38), (0.18, 0.43, 1.66)),
    ]


def _stack_of_books(palette: Palette, low: Colour, high: Colour) -> Solid:
    books = Material("books", ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (0.92, 0.88, 0.75)), 0.045, palette.seed(), grain=0.08)
    return box("books", books, low, high)


def _solid(shape: Shape, label: str, material: Material, low: Colour, high: Colour) -> Solid:
    centre = tuple(0.5 * (a + b) for a, b in zip(low, high, strict=True))
    half_sizes = tuple(0.5 * (b - a) for a, b in zip(low, high, strict=True))
    return Solid(shape, centre, half_sizes, material, label)  # type: ignore[arg-type]
