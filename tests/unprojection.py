"""World points of a depth map, for tests that compare views with each other."""

import torch
from jaxtyping import Float
from torch import Tensor


def unproject_depth(
    depth: Float[Tensor, "height width"], camera_to_world: Float[Tensor, "3 4"], K: Float[Tensor, "3 3"]
) -> Float[Tensor, "height width 3"]:
    """World point seen at each pixel centre at z-depth `depth`."""
    height, width = depth.shape
    rows = torch.arange(height, device=depth.device, dtype=depth.dtype) + 0.5
    columns = torch.arange(width, device=depth.device, dtype=depth.dtype) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    rays = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], dim=-1)
    # OpenCV camera axes to OpenGL ones, then into the world.
    points = rays * depth[..., None] * rays.new_tensor([1.0, -1.0, -1.0])
    return points @ camera_to_world[:, :3].T + camera_to_world[:, 3]
