"""The public functions of the rasterizer: colour, features through the same projection, and the features' adjoint.

`rasterization` is a drop-in for `gsplat.rendering.rasterization` 1.4 with pinhole cameras. Frames: `means` in the
world, `viewmats` world-to-camera in OpenCV axes, `Ks` and all image coordinates in pixels with centres at +0.5.

A backend is a module with the functions that `reference` lists in `__all__`; `reference` defines their meaning. One
may have an `add_normal` of its own.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from packaging.version import Version
from torch import Tensor

from fit3d_ns.rasterization import arguments, kernels
from fit3d_ns.rasterization.arguments import RasterizeMode, RenderMode
from fit3d_ns.rasterization.projection import TILE_SIZE, ProjectionSettings
from fit3d_ns.rasterization.reference import BlendGeometry

BackendName = Literal["auto", "reference", "cpu", "gsplat"]
GaussianFeatures = Float[Tensor, "num_gaussians channels"]

ALPHA_FLOOR_OF_EXPECTED_DEPTH = 1e-10
"""Expected depth is divided by at least this alpha, as in gsplat."""
_MODULES = {"reference": "reference", "cpu": "cpu.backend", "gsplat": "gsplat_backend"}


def rasterization(
    means: Float[Tensor, "num_gaussians 3"],
    quats: Float[Tensor, "num_gaussians 4"],
    scales: Float[Tensor, "num_gaussians 3"],
    opacities: Float[Tensor, " num_gaussians"],
    colors: Float[Tensor, "*colors"],
    viewmats: Float[Tensor, "num_cameras 4 4"],
    Ks: Float[Tensor, "num_cameras 3 3"],
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    *,
    backgrounds: Float[Tensor, "num_cameras channels"] | None = None,
    render_mode: RenderMode = "RGB",
    absgrad: bool = False,
    rasterize_mode: RasterizeMode = "classic",
    backend: BackendName = "auto",
    **fixed: Any,
) -> tuple[
    Float[Tensor, "num_cameras height width rendered"], Float[Tensor, "num_cameras height width 1"], dict[str, Any]
]:
    """Renders Gaussians into cameras; ValueError where an argument is not offered or does not fit the others.

    Args:
        quats: wxyz, of any length but zero.
        scales: Standard deviations along the three axes, in world units.
        opacities: In [0, 1].
        colors: [N, D] or [C, N, D]; with `sh_degree`, coefficients [N, K, 3] or [C, N, K, 3].
        near_plane: z-depth below which a Gaussian's centre is dropped; `far_plane` is the upper limit.
        radius_clip: Gaussians of at most this radius in pixels are dropped: ceil(3 sigma) along the longest axis; on
            CUDA with gsplat 1.5 that version's, ceil(3.33 sigma) along each image axis.
        eps2d: Blur added to the projected covariances, px^2.
        sh_degree: Highest degree of the harmonics that takes part, 0 to 4; None if `colors` are colours.
        backgrounds: What shows through where alpha is below 1; black if None. Depth has no background.
        render_mode: `D` is sum(w z), `ED` the same divided by alpha; `RGB+` puts it after the colours.
        absgrad: Whether backward leaves the sums of absolute gradients in `info["means2d"].absgrad`.
        rasterize_mode: `antialiased` scales the opacities by the loss of area that the blur would cause.
        backend: `auto` follows the device of `means`.
        fixed: gsplat's other options: `channel_chunk` changes nothing, since the backends choose chunks by themselves;
            `packed`, `sparse_grad`, `tile_size`, `distributed`, `camera_model` and `covars` are accepted only at
            gsplat's defaults.

    Returns:
        Images [C, H, W, X], accumulated alphas [C, H, W, 1], and `info`: gsplat's keys (`radii`, `means2d`, `depths`,
        `conics`, `opacities` with the compensation, `tiles_per_gauss`, `flatten_ids`, ...) and `backend`. `means2d`
        takes part in the graph.
    """
    arguments.check_modes(render_mode, rasterize_mode)
    arguments.check_fixed_options(fixed)
    uses_colors = render_mode not in ("D", "ED")
    if uses_colors:
        arguments.check_colors(colors, backgrounds, sh_degree, means, len(viewmats))
    antialiased = rasterize_mode == "antialiased"
    settings = ProjectionSettings(width, height, near_plane, far_plane, radius_clip, eps2d, antialiased)
    info = _project((means, quats, scales, opacities), viewmats, Ks, settings, backend)
    engine = load_backend(info["backend"])

    channels = []
    if uses_colors:
        if sh_degree is not None:
            is_drawn = info["radii"] > 0
            # gsplat 1.5 has one radius for each image axis.
            is_drawn = is_drawn.all(dim=-1) if is_drawn.ndim == 3 else is_drawn
            colors = engine.evaluate_harmonics(sh_degree, means, viewmats, colors, is_drawn)
        channels.append(colors.expand(len(viewmats), -1, -1))
    if render_mode != "RGB":
        channels.append(info["depths"][..., None])
        if backgrounds is not None:
            nothing = backgrounds.new_zeros(len(viewmats), 1)
            backgrounds = torch.cat([backgrounds, nothing], dim=-1) if uses_colors else nothing
    blended = channels[0] if len(channels) == 1 else torch.cat(channels, dim=-1)
    projected = (info["means2d"], info["conics"], info["opacities"])
    images, alphas = engine.blend(info["blend_geometry"], *projected, blended, backgrounds, absgrad)
    if render_mode in ("ED", "RGB+ED"):
        expected = images[..., -1:] / alphas.clamp(min=ALPHA_FLOOR_OF_EXPECTED_DEPTH)
        images = torch.cat([images[..., :-1], expected], dim=-1)
    return images, alphas, info


@torch.no_grad()
def project(
    means: Float[Tensor, "num_gaussians 3"],
    quats: Float[Tensor, "num_gaussians 4"],
    scales: Float[Tensor, "num_gaussians 3"],
    opacities: Float[Tensor, " num_gaussians"],
    viewmats: Float[Tensor, "num_cameras 4 4"],
    Ks: Float[Tensor, "num_cameras 3 3"],
    width: int,
    height: int,
    *,
    eps2d: float = 0.3,
    rasterize_mode: RasterizeMode = "classic",
    backend: BackendName = "auto",
) -> dict[str, Any]:
    """The `info` of `rasterization` without drawing anything and without gradients: for features alone.

    Arguments, keys and errors are those of `rasterization`.
    """
    arguments.check_modes("RGB", rasterize_mode)
    settings = ProjectionSettings(width, height, eps2d=eps2d, antialiased=rasterize_mode == "antialiased")
    return _project((means, quats, scales, opacities), viewmats, Ks, settings, backend)


def rasterize_features(
    features: GaussianFeatures, info: dict[str, Any], pixels: Int[Tensor, "num_pixels 2"] | None = None
) -> Float[Tensor, "num_cameras *pixels channels"]:
    """Blends per-Gaussian features through the projection of an earlier call, with the weights that colour had.

    Differentiable by `features` alone: the geometry in `info` was detached, `info["means2d"]` is never touched.
    ValueError where features or pixels do not fit `info`.

    Args:
        features: One row for each Gaussian that `info` was made from; any number of channels.
        info: What `rasterization` or `project` returned.
        pixels: Positions (row, column) to render in every camera; None renders all. Repeats are allowed.

    Returns:
        [C, H, W, D], or [C, P, D] with `pixels`. Nothing is added where alpha is below 1.
    """
    geometry = _geometry_of(info)
    arguments.check_features(features, geometry.num_gaussians, geometry.means2d)
    if pixels is not None:
        arguments.check_pixels(pixels, geometry.settings.width, geometry.settings.height)
    return load_backend(info["backend"]).blend_features(features, geometry, pixels)


@torch.no_grad()
def backproject_features(
    feature_maps: Float[Tensor, "num_cameras height width channels"],
    info: dict[str, Any],
    add_to: GaussianFeatures | None = None,
) -> tuple[GaussianFeatures, Float[Tensor, " num_gaussians"]]:
    """The adjoint of `rasterize_features`: sums the maps' pixels into the Gaussians, by blend weight.

    ValueError where maps or sums do not fit `info`.

    Args:
        feature_maps: One map per camera of `info`.
        info: What `rasterization` or `project` returned.
        add_to: Sums of earlier calls, contiguous; this call's are added to them in place. Gaussians that no camera sees
            are not touched, which makes a large scene's views cheaper.

    Returns:
        Sums over all cameras and pixels of weight times pixel, [N, D] (`add_to` if it was given), and of this call's
        weights alone, [N]. Without `add_to` their quotient is the weighted mean of what each Gaussian was seen as.
    """
    geometry = _geometry_of(info)
    settings = geometry.settings
    arguments.check_feature_maps(feature_maps, geometry.num_cameras, settings.width, settings.height, geometry.means2d)
    shape = (geometry.num_gaussians, feature_maps.shape[-1])
    if add_to is not None:
        arguments.check_sums(add_to, shape, feature_maps)
    sums = feature_maps.new_zeros(shape) if add_to is None else add_to
    totals = feature_maps.new_zeros(geometry.num_gaussians)
    load_backend(info["backend"]).backproject(feature_maps, geometry, sums, totals)
    return sums, totals


@torch.no_grad()
def add_normal(
    features: GaussianFeatures, info: dict[str, Any], weigh: Callable[[Tensor], Tensor], add_to: GaussianFeatures
) -> None:
    """Adds R^T weigh(R f) to `add_to`, in place: `rasterize_features` and `backproject_features` at less than both.

    `weigh` takes maps [C, H, W, some channels] and returns new ones of the same shape, each channel from itself; the
    rest is as there.
    """
    geometry = _geometry_of(info)
    arguments.check_features(features, geometry.num_gaussians, geometry.means2d)
    arguments.check_sums(add_to, tuple(features.shape), features)
    engine = load_backend(info["backend"])
    if hasattr(engine, "add_normal"):
        engine.add_normal(features, geometry, weigh, add_to)
        return
    maps = weigh(engine.blend_features(features, geometry, None))
    engine.backproject(maps, geometry, add_to, add_to.new_zeros(geometry.num_gaussians))


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, the one that `auto` prefers on its best device first."""
    names = ["cpu", "reference"]
    if torch.cuda.is_available() and not kernels.find_kernels().problem:
        names.insert(0, "gsplat")
    return names


def prepare_rasterizer(device: torch.device | str) -> None:
    """Makes ready whatever serves a device, which on CUDA may compile kernels; ValueError where that is not possible.

    Any rendering does that too: this says it before photographs are read and features extracted.
    """
    if torch.device(device).type == "cuda":
        load_backend("gsplat")


def resolve_backend(name: str, means: Tensor) -> str:
    """The backend that a call with these tensors gets.

    ValueError where there is none, or it cannot take their device or dtype.
    """
    if name not in ("auto", *_MODULES):
        raise ValueError(f"Unknown rasterization backend {name!r}; choose one of auto, {', '.join(_MODULES)}.")
    device = means.device.type
    if name == "auto":
        if device not in ("cpu", "cuda"):
            raise ValueError(f"No rasterization backend serves {device} tensors; move them to the CPU or to CUDA.")
        name = "gsplat" if device == "cuda" else "cpu"
    needed = {"cpu": "cpu", "gsplat": "cuda"}.get(name, device)
    if device != needed:
        raise ValueError(f"Rasterization backend {name!r} needs {needed} tensors, but `means` is on {means.device}.")
    if name == "gsplat" and len(means) == 0:
        # gsplat's projection divides by the number of Gaussians: with none, the process dies (SIGFPE, 1.4 and 1.5).
        return "reference"
    if name != "reference" and means.dtype != torch.float32:
        raise ValueError(f"Rasterization backend {name!r} works in float32, but `means` is {means.dtype}; convert it.")
    return name


@functools.cache
def _has_two_radii() -> bool:
    """Whether the installed gsplat has a radius for each image axis, which its strategies then want of `info`."""
    installed = kernels.find_version("gsplat")
    return installed is not None and installed >= Version("1.5")


def load_backend(name: str) -> Any:
    """The module of a backend, imported on first use, since importing gsplat or numba takes time.

    ValueError where gsplat's kernels are neither compiled nor can be.
    """
    if name == "gsplat":
        kernels.prepare_kernels()
    return importlib.import_module(f"fit3d_ns.rasterization.{_MODULES[name]}")


def _project(
    gaussians: tuple[Tensor, ...], viewmats: Tensor, Ks: Tensor, settings: ProjectionSettings, backend: str
) -> dict[str, Any]:
    means, quats, scales, opacities = gaussians
    arguments.check_geometry(means, quats, scales, opacities, viewmats, Ks)
    name = resolve_backend(backend, means)
    engine = load_backend(name)
    projected = engine.project_gaussians(means, quats, scales, viewmats, Ks, settings)
    opacities = opacities.expand(len(viewmats), -1)
    if projected.compensations is not None:
        opacities = opacities * projected.compensations
    geometry: BlendGeometry = engine.build_geometry(projected, opacities, settings)
    radii = projected.radii
    if radii.ndim == 2 and _has_two_radii():
        radii = radii[..., None].expand(-1, -1, 2)
    return {
        "camera_ids": None,
        "gaussian_ids": None,
        "radii": radii,
        "means2d": projected.means2d,
        "depths": projected.depths,
        "conics": projected.conics,
        "opacities": opacities,
        "tile_width": settings.tile_width,
        "tile_height": settings.tile_height,
        # `tiles_per_gauss`, `isect_ids`, `flatten_ids` and `isect_offsets`.
        **vars(geometry.tiles),
        "width": settings.width,
        "height": settings.height,
        "tile_size": TILE_SIZE,
        "n_cameras": len(viewmats),
        "backend": name,
        "blend_geometry": geometry,
    }


def _geometry_of(info: dict[str, Any]) -> BlendGeometry:
    geometry = info.get("blend_geometry")
    if not isinstance(geometry, BlendGeometry):
        raise ValueError("`info` was not made by `fit3d_ns.rasterization`; pass what `rasterization` returned third.")
    return geometry
