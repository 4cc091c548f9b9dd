"""Points of a surface from what a capture has: sensor depth of its train views, a triangle mesh, or a point cloud."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from fit3d_ns.lifting.surfels import SurfacePoints, compute_cell_keys, estimate_normals, group_rows
from fit3d_ns.scene import PosedCapture, View
from fit3d_ns.utils.progress import track
from fit3d_ns.utils.selection import select_evenly

_LONGEST_SIDE = 640
"""Depth maps are read at most so large: sensors hardly resolve more."""
_LARGEST_STEP = 0.05
"""Relative difference of depth to a neighbour above which there is an edge between them, and above which two views do
not mean the same point."""
_MAX_ROWS = 8_000_000
"""Fused points are fused again before there are more."""
_NEAR_PERCENTILE = 25.0
"""Of all points, this share is seen from nearer than what the smallest cells are made for."""
_DEPTH_SCALES = (1000.0, 5000.0, 4000.0, 10000.0, 256.0, 100.0)
"""Units per metre that depth maps of sensors and data sets have."""
_SAMPLED_VIEWS = 8
_MILLIMETRES = 1000.0


@dataclass(frozen=True)
class DepthMap:
    """What one view measures, as float64 in the capture's frame."""

    depth: Float[np.ndarray, "height width"]
    """z-depth in units of the frame; 0 = none."""
    rgb: Float[np.ndarray, "height width 3"]
    """Colours in [0, 1]."""
    K: Float[np.ndarray, "3 3"]
    camera_to_world: Float[np.ndarray, "3 4"]
    """OpenGL pose."""

    def unproject(self) -> tuple[np.ndarray, ...]:
        """Points, colours, widths of a pixel, and weights of what is measured."""
        rows, columns = np.nonzero(self.depth)
        z = self.depth[rows, columns]
        x = (columns + 0.5 - self.K[0, 2]) / self.K[0, 0] * z
        y = (rows + 0.5 - self.K[1, 2]) / self.K[1, 1] * z
        xyz = np.stack([x, -y, -z], axis=1) @ self.camera_to_world[:, :3].T + self.camera_to_world[:, 3]
        return xyz, self.rgb[rows, columns], z / self.K[0, 0], 1.0 / z**2

    def look_up(self, xyz: Float[np.ndarray, "points 3"]) -> tuple[np.ndarray, np.ndarray]:
        """z-depth of points, and what is measured in their direction (0 where that is nothing)."""
        pixels, z = project(xyz, self.K, self.camera_to_world)
        height, width = self.depth.shape
        inside = find_inside(pixels, z, width, height)
        columns, rows = np.floor(pixels[inside]).astype(int).T
        measured = np.zeros_like(z)
        measured[inside] = self.depth[rows, columns]
        return z, measured


def project(
    xyz: Float[np.ndarray, "points 3"], K: Float[np.ndarray, "3 3"], camera_to_world: Float[np.ndarray, "3 4"]
) -> tuple[Float[np.ndarray, "points 2"], Float[np.ndarray, " points"]]:
    """Pixels (x, y) and z-depth of points in an OpenGL camera; what is behind it has no pixel (NaN)."""
    x, y, z = ((xyz - camera_to_world[:, 3]) @ camera_to_world[:, :3] * [1.0, -1.0, -1.0]).T
    depth = np.where(z > 0, z, np.nan)
    return np.stack([x / depth * K[0, 0] + K[0, 2], y / depth * K[1, 1] + K[1, 2]], axis=1), z


def find_inside(pixels: np.ndarray, z: np.ndarray, width: int, height: int) -> np.ndarray:
    """True where a point is in front of the camera and in its picture."""
    with np.errstate(invalid="ignore"):
        return (z > 0) & (pixels >= 0).all(axis=1) & (pixels < [width, height]).all(axis=1)


def list_depth_views(capture: PosedCapture) -> list[View]:
    """Train views with depth; held-out ones shape nothing."""
    views = [view for view in capture.select("train") if view.frame.depth_path is not None]
    if not views:
        raise ValueError(
            f"No train frame of {capture.root} has a depth map that belongs to its photograph (`render_depth/` of the "
            "photographs' own lens, `depth_file_path`); use --surface mesh or points, or train splats."
        )
    return views


def load_depth_map(capture: PosedCapture, view: View, scale: float) -> DepthMap:
    """Depth and colour where the mask allows, without what lies between two surfaces, at most 640 pixels long.

    Depth has `scale` units per unit of the capture's world.
    """
    depth = capture.load_depth(view)
    assert depth is not None
    depth = torch.where(capture.load_valid_mask(view) & depth.isfinite(), depth, 0.0)
    step = max(1, round(max(view.width, view.height) / _LONGEST_SIDE))
    start = step // 2
    metres = depth[start::step, start::step].double().numpy()
    rgb = capture.load_image(view)[start::step, start::step].double().numpy() / 255.0
    # (column * step + start + 0.5) of the full picture is (column + 0.5) of the reduced one.
    K = view.K.double().numpy().copy()
    K[:2, 2] = (K[:2, 2] - start - 0.5) / step + 0.5
    K[0, 0], K[1, 1] = K[0, 0] / step, K[1, 1] / step
    values = drop_flying_pixels(metres) * (_MILLIMETRES / scale * capture.dataparser_scale)
    return DepthMap(values, rgb, K, view.camera_to_world.double().numpy())


def drop_flying_pixels(depth: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "height width"]:
    """Depth without pixels that have both a much nearer and a much farther neighbour."""
    kernel = np.ones((3, 3), np.uint8)
    near = cv2.erode(np.where(depth > 0, depth, np.inf), kernel)
    far = cv2.dilate(depth, kernel)
    return np.where((near < depth * (1 - _LARGEST_STEP)) & (far > depth * (1 + _LARGEST_STEP)), 0.0, depth)


def find_depth_scale(capture: PosedCapture) -> float:
    """The usual one of the depth maps' units at which most pixels of a view agree with the next view; 1000 if it is
    about as good as any."""
    views = list_depth_views(capture)
    starts = select_evenly(range(len(views) - 1), _SAMPLED_VIEWS)
    shares = {}
    for scale in _DEPTH_SCALES:
        num_agreeing = num_seen = 1
        for index in starts:
            first, second = (load_depth_map(capture, view, scale) for view in views[index : index + 2])
            z, measured = second.look_up(first.unproject()[0][::16])
            num_seen += int((measured > 0).sum())
            num_agreeing += int(((measured > 0) & (np.abs(measured - z) <= _LARGEST_STEP * z)).sum())
        shares[scale] = num_agreeing / num_seen
    best = max(shares, key=lambda scale: shares[scale])
    return best if shares[best] > 1.2 * shares[_MILLIMETRES] else _MILLIMETRES


def choose_cell(spacing: Float[np.ndarray, " points"], cell_pixels: float) -> float:
    """Side of the smallest cells: so many pixels of a near photograph."""
    return cell_pixels * float(np.percentile(spacing, _NEAR_PERCENTILE))


def fuse_depth(capture: PosedCapture, scale: float, cell_pixels: float) -> tuple[SurfacePoints, float]:
    """One point for each cell in which the train views' depth agrees on a surface, and the cells' side."""
    views = list_depth_views(capture)
    sampled = [load_depth_map(capture, view, scale).unproject()[2] for view in select_evenly(views, _SAMPLED_VIEWS)]
    if not sum(map(len, sampled)):
        raise ValueError(f"The depth maps of {capture.root} measure nothing where masks allow it; check them.")
    cell = choose_cell(np.concatenate(sampled), cell_pixels)
    parts, num_rows = [], 0
    for view in track(views, "Fusing depth"):
        depth_map = load_depth_map(capture, view, scale)
        xyz, rgb, spacing, weights = depth_map.unproject()
        if not len(xyz):
            continue
        directions = depth_map.camera_to_world[:, 3] - xyz
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        sums = np.column_stack([np.ones(len(xyz)), xyz, directions, rgb]) * weights[:, None]
        parts.append(_fuse(compute_cell_keys(xyz, cell), sums, spacing))
        num_rows += len(parts[-1][0])
        if num_rows > _MAX_ROWS:
            parts = [_fuse(*map(np.concatenate, zip(*parts, strict=True)))]
            num_rows = len(parts[0][0])
    _, sums, spacing = _fuse(*map(np.concatenate, zip(*parts, strict=True)))
    means = sums[:, 1:] / sums[:, :1]
    kept = _is_consistent(means[:, :3], capture, views, scale)
    if not kept.any():
        raise ValueError(f"No two views of {capture.root} agree on depth; give its unit with --depth-scale.")
    means, spacing = means[kept], spacing[kept]
    xyz = np.ascontiguousarray(means[:, :3])
    return SurfacePoints(xyz, estimate_normals(xyz, means[:, 3:6]), means[:, 6:], spacing), cell


def _fuse(keys: np.ndarray, sums: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    groups = group_rows(keys)
    return groups.keys, groups.sum(sums), groups.min(spacing)


def _is_consistent(xyz: np.ndarray, capture: PosedCapture, views: Sequence[View], scale: float) -> np.ndarray:
    """False where as many views look through a point as measure it."""
    votes = np.zeros(len(xyz), dtype=np.int64)
    for view in track(views, "Comparing depth"):
        z, measured = load_depth_map(capture, view, scale).look_up(xyz)
        votes += (measured > 0) & (np.abs(measured - z) <= _LARGEST_STEP * z)
        # Nothing is measured of what is behind the camera or beyond its picture.
        votes -= (measured > 0) & (measured - z > _LARGEST_STEP * z)
    return votes > 0


@dataclass(frozen=True)
class SurfaceFile:
    """A mesh or a cloud as its file has it."""

    xyz: Float[np.ndarray, "vertices 3"]
    faces: Int[np.ndarray, "faces 3"]
    """Numbers of vertices; none in a cloud."""
    rgb: Float[np.ndarray, "vertices 3"] | None
    """Colours in [0, 1]."""

    def sample(self, spacing: float, is_used: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Points about `spacing` apart on faces with a used vertex, evenly; their unit normals and colours."""
        corners = self.xyz[self.faces[is_used[self.faces].any(axis=1)]]
        crossed = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        lengths = np.linalg.norm(crossed, axis=1)
        ends = np.cumsum(0.5 * lengths)
        num_points = max(1, round(ends[-1] / spacing**2))
        chosen = np.searchsorted(ends, (np.arange(num_points) + 0.5) / num_points * ends[-1])
        first, second = np.random.default_rng(0).random((2, num_points, 1))
        # The half of the square beyond the triangle is turned onto it.
        first, second = np.where(first + second > 1, 1 - first, first), np.where(first + second > 1, 1 - second, second)
        weights = np.stack([1 - first - second, first, second], axis=1)
        rgb = None
        if self.rgb is not None:
            rgb = (self.rgb[self.faces[is_used[self.faces].any(axis=1)]][chosen] * weights).sum(axis=1)
        return (corners[chosen] * weights).sum(axis=1), crossed[chosen] / lengths[chosen, None], rgb


def read_surface_file(path: Path) -> SurfaceFile:
    """Reads a mesh or point cloud in any format that trimesh knows; what cannot be read or is empty is a ValueError."""
    import trimesh

    if not path.is_file():
        raise ValueError(f"There is no mesh or point cloud {path}; check --mesh.")
    try:
        loaded = trimesh.load(path, process=False)
        geometry = loaded.to_geometry() if isinstance(loaded, trimesh.Scene) else loaded
        xyz = np.asarray(geometry.vertices, dtype=np.float64)
        faces = np.asarray(getattr(geometry, "faces", np.empty((0, 3))), dtype=np.int64)
        colours = getattr(geometry if not len(faces) else geometry.visual, "vertex_colors", None)
        has_colours = colours is not None and np.shape(colours)[:1] == (len(xyz),)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a mesh or point cloud ({error}); save it as PLY.") from error
    finite = np.isfinite(xyz).all(axis=1)
    if not finite.any():
        raise ValueError(f"{path} holds no points; make the file again.")
    rgb = np.asarray(colours, dtype=np.float64)[:, :3] / 255.0 if has_colours else None
    return SurfaceFile(np.where(finite[:, None], xyz, 0.0), faces[finite[faces].all(axis=1)], rgb)


def measure_spacing(xyz: Float[np.ndarray, "points 3"], capture: PosedCapture) -> Float[np.ndarray, " points"]:
    """Width of a pixel at each point in the train view that is nearest; infinite where no view looks, walls apart."""
    spacing = np.full(len(xyz), np.inf)
    for view in capture.select("train"):
        K = view.K.double().numpy()
        pixels, z = project(xyz, K, view.camera_to_world.double().numpy())
        inside = find_inside(pixels, z, view.width, view.height)
        spacing[inside] = np.minimum(spacing[inside], z[inside] / K[0, 0])
    return spacing


def sample_surface(file: SurfaceFile, capture: PosedCapture, cell_pixels: float) -> tuple[SurfacePoints, float]:
    """One point for each cell that a mesh or cloud goes through and a train view looks at, and the cells' side.

    Colours are grey where the file has none.
    """
    spacing = measure_spacing(file.xyz, capture)
    is_used = np.isfinite(spacing)
    if not is_used.any():
        raise ValueError("No train view looks at any point of the surface; it lies in another world than the cameras.")
    cell = choose_cell(spacing[is_used], cell_pixels)
    if len(file.faces):
        xyz, normals, rgb = file.sample(cell / 3.0, is_used)
        spacing = measure_spacing(xyz, capture)
        is_used = np.isfinite(spacing)
        xyz, normals, rgb = xyz[is_used], normals[is_used], None if rgb is None else rgb[is_used]
    else:
        xyz, normals, rgb = file.xyz[is_used], np.zeros((int(is_used.sum()), 3)), file.rgb
        rgb = None if rgb is None else rgb[is_used]
    spacing = spacing[is_used]
    cameras = torch.stack([view.camera_to_world[:, 3] for view in capture.select("train")]).double().numpy()
    towards = cameras[cKDTree(cameras).query(xyz)[1]] - xyz
    normals = np.where((normals * towards).sum(axis=1, keepdims=True) < 0, -normals, normals)
    colours = np.full_like(xyz, 0.5) if rgb is None else rgb
    sums = np.column_stack([np.ones(len(xyz)), xyz, normals, towards, colours])
    _, sums, spacing = _fuse(compute_cell_keys(xyz, cell), sums, spacing)
    means = sums[:, 1:] / sums[:, :1]
    xyz = np.ascontiguousarray(means[:, :3])
    if len(file.faces):
        normals = means[:, 3:6] / np.maximum(np.linalg.norm(means[:, 3:6], axis=1, keepdims=True), 1e-9)
    else:
        normals = estimate_normals(xyz, means[:, 6:9])
    return SurfacePoints(xyz, normals, means[:, 9:], spacing), cell
