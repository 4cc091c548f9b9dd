"""A stand-in for gsplat's compiled module, one level below gsplat's Python: its wrappers, padding and graphs run.

Functions have the names and arguments of gsplat 1.4.0 or of 1.5.3, whichever is installed, and make the checks of their
C++ side: device, contiguity, dtype, whole numbers, channel counts, shared memory. Memory that CUDA leaves as it was is
NaN. Projection, tile lists and harmonics are gsplat's own in plain torch, so each version keeps its meaning; blending
is our reference. Works on the pretended card alone.
"""

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gsplat
import torch
from gsplat.cuda import _torch_impl as twin
from torch import Tensor
from torch.utils._pytree import tree_map

from fit3d_ns.rasterization import kernels, reference
from tests import pretended_cuda
from tests.pretended_cuda import PretendedTensor, _wait, place

COMPILED = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513)
"""Channel counts that the wheels have kernels for."""
TWO_RADII = not gsplat.__version__.startswith("1.4.")
"""Whether a Gaussian has a radius along each image axis, as since gsplat 1.5."""
NAMES = {
    "fully_fused_projection_fwd": "projection_ewa_3dgs_fused_fwd",
    "fully_fused_projection_bwd": "projection_ewa_3dgs_fused_bwd",
    "isect_tiles": "intersect_tile",
    "isect_offset_encode": "intersect_offset",
    "rasterize_to_pixels_fwd": "rasterize_to_pixels_3dgs_fwd",
    "rasterize_to_pixels_bwd": "rasterize_to_pixels_3dgs_bwd",
    "compute_sh_fwd": "spherical_harmonics_fwd",
    "compute_sh_bwd": "spherical_harmonics_bwd",
}
"""Names in gsplat 1.4, and since 1.5."""


@dataclass
class KernelCalls:
    """What reached the compiled module."""

    counts: Counter[str] = field(default_factory=Counter)
    """Calls, by the names of 1.4."""
    channels: list[int] = field(default_factory=list)
    """Of every blending, padding included."""


@contextlib.contextmanager
def replace_kernels() -> Iterator[KernelCalls]:
    """Puts the stand-in where gsplat looks for its compiled module; within `pretend_cuda` only."""
    calls = KernelCalls()
    stand_in = _Kernels(calls)
    functions = {}
    for old, new in NAMES.items():
        functions[new if TWO_RADII else old] = _watch(old, getattr(stand_in, old), calls)
    # gsplat looks for the camera model's name in the module itself.
    compiled = types.SimpleNamespace(CameraModelType=None, PINHOLE=0, **functions)
    module = types.ModuleType("gsplat.cuda._backend")
    module._C = compiled  # type: ignore[attr-defined]
    # Not with `mock.patch.dict`, which forgets whatever is imported meanwhile.
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        yield calls
    finally:
        kernels.prepare_kernels.cache_clear()
        del sys.modules[module.__name__]
        if before is not None:
            sys.modules[module.__name__] = before


def _watch(name: str, kernel: Any, calls: KernelCalls) -> Any:
    def call(*args: Any) -> Any:
        calls.counts[name] += 1
        # Inside, tensors are the CPU's, and nothing is watched.
        with torch._C.DisableTorchFunction():
            result = kernel(*args)
        pretended_cuda._card.count_work([leaf for leaf in args if isinstance(leaf, Tensor)], result)
        return tree_map(lambda leaf: place(leaf, True), result)

    return call


class _Kernels:
    """Each method has the arguments of the C++ function of its name in 1.4; those of 1.5 where they differ."""

    def __init__(self, calls: KernelCalls) -> None:
        self.calls = calls

    def fully_fused_projection_fwd(self, means: Any, covars: Any, quats: Any, scales: Any, *rest: Any) -> Any:
        if TWO_RADII:
            opacities, *rest = rest
            assert opacities is None, "they only tighten the radii, and the reference knows no such thing"
        viewmats, Ks, width, height, eps2d, near, far, clip, with_compensations, camera_model = rest
        tensors = _take(means=means, quats=quats, scales=scales, viewmats=viewmats, Ks=Ks)
        assert len(tensors[0]), "its launch divides by the number of Gaussians; on a card the process dies of SIGFPE"
        _check_integers(width=width, height=height)
        assert len(means), "gsplat divides by the number of Gaussians: the process would die (SIGFPE)"
        assert covars is None and camera_model == 0 and isinstance(with_compensations, bool)
        with torch.no_grad():
            limits = dict(eps2d=float(eps2d), near_plane=float(near), far_plane=float(far))
            radii, means2d, depths, conics, compensations = _project(
                *tensors, width, height, calc_compensations=with_compensations, **limits
            )
            # The plain version knows no `radius_clip`; with two radii, both have to be small.
            radii[(radii <= clip).all(-1) if TWO_RADII else radii <= clip] = 0
            nowhere = _find_undrawn(radii)
            for values in (means2d, depths, conics):
                values[nowhere] = torch.nan
            if compensations is not None:
                compensations[nowhere] = 0.0
        # As its kernels allocate them: `absgrad` would be lost on a copy.
        return radii, means2d.contiguous(), depths.contiguous(), conics.contiguous(), compensations

    def fully_fused_projection_bwd(
        self, means: Any, covars: Any, quats: Any, scales: Any, viewmats: Any, Ks: Any, width: int, height: int,
        eps2d: float, camera_model: int, radii: Any, conics: Any, compensations: Any, v_means2d: Any, v_depths: Any,
        v_conics: Any, v_compensations: Any, with_viewmats: bool,
    ) -> Any:  # fmt: skip
        inputs = _take(means=means, quats=quats, scales=scales, viewmats=viewmats, Ks=Ks)
        _take(conics=conics, compensations=compensations)
        (radii,) = _take(torch.int32, radii=radii)
        gradients = _take(v_means2d=v_means2d, v_depths=v_depths, v_conics=v_conics, v_compensations=v_compensations)
        sums = [torch.zeros_like(tensor) for tensor in inputs[:4]]
        drawn = ~_find_undrawn(radii)
        for camera in range(len(drawn)):
            # As the kernel does, whatever was not drawn is not even looked at.
            rows = drawn[camera].nonzero()[:, 0]
            leaves = [tensor[rows] for tensor in inputs[:3]] + [inputs[3][camera][None]]
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]
            with torch.enable_grad():
                results = _project(
                    *leaves, inputs[4][camera][None], width, height, eps2d=eps2d, near_plane=-1e10,
                    calc_compensations=compensations is not None,
                )[1:]  # fmt: skip
            pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if r is not None and g is not None]
            found = torch.autograd.grad([r for r, _ in pairs], leaves, [g[camera, rows][None] for _, g in pairs])
            for total, part in zip(sums[:3], found[:3], strict=True):
                total[rows] += part
            sums[3][camera] = found[3][0]
        v_means, v_quats, v_scales, v_viewmats = sums
        return v_means, None, v_quats, v_scales, v_viewmats if with_viewmats else None

    def isect_tiles(
        self, means2d: Any, radii: Any, depths: Any, camera_ids: Any, gaussian_ids: Any, num_cameras: int,
        tile_size: int, tile_width: int, tile_height: int, sort: bool, _double_buffer_or_segmented: bool,
    ) -> Any:  # fmt: skip
        means2d, depths = _take(means2d=means2d, depths=depths)
        (radii,) = _take(torch.int32, radii=radii)
        _check_integers(num_cameras=num_cameras, tile_size=tile_size, tile_width=tile_width, tile_height=tile_height)
        _wait("gsplat's number of tile entries")
        nowhere = _find_undrawn(radii)
        # The kernel looks at nothing else of a Gaussian that is not drawn; the plain version would round NaN.
        means2d, depths = means2d.masked_fill(nowhere[..., None], 0.0), depths.masked_fill(nowhere, 0.0)
        return twin._isect_tiles(means2d, radii, depths, tile_size, tile_width, tile_height, sort)

    def isect_offset_encode(self, isect_ids: Any, num_cameras: int, tile_width: int, tile_height: int) -> Any:
        (isect_ids,) = _take(torch.int64, isect_ids=isect_ids)
        _check_integers(num_cameras=num_cameras, tile_width=tile_width, tile_height=tile_height)
        return twin._isect_offset_encode(isect_ids, num_cameras, tile_width, tile_height)

    def rasterize_to_pixels_fwd(
        self, means2d: Any, conics: Any, colors: Any, opacities: Any, backgrounds: Any, masks: Any, width: int,
        height: int, tile_size: int, offsets: Any, flatten_ids: Any,
    ) -> Any:  # fmt: skip
        geometry, tensors, is_read = _take_blending(
            means2d, conics, colors, opacities, backgrounds, masks, width, height, tile_size, offsets, flatten_ids
        )
        channels = colors.shape[-1]
        if channels not in COMPILED:
            raise RuntimeError(f"Unsupported number of channels: {channels}")
        self.calls.channels.append(channels)
        with torch.no_grad():
            images, alphas = reference.blend(geometry, *tensors, absgrad=False)
        if is_read is not None:
            images[~is_read] = 0.0 if tensors[-1] is None else tensors[-1][:, None, None].expand_as(images)[~is_read]
            alphas[~is_read] = torch.nan
        return images, alphas, torch.zeros(images.shape[:3], dtype=torch.int32)

    def rasterize_to_pixels_bwd(
        self, means2d: Any, conics: Any, colors: Any, opacities: Any, backgrounds: Any, masks: Any, width: int,
        height: int, tile_size: int, offsets: Any, flatten_ids: Any, alphas: Any, last_ids: Any, v_images: Any,
        v_alphas: Any, absgrad: bool,
    ) -> Any:  # fmt: skip
        geometry, tensors, is_read = _take_blending(
            means2d, conics, colors, opacities, backgrounds, masks, width, height, tile_size, offsets, flatten_ids
        )
        _take(alphas=alphas)
        _take(torch.int32, last_ids=last_ids)
        v_images, v_alphas = _take(v_images=v_images, v_alphas=v_alphas)
        shared = tile_size**2 * (28 + 4 * colors.shape[-1])
        if shared > torch.cuda.get_device_properties(0).shared_memory_per_block_optin:
            raise RuntimeError(f"Failed to set maximum shared memory size (requested {shared} bytes)")
        if is_read is not None:
            v_images, v_alphas = v_images * is_read[..., None], v_alphas * is_read[..., None]
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:4]]
        with torch.enable_grad():
            results = reference.blend(geometry, *leaves, tensors[-1], absgrad=absgrad)
        means2d, conics, opacities, colors = torch.autograd.grad(
            results, leaves, [v_images, v_alphas], allow_unused=True, materialize_grads=True
        )
        return leaves[0].absgrad if absgrad else None, means2d, conics, colors, opacities

    def compute_sh_fwd(self, degree: int, directions: Any, coefficients: Any, masks: Any) -> Any:
        directions, coefficients = _take(directions=directions, coefficients=coefficients)
        (masks,) = _take(torch.bool, masks=masks)
        _check_integers(degree=degree)
        assert coefficients.ndim == 3, "beyond 1.5, gsplat takes no coefficients with an axis of cameras"
        colors = twin._spherical_harmonics(degree, directions, coefficients)
        return colors if masks is None else colors.masked_fill(~masks[..., None], torch.nan)

    def compute_sh_bwd(
        self, num_bases: int, degree: int, directions: Any, coefficients: Any, masks: Any, v_colors: Any,
        with_directions: bool,
    ) -> Any:  # fmt: skip
        directions, coefficients, v_colors = _take(directions=directions, coefficients=coefficients, v_colors=v_colors)
        (masks,) = _take(torch.bool, masks=masks)
        drawn = torch.ones(directions.shape[:-1], dtype=torch.bool) if masks is None else masks
        leaves = [tensor[drawn].clone().requires_grad_() for tensor in (coefficients, directions)]
        with torch.enable_grad():
            colors = twin._spherical_harmonics(degree, leaves[1], leaves[0])
        # Degree 0 knows no directions.
        found = torch.autograd.grad(colors, leaves, v_colors[drawn], allow_unused=True, materialize_grads=True)
        sums = [torch.zeros_like(tensor) for tensor in (coefficients, directions)]
        for total, part in zip(sums, found, strict=True):
            total[drawn] = part
        return sums[0], sums[1] if with_directions else None


def _project(means: Tensor, quats: Tensor, scales: Tensor, viewmats: Tensor, Ks: Tensor, *size: int, **options: Any):
    covariances, _ = twin._quat_scale_to_covar_preci(quats, scales, True, False)
    return twin._fully_fused_projection(means, covariances, viewmats, Ks, *size, **options)


def _find_undrawn(radii: Tensor) -> Tensor:
    return (radii <= 0).any(dim=-1) if TWO_RADII else radii <= 0


def _take_blending(
    means2d: Any, conics: Any, colors: Any, opacities: Any, backgrounds: Any, masks: Any, width: int, height: int,
    tile_size: int, offsets: Any, flatten_ids: Any,
) -> tuple[reference.BlendGeometry, list[Any], Tensor | None]:  # fmt: skip
    """Checked arguments: tile lists, what is differentiated with the backgrounds, and the pixels that are read."""
    means2d, conics, opacities, colors, backgrounds = _take(
        means2d=means2d, conics=conics, opacities=opacities, colors=colors, backgrounds=backgrounds
    )
    offsets, flatten_ids = _take(torch.int32, offsets=offsets, flatten_ids=flatten_ids)
    (masks,) = _take(torch.bool, masks=masks)
    _check_integers(width=width, height=height, tile_size=tile_size)
    counts = torch.zeros(opacities.shape, dtype=torch.int32)
    tiles = reference.TileLists(counts, flatten_ids.long(), flatten_ids, offsets)
    settings = reference.ProjectionSettings(width, height)
    geometry = reference.BlendGeometry(means2d, conics, opacities, tiles, settings)
    if masks is not None:
        masks = masks.repeat_interleave(tile_size, 1).repeat_interleave(tile_size, 2)[:, :height, :width]
    return geometry, [means2d, conics, opacities, colors, backgrounds], masks


def _take(dtype: torch.dtype = torch.float32, **tensors: Any) -> list[Any]:
    """The memory of tensors that pass the checks of the C++ side; None stays None."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        # Gradients that autograd fills in are the CPU's here.
        if not isinstance(tensor, PretendedTensor) and not name.startswith("v_"):
            raise RuntimeError(f"{name} must be a CUDA tensor")
        if not tensor.is_contiguous():
            raise RuntimeError(f"{name} must be contiguous")
        if tensor.dtype != dtype:
            raise RuntimeError(f"expected scalar type {dtype} but found {tensor.dtype} ({name})")
    return [place(tensor, False) for tensor in tensors.values()]


def _check_integers(**values: Any) -> None:
    for name, value in values.items():
        if type(value) is not int or value < 0:
            raise TypeError(f"incompatible function arguments: {name} = {value!r}")
