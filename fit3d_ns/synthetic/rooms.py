"""Procedural furnished rooms: solids and lights.

A room's floor is z = 0, its middle x = y = 0; x runs along its width, y along its depth, in metres.
Furniture stands along the four walls, a table with chairs in the middle.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fit3d_ns.synthetic.furniture import (
    Palette,
    box,
    build_bed,
    build_cabinet,
    build_chair,
    build_desk,
    build_floor_lamp,
    build_plant,
    build_shelf,
    build_sofa,
    build_table,
    place,
)
from fit3d_ns.synthetic.lighting import AreaLight
from fit3d_ns.synthetic.materials import Colour, Material
from fit3d_ns.synthetic.ray_tracing import Solid

_CORNER = 1.0
"""Metres at both ends of the two walls along x that are left to the furniture of the other walls."""


@dataclass(frozen=True)
class Room:
    """A furnished room."""

    size: tuple[float, float, float]
    """Width (x), depth (y) and height (z) in metres."""
    solids: list[Solid]
    """Everything there is, walls included."""
    lights: list[AreaLight]
    """What shines."""
    ambient: Colour
    """Light from everywhere."""


@dataclass(frozen=True)
class _Wall:
    length: float
    """Metres along which furniture may stand."""
    x: float
    """Position of the wall's middle in the room."""
    y: float
    yaw: float
    """Turn that brings the frame of a piece (wall at y = 0) to this wall."""


@dataclass(frozen=True)
class _Piece:
    width: float
    """Metres it takes along the wall."""
    is_tall: bool
    """Nothing hangs on the wall behind it."""
    build: Callable[[], list[Solid]]


def build_room(numbers: np.random.Generator) -> Room:
    """A room of its own for each state of the generator; all rooms have furniture of the same classes."""
    size = (float(numbers.uniform(4.8, 5.6)), float(numbers.uniform(4.4, 5.2)), float(numbers.uniform(2.5, 2.8)))
    palette = Palette(numbers)
    solids = _build_shell(palette, size)
    walls = _list_walls(size)
    blocked: list[list[tuple[float, float]]] = [[] for _ in walls]
    lights = []
    for wall, furniture, taken in zip(walls, _distribute(palette, walls), blocked, strict=True):
        for piece, x in furniture:
            local = place(piece.build(), x, 0.0, 0.0)
            solids += _hang(local, wall)
            if piece.is_tall:
                taken.append((x - 0.5 * piece.width, x + 0.5 * piece.width))
            lights += [_shine_from(solid) for solid in _hang(local, wall) if solid.material.emission > 0.0]
    for index in numbers.permutation(len(walls))[:2]:
        hung = _build_window(palette, walls[index], blocked[index])
        solids += _hang(hung, walls[index])
        lights += [_shine_through(_hang([solid], walls[index])[0]) for solid in hung if solid.label == "window"]
    for wall, taken in zip(walls, blocked, strict=True):
        solids += _hang(_build_pictures(palette, wall, taken), wall)
    solids += _build_dining_place(palette)
    pendant = _build_pendant(palette, size[2])
    solids += pendant
    lights.append(_shine_from(pendant[-1], strength=1.15))
    return Room(size, solids, lights, ambient=(0.44, 0.44, 0.46))


def _list_walls(size: tuple[float, float, float]) -> list[_Wall]:
    width, depth, _ = size
    return [
        _Wall(width - 2.0 * _CORNER, 0.0, -0.5 * depth, 0.0),
        _Wall(depth - 0.1, 0.5 * width, 0.0, 0.5 * math.pi),
        _Wall(width - 2.0 * _CORNER, 0.0, 0.5 * depth, math.pi),
        _Wall(depth - 0.1, -0.5 * width, 0.0, -0.5 * math.pi),
    ]


def _hang(piece: list[Solid], wall: _Wall) -> list[Solid]:
    return place(piece, wall.x, wall.y, wall.yaw)


def _distribute(palette: Palette, walls: list[_Wall]) -> list[list[tuple[_Piece, float]]]:
    """Pieces and their places along each wall; large ones first, each to a random wall that still has room."""
    numbers = palette.numbers
    pieces = [
        _Piece(2.15, False, lambda: build_bed(palette)),
        _Piece(1.95, False, lambda: build_sofa(palette)),
        _Piece(1.35, True, lambda: _build_sideboard(palette)),
        _Piece(1.25, True, lambda: build_desk(palette)),
        _Piece(1.15, True, lambda: build_cabinet(palette, 1.1, 1.95, 0.58, 0.95)),
        _Piece(1.05, True, lambda: build_shelf(palette)),
        _Piece(1.0, True, lambda: [box("door", palette.wood("panels", 0.95), (-0.45, 0.0, 0.0), (0.45, 0.05, 2.05))]),
        _Piece(0.6, True, lambda: build_plant(palette)),
        _Piece(0.5, True, lambda: build_floor_lamp(palette)),
    ]
    free = [wall.length for wall in walls]
    chosen: list[list[_Piece]] = [[] for _ in walls]
    for piece in pieces:
        fitting = [index for index, length in enumerate(free) if length >= piece.width]
        if fitting:
            index = int(numbers.choice(fitting))
            free[index] -= piece.width
            chosen[index].append(piece)
    places = []
    for wall, length, on_wall in zip(walls, free, chosen, strict=True):
        order = [on_wall[index] for index in numbers.permutation(len(on_wall))]
        gaps = numbers.dirichlet(np.full(len(order) + 1, 2.0)) * length
        x, placed = -0.5 * wall.length, []
        for piece, gap in zip(order, gaps, strict=False):
            placed.append((piece, float(x + gap + 0.5 * piece.width)))
            x += gap + piece.width
        places.append(placed)
    return places


def _build_shell(palette: Palette, size: tuple[float, float, float]) -> list[Solid]:
    """Floor, ceiling and four walls, each a slab."""
    numbers = palette.numbers
    w, d, h = size[0] / 2, size[1] / 2, size[2]
    thick = 0.1
    grounds: list[tuple[Colour, Colour, Colour]] = [
        ((0.86, 0.80, 0.68), (0.78, 0.72, 0.60), (0.62, 0.50, 0.36)),
        ((0.70, 0.80, 0.80), (0.62, 0.73, 0.75), (0.93, 0.93, 0.88)),
        ((0.82, 0.74, 0.72), (0.75, 0.66, 0.66), (0.58, 0.36, 0.36)),
        ((0.78, 0.82, 0.70), (0.70, 0.75, 0.62), (0.45, 0.52, 0.36)),
    ]
    ground = grounds[numbers.integers(len(grounds))]
    brick = ((0.72, 0.42, 0.32), (0.60, 0.34, 0.27), (0.82, 0.78, 0.72))
    accent = int(numbers.integers(4))
    pattern, repeat = (("wallpaper", 0.3), ("stripes", 0.11), ("fabric", 0.5))[numbers.integers(3)]
    papers = [
        Material("bricks", brick, 0.28, palette.seed())
        if index == accent
        else Material(pattern, ground, repeat, palette.seed(), grain=0.16)
        for index in range(4)
    ]
    floor = (
        palette.wood("planks", 0.14)
        if numbers.random() < 0.6
        else Material("tiles", ((0.80, 0.76, 0.70), (0.62, 0.56, 0.50), (0.4, 0.38, 0.36)), 0.4, palette.seed())
    )
    ceiling = Material("tiles", ((0.93, 0.93, 0.91), (0.88, 0.88, 0.86), (0.76, 0.75, 0.73)), 0.6, palette.seed(), 0.1)
    return [
        box("floor", floor, (-w - thick, -d - thick, -thick), (w + thick, d + thick, 0.0)),
        box("ceiling", ceiling, (-w - thick, -d - thick, h), (w + thick, d + thick, h + thick)),
        # Walls overlap in the corners, so that no ray slips through by rounding.
        box("wall", papers[0], (-w - thick, -d - thick, -thick), (w + thick, -d, h + thick)),
        box("wall", papers[1], (w, -d - thick, -thick), (w + thick, d + thick, h + thick)),
        box("wall", papers[2], (-w - thick, d, -thick), (w + thick, d + thick, h + thick)),
        box("wall", papers[3], (-w - thick, -d - thick, -thick), (-w, d + thick, h + thick)),
    ]


def _build_sideboard(palette: Palette) -> list[Solid]:
    """A low cabinet with a television."""
    show = Material("painting", ((0.5, 0.5, 0.5), (0.3, 0.45, 0.3), (0.04, 0.04, 0.05)), seed=palette.seed(), grain=0.0)
    dark = Material("plain", ((0.1, 0.1, 0.11),) * 3, grain=0.1)
    return [
        *build_cabinet(palette, 1.3, 0.62, 0.42, 0.3),
        box("screen", show, (-0.45, 0.16, 0.70), (0.45, 0.20, 1.24)),
        box("screen", dark, (-0.15, 0.10, 0.62), (0.15, 0.26, 0.70)),
    ]


def _build_window(palette: Palette, wall: _Wall, taken: list[tuple[float, float]]) -> list[Solid]:
    """A window with curtains where the wall is free; nothing if it is nowhere free enough."""
    free = _find_free(wall, taken, 1.9)
    if free is None:
        return []
    middle = float(palette.numbers.uniform(free[0] + 0.95, free[1] - 0.95))
    taken.append((middle - 0.95, middle + 0.95))
    view = Material(
        "view", ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.95, 0.95, 0.93)), seed=palette.seed(), grain=0.0, emission=1.0
    )
    cloth = palette.cloth("stripes", scale=0.05)
    return [
        box("window", view, (middle - 0.7, 0.0, 1.0), (middle + 0.7, 0.03, 2.1)),
        box("curtain", cloth, (middle - 0.93, 0.0, 0.85), (middle - 0.66, 0.08, 2.25)),
        box("curtain", cloth, (middle + 0.66, 0.0, 0.85), (middle + 0.93, 0.08, 2.25)),
    ]


def _build_pictures(palette: Palette, wall: _Wall, taken: list[tuple[float, float]]) -> list[Solid]:
    """Pictures wherever the wall is free, at most three."""
    numbers, solids = palette.numbers, []
    for _ in range(3):
        width, height = float(numbers.uniform(0.45, 0.9)), float(numbers.uniform(0.4, 0.7))
        free = _find_free(wall, taken, width + 0.2)
        if free is None:
            continue
        middle = float(numbers.uniform(free[0] + 0.5 * width + 0.1, free[1] - 0.5 * width - 0.1))
        taken.append((middle - 0.5 * width - 0.1, middle + 0.5 * width + 0.1))
        z = float(numbers.uniform(1.5, 1.7))
        frame: Colour = (0.15, 0.1, 0.07) if numbers.random() < 0.5 else (0.85, 0.78, 0.55)
        show = Material("painting", ((0.5, 0.5, 0.5), (0.35, 0.42, 0.25), frame), seed=palette.seed(), grain=0.06)
        low, high = (middle - width / 2, 0.0, z - height / 2), (middle + width / 2, 0.03, z + height / 2)
        solids.append(box("picture", show, low, high))
    return solids


def _find_free(wall: _Wall, taken: list[tuple[float, float]], width: float) -> tuple[float, float] | None:
    """The widest stretch of the wall at least `width` metres wide that nothing takes, or None."""
    stretches, start = [], -0.5 * wall.length
    for low, high in [*sorted(taken), (0.5 * wall.length, 0.5 * wall.length)]:
        stretches.append((start, low))
        start = max(start, high)
    widest = max(stretches, key=lambda stretch: stretch[1] - stretch[0])
    return widest if widest[1] - widest[0] >= width else None


def _build_dining_place(palette: Palette) -> list[Solid]:
    """Rug, table, four chairs and what stands on the table, in the middle of the room."""
    numbers = palette.numbers
    is_round = bool(numbers.random() < 0.5)
    width, depth = (0.95, 0.95) if is_round else (1.15, 0.75)
    rug = Material("rug", palette.cloth().colours, 0.12, palette.seed())
    solids = [box("rug", rug, (-1.25, -0.95, 0.0), (1.25, 0.95, 0.012)), *build_table(palette, width, depth, is_round)]
    chair = build_chair(palette)
    for x, y, yaw in ((0.0, -1.0, 0.0), (1.0, 0.0, 0.5), (0.0, 1.0, 1.0), (-1.0, 0.0, 1.5)):
        out = 0.16 + float(numbers.uniform(-0.05, 0.08))
        turn = yaw * math.pi + float(numbers.uniform(-0.25, 0.25))
        solids += place(chair, x * (width / 2 + out), y * (depth / 2 + out), turn)
    solids += place(build_plant(palette, 0.42), -0.2, -0.2, float(numbers.uniform(0, 1)), z=0.74)
    books = Material("books", ((0.5, 0.5, 0.5),) * 2 + ((0.9, 0.85, 0.7),), 0.05, palette.seed())
    pile = [box("books", books, (-0.12, -0.09, 0.0), (0.12, 0.09, 0.10))]
    return solids + place(pile, 0.25, 0.1, float(numbers.uniform(0, 3)), z=0.74)


def _build_pendant(palette: Palette, height: float) -> list[Solid]:
    """A lamp that hangs from the ceiling; the shade comes last."""
    cord = Material("plain", ((0.15, 0.15, 0.15),) * 3, grain=0.0)
    shade = Material("stripes", ((1.0, 0.95, 0.82), (0.96, 0.88, 0.7), (0.95, 0.75, 0.45)), 0.08, emission=1.0)
    pieces = [
        box("lamp", cord, (-0.012, -0.012, height - 0.45), (0.012, 0.012, height)),
        box("lamp", shade, (-0.26, -0.26, height - 0.70), (0.26, 0.26, height - 0.45)),
    ]
    x, y = float(palette.numbers.uniform(-0.2, 0.2)), float(palette.numbers.uniform(-0.2, 0.2))
    return place(pieces, x, y, float(palette.numbers.uniform(0, 1)))


def _shine_from(solid: Solid, strength: float = 0.5) -> AreaLight:
    """Light all round a lamp's shade."""
    directions = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    points = np.asarray(solid.centre) + 0.9 * directions * np.asarray(solid.half_sizes)
    return AreaLight(points.astype(np.float32), (strength, 0.92 * strength, 0.76 * strength))


def _shine_through(window: Solid) -> AreaLight:
    """Daylight from five points of a window, into the room."""
    inward = window.axes[1]
    spread = np.array([[0, 0], [-0.6, -0.6], [0.6, -0.6], [-0.6, 0.6], [0.6, 0.6]])
    along, up = window.axes[0] * window.half_sizes[0], window.axes[2] * window.half_sizes[2]
    points = np.asarray(window.centre) + 0.1 * inward + spread[:, :1] * along + spread[:, 1:] * up
    x, y, z = (float(value) for value in inward)
    return AreaLight(points.astype(np.float32), (1.15, 1.2, 1.25), (x, y, z))
