"""Of a wall, what the geometry head should read is known in closed form."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fit3d_ns.finetuning.draws import AugmentationConfig, Draw, TrainingViews
from fit3d_ns.finetuning.scene_bank import SceneBank
from fit3d_ns.finetuning.targets import TargetConfig, TargetRenderer, compute_mean_distance, render_geometry
from fit3d_ns.geometry.cameras import Camera
from fit3d_ns.scene import FeatureScene, Gaussians, save_scene
from fit3d_ns.utils.tensor_files import TensorStore
from tests.finetuning.finetuning_scene import DIM, PATCH, create_scene

NORMAL = F.normalize(torch.tensor([0.3, 0.2, 1.0]), dim=0)
"""Of the wall that passes through the world's origin; the cameras look at it along -z."""


def create_wall(folder, **settings) -> FeatureScene:
    """A scene whose Gaussians are flat and lie close together in one plane."""
    scene = create_scene(folder, **settings)
    along = F.normalize(torch.linalg.cross(NORMAL, torch.tensor([0.0, 1.0, 0.0])), dim=0)
    across = torch.linalg.cross(NORMAL, along)
    steps = torch.linspace(-2.5, 2.5, 101)
    means = (steps[:, None, None] * along + steps[None, :, None] * across).reshape(-1, 3)
    # Half a turn about the mean of z and the normal moves the one to the other.
    axis = F.normalize(NORMAL + torch.tensor([0.0, 0.0, 1.0]), dim=0)
    generator = torch.Generator().manual_seed(0)
    number = len(means)
    wall = Gaussians.from_raw(
        means=means,
        quats=torch.cat([torch.zeros(1), axis]).expand(number, 4),
        log_scales=torch.tensor([0.05, 0.05, 1e-4]).log().expand(number, 3),
        opacity_logits=torch.full((number, 1), 6.0),
        sh_dc=torch.zeros(number, 3),
        features=torch.randn(number, DIM, generator=generator),
        blend_weight=torch.ones(number),
        num_views=torch.full((number,), 6),
        feature_variance=torch.ones(number),
    )
    return replace(scene, gaussians=wall)


def compute_wall(view, grid):
    """log(z / f) and the normal in OpenCV's axes where the middle of each token sees the wall."""
    h, w = grid
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    u, v = x * view.width / w, y * view.height / h
    rays = torch.stack([(u - view.K[0, 2]) / view.K[0, 0], (v - view.K[1, 2]) / view.K[1, 1], torch.ones_like(u)], -1)
    flip = torch.tensor([1.0, -1.0, -1.0])
    normal = flip * (NORMAL @ view.camera_to_world[:, :3])
    offset = -float(NORMAL @ view.camera_to_world[:, 3])
    return torch.log(offset / (rays @ normal) / view.K[0, 0]), normal


def test_render_geometry__of_a_wall_is_its_distance_and_its_normal(tmp_path):
    scene = create_wall(tmp_path)
    for view in scene.posed_capture.views[::3]:
        rendered = render_geometry(scene, view.camera, (4, 5), "bilinear")
        distance, normal = compute_wall(view, (4, 5))
        torch.testing.assert_close(rendered[..., 0], distance, rtol=0.0, atol=0.02)
        assert float(distance.max() - distance.min()) > 0.3
        torch.testing.assert_close(rendered[..., 1:], normal.expand(4, 5, 3), rtol=0.0, atol=1e-3)
        assert normal[2] < 0.0
        # A picture of twice the size shows the same, at twice the focal length.
        K = torch.diag(torch.tensor([2.0, 2.0, 1.0])) @ view.K
        larger = render_geometry(
            scene, Camera(view.camera_to_world, K, 2 * view.width, 2 * view.height), (4, 5), "bilinear"
        )
        torch.testing.assert_close(larger[..., 0] + torch.log(torch.tensor(2.0)), distance, rtol=0.0, atol=0.02)


def test_render_geometry__does_not_depend_on_the_sign_of_an_axis_nor_on_what_is_behind(tmp_path):
    scene = create_wall(tmp_path)
    view = scene.posed_capture.views[0]
    camera = view.camera
    turned = scene.gaussians.quats.clone()
    # Half a turn about their own first axis.
    w, x, y, z = turned.unbind(-1)
    turned = torch.stack([-x, w, z, -y], dim=-1)
    other = replace(scene, gaussians=replace(scene.gaussians, quats=turned))
    expected = render_geometry(scene, camera, (4, 5), "area")
    torch.testing.assert_close(render_geometry(other, camera, (4, 5), "area"), expected, rtol=0.0, atol=1e-3)
    behind = view.camera_to_world.clone()
    behind[2, 3] = -5.0
    nothing = render_geometry(scene, camera._replace(camera_to_world=behind), (4, 5), "area")
    assert torch.equal(nothing, torch.zeros(4, 5, 4))


@pytest.mark.parametrize("has_store", [False, True])
def test_target__holds_geometry_about_the_mean_of_its_scene_and_mirrors_it(tmp_path, has_store):
    path = tmp_path / "scenes" / "wall.safetensors"
    scene = create_wall(tmp_path)
    save_scene(scene, path)
    bank = SceneBank([path])
    views = TrainingViews(bank.on_disk, [("train",)])
    config = TargetConfig(geometry_weight=1.0)
    targets = TargetRenderer(bank, views, config, TensorStore(1.0, tmp_path / "kept") if has_store else None)
    mean = compute_mean_distance(scene, views.views[0])
    for _ in range(2):
        for flip in (0.0, 1.0):
            sample = views.load_sample(Draw(0, 0, 1), AugmentationConfig(flip_probability=flip), PATCH, 0, "area")
            geometry = targets.render(sample).geometry
            plain = render_geometry(scene, sample.camera, sample.patch_grid, targets.rules[0])
            plain[..., 0] -= mean
            expected = plain.flip(1) * torch.tensor([1.0, -1.0, 1.0, 1.0]) if flip else plain
            # Kept in half precision.
            torch.testing.assert_close(geometry, expected, rtol=0.0, atol=5e-3)
    assert targets.num_rendered == (1 if has_store else 4)
    assert TargetRenderer(bank, views, TargetConfig()).render(sample).geometry is None


def test_mean_distance__takes_the_unit_of_the_world_out(tmp_path):
    scene = create_wall(tmp_path)
    views = scene.posed_capture.views
    small = compute_mean_distance(scene, views)
    gaussians = scene.gaussians
    grown = replace(
        gaussians, means=3.0 * gaussians.means, log_scales=gaussians.log_scales + torch.log(torch.tensor(3.0))
    )
    poses = [torch.cat([view.camera_to_world[:, :3], 3.0 * view.camera_to_world[:, 3:]], dim=1) for view in views]
    moved = [replace(view, camera_to_world=pose) for view, pose in zip(views, poses, strict=True)]
    large = compute_mean_distance(replace(scene, gaussians=grown), moved)
    assert large - small == pytest.approx(1.0986, abs=0.01)
