"""The gsplat backend against the reference: on a card, and on a pretended one with a stand-in for gsplat's kernels.

`scripts/test.sh` runs this file a second time with gsplat 1.5.3 in place of the installed one.
"""

import ast
import contextlib
import importlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fit3d_ns.rasterization import add_normal, rasterization, rasterize_features
from tests.pretended_cuda import pretend_cuda
from tests.rasterization.rasterization_scenes import (
    assert_same_rendering,
    make_scene,
    relative_error,
    render_everything,
)

gsplat = pytest.importorskip("gsplat")
gsplat_backend = pytest.importorskip("fit3d_ns.rasterization.gsplat_backend")
from tests.gsplat_kernels import COMPILED, TWO_RADII, KernelCalls, replace_kernels  # noqa: E402 - needs gsplat.

PRETENDED, REAL = "pretended", pytest.param("real", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
])  # fmt: skip


@pytest.fixture(params=[PRETENDED, REAL])
def card(request: pytest.FixtureRequest) -> Iterator[KernelCalls | None]:
    """A CUDA device; the calls of gsplat's kernels where it is a pretended one."""
    if request.param == "real":
        yield None
        return
    with pretend_cuda(), replace_kernels() as calls:
        yield calls


def render_on_card(scene: Any, **options: Any) -> dict[str, Any]:
    """As `render_everything`, with the results on the CPU."""
    results = render_everything(scene, "gsplat", device="cuda", **options)
    return {name: value if name == "info" else value.cpu() for name, value in results.items()}


@pytest.mark.parametrize("scene", [
    dict(), dict(num_cameras=2), dict(spread=2.6), dict(depth=(-4.0, 4.0)), dict(scale=(3.0, 8.0), num_gaussians=20),
    dict(scale=(1e-5, 1e-3)), dict(opacity=(0.999, 1.0)), dict(num_gaussians=1000, num_features=64),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [
    dict(), dict(render_mode="RGB+ED", rasterize_mode="antialiased"), dict(render_mode="RGB+D", radius_clip=4.0),
], ids=str)  # fmt: skip
def test_gsplat__agrees_with_reference(card, scene, options):
    scene = make_scene(**scene)
    actual = render_on_card(scene, **options)
    with radii_of_gsplat(options.get("radius_clip", 0.0) > 0):
        expected = render_everything(scene, "reference", **options)
    assert_same_rendering(actual, expected)
    for name in ("images", "alphas", "features"):
        near = (actual[name] - expected[name]).abs() <= 1e-4
        assert near.float().mean() >= 0.9999, name


def radii_of_gsplat(differ: bool) -> Any:
    """Where `differ`, and gsplat is 1.5 or later: the reference with that version's radii.

    They are 3.33 standard deviations along each image axis, and `radius_clip` drops what is small along both; gsplat
    1.4's is 3 standard deviations along the longest axis. No alpha of at least 1/255 lies beyond either.
    """
    if not (differ and TWO_RADII):
        return contextlib.nullcontext()
    longest = "fit3d_ns.rasterization.projection._compute_radii"
    return mock.patch(longest, lambda xx, yy, _: torch.ceil(3.33 * torch.maximum(xx, yy).detach().sqrt()))


def test_radius_clip__drops_what_is_small_by_the_installed_gsplats_radius(card):
    """Deviations of 1.25 px are 3.75 px to gsplat 1.4 and 4.17 px to gsplat 1.5, before both are rounded up."""
    scene = make_scene(num_gaussians=1, depth=(5.0, 5.0), spread=0.0)
    focal_over_depth = scene.Ks[0, 0, 0] / 5.0
    blurred = (1.25**2 - 0.3) ** 0.5
    arguments = scene.arguments() | {"scales": torch.full((1, 3), float(blurred / focal_over_depth))}
    arguments |= {"opacities": torch.ones(1), "colors": torch.ones(1, 3)}
    on_card = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    for backend, inputs in (("gsplat", on_card), ("reference", arguments)):
        for clip, is_drawn in ((3.0, True), (4.0, TWO_RADII and backend == "gsplat"), (5.0, False)):
            _, alphas, info = rasterization(**inputs, radius_clip=clip, backend=backend)
            assert bool(alphas.max() > 0.1) == is_drawn, (backend, clip)
            assert bool((info["radii"] > 0).any()) == is_drawn


@pytest.mark.parametrize("channels", [3, 64, 200, 700])
def test_gsplat__backprojection_is_the_adjoint(card, channels):
    scene = make_scene(num_gaussians=300, num_features=channels)
    result = render_on_card(scene)
    maps, features = result["v_maps"].double(), result["features"].double()
    forward = (features * maps).sum()
    backward = (scene.features.double() * result["sums"].double()).sum()
    assert abs(forward - backward) <= 1e-4 * maps.norm() * features.norm()


@pytest.mark.parametrize("channels", [5, 70])
def test_gsplat__adds_what_the_two_directions_give_one_after_the_other(card, channels):
    scene = make_scene(num_cameras=2, num_features=channels)
    sums = []
    for backend, device in (("gsplat", "cuda"), ("reference", "cpu")):
        info = render_everything(scene, backend, device=device)["info"]
        features = scene.features.to(device)
        total = torch.ones_like(features)
        add_normal(
            features, info, lambda maps: maps * torch.linspace(0, 1, maps.shape[2], device=maps.device)[:, None], total
        )
        sums.append(total.cpu())
    assert relative_error(*sums) <= 2e-4


def test_gsplat__reads_chosen_pixels_through_tile_masks(card):
    """Alphas of the other tiles are NaN on the pretended card: nothing of them may get through."""
    scene = make_scene(num_cameras=2)
    info = render_everything(scene, "gsplat", device="cuda")["info"]
    features = [scene.features.cuda().requires_grad_() for _ in range(2)]
    pixels = torch.tensor([[0, 0], [28, 36], [17, 3]]).cuda()
    full = rasterize_features(features[0], info)[:, pixels[:, 0], pixels[:, 1]]
    read = rasterize_features(features[1], info, pixels)
    torch.testing.assert_close(read.cpu(), full.cpu())
    for result in (full, read):
        result.square().sum().backward()
    torch.testing.assert_close(features[1].grad.cpu(), features[0].grad.cpu())


@pytest.mark.parametrize("num_gaussians", [0, 5])
def test_gsplat__draws_nothing_where_nothing_is_seen(card, num_gaussians):
    scene = make_scene(num_gaussians=num_gaussians, depth=(-5.0, -1.0), num_cameras=2)
    result = render_on_card(scene, render_mode="RGB+ED")
    assert all(value.isfinite().all() for name, value in result.items() if name != "info")
    assert not any(
        result[name].any() for name in ("alphas", "features", "v_means", "v_coefficients", "absgrad", "sums")
    )


@pytest.mark.parametrize("shared_kilobytes", [48, 99, 227])
@pytest.mark.parametrize("channels", [3, 5, 6, 7, 23, 48, 60, 64, 65, 66, 128, 200])
def test_gsplat__no_call_is_padded_by_more_than_an_eighth(monkeypatch, shared_kilobytes, channels):
    """Nor does gsplat have to pad it, which it refuses to do beyond 1.5."""
    scene = make_scene(num_gaussians=4, num_features=channels)
    blend = gsplat_backend.rasterize_to_pixels

    def refuse_to_pad(means2d: Any, conics: Any, colors: Any, *args: Any, **kwargs: Any) -> Any:
        assert colors.shape[-1] in COMPILED
        return blend(means2d, conics, colors, *args, **kwargs)

    with pretend_cuda(shared_bytes=shared_kilobytes * 1024), replace_kernels() as calls:
        monkeypatch.setattr(gsplat_backend, "rasterize_to_pixels", refuse_to_pad)
        render_on_card(scene)
    assert calls.counts["fully_fused_projection_fwd"] == calls.counts["isect_tiles"] == 1
    # Colour once, features forwards, and features with their weights backwards.
    asked = 3 + channels + channels + 1
    assert asked <= sum(calls.channels) <= asked * 8 / 7


@pytest.mark.parametrize("card", [PRETENDED], indirect=True)
def test_stand_in__refuses_what_the_compiled_module_refuses(card):
    """So that the tests above can fail."""
    scene = make_scene()
    projected = {key: value for key, value in scene.arguments().items() if isinstance(value, torch.Tensor)}
    arguments = scene.arguments() | {key: value.cuda() for key, value in projected.items()}
    _, _, info = rasterization(**arguments, colors=scene.features.cuda(), backend="gsplat")
    geometry = info["blend_geometry"]
    size = (geometry.settings.width, geometry.settings.height, 16)
    lists = (geometry.tiles.isect_offsets, geometry.tiles.flatten_ids)

    def blend(**changes: Any) -> Any:
        tensors = {"means2d": geometry.means2d, "conics": geometry.conics, "opacities": geometry.opacities}
        tensors |= {"colors": scene.features.cuda()[None]} | changes
        names = ("means2d", "conics", "colors", "opacities")
        compiled = importlib.import_module("gsplat.cuda._backend")._C
        forward = "rasterize_to_pixels_3dgs_fwd" if TWO_RADII else "rasterize_to_pixels_fwd"
        return getattr(compiled, forward)(*[tensors[name] for name in names], None, None, *size, *lists)

    blend()
    for changes, message in (
        ({"colors": scene.features[None]}, "colors must be a CUDA tensor"),
        ({"means2d": geometry.means2d.flip(-1).transpose(1, 2).contiguous().transpose(1, 2)}, "must be contiguous"),
        ({"opacities": geometry.opacities.double()}, "expected scalar type"),
        ({"colors": torch.zeros(1, 40, 6, device="cuda")}, "Unsupported number of channels: 6"),
    ):
        with pytest.raises(RuntimeError, match=message):
            blend(**changes)
    undrawn = info["radii"] <= 0
    undrawn = undrawn.any(-1) if TWO_RADII else undrawn
    assert undrawn.any() and info["depths"][undrawn].isnan().all()


def test_largest_channel_count__follows_from_shared_memory():
    # 256 pixels of 28 + 4 D bytes: D = 64 needs 71 KiB, D = 33 needs 40 KiB.
    assert gsplat_backend.largest_channel_count(48 * 1024) == 33
    assert gsplat_backend.largest_channel_count(64 * 1024) == 33
    assert gsplat_backend.largest_channel_count(71 * 1024) == 64
    assert gsplat_backend.largest_channel_count(99 * 1024) == 65
    assert gsplat_backend.largest_channel_count(227 * 1024) == 129
    assert gsplat_backend.largest_channel_count(1) == 1


USED_OF_GSPLAT = {
    "gsplat.fully_fused_projection": (
        "means covars quats scales viewmats Ks width height eps2d near_plane far_plane radius_clip",
        "packed calc_compensations",
    ),
    "gsplat.isect_tiles": ("means2d radii depths tile_size tile_width tile_height", ""),
    "gsplat.isect_offset_encode": ("isect_ids * tile_width tile_height", ""),
    "gsplat.rasterize_to_pixels": (
        "means2d conics colors opacities image_width image_height tile_size isect_offsets flatten_ids",
        "backgrounds masks absgrad",
    ),
    "gsplat.spherical_harmonics": ("degrees_to_use dirs coeffs", "masks"),
    "gsplat.strategy.DefaultStrategy": (
        "",
        "prune_opa grow_grad2d grow_scale3d grow_scale2d prune_scale3d prune_scale2d refine_scale2d_stop_iter"
        " refine_start_iter refine_stop_iter reset_every refine_every pause_refine_after_reset absgrad",
    ),
    "gsplat.strategy.MCMCStrategy": (
        "",
        "cap_max noise_lr refine_start_iter refine_stop_iter refine_every min_opacity",
    ),
}
"""All that the package takes from gsplat: arguments given by position (`*`: of changing name), and by name."""
ON_MAIN = {
    "gsplat.fully_fused_projection": "means covars quats scales viewmats Ks width height eps2d near_plane far_plane"
    " radius_clip packed sparse_grad calc_compensations camera_model opacities",
    "gsplat.isect_tiles": "means2d radii depths tile_size tile_width tile_height sort segmented packed n_images"
    " image_ids gaussian_ids conics opacities",
    "gsplat.isect_offset_encode": "isect_ids n_images tile_width tile_height",
    "gsplat.rasterize_to_pixels": "means2d conics colors opacities image_width image_height tile_size isect_offsets"
    " flatten_ids backgrounds masks packed absgrad",
    "gsplat.spherical_harmonics": "degrees_to_use dirs coeffs masks",
    "gsplat.strategy.MCMCStrategy": "cap_max noise_lr refine_start_iter refine_stop_iter noise_injection_stop_iter"
    " refine_every min_opacity verbose",
    "gsplat.strategy.ops.compute_relocation": "opacities scales ratios binoms",
}
"""Arguments on gsplat's main branch (to be 1.6) of 2026, as its source has them; it cannot be installed from PyPI."""
CHANNELS_ON_MAIN = {1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513}
"""What its `Config.h` compiles; other numbers it refuses where earlier versions padded."""
REPLACED_IN_GSPLAT = {
    "gsplat.strategy.ops.compute_relocation": ("opacities scales ratios binoms", ""),
    "gsplat.strategy.ops.quat_scale_to_covar_preci": ("quats scales", "compute_preci triu"),
}
"""What its MCMC strategy calls and gets from us."""


def test_gsplat__is_the_one_that_the_script_put_in_place():
    assert gsplat.__version__ == os.environ.get("FIT3D_TESTS_GSPLAT", gsplat.__version__)


def test_gsplat__has_what_the_package_takes_from_it():
    taken = set()
    for path in (Path(__file__).parents[2] / "fit3d_ns").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "gsplat":
                taken |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert taken == set(USED_OF_GSPLAT)
    for name, (by_position, by_name) in (USED_OF_GSPLAT | REPLACED_IN_GSPLAT).items():
        module, _, function = name.rpartition(".")
        installed = list(inspect.signature(getattr(importlib.import_module(module), function)).parameters)
        for parameters in (installed, ON_MAIN.get(name, "").split() or installed):
            for wanted, actual in zip(by_position.split(), parameters, strict=False):
                assert wanted in ("*", actual), (name, parameters)
            assert len(parameters) >= len(by_position.split()) and set(by_name.split()) <= set(parameters), name
    assert set(gsplat_backend.COMPILED_CHANNELS) <= CHANNELS_ON_MAIN
