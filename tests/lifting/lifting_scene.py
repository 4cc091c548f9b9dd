"""A scene small enough for dense linear algebra: a handful of large Gaussians, a few views with random tokens."""

import torch
from torch import Tensor

from fit3d_ns.geometry.cameras import Camera, camera_to_worlds_from_viewmats, viewmats_from_camera_to_worlds
from fit3d_ns.lifting.views import LiftView
from fit3d_ns.rasterization import rasterization, rasterize_features
from fit3d_ns.scene import ActivatedGaussians

WIDTH, HEIGHT, GRID, EMBED_DIM = 24, 16, (4, 6), 8


def create_gaussians(num_gaussians: int = 10, seed: int = 0) -> ActivatedGaussians:
    generator = torch.Generator().manual_seed(seed)
    means = (torch.rand(num_gaussians, 3, generator=generator) - 0.5) * torch.tensor([2.4, 1.6, 1.0])
    return ActivatedGaussians(
        means=means + torch.tensor([0.0, 0.0, 4.0]),
        quats=torch.randn(num_gaussians, 4, generator=generator),
        scales=0.15 + 0.25 * torch.rand(num_gaussians, 3, generator=generator),
        opacities=0.3 + 0.6 * torch.rand(num_gaussians, generator=generator),
    )


def create_views(num_views: int = 4, seed: int = 1, with_masks: bool = True) -> list[LiftView]:
    """Views side by side; tokens are random, masks leave out a corner."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for index in range(num_views):
        viewmat = torch.eye(4)
        viewmat[0, 3] = 0.3 * (index - 1.5)
        viewmat[1, 3] = 0.1 * index
        K = torch.tensor([[30.0, 0.0, 11.0], [0.0, 29.0, 8.5], [0.0, 0.0, 1.0]])
        tokens = torch.randn(*GRID, EMBED_DIM, generator=generator) + 2.0
        mask = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
        mask[: 3 + index, :5] = False
        views.append(
            LiftView(
                camera=Camera(camera_to_worlds_from_viewmats(viewmat), K, WIDTH, HEIGHT),
                load_tokens=lambda tokens=tokens: tokens,
                load_mask=(lambda mask=mask: mask) if with_masks else (lambda: None),
                name=f"frame_{index}.png",
            )
        )
    return views


def compute_dense_blending(gaussians: ActivatedGaussians, view: LiftView) -> tuple[Tensor, Tensor]:
    """R [H, W, N] in float64, by blending one-hot features, and alpha [H, W]."""
    num_gaussians = len(gaussians)
    _, alphas, info = rasterization(
        gaussians.means,
        gaussians.quats,
        gaussians.scales,
        gaussians.opacities,
        torch.zeros(num_gaussians, 3),
        viewmats_from_camera_to_worlds(view.camera.camera_to_world)[None],
        view.camera.K[None],
        view.camera.width,
        view.camera.height,
        backend="reference",
    )
    return rasterize_features(torch.eye(num_gaussians), info)[0].double(), alphas[0, ..., 0].double()
