import math

import torch

from fit3d_ns.geometry.cameras import (
    camera_to_worlds_from_viewmats,
    create_K,
    crop_Ks,
    project_points,
    resize_Ks,
    transform_camera_to_worlds,
    transform_points,
    viewmats_from_camera_to_worlds,
)
from tests.unprojection import unproject_depth


def rotation_about_x(angle: float) -> torch.Tensor:
    cosine, sine = math.cos(angle), math.sin(angle)
    return torch.tensor([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]], dtype=torch.float64)


def random_camera_to_worlds(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    rotations = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64))[0]
    rotations = rotations * torch.linalg.det(rotations)[:, None, None]
    return torch.cat([rotations, torch.randn(count, 3, 1, generator=generator, dtype=torch.float64)], dim=-1)


def test_viewmats__identity_pose_looks_along_minus_z() -> None:
    viewmat = viewmats_from_camera_to_worlds(torch.eye(4)[:3])
    # OpenGL looks along -z with y up: a point 2 ahead, 1 right, 1 up is at z = 2, x = 1, y = -1 in OpenCV.
    point = viewmat @ torch.tensor([1.0, 1.0, -2.0, 1.0])
    assert point.tolist() == [1.0, -1.0, 2.0, 1.0]


def test_viewmats__invert_the_poses_column_by_column() -> None:
    camera_to_worlds = random_camera_to_worlds(4)
    viewmats = viewmats_from_camera_to_worlds(camera_to_worlds)
    full = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    full[:, :3] = camera_to_worlds
    full[:, :3, 1:3] *= -1
    torch.testing.assert_close(viewmats, torch.linalg.inv(full))
    torch.testing.assert_close(camera_to_worlds_from_viewmats(viewmats), camera_to_worlds)


def test_viewmats__gradients_match_finite_differences() -> None:
    camera_to_worlds = random_camera_to_worlds(2).requires_grad_()
    assert torch.autograd.gradcheck(viewmats_from_camera_to_worlds, (camera_to_worlds,))


def test_project_points__closed_form() -> None:
    # The camera at (0, 0, 5) looks down on the plane z = 0; right is +x, up in the picture is +y.
    camera_to_world = torch.cat([torch.eye(3), torch.tensor([[0.0], [0.0], [5.0]])], dim=1)
    viewmat = viewmats_from_camera_to_worlds(camera_to_world)
    K = create_K(100.0, 200.0, 32.0, 24.0)
    pixels, depth = project_points(torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 7.0]]), viewmat, K)
    torch.testing.assert_close(pixels[:2], torch.tensor([[32.0, 24.0], [52.0, 4.0]]))
    assert depth.tolist() == [5.0, 5.0, -2.0]


def test_unproject_depth__is_seen_again_at_the_pixel_centres() -> None:
    camera_to_world = random_camera_to_worlds(1)[0]
    K = create_K(9.0, 8.0, 3.1, 2.7).double()
    depth = torch.rand(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    points = unproject_depth(depth, camera_to_world, K).reshape(-1, 3)
    pixels, seen = project_points(points, viewmats_from_camera_to_worlds(camera_to_world), K)
    expected = [[column + 0.5, row + 0.5] for row in range(5) for column in range(6)]
    torch.testing.assert_close(pixels, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(seen, depth.reshape(-1))


def test_resize_Ks__keeps_relative_positions() -> None:
    K = create_K(100.0, 110.0, 30.0, 20.0)
    resized = resize_Ks(K, (64, 48), (32, 12))
    torch.testing.assert_close(resized, create_K(50.0, 27.5, 15.0, 5.0))


def test_crop_Ks__moves_the_principal_point_only() -> None:
    cropped = crop_Ks(create_K(100.0, 110.0, 30.0, 20.0).repeat(2, 1, 1), left=4.0, top=3.0)
    torch.testing.assert_close(cropped, create_K(100.0, 110.0, 26.0, 17.0).repeat(2, 1, 1))


def test_transforms__points_stay_where_the_cameras_see_them() -> None:
    camera_to_worlds = random_camera_to_worlds(3)
    transform = torch.cat([rotation_about_x(0.7), torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64)], dim=1)
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved_cameras = transform_camera_to_worlds(camera_to_worlds, transform, scale=0.25)
    moved_points = transform_points(points, transform, scale=0.25)
    K = create_K(10.0, 10.0, 5.0, 5.0).double()
    for before, after in zip(camera_to_worlds, moved_cameras, strict=True):
        pixels, depth = project_points(points, viewmats_from_camera_to_worlds(before), K)
        new_pixels, new_depth = project_points(moved_points, viewmats_from_camera_to_worlds(after), K)
        torch.testing.assert_close(new_pixels, pixels)
        torch.testing.assert_close(new_depth, 0.25 * depth)


def test_transform_points__moves_before_it_scales() -> None:
    transform = torch.eye(4)[:3].clone()
    transform[:, 3] = torch.tensor([1.0, 0.0, 0.0])
    assert transform_points(torch.tensor([[1.0, 2.0, 4.0]]), transform, 0.5).tolist() == [[1.0, 1.0, 2.0]]
