"""The reference backend against a numpy loop, gsplat's PyTorch formulas, and finite differences."""

import importlib
import inspect
import math

import numpy as np
import pytest
import torch

from fit3d_ns.rasterization import interface, rasterization, rasterize_features, reference
from fit3d_ns.rasterization.projection import ProjectionSettings, project_gaussians
from fit3d_ns.rasterization.reference import _blend_weights, _iterate_tiles, compute_sh_basis, evaluate_harmonics
from tests.rasterization.rasterization_scenes import make_scene, relative_error


def _blend_pixel(row, column, means2d, radii, conics, opacities, depths, colors):
    """One pixel, straight from the formulas: tile test, alpha limits, stop, front to back."""
    tile_row, tile_column = row // 16 * 16, column // 16 * 16
    transmittance, color = 1.0, np.zeros(colors.shape[1])
    for g in np.lexsort((np.arange(len(depths)), depths)):
        x, y = means2d[g]
        reaches_columns = math.floor((x - radii[g]) / 16) * 16 <= tile_column < math.ceil((x + radii[g]) / 16) * 16
        reaches_rows = math.floor((y - radii[g]) / 16) * 16 <= tile_row < math.ceil((y + radii[g]) / 16) * 16
        if radii[g] == 0 or not (reaches_columns and reaches_rows):
            continue
        dx, dy = x - (column + 0.5), y - (row + 0.5)
        sigma = 0.5 * (conics[g, 0] * dx * dx + conics[g, 2] * dy * dy) + conics[g, 1] * dx * dy
        alpha = min(0.999, opacities[g] * math.exp(-sigma))
        if sigma < 0 or alpha < 1 / 255:
            continue
        if transmittance * (1 - alpha) <= 1e-4:
            break
        color += alpha * transmittance * colors[g]
        transmittance *= 1 - alpha
    return color, 1 - transmittance


def test_rasterization__agrees_with_a_loop_over_pixels():
    scene = make_scene(num_gaussians=60, opacity=(0.3, 1.0), scale=(0.05, 0.6), dtype=torch.float64)
    colors = torch.rand(60, 2, dtype=torch.float64)
    images, alphas, info = rasterization(**scene.arguments(), colors=colors, backend="reference")
    arrays = [info[key][0].numpy() for key in ("means2d", "radii", "conics", "opacities", "depths")]
    expected = np.array([
        np.append(*_blend_pixel(row, column, *arrays, colors.numpy()))
        for row in range(scene.height)
        for column in range(scene.width)
    ]).reshape(scene.height, scene.width, 3)  # fmt: skip
    assert alphas.max() > 0.999, "the stop rule must be exercised"
    np.testing.assert_allclose(torch.cat([images, alphas], dim=-1)[0].numpy(), expected, atol=1e-12)


def test_rasterization__one_round_gaussian_has_its_closed_form():
    # Standard deviation s at depth z covers f s / z pixels; on the axis the Jacobian has no other part.
    s, z, f = 0.1, 2.0, 100.0
    images, alphas, info = rasterization(
        torch.tensor([[0.0, 0.0, z]]), torch.tensor([[2.0, 0, 0, 0]]), torch.full((1, 3), s), torch.tensor([0.6]),
        torch.tensor([[1.0, 2.0]]), torch.eye(4)[None], torch.tensor([[[f, 0, 20.5], [0, f, 12.5], [0, 0, 1]]]), 41, 25,
        backend="reference",
    )  # fmt: skip
    variance = (f * s / z) ** 2 + 0.3
    assert info["radii"].item() == math.ceil(3 * math.sqrt(variance + math.sqrt(0.01)))
    distance = (torch.arange(41) - 20).float()
    expected = 0.6 * torch.exp(-(distance**2) / (2 * variance))
    torch.testing.assert_close(alphas[0, 12, :, 0], torch.where(expected >= 1 / 255, expected, 0.0))
    torch.testing.assert_close(images[0, 12], alphas[0, 12] * torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("mode", ["D", "ED", "RGB+D", "RGB+ED"])
def test_rasterization__depth_modes_blend_the_depths(mode):
    scene = make_scene(num_gaussians=30)
    colors = torch.rand(30, 3)
    image, alphas, info = rasterization(**scene.arguments(), colors=colors, render_mode=mode, backend="reference")
    depths = rasterize_features(info["depths"][0, :, None], info)
    if mode.endswith("ED"):
        depths = depths / alphas.clamp(min=1e-10)
    torch.testing.assert_close(image[..., -1:], depths)
    if mode.startswith("RGB"):
        torch.testing.assert_close(image[..., :3], rasterize_features(colors, info))


def test_rasterization__backgrounds_show_where_alpha_is_missing_but_not_in_depth():
    scene = make_scene(num_gaussians=10)
    colors, background = torch.rand(10, 3), torch.tensor([[0.2, 0.5, 0.9]])
    black, alphas, _ = rasterization(**scene.arguments(), colors=colors, render_mode="RGB+D", backend="reference")
    image, _, _ = rasterization(
        **scene.arguments(), colors=colors, backgrounds=background, render_mode="RGB+D", backend="reference"
    )
    torch.testing.assert_close(image[..., :3], black[..., :3] + (1 - alphas) * background)
    torch.testing.assert_close(image[..., 3], black[..., 3])


def test_project_gaussians__agrees_with_gsplats_formulas():
    formulas = pytest.importorskip("gsplat.cuda._torch_impl")
    scene = make_scene(num_gaussians=300, num_cameras=2, spread=2.5, dtype=torch.float64)
    settings = ProjectionSettings(scene.width, scene.height, antialiased=True)
    projected = project_gaussians(*scene.gaussians[:3], scene.viewmats, scene.Ks, settings)
    covariances, _ = formulas._quat_scale_to_covar_preci(scene.quats, scene.scales, True, False)
    radii, means2d, depths, conics, compensations = formulas._fully_fused_projection(
        scene.means, covariances, scene.viewmats, scene.Ks, scene.width, scene.height, calc_compensations=True
    )
    drawn = projected.radii > 0
    assert 0.1 < drawn.double().mean() < 0.9, "some must be outside"
    assert torch.equal(projected.radii, radii)
    for value, expected in [
        (projected.means2d, means2d), (projected.depths, depths), (projected.conics, conics),
        (projected.compensations, compensations),
    ]:  # fmt: skip
        torch.testing.assert_close(value[drawn], expected[drawn])
        assert not value[~drawn].any(), "rows that are not drawn hold zeros"


@pytest.mark.parametrize("sh_degree", range(5))
def test_compute_sh_basis__agrees_with_gsplats_formulas(sh_degree):
    formulas = pytest.importorskip("gsplat.cuda._torch_impl")
    directions = torch.nn.functional.normalize(torch.randn(50, 3, dtype=torch.float64), dim=-1)
    expected = formulas._eval_sh_bases_fast((sh_degree + 1) ** 2, directions)
    torch.testing.assert_close(compute_sh_basis(sh_degree, directions), expected)


def test_compute_sh_basis__is_orthonormal_on_the_sphere():
    # Gauss-Legendre in z times equal steps around it integrates polynomials of this degree exactly.
    z, weights = np.polynomial.legendre.leggauss(9)
    angles = np.arange(18) * 2 * math.pi / 18
    ring = np.sqrt(1 - z**2)[:, None]
    points = np.stack([ring * np.cos(angles), ring * np.sin(angles), np.broadcast_to(z[:, None], (9, 18))], axis=-1)
    basis = compute_sh_basis(4, torch.from_numpy(points.reshape(-1, 3)))
    areas = torch.from_numpy(np.repeat(weights * 2 * math.pi / 18, 18))
    torch.testing.assert_close(basis.T @ (basis * areas[:, None]), torch.eye(25, dtype=torch.float64))


def test_evaluate_harmonics__sees_gaussians_from_the_camera_centre():
    # Degree 1, coefficient of z alone: brighter where the Gaussian lies along +z from the camera.
    viewmats = torch.eye(4)[None].clone()
    viewmats[0, :3, 3] = torch.tensor([0.0, 0.0, -5.0])
    coefficients = torch.zeros(2, 4, 3)
    coefficients[:, 2] = 0.3
    means = torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 1.0]])
    colors = evaluate_harmonics(1, means, viewmats, coefficients, torch.tensor([[True, True]]))
    step = 0.3 * math.sqrt(3 / (4 * math.pi))
    torch.testing.assert_close(colors[0, :, 0], torch.tensor([0.5 + step, 0.5 - step]))


def _distance_to_thresholds(scene, info):
    """How near any contribution is to a place where the image jumps: 1/255, 0.999, 1e-4, or the edge of a tile list."""
    geometry = info["blend_geometry"]
    nearest = math.inf
    for pixels, ids in _iterate_tiles(geometry, 0):
        centres = geometry.means2d[0, ids].expand(len(pixels), -1, -1)
        weights, left = _blend_weights(pixels, centres, geometry.conics[0, ids], geometry.opacities[0, ids])
        delta = centres - (pixels.flip(-1)[:, None] + 0.5)
        xx, xy, yy = geometry.conics[0, ids].unbind(-1)
        sigma = 0.5 * (xx * delta[..., 0] ** 2 + yy * delta[..., 1] ** 2) + xy * delta[..., 0] * delta[..., 1]
        alpha = geometry.opacities[0, ids] * torch.exp(-sigma)
        nearest = min(nearest, (alpha - 1 / 255).abs().min(), (alpha - 0.999).abs().min(), (left - 1e-4).min())
    eigenvalues = torch.linalg.eigvalsh(
        torch.linalg.inv(geometry.conics[0][:, [0, 1, 1, 2]].reshape(-1, 2, 2))
    ).amax(dim=-1)  # fmt: skip
    radius = 3 * eigenvalues.sqrt()
    return float(min(nearest, (radius - radius.round()).abs().min()))


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_rasterization__passes_gradcheck_away_from_thresholds(mode):
    scene = make_scene(
        num_gaussians=3, width=9, height=7, spread=0.4, scale=(0.5, 0.9), opacity=(0.3, 0.7), num_features=2,
        dtype=torch.float64, seed=9,
    )  # fmt: skip
    backgrounds = torch.rand(1, 3, dtype=torch.float64)
    # Finite differences of one random sum of all values instead of each value: thousands of renderings fewer.
    v_image, v_alpha, v_maps = (torch.randn(1, 7, 9, channels, dtype=torch.float64) for channels in (4, 1, 2))

    def render(means, quats, scales, opacities, coefficients, viewmats, backgrounds, features):
        image, alpha, info = rasterization(
            means, quats, scales, opacities, coefficients, viewmats, scene.Ks, scene.width, scene.height,
            sh_degree=1, backgrounds=backgrounds, render_mode="RGB+ED", rasterize_mode=mode, backend="reference",
        )  # fmt: skip
        return (image * v_image).sum() + (alpha * v_alpha).sum(), (rasterize_features(features, info) * v_maps).sum()

    leaves = [*scene.gaussians, scene.coefficients[:, :4], scene.viewmats, backgrounds, scene.features]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    _, _, info = rasterization(*scene.gaussians, scene.coefficients, scene.viewmats, scene.Ks, 9, 7, sh_degree=1,
                               rasterize_mode=mode, backend="reference")  # fmt: skip
    assert (info["radii"] > 0).all() and _distance_to_thresholds(scene, info) > 1e-4
    # Features take no gradient to the geometry, which finite differences would see: they are checked alone.
    assert torch.autograd.gradcheck(lambda *geometry: render(*geometry, scene.features)[0], leaves[:-1])
    assert torch.autograd.gradcheck(
        lambda features: render(*[leaf.detach() for leaf in leaves[:-1]], features)[1], leaves[-1:]
    )


def test_rasterization__float32_and_float64_agree():
    scene = make_scene(num_gaussians=80)
    double = make_scene(num_gaussians=80, dtype=torch.float64)
    single_image, _, _ = rasterization(**scene.arguments(), colors=scene.coefficients, sh_degree=3, backend="reference")
    double_image, _, _ = rasterization(
        **double.arguments(), colors=double.coefficients, sh_degree=3, backend="reference"
    )
    assert double_image.dtype == torch.float64
    assert relative_error(single_image, double_image) < 2e-4


@pytest.mark.parametrize("name", ["cpu", "gsplat"])
def test_backends__have_the_functions_of_the_reference(name):
    if name == "gsplat":
        pytest.importorskip("gsplat")
    engine = importlib.import_module(f"fit3d_ns.rasterization.{interface._MODULES[name]}")
    for function in reference.__all__:
        expected = list(inspect.signature(getattr(reference, function)).parameters)
        actual = inspect.signature(getattr(engine, function)).parameters.values()
        assert [parameter.name for parameter in actual if parameter.default is inspect.Parameter.empty] == expected
