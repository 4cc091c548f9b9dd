"""Furnishes rooms with the pieces of `furniture.csv` in materials of `materials.csv`, and walks through them.

A piece is made of parts between two corners, in metres, in a frame of its own: x along the wall behind it, y away from
that wall, z up. Of materials with the same name one is drawn.
"""

import colorsys
import csv
import math
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.synthetic.rendering import Material, Room, Solid, Triple

Part = tuple[str, str, int, np.ndarray, np.ndarray]
"""Class, material, number of round axes, low corner and high corner."""


def build_room(numbers: np.random.Generator) -> Room:
    """A room of its own for each state of the generator, with furniture along the walls and a table in the middle."""
    size = width, depth, height = tuple(numbers.uniform((4.8, 4.4, 2.5), (5.6, 5.2, 2.8)).tolist())
    furnisher, pieces = _Furnisher(numbers), _read_pieces()
    furnisher.place(pieces["shell"], scale=np.array(size))
    above = numbers.permutation(["window", "pictures"])
    others = ("sideboard", "desk", "wardrobe", "shelf", "door", "plant", "floor lamp", "window", "pictures")
    wanted = [pieces["bed"] + pieces[above[0]], pieces["sofa"] + pieces[above[1]], *(pieces[name] for name in others)]
    # Each goes to a random wall with enough room, large ones first; two walls leave their corners to the others.
    free = np.array([width - 2.0, depth - 0.1, width - 2.0, depth - 0.1])
    at_walls: list[list[tuple[float, list[Part]]]] = [[], [], [], []]
    for parts in wanted:
        length = 0.1 + 2.0 * max(abs(corner[0]) for *_, low, high in parts for corner in (low, high))
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


class _Furnisher:
    """Collects the solids of one room."""

    def __init__(self, numbers: np.random.Generator) -> None:
        self.solids: list[Solid] = []
        self._numbers = numbers
        self._shared = {name: self._draw_material(name) for name in ("wood", "paper", "seat")}

    def place(self, parts: list[Part], position: Triple = (0.0, 0.0, 0.0), yaw: float = 0.0, scale: Any = 1.0) -> None:
        """Scales a piece, moves it and then turns it about the room's middle."""
        materials = dict(self._shared)
        axes = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
        for label, name, num_round, low, high in parts:
            materials[name] = materials.get(name) or self._draw_material(name)
            centre, half_sizes = axes @ (0.5 * scale * (low + high) + position), 0.5 * scale * (high - low)
            solid = Solid(label, materials[name], num_round, tuple(centre.tolist()), tuple(half_sizes.tolist()), yaw)
            self.solids.append(solid)

    def _draw_material(self, name: str) -> Material:
        """One of the table's materials of that name, in colours drawn from a random hue where it has none."""
        numbers, options = self._numbers, _read_materials()[name]
        material = replace(options[numbers.integers(len(options))], seed=int(numbers.integers(1 << 30)))
        if material.colours:
            return material
        hue, saturation, value = numbers.uniform((0.0, 0.3, 0.45), (1.0, 0.65, 0.75))
        if name == "paper":
            saturation, value = 0.35 * saturation, 0.5 + 0.5 * value
        main = colorsys.hsv_to_rgb(hue, saturation, value)
        other = colorsys.hsv_to_rgb(hue + 0.03, 0.8 * saturation, min(value + 0.12, 1.0))
        accent = colorsys.hsv_to_rgb(hue + numbers.uniform(0.3, 0.7), 0.6 * saturation, 0.8)
        return replace(material, colours=(*main, *other, *accent))


@lru_cache(maxsize=1)
def _read_materials() -> dict[str, list[Material]]:
    materials = defaultdict(list)
    for name, pattern, bright, *numbers in _read_rows("materials.csv"):
        cells, colours = tuple(map(float, numbers[:5])), tuple(map(float, numbers[5:]))
        materials[name].append(Material(pattern, bright == "yes", cells, colours))
    return materials


@lru_cache(maxsize=1)
def _read_pieces() -> dict[str, list[Part]]:
    pieces = defaultdict(list)
    for name, label, material, shape, *corners in _read_rows("furniture.csv"):
        low, high = np.array(corners, dtype=float).reshape(2, 3)
        pieces[name].append((label, material, {"box": 0, "cylinder": 2, "ellipsoid": 3}[shape], low, high))
    return pieces


def _read_rows(name: str) -> list[list[str]]:
    with open(Path(__file__).with_name(name), encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]
