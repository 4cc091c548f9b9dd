"""Light of the synthetic rooms, baked once: every view of a point sees it equally bright.

Each face of each solid carries a grid of texels with the light that arrives there: soft shadows of area lights, and an
ambient part that corners and covered places lose, tinted by what is near. Between texels it is interpolated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from fit3d_ns.synthetic.ray_tracing import Solid, intersect_solid, place_on_surface, trace_rays

_AMBIENT_REACH = 1.2
"""Metres at which a surface no longer takes ambient light away."""
_BOUNCE = 0.6
"""Share of the ambient light that near surfaces give back in their own colour."""
_LIGHT_REACH = 2.0
"""Metres at which a light has lost half of its strength."""
_SURFACE_OFFSET = 4e-3
_NUM_AMBIENT_RAYS = 28
_MAX_TEXELS_ACROSS = 64


@dataclass(frozen=True)
class AreaLight:
    """A light made of points."""

    points: Float[np.ndarray, "points 3"]
    """Where it shines from, in metres."""
    colour: tuple[float, float, float]
    """Strength at its very place, for a surface that faces it."""
    direction: tuple[float, float, float] | None = None
    """Unit vector of a flat light's side; None shines all round."""


@dataclass(frozen=True)
class BakedLight:
    """Light arriving on the surfaces of all solids."""

    texels: Float[np.ndarray, "texels 3"]
    """Arriving light; 1 shows a surface in its own colour."""
    offsets: Int[np.ndarray, "solids 6"]
    """First texel of each face."""
    shapes: Int[np.ndarray, "solids 6 2"]
    """Rows and columns of texels of each face."""

    def look_up(
        self, indices: Int[np.ndarray, " points"], unit_points: Float[np.ndarray, "points 3"]
    ) -> Float[np.ndarray, "points 3"]:
        """Bilinearly interpolated light at points of solids, given in their unit spaces."""
        faces, s, t = _find_face(unit_points)
        offsets, shapes = self.offsets[indices, faces], self.shapes[indices, faces]
        rows, row_weights = _between_texels(t, shapes[:, 0])
        columns, column_weights = _between_texels(s, shapes[:, 1])
        light = np.zeros((len(indices), 3), dtype=np.float32)
        for row, row_weight in ((0, 1.0 - row_weights), (1, row_weights)):
            for column, column_weight in ((0, 1.0 - column_weights), (1, column_weights)):
                texel_row = np.minimum(rows + row, shapes[:, 0] - 1)
                texel_column = np.minimum(columns + column, shapes[:, 1] - 1)
                texel = self.texels[offsets + texel_row * shapes[:, 1] + texel_column]
                light += texel * (row_weight * column_weight)[:, None]
        return light


def bake_light(
    solids: Sequence[Solid],
    lights: Sequence[AreaLight],
    room_size: tuple[float, float, float],
    ambient: tuple[float, float, float],
    texel_size: float = 0.14,
) -> BakedLight:
    """Computes the light on all faces within the room.

    Args:
        solids: The room's solids; those with emission neither take light nor throw shadows.
        lights: The lights.
        room_size: Extent in x, y (about 0) and z (from 0), in metres; faces outside of it stay dark.
        ambient: Light that arrives where nothing is near.
        texel_size: Distance of texels in metres.
    """
    offsets = np.zeros((len(solids), 6), dtype=np.int64)
    shapes = np.ones((len(solids), 6, 2), dtype=np.int64)
    opaque = _Occluders([solid for solid in solids if solid.material.emission == 0.0])
    half = 0.5 * np.asarray(room_size, dtype=np.float32)
    texels = []
    num_texels = 0
    for index, solid in enumerate(solids):
        directions = []
        for face in range(6):
            shapes[index, face], on_face = _lay_out_face(solid, face, texel_size)
            offsets[index, face] = num_texels
            num_texels += len(on_face)
            directions.append(on_face)
        points, normals = place_on_surface(solid, np.concatenate(directions))
        origins = points + np.float32(_SURFACE_OFFSET) * normals
        inside = (np.abs(origins - [0.0, 0.0, half[2]]) < half).all(axis=-1)
        light = np.zeros_like(origins)
        if solid.material.emission == 0.0 and inside.any():
            light[inside] = _gather_ambient(opaque, origins[inside], normals[inside]) * np.asarray(
                ambient, dtype=np.float32
            )
            light[inside] += _gather_direct(opaque, lights, origins[inside], normals[inside])
        texels.append(light)
    return BakedLight(np.concatenate(texels), offsets, shapes)


class _Occluders:
    """Opaque solids and the boxes around them, to find quickly those near a group of texels."""

    def __init__(self, solids: Sequence[Solid]) -> None:
        self._solids = list(solids)
        self.colours = np.array([solid.material.colours[0] for solid in solids], dtype=np.float32)
        reach = np.stack([np.abs(solid.axes.T) @ np.asarray(solid.half_sizes, dtype=np.float32) for solid in solids])
        centres = np.array([solid.centre for solid in solids], dtype=np.float32)
        self._low, self._high = centres - reach, centres + reach

    def select(self, low: Float[np.ndarray, " 3"], high: Float[np.ndarray, " 3"]) -> tuple[list[Solid], np.ndarray]:
        """Solids whose boxes overlap the box from `low` to `high`, and their indices."""
        near = np.nonzero(((self._low < high) & (self._high > low)).all(axis=-1))[0]
        return [self._solids[index] for index in near], near


def _gather_ambient(
    opaque: _Occluders, origins: Float[np.ndarray, "texels 3"], normals: Float[np.ndarray, "texels 3"]
) -> Float[np.ndarray, "texels 3"]:
    """Mean over the hemisphere of what is not near, and of the colour of what is; cosine-weighted."""
    near, indices = opaque.select(origins.min(axis=0) - _AMBIENT_REACH, origins.max(axis=0) + _AMBIENT_REACH)
    first = np.cross(normals, np.where(np.abs(normals[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]]))
    first /= np.linalg.norm(first, axis=-1, keepdims=True)
    second = np.cross(normals, first)
    # A spiral on the disc, lifted to the hemisphere, has the density of the cosine.
    spiral = np.arange(_NUM_AMBIENT_RAYS)
    radii = np.sqrt((spiral + 0.5) / _NUM_AMBIENT_RAYS)
    angles = spiral * np.pi * (3.0 - np.sqrt(5.0))
    x, y, z = radii * np.cos(angles), radii * np.sin(angles), np.sqrt(1.0 - radii**2)
    # (rays, 1) * (texels, 1, 3) -> (texels, rays, 3)
    directions = x[:, None] * first[:, None] + y[:, None] * second[:, None] + z[:, None] * normals[:, None]
    directions = directions.reshape(-1, 3).astype(np.float32)
    hits = trace_rays(near, np.repeat(origins, _NUM_AMBIENT_RAYS, axis=0), directions)
    openness = np.minimum(hits.distances / _AMBIENT_REACH, 1.0)[:, None]
    # Where nothing is hit the index is -1, and its colour has weight 0.
    colours = np.concatenate([opaque.colours[indices], np.zeros((1, 3), np.float32)])[hits.indices]
    gathered = openness + (1.0 - openness) * _BOUNCE * colours
    return gathered.reshape(-1, _NUM_AMBIENT_RAYS, 3).mean(axis=1)


def _gather_direct(
    opaque: _Occluders,
    lights: Sequence[AreaLight],
    origins: Float[np.ndarray, "texels 3"],
    normals: Float[np.ndarray, "texels 3"],
) -> Float[np.ndarray, "texels 3"]:
    """Light that reaches the texels straight from the lights' points."""
    gathered = np.zeros_like(origins)
    for light in lights:
        num_points = len(light.points)
        # (texels, points, 3) -> (texels * points, 3)
        offsets = (light.points[None] - origins[:, None]).reshape(-1, 3)
        distances = np.linalg.norm(offsets, axis=-1)
        strength = (offsets * np.repeat(normals, num_points, axis=0)).sum(axis=-1) / distances
        if light.direction is not None:
            towards = np.asarray(light.direction, dtype=np.float32)
            strength *= np.clip(-(offsets @ towards) / distances, 0.0, 1.0)
        lit = np.nonzero(strength > 0.0)[0]
        starts = origins[lit // num_points]
        if len(lit):
            low, high = starts.min(axis=0), starts.max(axis=0)
            low, high = np.minimum(low, light.points.min(axis=0)), np.maximum(high, light.points.max(axis=0))
            for solid in opaque.select(low, high)[0]:
                seen = intersect_solid(solid, starts, offsets[lit]) >= 1.0
                lit, starts = lit[seen], starts[seen]
        arriving = np.zeros_like(strength)
        arriving[lit] = strength[lit] / (1.0 + (distances[lit] / _LIGHT_REACH) ** 2) / num_points
        summed = arriving.reshape(-1, num_points).sum(axis=1)
        gathered += summed[:, None] * np.asarray(light.colour, dtype=np.float32)
    return gathered


def _lay_out_face(solid: Solid, face: int, texel_size: float) -> tuple[tuple[int, int], np.ndarray]:
    """Rows and columns of a face's texels, and their directions in unit space, row by row."""
    axis, sign = face // 2, 2.0 * (face % 2) - 1.0
    first, second = _FACE_AXES[axis]
    columns, rows = (
        int(np.clip(np.ceil(2.0 * solid.half_sizes[other] / texel_size), 1, _MAX_TEXELS_ACROSS))
        for other in (first, second)
    )
    middles = [(np.arange(count) + 0.5) / count * 2.0 - 1.0 for count in (rows, columns)]
    t, s = np.meshgrid(*middles, indexing="ij")
    directions = np.empty((rows * columns, 3))
    directions[:, axis], directions[:, first], directions[:, second] = sign, s.ravel(), t.ravel()
    return (rows, columns), directions


_FACE_AXES = ((1, 2), (0, 2), (0, 1))
"""For each axis the two others, along columns and rows of its faces."""


def _find_face(
    unit_points: Float[np.ndarray, "points 3"],
) -> tuple[Int[np.ndarray, " points"], Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Cube face through which a direction leaves, and where, as (s, t) in [-1, 1]."""
    absolute = np.abs(unit_points)
    axis = np.argmax(absolute, axis=-1)
    points = np.arange(len(axis))
    on_cube = unit_points / absolute[points, axis][:, None]
    others = np.array(_FACE_AXES)[axis]
    faces = 2 * axis + (unit_points[points, axis] > 0.0)
    return faces, on_cube[points, others[:, 0]], on_cube[points, others[:, 1]]


def _between_texels(
    coordinates: Float[np.ndarray, " points"], counts: Int[np.ndarray, " points"]
) -> tuple[Int[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Lower texel and the weight of the next one, clamped at the face's border."""
    position = np.clip((coordinates * 0.5 + 0.5) * counts - 0.5, 0.0, counts - 1.0)
    lower = np.floor(position).astype(np.int64)
    return lower, (position - lower).astype(np.float32)
