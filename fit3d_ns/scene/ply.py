"""Gaussians in PLY files: the layout of 3D Gaussian Splatting's authors, which gsplat, SuperSplat and FiT3D share.

Properties: `x y z`, `nx ny nz` (unused), `f_dc_0..2`, `f_rest_*` (all coefficients of red, then green, then blue),
`opacity` (logit), `scale_0..2` (logarithms), `rot_0..3` (wxyz), and FiT3D's `sem_*` (features). Read by name, so
order, further properties and missing normals do not matter.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.data.ply import create_vertices, read_ply_elements, read_spz, unpack_splats, write_ply_vertices
from fit3d_ns.scene.gaussians import Gaussians
from fit3d_ns.utils.progress import notice

_NUM_REST = (0, 9, 24, 45, 72)
_OTHER_FORMATS = (".splat", ".ksplat", ".sog")
MAX_OPACITY_LOGIT = 15.0
"""Logit of a Gaussian that nothing shines through: an opacity of 1 - 3e-7."""
_FEWEST_TO_JUDGE = 16
"""With fewer Gaussians, nothing follows from the range of their numbers."""


def write_ply(gaussians: Gaussians, path: Path, sh_degree: int | None = None) -> None:
    """Writes Gaussians with their features as binary little-endian PLY, atomically.

    Colour has `sh_degree` 0 to 4 in the file, by default as stored; coefficients are cut or filled with zeros. FiT3D's
    and Inria's readers want 3.
    """
    degree, colours = gaussians.sh_degree if sh_degree is None else sh_degree, gaussians.colours
    # A negative number of zeros cuts.
    rest = F.pad(colours[:, 1:], (0, 0, 0, (degree + 1) ** 2 - colours.shape[1]))
    columns = {
        ("x", "y", "z"): gaussians.means,
        ("nx", "ny", "nz"): torch.zeros(gaussians.num_gaussians, 3),
        _numbered("f_dc", 3): gaussians.sh_dc,
        # (n, k, 3) -> (n, 3*k), all of red first
        _numbered("f_rest", 3 * rest.shape[1]): rest.transpose(1, 2).flatten(1),
        ("opacity",): gaussians.opacity_logits[:, None],
        _numbered("scale", 3): gaussians.log_scales,
        _numbered("rot", 4): gaussians.quats,
        _numbered("sem", gaussians.feature_dim): gaussians.features,
    }
    tables = {names: tensor.detach().float().cpu().numpy() for names, tensor in columns.items()}
    write_ply_vertices(create_vertices(tables), path)


def read_ply(path: Path) -> tuple[Gaussians, int]:
    """Reads Gaussians that Inria's code, gsplat, nerfstudio, SuperSplat (compressed too) or FiT3D wrote, or of SPZ.

    Features have 0 channels where the file has no `sem_*`. The number is that of Gaussians left out because a value was
    NaN, infinite or too large. ValueError where the file is missing, cut short, not a PLY, or lacks what a Gaussian
    needs.
    """
    if path.suffix.lower() in _OTHER_FORMATS or path.name == "meta.json":
        raise ValueError(
            f"{path} is not a PLY file; make one with `npx @playcanvas/splat-transform {path.name} splat.ply`."
        )
    elements = {"vertex": read_spz(path)} if path.suffix.lower() == ".spz" else read_ply_elements(path)
    vertices = elements["vertex"]
    if "packed_position" in (vertices.dtype.names or ()):
        vertices = unpack_splats(elements, path)
    names = vertices.dtype.names or ()
    if not len(vertices):
        raise ValueError(f"{path} holds no Gaussians.")
    if "opacity" not in names:
        raise ValueError(f"{path} has no `opacity`: it is a point cloud or mesh, not Gaussians.")
    needed = ("x", "y", "z", *_numbered("f_dc", 3), *_numbered("scale", 3), *_numbered("rot", 4))
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; export it as a 3D Gaussian Splatting PLY.")
    num_rest = _count(names, "f_rest", path)
    if num_rest not in _NUM_REST:
        problem = f"{path} has {num_rest} f_rest properties, which belong to no SH degree (0, 9, 24, 45 or 72)"
        raise ValueError(f"{problem}; it was cut or edited: export it again.")

    def take(*group: str) -> Tensor:
        if not group:
            return torch.zeros(len(vertices), 0)
        return torch.from_numpy(np.stack([vertices[name].astype(np.float32) for name in group], axis=1))

    # (n, 3*k) -> (n, k, 3)
    rest = take(*_numbered("f_rest", num_rest)).reshape(len(vertices), 3, num_rest // 3).transpose(1, 2)
    log_scales, opacity_logits = take(*_numbered("scale", 3)), _read_opacity_logits(take("opacity"), path)
    if "filter_3D" in names:
        log_scales, opacity_logits = _apply_filter(log_scales, opacity_logits, take("filter_3D"))
    gaussians = Gaussians.from_raw(
        means=take("x", "y", "z"),
        quats=take(*_numbered("rot", 4)),
        log_scales=log_scales,
        opacity_logits=opacity_logits,
        sh_dc=take(*_numbered("f_dc", 3)),
        features=take(*_numbered("sem", _count(names, "sem", path))),
        sh_rest=rest,
        drop_invalid=True,
    )
    if gaussians.num_gaussians == 0:
        raise ValueError(f"{path} holds no usable Gaussian ({len(vertices)} in the file, all NaN or infinite).")
    return gaussians, len(vertices) - gaussians.num_gaussians


def _read_opacity_logits(values: Float[Tensor, "n 1"], path: Path) -> Float[Tensor, "n 1"]:
    """Logits; opacities that were written as such are recognised, and those of 1, whose logit is infinite, kept."""
    finite = values[values.isfinite()]
    # Logits of trained Gaussians are negative for all that is less than half opaque.
    if len(finite) >= _FEWEST_TO_JUDGE and -1e-6 <= float(finite.min()) and float(finite.max()) <= 1.0 + 1e-6:
        notice(f"Opacities of {path} lie between 0 and 1: they are taken as opacities, not as logits.")
        values = values.clamp(0.0, 1.0).logit()
    return values.clamp(max=MAX_OPACITY_LOGIT)


def _apply_filter(
    log_scales: Float[Tensor, "n 3"], opacity_logits: Float[Tensor, "n 1"], width: Float[Tensor, "n 1"]
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 1"]]:
    """Mip-Splatting's 3D smoothing filter: a convolution with a Gaussian of `width`, which keeps the mass (eq. 9)."""
    variances = (2.0 * log_scales.double()).exp()
    filtered = variances + width.double().square()
    lost = (variances / filtered).prod(dim=1, keepdim=True).sqrt()
    opacities = opacity_logits.double().sigmoid() * lost
    return (0.5 * filtered.log()).float(), opacities.logit().float().clamp(max=MAX_OPACITY_LOGIT)


def _numbered(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}_{index}" for index in range(count))


def _count(names: tuple[str, ...], prefix: str, path: Path) -> int:
    count = sum(name.startswith(f"{prefix}_") for name in names)
    if any(name not in names for name in _numbered(prefix, count)):
        raise ValueError(f"{path} has {count} {prefix} properties, but not {prefix}_0 to {prefix}_{count - 1}.")
    return count
