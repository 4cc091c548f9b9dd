"""What a second, linear head reads from the tokens: how far away a scene's surfaces are, and which way they face.

A feature that all views of a point agree on cannot hold its distance to the camera, so targets that are averaged over
views teach a backbone to forget depth. The head asks for it back. Its targets are blended from the scene's Gaussians
at the token grid, as the features are:

    log(z / f)    z-depth of the Gaussians' centres over the focal length in pixels of the image that is shown, because
                  an image alone tells only this ratio; about the scene's mean, because worlds have any unit
    n             the shortest axis of the Gaussians, turned towards the camera, in OpenCV's camera axes (x right, y
                  down, z forwards); shorter than 1 where those that are blended disagree
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.geometry.cameras import Camera, viewmats_from_camera_to_worlds
from fit3d_ns.rasterization.projection import rotations_from_quats
from fit3d_ns.scene import FeatureScene, TokenReadingRule, View, create_token_reader
from fit3d_ns.utils.selection import select_evenly

NUM_CHANNELS = 4
HEAD_RATE = 20.0
"""Times the backbone's learning rate: the head begins at zero and has few steps to follow."""
_NUM_VIEWS, _SMALLEST_ALPHA, _SMALLEST_DEPTH = 8, 1e-6, 1e-6


@torch.no_grad()
def render_values(
    scene: FeatureScene,
    camera: Camera,
    patch_grid: tuple[int, int],
    rule: TokenReadingRule,
    values: Float[Tensor, "num_gaussians channels"],
) -> Float[Tensor, "h w channels"]:
    """Values of the Gaussians, blended and read at the token grid (h, w) of a picture."""
    size = (camera.width, camera.height, patch_grid)
    reader = create_token_reader(*size, rule, neighbourhood=False, device=values.device)
    return reader.read(reader.blend(values, scene.activated.project(camera)))[0]


@torch.no_grad()
def render_geometry(
    scene: FeatureScene, camera: Camera, patch_grid: tuple[int, int], rule: TokenReadingRule
) -> Float[Tensor, "h w 4"]:
    """Log of depth over focal length, and the normal, at each token; zeros where nothing is."""
    gaussians = scene.activated
    viewmat = viewmats_from_camera_to_worlds(camera.camera_to_world.to(gaussians.means))
    places = gaussians.means @ viewmat[:3, :3].T + viewmat[:3, 3]
    # Columns of a rotation are the axes.
    shortest = gaussians.scales.argmin(dim=1)[:, None, None].expand(-1, 3, 1)
    normals = rotations_from_quats(gaussians.quats).gather(2, shortest)[..., 0] @ viewmat[:3, :3].T
    normals = -normals * torch.sign((normals * places).sum(dim=1, keepdim=True))
    distances = torch.log(places[:, 2:].clamp(min=_SMALLEST_DEPTH) / float(camera.K[0, 0]))
    values = torch.cat([distances, normals, torch.ones_like(distances)], dim=1)
    blended = render_values(scene, camera, patch_grid, rule, values)
    alphas = blended[..., NUM_CHANNELS:]
    return torch.where(alphas > _SMALLEST_ALPHA, blended[..., :NUM_CHANNELS] / alphas, 0.0)


def compute_mean_distance(scene: FeatureScene, views: Sequence[View]) -> float:
    """Mean of log(z / f) over a few views, evenly spread."""
    chosen = select_evenly(views, _NUM_VIEWS)
    maps = [render_geometry(scene, view.camera, (16, 16), "area")[..., 0] for view in chosen]
    return float(torch.stack(maps).mean())
