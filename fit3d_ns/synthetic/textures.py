"""Procedural colours of the synthetic rooms: what a material shows at a point of a solid.

All patterns are functions of position on the solid in metres, so every view of a point shows the same colour. `u` and
`v` run along a face; on upright faces v points up. Features are no finer than about 2 cm, which a splat can hold.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fit3d_ns.synthetic.materials import Colour, Material, hash_lattice, value_noise

_Rgb = Float[np.ndarray, "points 3"]
_Values = Float[np.ndarray, " points"]


@dataclass(frozen=True)
class SurfacePoints:
    """Where on a solid colours are wanted."""

    local: Float[np.ndarray, "points 3"]
    """Position along the solid's own axes, from its centre, in metres."""
    u: Float[np.ndarray, " points"]
    """Position along the face, in metres."""
    v: Float[np.ndarray, " points"]
    """Position across the face, in metres; upwards on upright faces."""
    half_u: Float[np.ndarray, " points"]
    """Half the face's length along u, in metres."""
    half_v: Float[np.ndarray, " points"]
    """Half the face's length along v, in metres."""


def compute_albedo(material: Material, unit_points: Float[np.ndarray, "points 3"], half_sizes: Colour) -> _Rgb:
    """Colour in [0, 1] at points of a solid, given in its unit space.

    Args:
        material: The solid's material.
        unit_points: Points on the surface in unit space (see `ray_tracing`).
        half_sizes: The solid's half sizes in metres.
    """
    points = _describe_points(unit_points, half_sizes)
    colour = PATTERNS[material.pattern](material, points)
    if material.grain > 0.0:
        coarse = value_noise(points.local / 0.3, material.seed)
        fine = value_noise(points.local / 0.07, material.seed + 1)
        finest = value_noise(points.local / 0.03, material.seed + 2)
        noise = 0.4 * coarse + 0.35 * fine + 0.25 * finest
        colour = colour * (1.0 + 2.0 * material.grain * (noise - 0.5))[:, None]
    return np.clip(colour, 0.0, 1.0).astype(np.float32)


def _describe_points(unit_points: Float[np.ndarray, "points 3"], half_sizes: Colour) -> SurfacePoints:
    half = np.asarray(half_sizes, dtype=np.float32)
    local = unit_points * half
    axis = np.argmax(np.abs(unit_points), axis=-1)
    # Faces across x show (y, z), across y (x, z), across z (x, y).
    first, second = np.array([1, 0, 0])[axis], np.array([2, 2, 1])[axis]
    rows = np.arange(len(local))
    return SurfacePoints(local, local[rows, first], local[rows, second], half[first], half[second])


def _mix(weights: _Values, first: Colour | _Rgb, second: Colour | _Rgb) -> _Rgb:
    """`first` where the weight is 0, `second` where it is 1."""
    weights = weights[:, None].astype(np.float32)
    return np.asarray(first, np.float32) * (1.0 - weights) + np.asarray(second, np.float32) * weights


def _draw(numbers: np.random.Generator, low: float, high: float) -> Colour:
    """A random colour with channels between two values."""
    red, green, blue = (float(value) for value in numbers.uniform(low, high, 3))
    return red, green, blue


def _plain(material: Material, points: SurfacePoints) -> _Rgb:
    return np.broadcast_to(np.asarray(material.colours[0], dtype=np.float32), points.local.shape)


def _wood(material: Material, points: SurfacePoints) -> _Rgb:
    """Veins along the longer side of the face."""
    along_u = points.half_u >= points.half_v
    along, across = np.where(along_u, points.u, points.v), np.where(along_u, points.v, points.u)
    bend = value_noise(np.stack([along / 0.35, across / 0.12, 0 * along], axis=-1), material.seed + 5)
    rings = 0.5 + 0.5 * np.sin(2.0 * np.pi * (across / material.scale + 1.6 * bend))
    return _mix(rings, material.colours[0], material.colours[1])


def _planks(material: Material, points: SurfacePoints) -> _Rgb:
    """Floor boards, each with its own tint, shifted from row to row."""
    row = np.floor(points.v / material.scale)
    shift = hash_lattice(row.astype(int), 0 * row.astype(int), 0 * row.astype(int), material.seed)
    column = np.floor(points.u / (material.scale * 6.0) + shift)
    tint = hash_lattice(row.astype(int), column.astype(int), 1 + 0 * row.astype(int), material.seed)
    colour = 0.5 * _wood(material, points) + 0.5 * _mix(tint, material.colours[0], material.colours[1])
    gap = np.abs(points.v / material.scale - row - 0.5) > 0.44
    return _mix(0.75 * gap, colour, material.colours[2])


def _tiles(material: Material, points: SurfacePoints) -> _Rgb:
    """A checker of two colours with joints."""
    u, v = points.u / material.scale, points.v / material.scale
    parity = (np.floor(u) + np.floor(v)) % 2.0
    joint = (np.abs(u - np.floor(u) - 0.5) > 0.45) | (np.abs(v - np.floor(v) - 0.5) > 0.45)
    return _mix(joint.astype(float), _mix(parity, material.colours[0], material.colours[1]), material.colours[2])


def _checks(material: Material, points: SurfacePoints) -> _Rgb:
    """Woven checks: two sets of stripes that add up."""
    weight = 0.5 * (np.floor(points.u / material.scale) % 2.0) + 0.5 * (np.floor(points.v / material.scale) % 2.0)
    return _mix(weight, material.colours[0], material.colours[1])


def _stripes(material: Material, points: SurfacePoints) -> _Rgb:
    """Upright stripes, every third one in the accent colour."""
    index = np.floor(points.u / material.scale)
    colour = _mix(index % 2.0, material.colours[0], material.colours[1])
    return _mix(((index % 6.0) == 3.0).astype(float), colour, material.colours[2])


def _wallpaper(material: Material, points: SurfacePoints) -> _Rgb:
    """A plain ground with shifted rows of rings, and broad soft stains that tell places apart."""
    v = points.v / material.scale
    u = points.u / material.scale + 0.5 * (np.floor(v) % 2.0)
    cell = np.floor(u).astype(int), np.floor(v).astype(int)
    radius = np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)
    size = 0.2 + 0.2 * hash_lattice(cell[0], cell[1], 0 * cell[0], material.seed)
    ring = (np.abs(radius - size) < 0.09).astype(float)
    stain = value_noise(points.local / 0.9, material.seed + 7)
    ground = _mix(0.6 * stain, material.colours[0], material.colours[1])
    return _mix(0.5 * ring, ground, material.colours[2])


def _bricks(material: Material, points: SurfacePoints) -> _Rgb:
    """Bricks of single tints with joints."""
    row = np.floor(points.v / (0.4 * material.scale))
    u = points.u / material.scale + 0.5 * (row % 2.0)
    tint = hash_lattice(np.floor(u).astype(int), row.astype(int), 0 * row.astype(int), material.seed)
    in_row = points.v / (0.4 * material.scale) - row
    joint = (np.abs(u - np.floor(u) - 0.5) > 0.44) | (np.abs(in_row - 0.5) > 0.4)
    return _mix(joint.astype(float), _mix(tint, material.colours[0], material.colours[1]), material.colours[2])


def _fabric(material: Material, points: SurfacePoints) -> _Rgb:
    """Blotches of two colours, as on a woven cover."""
    noise = value_noise(points.local / material.scale, material.seed + 3)
    return _mix(np.clip(3.0 * noise - 1.0, 0.0, 1.0), material.colours[0], material.colours[1])


def _leaves(material: Material, points: SurfacePoints) -> _Rgb:
    """Small blotches with accents."""
    noise = value_noise(points.local / material.scale, material.seed + 3)
    colour = _mix(noise, material.colours[0], material.colours[1])
    bright = value_noise(points.local / (0.7 * material.scale), material.seed + 4) > 0.68
    return _mix(bright.astype(float), colour, material.colours[2])


def _books(material: Material, points: SurfacePoints) -> _Rgb:
    """Spines of about `scale` metres with a band each."""
    index = np.floor(points.u / material.scale).astype(int)
    zero = 0 * index
    colour = np.stack([hash_lattice(index, zero, zero + channel, material.seed) for channel in range(3)], axis=-1)
    colour = 0.12 + 0.75 * colour
    height = 0.6 * hash_lattice(index, zero, zero + 5, material.seed) - 0.3
    band = np.abs(points.v / points.half_v - height) < 0.14
    edge = np.abs(points.u / material.scale - index - 0.5) > 0.44
    return _mix(0.6 * edge, _mix(0.8 * band, colour, material.colours[2]), (0.05, 0.05, 0.05))


def _painting(material: Material, points: SurfacePoints) -> _Rgb:
    """A picture within a frame: a sky and a ground with discs and bars, told apart by the seed."""
    numbers = np.random.default_rng(material.seed)
    u, v = points.u / points.half_u, points.v / points.half_v
    colour = _mix(np.clip(0.5 + 0.5 * v, 0, 1), _draw(numbers, 0.2, 0.9), _draw(numbers, 0.3, 1.0))
    colour = _mix((v < numbers.uniform(-0.5, 0.1) + 0.15 * np.sin(4 * u)).astype(float), colour, material.colours[1])
    for _ in range(6):
        centre, size = numbers.uniform(-0.7, 0.7, 2), numbers.uniform(0.1, 0.35, 2)
        if numbers.random() < 0.5:
            inside = ((u - centre[0]) / size[0]) ** 2 + ((v - centre[1]) / size[1]) ** 2 < 1.0
        else:
            inside = (np.abs(u - centre[0]) < size[0]) & (np.abs(v - centre[1]) < size[1])
        colour = _mix(inside.astype(float), colour, _draw(numbers, 0.05, 0.95))
    margin = np.minimum(points.half_u - np.abs(points.u), points.half_v - np.abs(points.v))
    return _mix((margin < 0.03).astype(float), colour, material.colours[2])


def _view(material: Material, points: SurfacePoints) -> _Rgb:
    """A window: sky with clouds, hills and a garden, behind a frame with bars."""
    u, v = points.u / points.half_u, points.v / points.half_v
    sky = _mix(np.clip(0.5 + 0.5 * v, 0, 1), (0.85, 0.92, 1.0), (0.45, 0.68, 0.98))
    clouds = value_noise(points.local / 0.22, material.seed + 9)
    colour = _mix(np.clip(3.0 * clouds - 1.5, 0, 1), sky, (1.0, 1.0, 1.0))
    hills = v < -0.15 + 0.2 * np.sin(2.3 * u + material.seed % 7)
    colour = _mix(hills.astype(float), colour, (0.33, 0.5, 0.3))
    garden = v < -0.55 + 0.1 * np.sin(5.0 * u)
    colour = _mix(garden.astype(float), colour, (0.5, 0.62, 0.25))
    margin = np.minimum(points.half_u - np.abs(points.u), points.half_v - np.abs(points.v))
    bars = (margin < 0.06) | (np.abs(points.u) < 0.03) | (np.abs(points.v - 0.3 * points.half_v) < 0.025)
    return _mix(bars.astype(float), colour, material.colours[2])


def _rug(material: Material, points: SurfacePoints) -> _Rgb:
    """Frames within frames, diamonds in the middle."""
    margin = np.minimum(points.half_u - np.abs(points.u), points.half_v - np.abs(points.v))
    colour = _mix(np.floor(margin / material.scale) % 2.0, material.colours[0], material.colours[1])
    diamonds = np.abs(points.u / 0.4 % 1.0 - 0.5) + np.abs(points.v / 0.4 % 1.0 - 0.5) < 0.33
    inner = margin > 3.0 * material.scale
    return _mix((inner & diamonds).astype(float), colour, material.colours[2])


def _panels(material: Material, points: SurfacePoints) -> _Rgb:
    """Fronts of doors and drawers: `scale` metres high panels of wood with dark joints and bright handles."""
    rows = np.maximum(np.round(2.0 * points.half_v / material.scale), 1.0)
    columns = np.maximum(np.round(2.0 * points.half_u / 0.55), 1.0)
    v = (points.v / points.half_v * 0.5 + 0.5) * rows
    u = (points.u / points.half_u * 0.5 + 0.5) * columns
    height, width = 2.0 * points.half_v / rows, 2.0 * points.half_u / columns
    from_middle_v, from_middle_u = (v % 1.0 - 0.5) * height, (u % 1.0 - 0.5) * width
    to_edge = np.minimum(0.5 * height - np.abs(from_middle_v), 0.5 * width - np.abs(from_middle_u))
    colour = _wood(material, points)
    colour = _mix(0.35 * ((to_edge > 0.05) & (to_edge < 0.075)), colour, (0.1, 0.08, 0.06))
    colour = _mix((to_edge < 0.012).astype(float), colour, (0.08, 0.06, 0.05))
    handle = (np.abs(from_middle_v) < 0.02) & (np.abs(from_middle_u) < 0.09)
    return _mix(handle.astype(float), colour, material.colours[2])


def _display(material: Material, points: SurfacePoints) -> _Rgb:
    """A switched-on screen with windows and lines."""
    u, v = points.u / points.half_u, points.v / points.half_v
    colour = _mix(np.clip(0.5 + 0.3 * u + 0.3 * v, 0, 1), material.colours[0], material.colours[1])
    window = (np.abs(u + 0.3) < 0.45) & (np.abs(v - 0.1) < 0.6)
    lines = window & (np.floor(v * 9.0) % 2 == 0) & (u < -0.3 + 0.35 * np.sin(7.0 * np.floor(v * 9.0)))
    colour = _mix(window.astype(float), colour, (0.92, 0.93, 0.95))
    colour = _mix(lines.astype(float), colour, (0.2, 0.25, 0.4))
    frame = (np.abs(u) > 0.94) | (np.abs(v) > 0.91)
    return _mix(frame.astype(float), colour, (0.03, 0.03, 0.03))


PATTERNS: dict[str, Callable[[Material, SurfacePoints], _Rgb]] = {
    "plain": _plain,
    "wood": _wood,
    "planks": _planks,
    "tiles": _tiles,
    "checks": _checks,
    "stripes": _stripes,
    "wallpaper": _wallpaper,
    "bricks": _bricks,
    "fabric": _fabric,
    "leaves": _leaves,
    "books": _books,
    "painting": _painting,
    "view": _view,
    "rug": _rug,
    "panels": _panels,
    "display": _display,
}
