"""Features through an earlier projection: isolation, the adjoint, chosen pixels."""

import pytest
import torch

from fit3d_ns.rasterization import (
    arguments,
    backproject_features,
    interface,
    project,
    rasterization,
    rasterize_features,
)
from tests.rasterization.rasterization_scenes import make_scene, relative_error

BACKENDS = ["cpu", "reference"]


def _render(scene, backend, **options):
    colors = torch.rand(len(scene.means), 3, generator=torch.Generator().manual_seed(3))
    return rasterization(**scene.arguments(), colors=colors.to(scene.means), backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rasterize_features__blends_as_colors_are_blended(backend):
    scene = make_scene(num_cameras=2)
    image, alphas, info = _render(scene, backend)
    colors = torch.rand(40, 3, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(rasterize_features(colors, info), image)
    torch.testing.assert_close(rasterize_features(torch.ones(40, 1), info), alphas)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 3, 16, 20, 33, 64, 130])
def test_backproject_features__is_the_adjoint(backend, channels):
    scene = make_scene(num_cameras=2, num_gaussians=300)
    _, alphas, info = _render(scene, backend)
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(300, channels, generator=generator)
    maps = torch.randn(2, 29, 37, channels, generator=generator)
    sums, weights = backproject_features(maps, info)
    forward = (rasterize_features(features, info).double() * maps.double()).sum()
    backward = (features.double() * sums.double()).sum()
    scale = rasterize_features(features, info).norm() * maps.norm()
    assert abs(forward - backward) <= 1e-5 * scale
    torch.testing.assert_close(weights.sum(), alphas.sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rasterize_features__gradient_is_the_backprojection(backend):
    scene = make_scene(num_features=9)
    _, _, info = _render(scene, backend)
    features, maps = scene.features.clone().requires_grad_(), torch.randn(1, 29, 37, 9)
    rasterize_features(features, info).backward(maps)
    torch.testing.assert_close(features.grad, backproject_features(maps, info)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rasterize_features__at_pixels_equals_the_full_image(backend):
    scene = make_scene(num_cameras=2, num_features=20)
    _, _, info = _render(scene, backend)
    generator = torch.Generator().manual_seed(5)
    pixels = torch.stack([torch.randint(0, size, (40,), generator=generator) for size in (29, 37)], dim=-1)
    pixels = torch.cat([pixels, torch.tensor([[0, 0], [28, 36], [0, 36]]), pixels[:5]])
    gradients = []
    v_rows = torch.randn(2, len(pixels), 20, generator=generator)
    for at_pixels in (True, False):
        features = scene.features.clone().requires_grad_()
        if at_pixels:
            rows = rasterize_features(features, info, pixels)
        else:
            rows = rasterize_features(features, info)[:, pixels[:, 0], pixels[:, 1]]
        rows.backward(v_rows)
        gradients.append((rows.detach(), features.grad))
    torch.testing.assert_close(*[rows for rows, _ in gradients])
    torch.testing.assert_close(*[gradient for _, gradient in gradients], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rasterize_features__no_pixels_give_no_rows(backend):
    _, _, info = _render(make_scene(), backend)
    features = torch.rand(40, 3, requires_grad=True)
    rows = rasterize_features(features, info, torch.zeros(0, 2, dtype=torch.int64))
    assert rows.shape == (1, 0, 3)
    rows.sum().backward()
    assert not features.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rasterize_features__cannot_move_the_geometry(backend):
    scene = make_scene()
    leaves = {name: getattr(scene, name).clone().requires_grad_() for name in ("means", "quats", "scales", "opacities")}
    arguments = scene.arguments() | leaves
    colors = torch.rand(40, 3)
    image, _, info = rasterization(**arguments, colors=colors, absgrad=True, backend=backend)
    info["means2d"].retain_grad()
    features = scene.features.clone().requires_grad_()
    rasterize_features(features, info).square().sum().backward()
    assert features.grad.any()
    assert all(leaf.grad is None for leaf in leaves.values()) and info["means2d"].grad is None
    absolute = getattr(info["means2d"], "absgrad", None)
    assert absolute is None or not absolute.any()

    # And with a colour loss beside it, the geometry's gradients are those of colour alone, to the bit.
    image.square().sum().backward()
    with_features = [leaf.grad.clone() for leaf in leaves.values()]
    alone = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    image, _, _ = rasterization(**(scene.arguments() | alone), colors=colors, backend=backend)
    image.square().sum().backward()
    assert all(torch.equal(grad, leaf.grad) for grad, leaf in zip(with_features, alone.values(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rasterize_features__projects_and_sorts_nothing_again(backend, monkeypatch):
    scene = make_scene()
    _, _, info = _render(scene, backend)
    engine = interface.load_backend(backend)

    def refuse(*args):
        raise AssertionError("a second projection or sort")

    monkeypatch.setattr(engine, "project_gaussians", refuse)
    monkeypatch.setattr(engine, "build_geometry", refuse)
    maps = rasterize_features(scene.features, info)
    assert backproject_features(maps, info)[0].shape == scene.features.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_project__gives_features_the_geometry_of_rasterization(backend):
    scene = make_scene(num_cameras=2)
    _, _, info = _render(scene, backend, rasterize_mode="antialiased", eps2d=0.5)
    alone = project(**scene.arguments(), rasterize_mode="antialiased", eps2d=0.5, backend=backend)
    assert torch.equal(rasterize_features(scene.features, alone), rasterize_features(scene.features, info))
    assert alone.keys() == info.keys()


def test_backproject_features__recovers_the_color_of_a_lone_gaussian():
    scene = make_scene(num_gaussians=1, spread=0.1, opacity=(0.9, 0.95))
    _, alphas, info = _render(scene, "cpu")
    color = torch.tensor([0.3, -2.0, 5.0])
    sums, weights = backproject_features(color.expand(1, 29, 37, 3).contiguous(), info)
    torch.testing.assert_close(sums[0] / weights[0], color)
    assert relative_error(weights, alphas.sum().reshape(1)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_backproject_features__adds_to_sums_and_leaves_what_no_camera_sees(backend):
    scene = make_scene(num_gaussians=300)
    scene.means[:7, 2] = -50.0
    _, _, info = _render(scene, backend)
    maps = torch.randn(1, 29, 37, 20, generator=torch.Generator().manual_seed(4))
    expected, weights = backproject_features(maps, info)
    start = torch.randn(300, 20, generator=torch.Generator().manual_seed(5))
    added = start.clone()
    found, again = backproject_features(maps, info, add_to=added)
    assert found is added and torch.equal(again, weights)
    torch.testing.assert_close(added, start + expected)
    assert torch.equal(added[:7], start[:7]) and not expected[:7].any() and not weights[:7].any()
    # Scratch memory of the call before holds nothing over.
    small = backproject_features(maps[..., :3].contiguous(), info)[0]
    torch.testing.assert_close(small, expected[:, :3])


def test_backproject_features__refuses_sums_it_cannot_add_to():
    maps = torch.zeros(1, 29, 37, 4)
    for sums, sentence in (
        (torch.zeros(40, 5), "`add_to` has shape"),
        (torch.zeros(40, 4, dtype=torch.float64), "`add_to` is torch.float64"),
        (torch.zeros(4, 40).T, "not contiguous"),
    ):
        with pytest.raises(ValueError, match=sentence):
            arguments.check_sums(sums, (40, 4), maps)
