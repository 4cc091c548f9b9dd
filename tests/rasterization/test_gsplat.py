"""The gsplat backend: against the reference on a CUDA card, and its calls against gsplat's signatures without one."""

import importlib
import inspect

import pytest
import torch

from fit3d_ns.rasterization import rasterize_features, reference
from fit3d_ns.rasterization.reference import TileLists, compute_sh_basis, list_tiles
from tests.rasterization.rasterization_scenes import assert_same_rendering, make_scene, render_everything

gsplat_backend = pytest.importorskip("fit3d_ns.rasterization.gsplat_backend")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("scene", [
    dict(), dict(num_cameras=2), dict(spread=2.6), dict(depth=(-4.0, 4.0)), dict(scale=(3.0, 8.0), num_gaussians=20),
    dict(scale=(1e-5, 1e-3)), dict(opacity=(0.999, 1.0)), dict(num_gaussians=5000, num_features=64),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [
    dict(), dict(render_mode="RGB+ED", rasterize_mode="antialiased"), dict(render_mode="RGB+D", radius_clip=4.0),
], ids=str)  # fmt: skip
def test_gsplat__agrees_with_reference(scene, options):
    scene = make_scene(**scene)
    actual = render_everything(scene, "gsplat", device="cuda", **options)
    expected = render_everything(scene, "reference", **options)
    assert_same_rendering(actual, expected)
    for name in ("images", "alphas", "features"):
        near = (actual[name].cpu() - expected[name]).abs() <= 1e-4
        assert near.float().mean() >= 0.9999, name


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("channels", [3, 64, 200, 700])
def test_gsplat__backprojection_is_the_adjoint(channels):
    scene = make_scene(num_gaussians=300, num_features=channels)
    result = render_everything(scene, "gsplat", device="cuda")
    maps, features = result["v_maps"].double().cpu(), result["features"].double().cpu()
    forward = (features * maps).sum()
    backward = (scene.features.double() * result["sums"].double().cpu()).sum()
    assert abs(forward - backward) <= 1e-4 * maps.norm() * features.norm()


def test_largest_channel_count__follows_from_shared_memory():
    # 256 pixels of 28 + 4 D bytes: D = 64 needs 71 KiB, D = 33 needs 40 KiB.
    assert gsplat_backend.largest_channel_count(48 * 1024) == 33
    assert gsplat_backend.largest_channel_count(64 * 1024) == 33
    assert gsplat_backend.largest_channel_count(71 * 1024) == 64
    assert gsplat_backend.largest_channel_count(99 * 1024) == 65
    assert gsplat_backend.largest_channel_count(227 * 1024) == 129
    assert gsplat_backend.largest_channel_count(1) == 1


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """Replaces gsplat's kernels by the reference; each call must fit the signature of the function it replaces."""
    gsplat = importlib.import_module("gsplat")
    calls = []

    def replace(name, function):
        signature = inspect.signature(getattr(gsplat, name))

        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append(name)
            return function(**bound.arguments)

        monkeypatch.setattr(gsplat_backend, name, call)

    def project(means, quats, scales, viewmats, Ks, width, height, calc_compensations, **limits):
        names = ("eps2d", "near_plane", "far_plane", "radius_clip")
        settings = reference.ProjectionSettings(
            width, height, antialiased=calc_compensations, **{name: limits[name] for name in names}
        )
        calls.append(settings)
        projected = reference.project_gaussians(means, quats, scales, viewmats, Ks, settings)
        return projected.radii, projected.means2d, projected.depths, projected.conics, projected.compensations

    def isect_tiles(means2d, radii, depths, tile_width, tile_height, **_):
        settings = reference.ProjectionSettings(tile_width * 16, tile_height * 16)
        projected = reference.ProjectedGaussians(radii, means2d, depths, torch.zeros(*radii.shape, 3), None)
        tiles = list_tiles(projected, settings)
        calls.append(tiles.isect_offsets)
        return tiles.tiles_per_gauss, tiles.isect_ids, tiles.flatten_ids

    def isect_offset_encode(**_):
        return next(call for call in reversed(calls) if isinstance(call, torch.Tensor))

    def rasterize_to_pixels(means2d, conics, colors, opacities, image_width, image_height, **rest):
        entries = rest["flatten_ids"]
        tiles = TileLists(torch.zeros_like(opacities, dtype=torch.int32), entries, entries, rest["isect_offsets"])
        geometry = reference.BlendGeometry(
            means2d, conics, opacities, tiles, reference.ProjectionSettings(image_width, image_height)
        )
        image, alpha = reference.blend(
            geometry, means2d, conics, opacities, colors, rest["backgrounds"], rest["absgrad"]
        )
        if rest["masks"] is not None:
            is_read = rest["masks"].repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :image_height, :image_width]
            image, alpha = image * is_read[..., None], alpha * torch.nan
        return image, alpha

    def spherical_harmonics(degrees_to_use, dirs, coeffs, masks):
        basis = compute_sh_basis(degrees_to_use, torch.nn.functional.normalize(dirs, dim=-1))
        colors = (basis[..., None] * coeffs[..., : basis.shape[-1], :]).sum(dim=-2)
        return torch.where(masks[..., None], colors, torch.nan)

    replace("fully_fused_projection", project)
    replace("isect_tiles", isect_tiles)
    replace("isect_offset_encode", isect_offset_encode)
    replace("rasterize_to_pixels", rasterize_to_pixels)
    replace("spherical_harmonics", spherical_harmonics)
    monkeypatch.setattr("fit3d_ns.rasterization.interface.resolve_backend", lambda name, means: name)
    monkeypatch.setattr(gsplat_backend, "channels_per_call", lambda device: 4)
    return calls


@pytest.mark.parametrize("options", [dict(), dict(render_mode="RGB+ED", rasterize_mode="antialiased")], ids=str)
def test_gsplat__wires_its_kernels_as_the_reference_does(kernels_on_cpu, options):
    scene = make_scene(num_cameras=2)
    actual = render_everything(scene, "gsplat", eps2d=0.4, near_plane=1.5, radius_clip=2.0, **options)
    expected = render_everything(scene, "reference", eps2d=0.4, near_plane=1.5, radius_clip=2.0, **options)
    assert_same_rendering(actual, expected)
    # One projection and one sort; colour in one call, 5 features in two, and backprojection's 6 channels in two.
    names = [call for call in kernels_on_cpu if isinstance(call, str)]
    assert names.count("fully_fused_projection") == names.count("isect_tiles") == 1
    assert names.count("rasterize_to_pixels") == 1 + 2 + 2


def test_gsplat__reads_chosen_pixels_through_tile_masks(kernels_on_cpu):
    scene = make_scene()
    info = render_everything(scene, "gsplat")["info"]
    pixels = torch.tensor([[0, 0], [28, 36], [17, 3]])
    full = rasterize_features(scene.features, info)
    torch.testing.assert_close(rasterize_features(scene.features, info, pixels), full[:, pixels[:, 0], pixels[:, 1]])
