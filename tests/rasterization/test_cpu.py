"""The compiled CPU backend against the reference: images and every gradient."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch

from fit3d_ns.rasterization import rasterization, rasterize_features
from fit3d_ns.rasterization.cpu import runtime
from fit3d_ns.rasterization.cpu.runtime import compiled
from fit3d_ns.rasterization.cpu.vectors import add_sums, broadcast, exponential, load, store
from tests.rasterization.rasterization_scenes import (
    assert_same_rendering,
    make_scene,
    relative_error,
    render_everything,
)

SCENES = {
    "ordinary": dict(),
    "two cameras": dict(num_cameras=2),
    "straddling": dict(spread=2.6),
    "behind": dict(depth=(-4.0, 4.0)),
    "huge": dict(scale=(3.0, 8.0), num_gaussians=20),
    "tiny": dict(scale=(1e-5, 1e-3)),
    "opaque": dict(opacity=(0.999, 1.0), scale=(0.1, 0.5)),
    "faint": dict(opacity=(0.0, 0.008)),
    "needles": dict(scale=(1e-4, 1.0)),
    "one pixel": dict(width=1, height=1, spread=0.5),
    "whole tiles": dict(width=48, height=32),
    "one Gaussian": dict(num_gaussians=1, spread=0.1),
}


@pytest.mark.parametrize("name", SCENES)
def test_cpu__agrees_with_reference(name):
    scene = make_scene(**SCENES[name])
    assert_same_rendering(render_everything(scene, "cpu"), render_everything(scene, "reference"))


@pytest.mark.parametrize("options", [
    dict(render_mode="D"), dict(render_mode="ED"), dict(render_mode="RGB+D"), dict(render_mode="RGB+ED"),
    dict(rasterize_mode="antialiased"), dict(near_plane=2.0, far_plane=3.5), dict(radius_clip=6.0), dict(eps2d=1.5),
    dict(sh_degree=0), dict(sh_degree=1), dict(sh_degree=2), dict(sh_degree=4),
], ids=str)  # fmt: skip
def test_cpu__agrees_with_reference_under_every_option(options):
    scene = make_scene(num_cameras=2, scale=(0.01, 0.3))
    if options.get("render_mode") in ("D", "ED"):
        # Colours take no part: their gradients are absent on both sides.
        results = [render_everything(scene, backend, **options) for backend in ("cpu", "reference")]
        for result in results:
            assert result.pop("v_coefficients") is None
            result["v_backgrounds"] = torch.zeros(1) if result["v_backgrounds"] is None else result["v_backgrounds"]
        assert_same_rendering(*results)
    else:
        assert_same_rendering(
            render_everything(scene, "cpu", **options), render_everything(scene, "reference", **options)
        )


def test_cpu__agrees_with_reference_on_ten_thousand_gaussians():
    scene = make_scene(num_gaussians=10_000, width=50, height=34, scale=(0.005, 0.15), num_features=16)
    assert_same_rendering(render_everything(scene, "cpu"), render_everything(scene, "reference"))


def test_cpu__info_agrees_with_reference():
    scene = make_scene(num_gaussians=200, num_cameras=2, spread=2.0)
    infos = [
        rasterization(**scene.arguments(), colors=torch.rand(200, 3), rasterize_mode="antialiased", backend=name)[2]
        for name in ("cpu", "reference")
    ]
    gsplats_keys = {
        "camera_ids", "gaussian_ids", "radii", "means2d", "depths", "conics", "opacities", "tile_width", "tile_height",
        "tiles_per_gauss", "isect_ids", "flatten_ids", "isect_offsets", "width", "height", "tile_size", "n_cameras",
    }  # fmt: skip
    assert gsplats_keys <= infos[0].keys() == infos[1].keys()
    for key in gsplats_keys - {"means2d", "depths", "conics", "opacities"}:
        first, second = infos[0][key], infos[1][key]
        if key == "isect_ids":  # The low 32 bits are those of a float32, where rounding shows.
            first, second = first >> 32, second >> 32
        if isinstance(first, torch.Tensor):
            assert first.dtype == second.dtype and torch.equal(first, second), key
        else:
            assert first == second, key
    for key in ("means2d", "depths", "conics", "opacities"):
        torch.testing.assert_close(infos[0][key], infos[1][key], rtol=1e-4, atol=1e-5)
    assert (infos[0]["backend"], infos[1]["backend"]) == ("cpu", "reference")


@pytest.mark.parametrize("per_camera", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_cpu__blends_colors_of_any_width(channels, per_camera):
    scene = make_scene(num_cameras=2)
    shape = (2, 40, channels) if per_camera else (40, channels)
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        colors, background = torch.rand(shape, requires_grad=True), torch.rand(2, channels, requires_grad=True)
        means = scene.means.clone().requires_grad_()
        arguments = scene.arguments() | dict(means=means, colors=colors, backgrounds=background)
        image, _, _ = rasterization(**arguments, backend=backend)
        (image * torch.rand(image.shape)).sum().backward()
        results.append([image.detach(), colors.grad, background.grad, means.grad])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 2e-4


@pytest.mark.parametrize("per_camera", [False, True])
def test_cpu__takes_harmonics_per_camera_as_reference_does(per_camera):
    scene = make_scene(num_cameras=2)
    results = []
    for backend in ("cpu", "reference"):
        shs = scene.coefficients.expand(2, -1, -1, -1).clone() if per_camera else scene.coefficients.clone()
        shs.requires_grad_()
        image, _, _ = rasterization(**scene.arguments(), colors=shs, sh_degree=2, backend=backend)
        (image * torch.linspace(-1, 1, image.numel()).reshape(image.shape)).sum().backward()
        results.append([image.detach(), shs.grad])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 2e-4
    assert not results[0][1][..., 9:, :].any(), "coefficients above the degree have no part"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rasterization__no_gaussians_render_with_harmonics_and_depth(backend):
    results = render_everything(make_scene(num_gaussians=0, num_cameras=2), backend, render_mode="RGB+ED")
    assert results["images"].shape == (2, 29, 37, 4) and not results["alphas"].any()
    assert results["sums"].shape == (0, 5) and not results["v_viewmats"].any()


def test_cpu__no_gaussians_show_the_background():
    scene = make_scene(num_gaussians=0)
    background = torch.tensor([[0.1, 0.2, 0.3]], requires_grad=True)
    image, alpha, info = rasterization(
        **scene.arguments(), colors=torch.zeros(0, 3), backgrounds=background, backend="cpu"
    )
    torch.testing.assert_close(image, background.detach().expand(1, 29, 37, 3))
    assert not alpha.any() and not rasterize_features(torch.zeros(0, 2), info).any()
    image.sum().backward()
    torch.testing.assert_close(background.grad, torch.full((1, 3), 29.0 * 37))


def test_cpu__gaussians_out_of_sight_have_zero_gradients():
    scene = make_scene(num_gaussians=20, depth=(-5.0, -1.0))
    results = render_everything(scene, "cpu")
    assert not results["images"].isnan().any() and not results["alphas"].any()
    for name in ("means", "quats", "scales", "opacities", "coefficients", "features", "viewmats"):
        assert not results[f"v_{name}"].any(), name
    assert not results["weights"].any()


def test_cpu__is_what_auto_takes_and_renders_without_gradients():
    scene = make_scene()
    image, alpha, info = rasterization(**scene.arguments(), colors=torch.rand(40, 3), absgrad=True)
    assert info["backend"] == "cpu" and not image.requires_grad and not info["means2d"].requires_grad


def test_cpu__alphas_alone_have_gradients():
    scene = make_scene()
    gradients = []
    for backend in ("cpu", "reference"):
        means = scene.means.clone().requires_grad_()
        arguments = scene.arguments() | dict(means=means)
        _, alphas, _ = rasterization(**arguments, colors=torch.rand(40, 3), backend=backend)
        alphas.square().sum().backward()
        gradients.append(means.grad)
    assert relative_error(*gradients) < 2e-3


def test_compiled__forgets_stored_kernels_when_any_source_changes(tmp_path):
    # A kernel in one file calls a function in another; stored code must not outlive a change of the latter.
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "runtime.py").write_text(inspect.getsource(runtime))
    (package / "outer.py").write_text(
        "from runtime import compiled\nfrom inner import inner\n\n@compiled\ndef outer(x):\n    return inner(x)\n"
    )
    results = []
    for factor in (2, 3):
        (package / "inner.py").write_text(
            f"from runtime import compiled\n\n@compiled\ndef inner(x):\n    return {factor} * x\n"
        )
        code = f"import sys; sys.path.insert(0, {str(package)!r}); from outer import outer; print(outer(5))"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        results.append(int(run.stdout))
    assert results == [10, 15]


@compiled
def _use_vectors(values, exponentials, sums):
    lanes = load(values, 0)
    store(exponentials, 0, exponential(lanes))
    add_sums(sums, 0, (lanes, lanes * lanes, lanes + broadcast(np.float32(1.0)), lanes))


def test_vectors__compute_what_numpy_does():
    for values in np.random.default_rng(0).uniform(-90, 5, (50, 16)).astype(np.float32):
        exponentials, sums = np.empty(16, np.float32), np.full(4, 3.0, np.float32)
        _use_vectors(values, exponentials, sums)
        np.testing.assert_allclose(exponentials, np.exp(np.maximum(values, -87).astype(np.float64)), rtol=2e-7)
        x = values.astype(np.float64)
        np.testing.assert_allclose(sums, 3 + np.array([x.sum(), (x * x).sum(), (x + 1).sum(), x.sum()]), rtol=1e-5)
