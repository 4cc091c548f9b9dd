"""Points that two views both see, and whether features find them again.

A view is a z-depth map with its camera; depths may be rendered or measured, in any unit that the poses share (0 = no
measurement). Image points are (x, y) in pixels, pixel centres at +0.5. A token map [h, w, E] covers the whole image;
token (i, j) is at ((j + 0.5) W / w, (i + 0.5) H / h). Features are matched on a regular grid of each image.

`find_matches` asks every visible place: each point that both views see takes its nearest neighbour by cosine among all
grid points of the other image. `find_ratio_matches` asks for the most distinct matches by Lowe's ratio test, as probe3d
does for ScanNet and NAVI: every grid point of the first image with depth looks for its two nearest neighbours among the
grid points of the second image with depth, by the cosine distance 1 - cos. The ratio of the two distances, nearest over
second, is near 0 where a match is distinct and 1 where it is not. The lowest ratios are kept, whether the second view
sees those points or not: a backbone that finds nothing in common also fails here. Matching goes from first to second.

Differences to probe3d (El Banani et al., CVPR 2024; `evaluate_{scannet,navi}_correspondence.py` and
`evals/utils/correspondence.py`): features beyond the outermost token centres stay constant (there: fade to zero), and
depth is read at the middle of each grid cell (there: at its upper left pixel). All pixels here are of the full-size
image; its 5, 10 and 20 px for ScanNet count in an image of a quarter of the size, so they are 20, 40 and 80 px here.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.geometry.cameras import is_inside, project_points, viewmats_from_camera_to_worlds

SMALLEST_DISTANCE = 1e-9
"""Distances of features below it count as this much (probe3d), so that equal features have the ratio 1."""
ROWS_AT_ONCE = 2048
"""Rows of cosines that are in memory at a time."""
Points = Float[Tensor, "points 2"]
Values = Float[Tensor, " points"]
Size = tuple[int, int]
"""Width and height of an image, pixels."""
Maps = tuple[Float[Tensor, "h w embed"], Float[Tensor, "h_other w_other embed"]]
"""Token maps of a first view and of a second, other one."""


@dataclass(frozen=True)
class DepthView:
    """One view with known depth."""

    depth: Float[Tensor, "height width"]
    """z-depth at pixel centres, 0 = unknown."""
    K: Float[Tensor, "3 3"]
    """Intrinsics in pixels of the depth map."""
    camera_to_world: Float[Tensor, "3 4"]
    """OpenGL pose; its translation has the unit of `depth`."""
    valid_mask: Bool[Tensor, "height width"] | None = None
    """True where the image may be used; everywhere by default."""

    @property
    def size(self) -> Size:
        """Width and height in pixels."""
        return self.depth.shape[1], self.depth.shape[0]

    @property
    def usable_depth(self) -> Float[Tensor, "height width"]:
        """Depth, 0 where it is unknown, not finite or masked."""
        usable = self.depth.isfinite() & (self.depth > 0)
        if self.valid_mask is not None:
            usable &= self.valid_mask
        return torch.where(usable, self.depth, 0.0)


def create_grid_points(width: int, height: int, grid: tuple[int, int]) -> Points:
    """Centres (x, y) of the cells of a grid (h, w) over the image, rows first."""
    rows = (torch.arange(grid[0]) + 0.5) * (height / grid[0])
    columns = (torch.arange(grid[1]) + 0.5) * (width / grid[1])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def find_covisible(
    view: DepthView, other: DepthView, points: Points, depth_tolerance: float = 0.05
) -> tuple[Float[Tensor, "seen 2"], Float[Tensor, "seen 2"]]:
    """Which image points of `view` the `other` view sees, and where in its own image.

    A point (x, y) counts if its pixel has depth, it falls inside the other image, the other image has depth at the
    pixel it falls into, and the two depths differ by at most the share `depth_tolerance`: else something is in between.
    """
    depth = look_up(view.usable_depth, points)
    other_points, other_depth, measured = observe(unproject(points, depth, view), other)
    visible = (depth > 0) & (measured > 0) & ((measured - other_depth).abs() <= depth_tolerance * other_depth)
    return points[visible], other_points[visible]


def observe(xyz: Float[Tensor, "points 3"], view: DepthView) -> tuple[Points, Values, Values]:
    """Where world points are in a view's image, their z-depth there, and the depth that the view has at that pixel: 0
    where it has none, and for points behind it or outside its image."""
    pixels, depth = project_points(xyz, viewmats_from_camera_to_worlds(view.camera_to_world), view.K)
    inside = is_inside(pixels, depth, *view.size)
    measured = look_up(view.usable_depth, torch.where(inside[:, None], pixels, 0.0))
    return pixels, depth, torch.where(inside, measured, 0.0)


def measure_rotation(camera_to_world: Float[Tensor, "3 4"], other: Float[Tensor, "3 4"]) -> Float[Tensor, ""]:
    """Degrees of the rotation that takes one camera's orientation to the other's, in [0, 180] (probe3d's bins)."""
    relative = camera_to_world[:, :3].T @ other[:, :3]
    # |R - I| = 2 sqrt(2) sin(angle / 2) in the Frobenius norm; unlike the trace formula this is exact near 0.
    sine = (relative - torch.eye(3).to(relative)).norm() / (2 * math.sqrt(2))
    return torch.rad2deg(2 * torch.asin(sine.clamp(max=1.0)))


def sample_tokens(
    tokens: Float[Tensor, "h w embed"], points: Points, width: int, height: int
) -> Float[Tensor, "points embed"]:
    """Token map at image points (x, y): bilinear between token centres, constant beyond the outermost ones."""
    # grid_sample's -1 and 1 are the image's edges when align_corners is off.
    grid = points.to(tokens) / points.new_tensor([width, height]).to(tokens) * 2 - 1
    maps = tokens.permute(2, 0, 1)[None]
    sampled = F.grid_sample(maps, grid[None, None], mode="bilinear", padding_mode="border", align_corners=False)
    # (1, e, 1, n) -> (n, e)
    return sampled[0, :, 0].T


def find_matches(maps: Maps, sizes: tuple[Size, Size], points: Points, grid: tuple[int, int]) -> Points:
    """Where features find each point (x, y) of the first image in the second, among a grid (h, w) of points there."""
    places = create_grid_points(*sizes[1], grid).to(maps[0])
    queries = F.normalize(sample_tokens(maps[0], points, *sizes[0]), dim=1)
    candidates = F.normalize(sample_tokens(maps[1], places, *sizes[1]), dim=1)
    return places[torch.cat([(rows @ candidates.T).argmax(dim=1) for rows in queries.split(ROWS_AT_ONCE)])]


def find_ratio_matches(
    maps: Maps,
    views: tuple[DepthView, DepthView],
    grids: tuple[tuple[int, int], tuple[int, int]],
    max_matches: int = 1000,
) -> tuple[Float[Tensor, "matches 2"], Float[Tensor, "matches 2"], Float[Tensor, " matches"]]:
    """The most distinct matches of the first view's grid in the second's; none where that has fewer than two points.

    Features are read at `grids` (h, w) of points in either image. Returned are (x, y) in the first and in the second
    image, and the ratios in [0, 1], lowest first.
    """
    grid_points = [create_grid_points(*view.size, grid).to(view.depth) for view, grid in zip(views, grids, strict=True)]
    pairs = zip(grid_points, views, strict=True)
    points, places = (own[look_up(view.usable_depth, own) > 0] for own, view in pairs)
    if len(points) == 0 or len(places) < 2:
        return points[:0], places[:0], points.new_zeros(0)
    queries = F.normalize(sample_tokens(maps[0], points, *views[0].size), dim=1)
    candidates = F.normalize(sample_tokens(maps[1], places, *views[1].size), dim=1)
    ratios, nearest = [], []
    for rows in queries.split(ROWS_AT_ONCE):
        cosines = rows @ candidates.T
        best = cosines.max(dim=1)
        # Faster than a top-2: the maximum is struck out, and what is then the maximum is the second.
        second = cosines.scatter_(1, best.indices[:, None], -2.0).amax(dim=1)
        distances = [(1 - values).clamp_min(SMALLEST_DISTANCE) for values in (best.values, second)]
        ratios.append(distances[0] / distances[1])
        nearest.append(best.indices)
    # A stable order, so that equal ratios are chosen alike on every machine.
    ordered = torch.cat(ratios).sort(stable=True)
    chosen = ordered.indices[:max_matches]
    return points[chosen], places[torch.cat(nearest)[chosen]], ordered.values[:max_matches]


def measure_match_errors(view: DepthView, other: DepthView, points: Points, matched: Points) -> tuple[Values, Values]:
    """How far from the true places points (x, y) were matched in the second image, whether that sees them or not.

    In pixels of that image; and in space between the two surface points, in the unit of the poses. NaN, which no
    threshold lets through, behind the camera and where a view has no depth: the first, or either in space.
    """
    depth, matched_depth = look_up(view.usable_depth, points), look_up(other.usable_depth, matched)
    in_world, matched_in_world = unproject(points, depth, view), unproject(matched, matched_depth, other)
    places, other_depth = project_points(in_world, viewmats_from_camera_to_worlds(other.camera_to_world), other.K)
    unknown = in_world.new_tensor(float("nan"))
    pixels = torch.where((depth > 0) & (other_depth > 0), (matched - places).norm(dim=1), unknown)
    distances = torch.where((depth > 0) & (matched_depth > 0), (matched_in_world - in_world).norm(dim=1), unknown)
    return pixels, distances


def look_up(values: Float[Tensor, "height width"], points: Points) -> Values:
    """The value of the pixel that each point falls into; depth is never interpolated over edges."""
    height, width = values.shape
    columns = points[:, 0].floor().long().clamp(0, width - 1)
    rows = points[:, 1].floor().long().clamp(0, height - 1)
    return values[rows, columns]


def unproject(points: Points, depth: Values, view: DepthView) -> Float[Tensor, "points 3"]:
    """World points that lie at `depth` behind image points, which need not be pixel centres."""
    x = (points[:, 0] - view.K[0, 2]) / view.K[0, 0]
    y = (points[:, 1] - view.K[1, 2]) / view.K[1, 1]
    # OpenCV camera axes to OpenGL ones.
    in_camera = torch.stack([x * depth, -y * depth, -depth], dim=-1)
    return in_camera @ view.camera_to_world[:, :3].T + view.camera_to_world[:, 3]
