"""Backends: what each of them offers, and which one serves a call.

A backend is a module with the functions of `Backend`; `reference` defines their meaning.
"""

import importlib
import importlib.util
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from fit3d_ns.rasterization.projection import ProjectedGaussians, ProjectionSettings
from fit3d_ns.rasterization.tile_lists import BlendGeometry

BackendName = Literal["auto", "reference", "cpu", "gsplat"]

_MODULES = {"reference": "reference", "cpu": "cpu.backend", "gsplat": "gsplat_backend"}


@runtime_checkable
class Backend(Protocol):
    """The steps of rasterization; shapes and meaning as in `reference`."""

    def project_gaussians(
        self, means: Tensor, quats: Tensor, scales: Tensor, viewmats: Tensor, Ks: Tensor, settings: ProjectionSettings
    ) -> ProjectedGaussians: ...

    def evaluate_harmonics(
        self, sh_degree: int, means: Tensor, viewmats: Tensor, coefficients: Tensor, is_drawn: Tensor
    ) -> Tensor: ...

    def build_geometry(
        self, projected: ProjectedGaussians, opacities: Tensor, settings: ProjectionSettings
    ) -> BlendGeometry: ...

    def blend(
        self,
        geometry: BlendGeometry,
        means2d: Tensor,
        conics: Tensor,
        opacities: Tensor,
        colors: Tensor,
        backgrounds: Tensor | None,
        absgrad: bool,
    ) -> tuple[Tensor, Tensor]: ...

    def blend_features(self, features: Tensor, geometry: BlendGeometry, pixels: Tensor | None) -> Tensor: ...

    def backproject(self, feature_maps: Tensor, geometry: BlendGeometry, sums: Tensor, totals: Tensor) -> None: ...


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, the one that `auto` prefers on its best device first."""
    names = ["cpu", "reference"]
    if torch.cuda.is_available() and importlib.util.find_spec("gsplat") is not None:
        names.insert(0, "gsplat")
    return names


def resolve_backend(name: str, means: Tensor) -> str:
    """The backend that a call with these tensors gets.

    Raises:
        ValueError: There is no such backend, or it cannot work on the tensors' device or dtype.
    """
    if name not in ("auto", *_MODULES):
        raise ValueError(f"Unknown rasterization backend {name!r}; choose one of auto, {', '.join(_MODULES)}.")
    device = means.device.type
    if name == "auto":
        if device not in ("cpu", "cuda"):
            raise ValueError(
                f"No rasterization backend serves {device} tensors; move them to the CPU or a CUDA device."
            )
        name = "gsplat" if device == "cuda" else "cpu"
    needed = {"cpu": "cpu", "gsplat": "cuda"}.get(name, device)
    if device != needed:
        raise ValueError(f"Rasterization backend {name!r} needs {needed} tensors, but `means` is on {means.device}.")
    if name == "gsplat" and importlib.util.find_spec("gsplat") is None:
        raise ValueError("Rasterization on CUDA needs gsplat, which is not installed; install `gsplat>=1.4.0,<1.6`.")
    if name != "reference" and means.dtype != torch.float32:
        raise ValueError(f"Rasterization backend {name!r} works in float32, but `means` is {means.dtype}; convert it.")
    return name


def load_backend(name: str) -> Backend:
    """The module of a backend, imported on first use, since importing gsplat or numba takes time."""
    return cast(Backend, importlib.import_module(f"fit3d_ns.rasterization.{_MODULES[name]}"))
