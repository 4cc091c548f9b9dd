"""Gaussian rasterization: colour, features and their adjoint, on CPU and CUDA, with one meaning on all backends."""

from fit3d_ns.rasterization.arguments import RasterizeMode
from fit3d_ns.rasterization.interface import (
    add_normal,
    available_backends,
    backproject_features,
    prepare_rasterizer,
    project,
    rasterization,
    rasterize_features,
)
