"""Points that two views both see, and whether features find them again.

A view is a z-depth map with its camera; depths may be rendered or measured, in any unit that the poses share (0 = no
measurement). Image points are (x, y) in pixels, pixel centres at +0.5. A token map [h, w, E] covers the whole image;
token (i, j) stands at ((j + 0.5) W / w, (i + 0.5) H / h).

Recall is defined like probe3d's for ScanNet pairs: features are read on a regular grid of both images, each point that
both see takes its nearest neighbour by cosine among all grid points of the other image, and counts as found if that
lies within so many pixels of the true place. Differences to probe3d: queries are co-visible points drawn at random
(there: the best by ratio test, seen or not), and matching goes one way.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.geometry.cameras import project_points, viewmats_from_camera_to_worlds
from fit3d_ns.utils.seeds import create_generator

AngleKind = Literal["rotation", "parallax"]


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
    def usable_depth(self) -> Float[Tensor, "height width"]:
        """Depth, 0 where it is unknown, not finite or masked."""
        usable = self.depth.isfinite() & (self.depth > 0)
        if self.valid_mask is not None:
            usable &= self.valid_mask
        return torch.where(usable, self.depth, 0.0)


@dataclass(frozen=True)
class CovisiblePoints:
    """Points of a first view that a second view sees too."""

    points: Float[Tensor, "points 2"]
    """(x, y) in the first image."""
    other_points: Float[Tensor, "points 2"]
    """Where the second image shows them."""
    angles: Float[Tensor, " points"]
    """Degrees between the two views of each point, as the kind that was asked for."""

    def __len__(self) -> int:
        return self.points.shape[0]

    def select(self, chosen: Int[Tensor, " chosen"]) -> "CovisiblePoints":
        """The points with the given numbers."""
        return CovisiblePoints(self.points[chosen], self.other_points[chosen], self.angles[chosen])


def create_grid_points(width: int, height: int, size: tuple[int, int]) -> Float[Tensor, "points 2"]:
    """Centres (x, y) of the cells of a grid (h, w) over the image, rows first."""
    rows = (torch.arange(size[0]) + 0.5) * (height / size[0])
    columns = (torch.arange(size[1]) + 0.5) * (width / size[1])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def find_covisible(
    view: DepthView,
    other: DepthView,
    points: Float[Tensor, "points 2"],
    depth_tolerance: float = 0.05,
    angle_kind: AngleKind = "rotation",
) -> CovisiblePoints:
    """Which image points of `view` the `other` view sees, and where.

    A point counts if its pixel has depth, it falls inside the other image, the other image has depth at the pixel it
    falls into, and the two depths agree: otherwise something stands in between or the point moved.

    Args:
        view: The first view.
        other: The second view.
        points: (x, y) in the first image.
        depth_tolerance: Largest relative difference of depths in the other view, at least 0.
        angle_kind: `rotation`: between the orientations of the two cameras (probe3d's bins), the same for all points;
            `parallax`: between the directions from the point to the two cameras.
    """
    depth = _look_up(view.usable_depth, points)
    in_world = _unproject(points, depth, view)
    viewmat = viewmats_from_camera_to_worlds(other.camera_to_world)
    other_points, other_depth = project_points(in_world, viewmat, other.K)
    height, width = other.depth.shape
    inside = (other_points >= 0).all(dim=1) & (other_points[:, 0] < width) & (other_points[:, 1] < height)
    visible = (depth > 0) & (other_depth > 0) & inside
    measured = _look_up(other.usable_depth, torch.where(visible[:, None], other_points, 0.0))
    visible &= (measured > 0) & ((measured - other_depth).abs() <= depth_tolerance * other_depth)
    if angle_kind == "rotation":
        angles = measure_rotation(view.camera_to_world, other.camera_to_world).expand(points.shape[0])
    else:
        towards = F.normalize(view.camera_to_world[:, 3] - in_world, dim=1)
        other_towards = F.normalize(other.camera_to_world[:, 3] - in_world, dim=1)
        # The half-angle form is exact for small angles, where acos loses half of the digits.
        angles = torch.rad2deg(
            2 * torch.atan2((towards - other_towards).norm(dim=1), (towards + other_towards).norm(dim=1))
        )
    return CovisiblePoints(points, other_points, angles).select(visible.nonzero()[:, 0])


def measure_rotation(camera_to_world: Float[Tensor, "3 4"], other: Float[Tensor, "3 4"]) -> Float[Tensor, ""]:
    """Degrees of the rotation that takes one camera's orientation to the other's, in [0, 180]."""
    relative = camera_to_world[:, :3].T @ other[:, :3]
    # |R - I| = 2 sqrt(2) sin(angle / 2) in the Frobenius norm; unlike the trace formula this is exact near 0.
    sine = (relative - torch.eye(3).to(relative)).norm() / (2 * math.sqrt(2))
    return torch.rad2deg(2 * torch.asin(sine.clamp(max=1.0)))


def sample_tokens(
    tokens: Float[Tensor, "h w embed"], points: Float[Tensor, "points 2"], width: int, height: int
) -> Float[Tensor, "points embed"]:
    """Token map at image points (x, y): bilinear between token centres, constant beyond the outermost ones."""
    # grid_sample's -1 and 1 are the image's edges when align_corners is off.
    grid = points.to(tokens) / points.new_tensor([width, height]).to(tokens) * 2 - 1
    maps = tokens.permute(2, 0, 1)[None]
    sampled = F.grid_sample(maps, grid[None, None], mode="bilinear", padding_mode="border", align_corners=False)
    # (1, e, 1, n) -> (n, e)
    return sampled[0, :, 0].T


def find_nearest(
    queries: Float[Tensor, "queries embed"], candidates: Float[Tensor, "candidates embed"], chunk_size: int = 2048
) -> Int[Tensor, " queries"]:
    """Number of the candidate with the largest cosine to each query; memory stays at `chunk_size` rows of cosines."""
    normalised = F.normalize(candidates, dim=1)
    nearest = [(F.normalize(rows, dim=1) @ normalised.T).argmax(dim=1) for rows in queries.split(chunk_size)]
    return torch.cat(nearest) if nearest else torch.zeros(0, dtype=torch.long, device=queries.device)


def measure_matching_errors(
    tokens: Float[Tensor, "h w embed"],
    other_tokens: Float[Tensor, "h_other w_other embed"],
    covisible: CovisiblePoints,
    image_size: tuple[int, int],
    other_image_size: tuple[int, int],
    grid: tuple[int, int] | None = None,
) -> Float[Tensor, " points"]:
    """Pixels between where features find each point in the other image and where it is.

    Args:
        tokens: Token map of the first view.
        other_tokens: Token map of the second view.
        covisible: The points to find.
        image_size: (width, height) of the first image.
        other_image_size: (width, height) of the second image; errors are in its pixels.
        grid: (h, w) of the candidates in the second image; its token grid by default.
    """
    queries = sample_tokens(tokens, covisible.points, *image_size)
    grid = (other_tokens.shape[0], other_tokens.shape[1]) if grid is None else grid
    places = create_grid_points(*other_image_size, grid).to(tokens)
    candidates = sample_tokens(other_tokens, places, *other_image_size)
    return (places[find_nearest(queries, candidates)] - covisible.other_points).norm(dim=1)


def draw_points(covisible: CovisiblePoints, max_points: int, seed: int, *purpose: str | int) -> CovisiblePoints:
    """At most `max_points` of the points, drawn without replacement; all of them where there are no more."""
    if len(covisible) <= max_points:
        return covisible
    order = torch.randperm(len(covisible), generator=create_generator(seed, "covisible points", *purpose))
    return covisible.select(order[:max_points].sort().values.to(covisible.points.device))


def _look_up(values: Float[Tensor, "height width"], points: Float[Tensor, "points 2"]) -> Float[Tensor, " points"]:
    """The value of the pixel that each point falls into; depth is never interpolated over edges."""
    height, width = values.shape
    columns = points[:, 0].floor().long().clamp(0, width - 1)
    rows = points[:, 1].floor().long().clamp(0, height - 1)
    return values[rows, columns]


def _unproject(
    points: Float[Tensor, "points 2"], depth: Float[Tensor, " points"], view: DepthView
) -> Float[Tensor, "points 3"]:
    """World points that lie at `depth` behind image points, which need not be pixel centres."""
    x = (points[:, 0] - view.K[0, 2]) / view.K[0, 0]
    y = (points[:, 1] - view.K[1, 2]) / view.K[1, 1]
    # OpenCV camera axes to OpenGL ones.
    in_camera = torch.stack([x * depth, -y * depth, -depth], dim=-1)
    return in_camera @ view.camera_to_world[:, :3].T + view.camera_to_world[:, 3]
