"""Toy rooms: furnished by chance, walked through, and rendered exactly: colour, z-depth and labels, through any lens.

Every solid is convex and has a *unit space*: moved to its centre, turned by its yaw and divided by its half sizes, it
is the unit ball in its first `num_round` axes and [-1, 1] in the others. Distances along a ray do not change.
Points and rays are float32 columns; the world is in metres, z up.

A piece of `furniture.csv` is made of parts between two corners, in a frame of its own: x along the wall behind it, y
away from that wall, z up. Of the materials of `materials.csv` with the same name one is drawn.
"""

import colorsys
import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.geometry.undistortion import find_rays

Triple = tuple[float, float, float]
Columns = Float[np.ndarray, "3 points"]
Values = Float[np.ndarray, " points"]
Indices = Int[np.ndarray, " points"]

SHELL = ("wall", "floor", "ceiling")
_FURNITURE = "door window curtain rug table chair sofa bed cabinet shelf books lamp picture plant screen"
CLASSES = (*SHELL, *_FURNITURE.split())
"""Names of the label indices 0, 1, ..."""

_ROUND_AXES = {"box": 0, "cylinder": 2, "ellipsoid": 3}
_RAYS = ((0.0, 0.0), (0.0, -0.38), (0.33, 0.19), (-0.33, 0.19))
"""Offsets of a pixel's rays from its centre; depth, label and point are those of the first."""
_LIGHT_POINTS = ((0.6, 0.6, 0.6), (0.6, -0.6, -0.6), (-0.6, 0.6, -0.6), (-0.6, -0.6, 0.6))
"""Point of a light, in unit space, that each of them is lit from: several hard shadows make a soft one."""
_AMBIENT, _LIGHTS = 0.42, {"lamp": (0.55, 0.51, 0.42), "window": (0.56, 0.59, 0.62)}
"""Light from everywhere, and what bright solids of a class add to a surface nearby that faces them."""


@dataclass(frozen=True)
class Material:
    """How a solid looks: a pattern that `_paint` knows; bright ones are not shaded and throw no shadows."""

    pattern: str
    is_bright: bool
    cells: tuple[float, ...]
    """Width and height of cells, shift from row to row in widths, width of joints, radius of dots; in metres."""
    colours: tuple[float, ...]
    """RGB in [0, 1] of main, other and accent colour."""
    seed: int = 0


@dataclass(frozen=True)
class Solid:
    """A box (`num_round` 0), an upright elliptic cylinder (2) or an ellipsoid (3), turned about z by `yaw` radians."""

    label: str
    material: Material
    num_round: int
    centre: Triple
    half_sizes: Triple
    yaw: float = 0.0

    @cached_property
    def to_unit_space(self) -> Float[np.ndarray, "3 3"]:
        """Takes directions of the world to those of unit space."""
        cosine, sine = np.cos(self.yaw), np.sin(self.yaw)
        axes = np.array([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]])
        return (axes / np.array(self.half_sizes)[:, None]).astype(np.float32)


@dataclass(frozen=True)
class Room:
    """A closed room of a width (x), depth (y) and height, its floor at z = 0 and its middle at x = y = 0."""

    size: Triple
    solids: list[Solid]


@dataclass(frozen=True)
class View:
    """What a camera sees: colour, and of the pixel centres z-depth in metres, class and world point."""

    image: UInt8[Tensor, "height width 3"]
    depth: Float[Tensor, "height width"]
    labels: UInt8[Tensor, "height width"]
    points: Float[Tensor, "height width 3"]


def build_room(numbers: np.random.Generator) -> Room:
    """A room of its own for each state of the generator, with furniture along the walls and a table in the middle."""
    size = width, depth, height = tuple(numbers.uniform((4.8, 4.4, 2.5), (5.6, 5.2, 2.8)).tolist())
    furnisher, pieces = _Furnisher(numbers), _read_table("furniture.csv")
    furnisher.place(pieces["shell"], scale=np.array(size))
    above = numbers.permutation(["window", "pictures"])
    others = ("sideboard", "desk", "wardrobe", "shelf", "door", "plant", "floor lamp", "window", "pictures")
    wanted = [pieces["bed"] + pieces[above[0]], pieces["sofa"] + pieces[above[1]], *(pieces[name] for name in others)]
    # Each goes to a random wall with enough room, large ones first; two walls leave their corners to the others.
    free = np.array([width - 2.0, depth - 0.1, width - 2.0, depth - 0.1])
    at_walls: list[list[tuple[float, list[list[str]]]]] = [[], [], [], []]
    for parts in wanted:
        length = 0.1 + 2.0 * max(abs(float(x)) for row in parts for x in (row[3], row[6]))
        fitting = np.flatnonzero(free >= length)
        if len(fitting):
            wall = int(numbers.choice(fitting))
            at_walls[wall].append((length, parts))
            free[wall] -= length
    for wall, furniture in enumerate(at_walls):
        x = -0.5 * (free[wall] + sum(length for length, _ in furniture))
        gaps = free[wall] * numbers.dirichlet(np.full(len(furniture) + 1, 2.0))
        for index, gap in zip(numbers.permutation(len(furniture)), gaps, strict=False):
            length, parts = furniture[index]
            position, scale = (x + gap + 0.5 * length, -0.5 * size[1 - wall % 2], 0.0), numbers.uniform(0.9, 1.0, 3)
            furnisher.place(parts, position, 0.5 * math.pi * wall, scale)
            x += gap + length
    furnisher.place(pieces["rug"], yaw=0.5 * math.pi * int(numbers.integers(2)))
    furnisher.place(pieces[str(numbers.choice(["round table", "long table"]))])
    for turn, out in enumerate((0.6, 0.75, 0.6, 0.75)):
        furnisher.place(pieces["chair"], (0.0, -out, 0.0), 0.5 * math.pi * turn + numbers.uniform(-0.2, 0.2))
    for name in ("books", "potted plant"):
        furnisher.place(pieces[name], (0.0, 0.0, 0.74), numbers.uniform(-0.5, 0.5))
    furnisher.place(pieces["pendant"], (0.0, 0.0, height))
    return Room(size, furnisher.solids)


def walk_through(size: Triple, num_frames: int, start: float = 0.0) -> Float[Tensor, "frames 3 4"]:
    """OpenGL poses of a camera that walks on an oval around the room's middle and looks across it.

    A round has 48 frames; longer walks take several, at changing heights. `start` is the first angle in radians.
    """
    phases = np.arange(num_frames) * (2.0 * math.pi / num_frames)
    angles = start + max(1, round(num_frames / 48)) * phases
    wobble = np.sin(3.0 * angles + phases)
    # The camera keeps nearly a metre away from the walls.
    reach = 1.0 - 0.08 * np.sin(2.0 * angles + phases)
    x, y = (0.5 * size[0] - 0.95) * reach * np.cos(angles), (0.5 * size[1] - 0.95) * reach * np.sin(angles)
    positions = np.stack([x, y, 1.5 + 0.12 * wobble + 0.15 * np.sin(phases + 1.0)], axis=-1)
    aims = angles + 0.35 * np.sin(2.0 * angles + 2.0 * phases)
    backward = positions - np.stack([-0.5 * np.cos(aims), -0.5 * np.sin(aims), 0.95 + 0.1 * wobble], axis=-1)
    right = np.cross([0.0, 0.0, 1.0], backward)
    axes = np.stack([right, np.cross(backward, right), backward], axis=-1)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    return torch.from_numpy(np.concatenate([axes, positions[..., None]], axis=-1)).float()


def render_room(room: Room, camera_to_world: Float[Tensor, "3 4"], lens: Lens) -> View:
    """Renders the view of an OpenGL camera inside the room and outside of all furniture."""
    pose, shape = camera_to_world.numpy().astype(np.float32), (lens.height, lens.width)
    rows, columns = np.mgrid[: lens.height, : lens.width] + 0.5
    labels = np.array([CLASSES.index(solid.label) for solid in room.solids], dtype=np.uint8)
    images, seen = [], []
    for (right, down), light_point in zip(_RAYS, _LIGHT_POINTS, strict=True):
        x, y = find_rays(lens, np.stack([columns.ravel() + right, rows.ravel() + down], axis=-1)).T
        # Rays have z = 1 in OpenCV's camera, so that distances along them are z-depths.
        rays = pose[:, :3] @ np.stack([x, -y, -np.ones_like(x)]).astype(np.float32)
        depth, indices = trace_rays(room.solids, pose[:, 3], rays)
        assert (indices >= 0).all(), "A room is closed: every ray ends on a wall at the latest."
        points = pose[:, 3:] + depth * rays
        images.append(_shade(room, points, indices, light_point))
        seen.append((depth.reshape(shape), labels[indices].reshape(shape), points.T.reshape(*shape, 3)))
    image = (np.mean(images, axis=0) * 255.0).round().astype(np.uint8).T.reshape(*shape, 3)
    return View(*(torch.from_numpy(np.ascontiguousarray(values)) for values in (image, *seen[0])))


def trace_rays(solids: Sequence[Solid], origin: Float[np.ndarray, " 3"], rays: Columns) -> tuple[Values, Indices]:
    """Distance to the first solid along each ray, in lengths of the ray, and its index; infinity and -1 without one."""
    squared_lengths = (rays**2).sum(axis=0)
    distances, indices = np.full(rays.shape[1], np.inf, dtype=np.float32), np.full(rays.shape[1], -1)
    for index, solid in enumerate(solids):
        # Only rays that touch the ball around a solid try it; all do from within.
        offset = np.array(solid.centre, np.float32) - origin
        squared_tangent = offset @ offset - np.float32(np.square(solid.half_sizes).sum())
        along = offset @ rays
        may_hit = (squared_tangent <= 0.0) | (along * np.abs(along) >= 0.999 * squared_tangent * squared_lengths)
        chosen = np.flatnonzero(may_hit)
        found = intersect_solid(solid, origin, rays[:, chosen])
        nearer = found < distances[chosen]
        distances[chosen[nearer]], indices[chosen[nearer]] = found[nearer], index
    return distances, indices


def intersect_solid(solid: Solid, origin: Float[np.ndarray, " 3"], rays: Columns) -> Values:
    """Distances at which rays from outside enter a solid, in lengths of the ray; infinite for those that do not."""
    start = solid.to_unit_space @ (origin - np.array(solid.centre, np.float32))[:, None]
    # No component is exactly zero, which would give 0 / 0 for a ray in the plane of a face.
    rays = solid.to_unit_space @ rays + np.float32(1e-9)
    ball, flat = slice(0, solid.num_round), slice(solid.num_round, 3)
    middle, reach = -start[flat] / rays[flat], 1.0 / np.abs(rays[flat])
    lows, highs = [*(middle - reach)], [*(middle + reach)]
    if solid.num_round > 0:
        squared_length = (rays[ball] ** 2).sum(axis=0)
        middle = -(start[ball] * rays[ball]).sum(axis=0) / squared_length
        squared_gap = ((start[ball] + middle * rays[ball]) ** 2).sum(axis=0)
        with np.errstate(invalid="ignore"):
            # NaN for rays that miss, for which the comparisons below are false.
            reach = np.sqrt((1.0 - squared_gap) / squared_length)
        lows, highs = [*lows, middle - reach], [*highs, middle + reach]
    near, far = np.maximum.reduce(lows), np.minimum.reduce(highs)
    return np.where((near <= far) & (near > 1e-4), near, np.float32(np.inf))


class _Furnisher:
    """Collects the solids of one room, whose furniture is of one wood."""

    def __init__(self, numbers: np.random.Generator) -> None:
        self.numbers, self.solids = numbers, list[Solid]()
        self.shared = {name: self._draw_material(name) for name in ("wood", "paper", "seat")}

    def place(
        self, parts: list[list[str]], position: Triple = (0.0, 0.0, 0.0), yaw: float = 0.0, scale: Any = 1.0
    ) -> None:
        """Scales a piece, given by its rows of the table, moves it and then turns it about the room's middle."""
        materials = dict(self.shared)
        axes = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
        for label, name, shape, *corners in parts:
            low, high = np.array(corners, dtype=float).reshape(2, 3)
            materials[name] = materials.get(name) or self._draw_material(name)
            centre, half_sizes = axes @ (0.5 * scale * (low + high) + position), 0.5 * scale * (high - low)
            sizes = tuple(centre.tolist()), tuple(half_sizes.tolist())
            self.solids.append(Solid(label, materials[name], _ROUND_AXES[shape], *sizes, yaw))

    def _draw_material(self, name: str) -> Material:
        """One of the table's materials of that name, in colours drawn from a random hue where it has none."""
        numbers, options = self.numbers, _read_table("materials.csv")[name]
        pattern, bright, *rest = options[numbers.integers(len(options))]
        cells, colours = tuple(map(float, rest[:5])), tuple(map(float, rest[5:]))
        seed = int(numbers.integers(1 << 30))
        if colours:
            return Material(pattern, bright == "yes", cells, colours, seed)
        hue, saturation, value = numbers.uniform((0.0, 0.3, 0.45), (1.0, 0.65, 0.75))
        if name == "paper":
            saturation, value = 0.35 * saturation, 0.5 + 0.5 * value
        main = colorsys.hsv_to_rgb(hue, saturation, value)
        other = colorsys.hsv_to_rgb(hue + 0.03, 0.8 * saturation, min(value + 0.12, 1.0))
        accent = colorsys.hsv_to_rgb(hue + numbers.uniform(0.3, 0.7), 0.6 * saturation, 0.8)
        return Material(pattern, bright == "yes", cells, (*main, *other, *accent), seed)


@lru_cache
def _read_table(name: str) -> dict[str, list[list[str]]]:
    """The rows of one of the tables by their first column, without it."""
    rows = defaultdict(list)
    with open(Path(__file__).with_name(name), encoding="utf-8", newline="") as file:
        for first, *others in csv.reader(file):
            rows[first].append(others)
    return rows


def _shade(room: Room, points: Columns, indices: Indices, light_point: Triple) -> Columns:
    """Colours in [0, 1] of points on the room's solids, the same from everywhere."""
    albedo, normals = np.empty_like(points), np.empty_like(points)
    for index in np.unique(indices):
        chosen = np.flatnonzero(indices == index)
        albedo[:, chosen], normals[:, chosen] = _paint(room.solids[index], points[:, chosen])
    # Surfaces get darker towards the walls, floor and ceiling that they meet, within some 20 cm.
    half = 0.5 * np.array(room.size, np.float32)[:, None]
    gap = half - np.abs(points - half * [[0.0], [0.0], [1.0]])
    corner = 1.0 - 0.45 * np.exp(-gap / 0.2) * (1.0 - np.abs(normals))
    light = np.tile(_AMBIENT * corner.prod(axis=0), (3, 1))
    is_bright = np.array([solid.material.is_bright for solid in room.solids])
    opaque = [solid for solid in room.solids if not solid.material.is_bright and solid.label not in SHELL]
    for lamp in [solid for solid in room.solids if solid.material.is_bright and solid.label in _LIGHTS]:
        # Nearer to the room's middle than the solid itself, the light is out of its wall. It fades by half in 2.4 m.
        source = [0.9, 0.9, 1.0] * np.array(lamp.centre) + np.linalg.inv(lamp.to_unit_space) @ np.array(light_point)
        rays = points - source.astype(np.float32)[:, None]
        is_lit = trace_rays(opaque, source.astype(np.float32), rays)[0] > 0.998
        squared = (rays**2).sum(axis=0)
        cosine = np.maximum(-(rays * normals).sum(axis=0), 0.0) / np.sqrt(squared)
        light += np.outer(_LIGHTS[lamp.label], is_lit * cosine / (1.0 + squared / 6.0))
    return np.clip(albedo * np.where(is_bright[indices], 1.0, light), 0.0, 1.0).astype(np.float32)


def _paint(solid: Solid, world_points: Columns) -> tuple[Columns, Columns]:
    """Colours and outward unit normals of points of a surface; patterns are no finer than splats can hold."""
    unit = solid.to_unit_space @ (world_points - np.array(solid.centre, np.float32)[:, None])
    reach, points = np.abs(unit), np.arange(unit.shape[1])
    axis = reach.argmax(axis=0)
    # Faces across x show (y, z), across y (x, z), across z (x, y); u and v are metres from the face's corner.
    first, second = np.where(axis == 0, 1, 0), np.where(axis == 2, 1, 2)
    width, height = (2.0 * np.array(solid.half_sizes, np.float32)[along] for along in (first, second))
    u, v = 0.5 * (1.0 + unit[first, points]) * width, 0.5 * (1.0 + unit[second, points]) * height
    reach[: solid.num_round] = np.linalg.norm(unit[: solid.num_round], axis=0)
    normals = solid.to_unit_space.T @ np.where(reach >= reach.max(axis=0) - 1e-4, unit, np.float32(0.0))
    pattern, seed = solid.material.pattern, solid.material.seed
    texels, shift = _make_noise(), 211 * axis + seed % 1013
    rows, columns = (((place / 0.008).astype(int) + shift) % len(texels) for place in (v, u))
    noise = texels[rows, columns]
    main, other, accent = np.array(solid.material.colours, np.float32).reshape(3, 3, 1)
    tints = np.random.default_rng(seed).random(1000).astype(np.float32)
    if pattern in ("cells", "mortar", "books"):
        cell_width, cell_height, shift, joint, radius = solid.material.cells
        # A face holds whole cells, at least one.
        across = width / np.maximum(np.round(width / cell_width), 1.0)
        up = height / np.maximum(np.round(height / cell_height), 1.0)
        row = np.floor(v / up)
        column = np.floor(u / across + shift * row)
        from_u, from_v = (u / across + shift * row - column - 0.5) * across, (v / up - row - 0.5) * up
        edge = np.minimum(0.5 * across - np.abs(from_u), 0.5 * up - np.abs(from_v))
        tint = tints[(31 * row + 7 * column).astype(int) % len(tints)]
        if pattern == "books":
            main = other = 0.5 + 0.33 * np.sin(6.3 * (tint + tints[:3, None]))
        colour = _mix(0.4 * ((row + column) % 2.0) + 0.4 * tint + 0.2 * noise, main, other)
        colour = _mix(np.hypot(from_u, from_v) < radius, colour, accent)
        colour = _mix(edge < joint, colour, accent if pattern == "mortar" else 0.3 * main)
    elif pattern == "grain":
        colour = _mix(0.5 + 0.5 * np.sin(80.0 * np.where(width < height, u, v) + 14.0 * noise), main, other)
    elif pattern == "picture":
        margin = np.minimum(np.minimum(u, width - u), np.minimum(v, height - v))
        colour = 0.5 + 0.33 * np.sin(6.3 * (np.floor(7.0 * noise) / 7.0 + 0.3 * v / height + tints[:3, None]))
        colour = _mix(margin < 0.03, colour, accent)
    else:
        colour = _mix(noise > 0.85, _mix(np.clip(3.0 * noise - 1.0, 0.0, 1.0), main, other), accent)
    return colour * (1.0 + 0.3 * (noise - 0.5)), normals / np.linalg.norm(normals, axis=0)


def _mix(weights: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`first` where the weight is 0, `second` where it is 1."""
    return first + weights.astype(np.float32) * (second - first)


@lru_cache(maxsize=1)
def _make_noise() -> Float[np.ndarray, "size size"]:
    """Clouds around 0.5 that tile the plane, filtered from white noise in the frequency domain."""
    frequencies = np.fft.fftfreq(1024)
    radii = np.hypot(frequencies[:, None], frequencies) + 8.0 / 1024
    noise = np.fft.ifft2(np.fft.fft2(np.random.default_rng(0).normal(size=radii.shape)) / radii**1.7).real
    return (0.5 + 0.22 * (noise - noise.mean()) / noise.std()).clip(0.0, 1.0).astype(np.float32)
