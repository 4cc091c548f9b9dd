"""Points of a surface from what a capture has: sensor depth of its train views, a triangle mesh, or a point cloud.

Of all points in a cell of a grid one is left; the cells' side is chosen by how finely photographs see the surface.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy.spatial import cKDTree
from torch import Tensor

from fit3d_ns.analysis.correspondence import DepthView, look_up, observe, unproject
from fit3d_ns.data.images import MILLIMETRES_PER_METRE
from fit3d_ns.geometry.cameras import is_inside, project_points, viewmats_from_camera_to_worlds
from fit3d_ns.lifting.surfels import SurfacePoints, compute_cell_keys, estimate_normals, sum_groups
from fit3d_ns.scene import PosedCapture, View
from fit3d_ns.utils.progress import track
from fit3d_ns.utils.selection import select_evenly

_LONGEST_SIDE = 640
"""Depth maps are read at about this size at most: sensors hardly resolve more."""
_LARGEST_STEP = 0.05
"""Relative difference of depth above which there is an edge, and two views do not mean the same point."""
_MAX_ROWS = 8_000_000
"""Fused points are fused again before there are more."""
_MAX_POINTS = 50_000_000
"""Most points of a mesh; they take about 200 bytes each."""
_NEAR_PERCENTILE = 25.0
"""This share of the points is seen from nearer than what the smallest cells are made for."""
_DEPTH_SCALES = (1000.0, 5000.0, 4000.0, 10000.0, 256.0, 100.0)
"""Units per metre that depth maps of sensors and data sets have."""
_ANY_SCALES, _FINE_STEPS = np.geomspace(1.0, 1e6, 146), np.geomspace(1 / 1.1, 1.1, 21)
"""A tenth and a hundredth apart."""
_SAMPLED_VIEWS = 8


def list_depth_views(capture: PosedCapture) -> list[View]:
    """Train views with depth, held-out ones shape nothing; ValueError where there is none."""
    views = [view for view in capture.select("train") if view.frame.depth_path is not None]
    if not views:
        raise ValueError(
            f"No train frame of {capture.root} has a depth map that belongs to its photograph (`render_depth/` of the "
            "photographs' own lens, `depth_file_path`); use --surface mesh or points, or train splats on colours alone."
        )
    return views


def load_depth_view(capture: PosedCapture, view: View, scale: float) -> DepthView:
    """Depth as of `load_valid_depth`, reduced to at most about 640 pixels a side."""
    step = _choose_step(view)
    # Pixel centre column * step + step // 2 + 0.5 of the whole picture is column + 0.5 of the reduced one.
    K = view.K.clone()
    K[:2, 2] += 0.5 * step - (step // 2 + 0.5)
    K[:2] /= step
    return DepthView(_reduce(load_valid_depth(capture, view, scale), step), K, view.camera_to_world)


def load_valid_depth(capture: PosedCapture, view: View, scale: float) -> Float[Tensor, "height width"]:
    """Measured depth in units of the capture's frame where the mask allows, 0 elsewhere.

    The map has `scale` units per unit of the dataset's world.
    """
    depth = capture.load_depth(view)
    assert depth is not None
    depth = drop_flying_pixels(torch.where(capture.load_valid_mask(view), depth, 0.0))
    return depth * (MILLIMETRES_PER_METRE / scale * capture.dataparser_scale)


def drop_flying_pixels(depth: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
    """Depth without pixels between two surfaces, that have both a much nearer and a much farther neighbour."""
    values, kernel = depth.numpy(), np.ones((3, 3), np.uint8)
    near = cv2.erode(np.where(values > 0, values, np.float32(np.inf)), kernel)
    far = cv2.dilate(values, kernel)
    is_between = (near < values * (1 - _LARGEST_STEP)) & (far > values * (1 + _LARGEST_STEP))
    return torch.where(torch.from_numpy(is_between), 0.0, depth)


def find_depth_scale(capture: PosedCapture, given: float | None = None) -> float:
    """Units of the depth maps per unit of the dataset's world, by how many pixels of a view agree with the next view.

    That is 1000 or another usual one, unless many more agree at one between them: poses that were found from
    photographs have a unit of their own. ValueError where another scale than the given one fits by far better.
    """
    views, pairs = list_depth_views(capture), []
    for index in select_evenly(range(len(views) - 1), _SAMPLED_VIEWS) if len(views) > 1 else []:
        first, second = (load_depth_view(capture, view, MILLIMETRES_PER_METRE) for view in views[index : index + 2])
        pairs.append((_list_points(first)[0][::32], first.camera_to_world[:, 3], second))

    def measure(scale: float, step: float = _LARGEST_STEP) -> float:
        factor, share = MILLIMETRES_PER_METRE / scale, 0.0
        for xyz, centre, second in pairs:
            _, depth, measured = observe(centre + factor * (xyz - centre), second)
            agrees = (measured > 0) & ((factor * measured - depth).abs() <= step * depth)
            share += float(agrees.float().sum() / max(len(agrees), 1)) / len(pairs)
        return share

    shares = {scale: measure(scale) for scale in (*_DEPTH_SCALES, *([given] if given else []))}
    best = max(shares, key=lambda scale: shares[scale])
    tried = np.array([measure(scale) for scale in _ANY_SCALES])
    peak = int(tried.argmax())
    # Only a peak tells: where views agree at any scale, as of one place, so they do far away.
    if tried[peak] > 1.2 * max(shares[best], *tried[[max(peak - 4, 0), min(peak + 4, len(tried) - 1)]]):
        best = float(f"{max(_ANY_SCALES[peak] * _FINE_STEPS, key=lambda scale: measure(scale, 0.01)):.4g}")
        shares[best] = tried[peak]
    if given is not None:
        if shares[given] < 0.5 * shares[best]:
            raise ValueError(
                f"Views of {capture.root} agree on {shares[given]:.0%} of the depth at --depth-scale {given:g} and on "
                f"{shares[best]:.0%} at {best:g}; use that."
            )
        return given
    return best if shares[best] > 1.2 * shares[MILLIMETRES_PER_METRE] else MILLIMETRES_PER_METRE


def fuse_depth(capture: PosedCapture, scale: float, cell_pixels: float) -> tuple[SurfacePoints, float]:
    """One point for each cell in which the train views' depth agrees on a surface, and the cells' side."""
    views = list_depth_views(capture)
    sampled = [_list_points(load_depth_view(capture, view, scale))[1] for view in select_evenly(views, _SAMPLED_VIEWS)]
    cell = _choose_cell(np.concatenate(sampled), cell_pixels, f"The depth maps of {capture.root} measure nothing")
    parts: list[tuple[np.ndarray, ...]] = []
    for view in track(views, "Fusing depth"):
        depth_view = load_depth_view(capture, view, scale)
        xyz, spacing = _list_points(depth_view)
        rgb = _reduce(capture.load_image(view), _choose_step(view))[depth_view.depth > 0].float() / 255.0
        towards = torch.nn.functional.normalize(view.camera_to_world[:, 3] - xyz, dim=1)
        # A sensor's error grows with the square of depth.
        rows = torch.cat([torch.ones(len(xyz), 1), xyz, towards, rgb], dim=1).double().numpy() / spacing[:, None] ** 2
        parts.append(_fuse(compute_cell_keys(xyz.double().numpy(), cell), rows, spacing))
        if sum(len(part[0]) for part in parts) > _MAX_ROWS:
            parts = [_fuse(*map(np.concatenate, zip(*parts, strict=True)))]
    _, sums, spacing = _fuse(*map(np.concatenate, zip(*parts, strict=True)))
    means = sums[:, 1:] / sums[:, :1]
    kept = _is_consistent(torch.from_numpy(means[:, :3]).float(), capture, views, scale)
    if not kept.any():
        raise ValueError(f"No two views of {capture.root} agree on depth; give its unit with --depth-scale.")
    places, cameras, colours = np.split(means[kept], [3, 6], axis=1)
    return SurfacePoints(places, estimate_normals(places, cameras), colours, spacing[kept]), cell


@dataclass(frozen=True)
class SurfaceFile:
    """A mesh or a cloud as its file has it."""

    xyz: Float[np.ndarray, "vertices 3"]
    faces: Int[np.ndarray, "faces 3"]
    """Numbers of vertices; none in a cloud."""
    rgb: Float[np.ndarray, "vertices 3"]
    """Colours in [0, 1]; grey where the file has none."""

    def sample(self, spacing: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points about `spacing` apart, evenly, their unit normals and colours."""
        corners = self.xyz[self.faces]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        lengths = np.linalg.norm(normals, axis=1)
        ends = np.cumsum(0.5 * lengths)
        if not ends[-1] <= _MAX_POINTS * spacing**2:
            raise ValueError(
                f"The mesh near the cameras has an area of {ends[-1]:.3g}, too large for points {spacing:.3g} apart; "
                "cut off what is far away, or raise --cell-pixels."
            )
        num_points = max(1, round(ends[-1] / spacing**2))
        chosen = np.searchsorted(ends, (np.arange(num_points) + 0.5) / num_points * ends[-1])
        weights = np.random.default_rng(0).dirichlet((1.0, 1.0, 1.0), num_points)[..., None]
        xyz, rgb = ((values[self.faces[chosen]] * weights).sum(axis=1) for values in (self.xyz, self.rgb))
        return xyz, normals[chosen] / lengths[chosen, None], rgb


def read_surface_file(path: Path) -> SurfaceFile:
    """Reads a mesh or point cloud in any format that trimesh knows; what cannot be read or is empty is a ValueError."""
    import trimesh

    if not path.is_file():
        raise ValueError(f"There is no mesh or point cloud {path}; check --mesh.")
    try:
        loaded: Any = trimesh.load(path, process=False)
        geometry: Any = loaded.to_geometry() if isinstance(loaded, trimesh.Scene) else loaded
        xyz = np.asarray(geometry.vertices, dtype=np.float64)
        faces = np.asarray(getattr(geometry, "faces", np.empty((0, 3))), dtype=np.int64)
        if any(rows.size and rows.shape != (len(rows), 3) for rows in (xyz, faces)):
            raise ValueError("its corners are no triples")
        xyz, faces = xyz.reshape(-1, 3), faces.reshape(-1, 3)
        if faces.size and not 0 <= faces.min() <= faces.max() < len(xyz):
            raise ValueError("faces have corners that it does not hold")
        colours = np.asarray(getattr(geometry.visual, "vertex_colors", ()), dtype=np.float64)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a mesh or point cloud ({error}); save it as PLY.") from error
    finite = np.asarray(np.isfinite(xyz).all(axis=1))
    if not finite.any():
        raise ValueError(f"{path} holds no points; make the file again.")
    rgb = colours[:, :3] / 255.0 if len(colours) == len(xyz) else np.full_like(xyz, 0.5)
    if len(faces):
        return SurfaceFile(xyz, faces[finite[faces].all(axis=1)], rgb)
    return SurfaceFile(xyz[finite], faces, rgb[finite])


def sample_surface(file: SurfaceFile, capture: PosedCapture, cell_pixels: float) -> tuple[SurfacePoints, float]:
    """Points of a mesh or cloud that a train view looks at, half a cell apart, and the cells' side."""
    spacing = _measure_spacing(file.xyz, capture)
    is_seen = np.isfinite(spacing)
    cell = _choose_cell(spacing[is_seen], cell_pixels, "No train view looks at the surface, which is in another world")
    cameras = torch.stack([view.camera_to_world[:, 3] for view in capture.select("train")]).double().numpy()
    nearest = cKDTree(cameras)
    if len(file.faces):
        near = SurfaceFile(file.xyz, file.faces[is_seen[file.faces].any(axis=1)], file.rgb)
        xyz, normals, rgb = near.sample(0.5 * cell)
        spacing = _measure_spacing(xyz, capture)
        facing = (normals * (cameras[nearest.query(xyz)[1]] - xyz)).sum(axis=1, keepdims=True)
        points = SurfacePoints(xyz, np.where(facing < 0, -normals, normals), rgb, spacing)
        return points.select(np.isfinite(spacing)), cell
    rows = np.column_stack([np.ones(len(file.xyz)), file.xyz, file.rgb])[is_seen]
    _, sums, spacing = _fuse(compute_cell_keys(rows[:, 1:4], 0.5 * cell), rows, spacing[is_seen])
    xyz, rgb = np.split(sums[:, 1:] / sums[:, :1], [3], axis=1)
    return SurfacePoints(xyz, estimate_normals(xyz, cameras[nearest.query(xyz)[1]] - xyz), rgb, spacing), cell


def _choose_step(view: View) -> int:
    return max(1, round(max(view.width, view.height) / _LONGEST_SIDE))


def _reduce(picture: Shaped[Tensor, "height width *channels"], step: int) -> Shaped[Tensor, "rows columns *channels"]:
    return picture[step // 2 :: step, step // 2 :: step]


def _list_points(view: DepthView) -> tuple[Float[Tensor, "points 3"], Float[np.ndarray, " points"]]:
    """World points of all measured pixels in order of rows, and the width of a pixel at each."""
    pixels = view.depth.nonzero().flip(1) + 0.5
    depth = look_up(view.depth, pixels)
    return unproject(pixels, depth, view), (depth / view.K[0, 0]).double().numpy()


def _choose_cell(spacing: Float[np.ndarray, " points"], cell_pixels: float, problem: str) -> float:
    if not len(spacing):
        raise ValueError(f"{problem}; check the files and --data.")
    return cell_pixels * float(np.percentile(spacing, _NEAR_PERCENTILE))


def _fuse(keys: np.ndarray, sums: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of one key become one: their sums, and the smallest spacing."""
    keys, members, sums = sum_groups(keys, sums)
    least = torch.full((len(keys),), torch.inf, dtype=torch.float64)
    least.scatter_reduce_(0, torch.from_numpy(members), torch.from_numpy(spacing), "amin")
    return keys, sums, least.numpy()


def _is_consistent(xyz: Tensor, capture: PosedCapture, views: Sequence[View], scale: float) -> Bool[np.ndarray, " n"]:
    """False where as many views look through a point as measure it."""
    votes = torch.zeros(len(xyz), dtype=torch.int64)
    for view in track(views, "Comparing depth"):
        _, depth, measured = observe(xyz, load_depth_view(capture, view, scale))
        votes += (measured > 0) & ((measured - depth).abs() <= _LARGEST_STEP * depth)
        votes -= ((measured > 0) & (measured - depth > _LARGEST_STEP * depth)).long()
    return (votes > 0).numpy()


def _measure_spacing(xyz: Float[np.ndarray, "points 3"], capture: PosedCapture) -> Float[np.ndarray, " points"]:
    """Width of a pixel at each point in the nearest train view; infinite where none looks. Walls hide nothing."""
    points, spacing = torch.from_numpy(xyz).float(), torch.full((len(xyz),), torch.inf)
    for view in capture.select("train"):
        pixels, depth = project_points(points, viewmats_from_camera_to_worlds(view.camera_to_world), view.K)
        inside = is_inside(pixels, depth, view.width, view.height)
        spacing = torch.where(inside, torch.minimum(spacing, depth / view.K[0, 0]), spacing)
    return spacing.double().numpy()
