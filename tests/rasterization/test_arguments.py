"""Refused arguments of the rasterizer: each gives one sentence that names the value."""

import pytest
import torch

from fit3d_ns.rasterization import arguments, backproject_features, rasterization, rasterize_features
from fit3d_ns.rasterization.interface import resolve_backend


def _scene(num_gaussians=3):
    generator = torch.Generator().manual_seed(0)
    return dict(
        means=torch.randn(num_gaussians, 3, generator=generator) * 0.2 + torch.tensor([0.0, 0.0, 3.0]),
        quats=torch.randn(num_gaussians, 4, generator=generator),
        scales=torch.full((num_gaussians, 3), 0.2),
        opacities=torch.full((num_gaussians,), 0.5),
        colors=torch.rand(num_gaussians, 3, generator=generator),
        viewmats=torch.eye(4)[None],
        Ks=torch.tensor([[[10.0, 0, 4], [0, 10.0, 3], [0, 0, 1]]]),
        width=8,
        height=6,
    )


@pytest.mark.parametrize(
    "option, value",
    [
        ("packed", True),
        ("sparse_grad", True),
        ("tile_size", 8),
        ("distributed", True),
        ("camera_model", "fisheye"),
        ("covars", torch.eye(3).expand(3, 3, 3)),
    ],
)
def test_rasterization__refuses_options_it_does_not_offer(option, value):
    with pytest.raises(ValueError, match=f"`{option}="):
        rasterization(**_scene(), **{option: value}, backend="reference")


def test_rasterization__accepts_gsplat_defaults():
    images, alphas, _ = rasterization(
        **_scene(),
        packed=False,
        sparse_grad=False,
        tile_size=16,
        channel_chunk=32,
        camera_model="pinhole",
        distributed=False,
        covars=None,
        backend="reference",
    )
    assert images.shape == (1, 6, 8, 3) and alphas.shape == (1, 6, 8, 1)


def test_check_modes__names_the_choices():
    with pytest.raises(ValueError, match="'depth'.*RGB\\+ED"):
        arguments.check_modes("depth", "classic")
    with pytest.raises(ValueError, match="'smooth'.*antialiased"):
        arguments.check_modes("RGB", "smooth")


@pytest.mark.parametrize(
    "name, value",
    [
        ("quats", torch.zeros(3, 3)),
        ("scales", torch.zeros(4, 3)),
        ("opacities", torch.zeros(3, 1)),
        ("viewmats", torch.zeros(4, 4)),
        ("Ks", torch.zeros(2, 3, 3)),
        ("scales", torch.zeros(3, 3, dtype=torch.float64)),
    ],
)
def test_check_geometry__refuses_what_does_not_fit(name, value):
    scene = _scene() | {name: value}
    names = ("means", "quats", "scales", "opacities", "viewmats", "Ks")
    with pytest.raises(ValueError, match=f"`{name}`"):
        arguments.check_geometry(*[scene[name] for name in names])


def test_rasterization__refuses_an_empty_image():
    with pytest.raises(ValueError, match="An image of 0 x 6 pixels"):
        rasterization(**(_scene() | {"width": 0}))


@pytest.mark.parametrize(
    "colors, sh_degree, message",
    [
        (torch.zeros(4, 3), None, "N=3"),
        (torch.zeros(3, 3), 0, r"\[N, K, 3\]"),
        (torch.zeros(3, 4, 3), 2, "needs 9 coefficients"),
        (torch.zeros(3, 36, 3), 5, "0 to 4"),
        (torch.zeros(3, 0), None, "no channels"),
    ],
)
def test_check_colors__refuses_what_does_not_fit(colors, sh_degree, message):
    with pytest.raises(ValueError, match=message):
        arguments.check_colors(colors, None, sh_degree, torch.zeros(3, 3), 1)


def test_check_colors__refuses_backgrounds_of_another_size():
    with pytest.raises(ValueError, match="`backgrounds`"):
        arguments.check_colors(torch.zeros(3, 3), torch.zeros(1, 4), None, torch.zeros(3, 3), 1)


def test_rasterize_features__refuses_what_does_not_fit_info():
    _, _, info = rasterization(**_scene(), backend="reference")
    with pytest.raises(ValueError, match="N=3"):
        rasterize_features(torch.zeros(4, 2), info)
    with pytest.raises(ValueError, match="D at least 1"):
        rasterize_features(torch.zeros(3, 0), info)
    with pytest.raises(ValueError, match="torch.float64"):
        rasterize_features(torch.zeros(3, 2, dtype=torch.float64), info)
    with pytest.raises(ValueError, match="6 rows and 8 columns"):
        rasterize_features(torch.zeros(3, 2), info, pixels=torch.tensor([[0, 0], [6, 0]]))
    with pytest.raises(ValueError, match="rows -1"):
        rasterize_features(torch.zeros(3, 2), info, pixels=torch.tensor([[-1, 0]]))
    with pytest.raises(ValueError, match="expected \\[1, 6, 8, D\\]"):
        backproject_features(torch.zeros(1, 5, 8, 2), info)
    with pytest.raises(ValueError, match="was not made by"):
        rasterize_features(torch.zeros(3, 2), {"backend": "reference"})


def test_resolve_backend__says_what_does_not_go_together():
    with pytest.raises(ValueError, match="'cuda'.*auto, reference, cpu, gsplat"):
        resolve_backend("cuda", torch.zeros(1, 3))
    with pytest.raises(ValueError, match="needs cuda tensors"):
        resolve_backend("gsplat", torch.zeros(1, 3))
    with pytest.raises(ValueError, match="float32"):
        resolve_backend("cpu", torch.zeros(1, 3, dtype=torch.float64))
