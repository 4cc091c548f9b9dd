"""Gaussian rasterization: colour, features and their adjoint, on CPU and CUDA, with one meaning on all backends."""

from fit3d_ns.rasterization.backends import available_backends
from fit3d_ns.rasterization.interface import backproject_features, project, rasterization, rasterize_features
from fit3d_ns.rasterization.projection import compute_covariances
from fit3d_ns.rasterization.relocation import compute_relocation

__all__ = [
    "available_backends",
    "backproject_features",
    "compute_covariances",
    "compute_relocation",
    "project",
    "rasterization",
    "rasterize_features",
]
