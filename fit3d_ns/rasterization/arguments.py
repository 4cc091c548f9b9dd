"""Checks of what callers of the rasterizer pass in: one sentence, a ValueError, for each thing that can be wrong."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fit3d_ns.rasterization.reference import MAX_SH_DEGREE

RenderMode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]
RasterizeMode = Literal["classic", "antialiased"]

_FIXED: dict[str, tuple[Any, str]] = {
    "packed": (False, "the projection is always kept as [C, N]"),
    "sparse_grad": (False, "gradients are always dense"),
    "tile_size": (16, "tiles are always 16 pixels wide"),
    "camera_model": ("pinhole", "undistort the images first"),
    "distributed": (False, "each process renders its own Gaussians"),
    "covars": (None, "pass `quats` and `scales`"),
}


def check_fixed_options(options: Mapping[str, Any]) -> None:
    """Refuses values of gsplat's options other than the one that is built in; TypeError where it has no such option."""
    for name, value in options.items():
        if name == "channel_chunk":
            continue
        if name not in _FIXED:
            raise TypeError(f"rasterization() got an unexpected keyword argument {name!r}")
        expected, advice = _FIXED[name]
        if value is not expected and value != expected:
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"Rasterization takes `{name}={expected!r}` only, not {shown}: {advice}.")


def check_modes(render_mode: str, rasterize_mode: str) -> None:
    """Refuses unknown modes."""
    modes = [("render_mode", render_mode, RenderMode), ("rasterize_mode", rasterize_mode, RasterizeMode)]
    for name, value, choices in modes:
        if value not in get_args(choices):
            raise ValueError(f"Unknown `{name}` {value!r}; choose one of {', '.join(get_args(choices))}.")


def check_geometry(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, viewmats: Tensor, Ks: Tensor
) -> None:
    """Compares the shapes, dtypes and devices of Gaussians and cameras."""
    num_gaussians, num_cameras = means.shape[0], viewmats.shape[0]
    expected = {
        "means": (means, (num_gaussians, 3)),
        "quats": (quats, (num_gaussians, 4)),
        "scales": (scales, (num_gaussians, 3)),
        "opacities": (opacities, (num_gaussians,)),
        "viewmats": (viewmats, (num_cameras, 4, 4)),
        "Ks": (Ks, (num_cameras, 3, 3)),
    }
    for name, (tensor, shape) in expected.items():
        _check_like(name, tensor, "means", means, shape)
    if num_cameras == 0:
        raise ValueError("`viewmats` holds no camera; pass at least one.")


def check_colors(
    colors: Tensor, backgrounds: Tensor | None, sh_degree: int | None, means: Tensor, num_cameras: int
) -> None:
    """Checks colours or harmonics coefficients, their degree, and backgrounds against Gaussians and cameras."""
    num_gaussians = means.shape[0]
    _check_like("colors", colors, "means", means)
    shared, per_camera = (num_gaussians,), (num_cameras, num_gaussians)
    trailing = 1 if sh_degree is None else 2
    if tuple(colors.shape[:-trailing]) not in (shared, per_camera) or (sh_degree is not None and colors.shape[-1] != 3):
        layout = "[N, D] or [C, N, D]" if sh_degree is None else "[N, K, 3] or [C, N, K, 3]"
        problem = f"`colors` has shape {list(colors.shape)}, expected {layout} with N={num_gaussians}"
        raise ValueError(f"{problem}, C={num_cameras} for sh_degree={sh_degree}.")
    if colors.shape[-1] == 0:
        raise ValueError("`colors` has no channels; to render features alone, call `project` instead.")
    if sh_degree is not None and not 0 <= sh_degree <= MAX_SH_DEGREE:
        raise ValueError(f"`sh_degree` is {sh_degree}; choose 0 to {MAX_SH_DEGREE}.")
    if sh_degree is not None and (sh_degree + 1) ** 2 > colors.shape[-2]:
        problem = f"`sh_degree` {sh_degree} needs {(sh_degree + 1) ** 2} coefficients"
        raise ValueError(f"{problem}, but `colors` holds {colors.shape[-2]}; lower the degree.")
    if backgrounds is not None:
        _check_like("backgrounds", backgrounds, "means", means, (num_cameras, colors.shape[-1]))


def check_features(features: Tensor, num_gaussians: int, like: Tensor) -> None:
    """Checks per-Gaussian features against the Gaussians of an `info`."""
    if features.ndim != 2 or features.shape[0] != num_gaussians or features.shape[1] == 0:
        raise ValueError(
            f"`features` has shape {list(features.shape)}, expected [N, D] with N={num_gaussians} (the Gaussians that"
            " `info` was made from) and D at least 1."
        )
    _check_like("features", features, "the rendered Gaussians", like)


def check_pixels(pixels: Tensor, width: int, height: int) -> None:
    """Checks that `pixels` are integers [P, 2], (row, column) positions within the image."""
    if pixels.ndim != 2 or pixels.shape[1] != 2 or pixels.is_floating_point() or pixels.dtype == torch.bool:
        problem = f"`pixels` is a {pixels.dtype} tensor of shape {list(pixels.shape)}"
        raise ValueError(f"{problem}; pass integers [P, 2] as (row, column).")
    if len(pixels) == 0:
        return
    # One transfer, not two: on a GPU each of them waits for everything before it.
    lowest, highest = torch.stack([pixels.amin(dim=0), pixels.amax(dim=0)]).tolist()
    if min(lowest) < 0 or highest[0] >= height or highest[1] >= width:
        problem = f"`pixels` spans rows {lowest[0]}..{highest[0]} and columns {lowest[1]}..{highest[1]}"
        raise ValueError(f"{problem}, outside the image of {height} rows and {width} columns.")


def check_feature_maps(feature_maps: Tensor, num_cameras: int, width: int, height: int, like: Tensor) -> None:
    """Checks per-pixel maps against the images of an `info`."""
    if feature_maps.ndim != 4 or tuple(feature_maps.shape[:3]) != (num_cameras, height, width):
        problem = f"`feature_maps` has shape {list(feature_maps.shape)}, expected [{num_cameras}, {height}, {width}, D]"
        raise ValueError(f"{problem}; resize the maps to the rendered image first.")
    _check_like("feature_maps", feature_maps, "the rendered Gaussians", like)


def check_sums(add_to: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Checks sums that are added to in place: they must be contiguous."""
    _check_like("add_to", add_to, "the features", like, shape)
    if not add_to.is_contiguous():
        raise ValueError("`add_to` is not contiguous, and a copy would not be added to in place.")


def _check_like(
    name: str, tensor: Tensor, other_name: str, other: Tensor, shape: tuple[int, ...] | None = None
) -> None:
    """Type and device must be those of another tensor, the shape, where one is given, that one."""
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` has shape {list(tensor.shape)}, expected {list(shape)}.")
    if tensor.dtype != other.dtype or tensor.device != other.device:
        problem = f"`{name}` is {tensor.dtype} on {tensor.device}, but {other_name} is {other.dtype} on {other.device}"
        raise ValueError(f"{problem}; convert one of them.")
