"""Small scenes for the rasterizer's tests, and the rendering of everything that has a gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fit3d_ns.rasterization import backproject_features, rasterization, rasterize_features


@dataclass(frozen=True)
class GaussianScene:
    """Gaussians, cameras and gradients to send back."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    coefficients: Tensor
    features: Tensor
    viewmats: Tensor
    Ks: Tensor
    width: int
    height: int

    @property
    def gaussians(self) -> list[Tensor]:
        return [self.means, self.quats, self.scales, self.opacities]

    def arguments(self) -> dict:
        names = ["means", "quats", "scales", "opacities", "viewmats", "Ks", "width", "height"]
        return {name: getattr(self, name) for name in names}


def make_scene(
    num_gaussians=40, num_cameras=1, width=37, height=29, scale=(0.02, 0.3), opacity=(0.05, 0.95), depth=(1.0, 5.0),
    spread=1.2, num_features=5, seed=0, dtype=torch.float32,
) -> GaussianScene:  # fmt: skip
    """Gaussians in and around the view of slightly moved cameras whose principal point is off centre."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, low=0.0, high=1.0):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low

    depths = uniform(num_gaussians, 1, low=depth[0], high=depth[1])
    sideways = uniform(num_gaussians, 2, low=-0.5, high=0.5) * spread * depths
    viewmats = torch.eye(4, dtype=torch.float64).repeat(num_cameras, 1, 1)
    viewmats[:, :3, :3] = torch.linalg.matrix_exp(_skew(uniform(num_cameras, 3, low=-0.1, high=0.1)))
    viewmats[:, :3, 3] = uniform(num_cameras, 3, low=-0.2, high=0.2)
    K = [[0.9 * width, 0, 0.45 * width], [0, 0.95 * width, 0.56 * height], [0, 0, 1]]
    tensors = dict(
        means=torch.cat([sideways, depths], dim=1),
        quats=torch.randn(num_gaussians, 4, generator=generator, dtype=torch.float64),
        scales=uniform(num_gaussians, 3, low=scale[0], high=scale[1]) * depths / 3,
        opacities=uniform(num_gaussians, low=opacity[0], high=opacity[1]),
        coefficients=torch.randn(num_gaussians, 25, 3, generator=generator, dtype=torch.float64) * 0.2,
        features=torch.randn(num_gaussians, num_features, generator=generator, dtype=torch.float64),
        viewmats=viewmats,
        Ks=torch.tensor(K, dtype=torch.float64).repeat(num_cameras, 1, 1),
    )
    return GaussianScene(width=width, height=height, **{name: value.to(dtype) for name, value in tensors.items()})


def render_everything(scene: GaussianScene, backend: str, sh_degree=3, seed=1, device="cpu", **options) -> dict:
    """Images, features, adjoint and all gradients of a random linear loss, by name."""
    names = ["means", "quats", "scales", "opacities", "viewmats", "coefficients", "features"]
    leaves = {name: getattr(scene, name).to(device, copy=True).requires_grad_() for name in names}
    generator = torch.Generator().manual_seed(seed)
    num_cameras = len(scene.viewmats)
    backgrounds = torch.rand(num_cameras, 3, generator=generator).to(scene.means).to(device).requires_grad_()
    images, alphas, info = rasterization(
        *[leaves[name] for name in names[:4]], leaves["coefficients"], leaves["viewmats"], scene.Ks.to(device),
        scene.width, scene.height, sh_degree=sh_degree, backgrounds=backgrounds, absgrad=True, backend=backend,
        **options,
    )  # fmt: skip
    info["means2d"].retain_grad()

    def random_like(tensor):
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    torch.autograd.backward([images, alphas], [random_like(images), random_like(alphas)])
    maps = rasterize_features(leaves["features"], info)
    v_maps = random_like(maps)
    maps.backward(v_maps)
    sums, weights = backproject_features(v_maps, info)
    results = {f"v_{name}": leaf.grad for name, leaf in leaves.items()}
    results |= {"v_backgrounds": backgrounds.grad, "v_means2d": info["means2d"].grad, "sums": sums, "weights": weights}
    results |= {"absgrad": info["means2d"].absgrad, "images": images.detach(), "alphas": alphas.detach()}
    results |= {"features": maps.detach(), "v_maps": v_maps, "info": info}
    return results


def relative_error(value: Tensor, expected: Tensor) -> float:
    """L2 distance over L2 norm; the distance alone where the norm is zero."""
    distance = (value.double().cpu() - expected.double().cpu()).norm().item()
    return distance / (expected.double().norm().item() or 1.0)


def assert_same_rendering(actual: dict, expected: dict) -> None:
    """Images within 2e-4 and gradients within 2e-3, relative L2: the tolerances of the rasterizer's contract."""
    assert actual.keys() == expected.keys()
    for name in actual.keys() - {"info"}:
        assert actual[name].shape == expected[name].shape, name
        tolerance = 2e-4 if name in ("images", "alphas", "features") else 2e-3
        assert relative_error(actual[name], expected[name]) <= tolerance, name


def _skew(vectors: Tensor) -> Tensor:
    x, y, z = vectors.unbind(dim=-1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(row, dim=-1) for row in ([zero, -z, y], [z, zero, -x], [-y, x, zero])]
    return torch.stack(rows, dim=-2)
