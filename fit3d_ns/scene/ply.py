"""Gaussians in PLY files: the layout of 3D Gaussian Splatting's authors, which gsplat, SuperSplat and FiT3D share.

Properties: `x y z`, `nx ny nz` (unused), `f_dc_0..2`, `f_rest_*` (all coefficients of red, then green, then blue),
`opacity` (logit), `scale_0..2` (logarithms), `rot_0..3` (wxyz), and FiT3D's `sem_*` (features). Read by name, so
order, further properties and missing normals do not matter.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data.ply import read_ply_elements, unpack_splats, write_ply_vertices
from fit3d_ns.features import BackboneDescription
from fit3d_ns.scene.feature_decoder import FeatureDecoder
from fit3d_ns.scene.feature_scene import FeatureScene
from fit3d_ns.scene.gaussians import Gaussians
from fit3d_ns.scene.posed_capture import PosedCapture
from fit3d_ns.utils.files import write_atomically
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.tensor_files import load_torch_file

_NUM_REST = (0, 9, 24, 45, 72)
_OTHER_FORMATS = (".spz", ".splat", ".ksplat", ".sog")
_MAX_OPACITY_LOGIT = 15.0
"""Logit of a Gaussian that nothing shines through: an opacity of 1 - 3e-7."""
_FEWEST_TO_JUDGE = 16
"""With fewer Gaussians, nothing follows from the range of their numbers."""


def write_ply(gaussians: Gaussians, path: Path, sh_degree: int | None = None) -> None:
    """Writes Gaussians with their features as binary little-endian PLY, atomically.

    Colour has `sh_degree` 0 to 4 in the file, by default as stored; coefficients are cut or filled with zeros. FiT3D's
    and Inria's readers want 3.
    """
    num = gaussians.num_gaussians
    degree = gaussians.sh_degree if sh_degree is None else sh_degree
    rest = torch.zeros(num, (degree + 1) ** 2 - 1, 3)
    if gaussians.sh_rest is not None:
        kept = gaussians.sh_rest[:, : rest.shape[1]].float().cpu()
        rest[:, : kept.shape[1]] = kept
    columns = {
        ("x", "y", "z"): gaussians.means,
        ("nx", "ny", "nz"): torch.zeros(num, 3),
        _numbered("f_dc", 3): gaussians.sh_dc,
        # (n, k, 3) -> (n, 3*k), all of red first
        _numbered("f_rest", 3 * rest.shape[1]): rest.transpose(1, 2).flatten(1),
        ("opacity",): gaussians.opacity_logits[:, None],
        _numbered("scale", 3): gaussians.log_scales,
        _numbered("rot", 4): gaussians.quats,
        _numbered("sem", gaussians.feature_dim): gaussians.features,
    }
    names = [name for group in columns for name in group]
    values = torch.cat([tensor.detach().float().cpu() for tensor in columns.values()], dim=1).numpy()
    write_ply_vertices(values.astype("<f4").view([(name, "<f4") for name in names])[:, 0], path)


def read_splats(path: Path) -> tuple[Gaussians, int]:
    """Reads Gaussians of a PLY file or of a checkpoint of gsplat's example trainer; the number is of those left out.

    ValueError as in `read_ply`, and for a checkpoint that is damaged, holds code, or lacks gsplat's `splats`.
    """
    return _read_gsplat_checkpoint(path) if path.suffix == ".pt" else read_ply(path)


def read_ply(path: Path) -> tuple[Gaussians, int]:
    """Reads Gaussians that Inria's code, gsplat, nerfstudio, SuperSplat (compressed too) or FiT3D wrote.

    Features have 0 channels where the file has no `sem_*`. The number is that of Gaussians left out because a value was
    NaN, infinite or too large. ValueError where the file is missing, cut short, not a PLY, or lacks what a Gaussian
    needs.
    """
    if path.suffix.lower() in _OTHER_FORMATS or path.name == "meta.json":
        raise ValueError(
            f"{path} is not a PLY file; make one with `npx @playcanvas/splat-transform {path.name} splat.ply`."
        )
    elements = read_ply_elements(path)
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
        raise ValueError(
            f"{path} has {num_rest} f_rest properties, which belong to no SH degree (0, 9, 24, 45 or 72); "
            "it was cut or edited: export it again."
        )

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
    return values.clamp(max=_MAX_OPACITY_LOGIT)


def _apply_filter(
    log_scales: Float[Tensor, "n 3"], opacity_logits: Float[Tensor, "n 1"], width: Float[Tensor, "n 1"]
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 1"]]:
    """Mip-Splatting's 3D smoothing filter: a convolution with a Gaussian of `width`, which keeps the mass (eq. 9)."""
    variances = (2.0 * log_scales.double()).exp()
    filtered = variances + width.double().square()
    lost = (variances / filtered).prod(dim=1, keepdim=True).sqrt()
    opacities = opacity_logits.double().sigmoid() * lost
    return (0.5 * filtered.log()).float(), opacities.logit().float().clamp(max=_MAX_OPACITY_LOGIT)


def _read_gsplat_checkpoint(path: Path) -> tuple[Gaussians, int]:
    """Reads the Gaussians of a checkpoint of gsplat's example trainer (`ckpts/*.pt`), and how many were left out.

    ValueError where the file is damaged, holds code, or other things than gsplat's `splats`.
    """
    content = _load_tensors(path)
    splats = content.get("splats") if isinstance(content, dict) else None
    needed = ("means", "quats", "scales", "opacities", "sh0")
    lacking = [name for name in needed if not isinstance(splats, dict) or not isinstance(splats.get(name), Tensor)]
    if lacking or not isinstance(splats, dict):
        raise ValueError(f"{path} is no checkpoint of gsplat: its `splats` lack {', '.join(lacking)}; export a PLY.")
    gaussians = Gaussians.from_raw(
        means=splats["means"],
        quats=splats["quats"],
        log_scales=splats["scales"],
        opacity_logits=splats["opacities"].clamp(max=_MAX_OPACITY_LOGIT),
        sh_dc=splats["sh0"].reshape(-1, 3),
        sh_rest=splats.get("shN"),
        drop_invalid=True,
    )
    if gaussians.num_gaussians == 0:
        raise ValueError(f"{path} holds no usable Gaussian ({len(splats['means'])} in the file, all NaN or infinite).")
    return gaussians, len(splats["means"]) - gaussians.num_gaussians


def write_fit3d(scene: FeatureScene, ply_path: Path, decoder_path: Path) -> None:
    """Writes a scene as FiT3D does: Gaussians with `sem_*` and a checkpoint with the convolution as `0.weight`.

    A bias becomes one more channel that is 1 for every Gaussian: it blends to alpha, so the centre tap `bias` gives
    `bias * alpha`, exactly. (FiT3D's own kernels are compiled for 64 channels; lift without a bias for those.)
    """
    gaussians, weight = scene.gaussians, scene.decoder.weight.detach().float().cpu()
    if scene.decoder.bias is not None:
        extra = torch.zeros_like(weight[:, :1])
        extra[:, 0, 1, 1] = scene.decoder.bias.detach().float().cpu()
        weight = torch.cat([weight, extra], dim=1)
        gaussians = replace(gaussians, features=torch.nn.functional.pad(gaussians.features, (0, 1), value=1.0))
    write_ply(gaussians, ply_path, sh_degree=3)
    with write_atomically(Path(decoder_path)) as temporary:
        torch.save({"0.weight": weight.contiguous()}, temporary)


def read_fit3d(
    ply_path: Path, decoder_path: Path, capture: PosedCapture, backbone: BackboneDescription
) -> tuple[FeatureScene, int]:
    """Reads a scene that FiT3D published or `write_fit3d` wrote, and how many Gaussians were dropped.

    ValueError where one of the files is not what it should be, or they do not belong together.

    Args:
        decoder_path: Checkpoint of the convolution, a state dict with `0.weight` and no bias.
        capture: The captured views in the PLY's world. FiT3D's is COLMAP's: make the capture with the inverse of
            `CaptureFiles.colmap_to_world` as `dataparser_transform` (ScanNet++: (x, y, z) to (y, x, -z)).
        backbone: The ViT whose tokens were lifted; the files do not say.
    """
    gaussians, num_dropped = read_ply(ply_path)
    state = _load_tensors(Path(decoder_path))
    weight = state.get("0.weight", state.get("weight")) if isinstance(state, dict) else None
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"{decoder_path} has no 3x3 convolution `0.weight`; give FiT3D's feat_decoder checkpoint.")
    if weight.shape[1] != gaussians.feature_dim:
        raise ValueError(
            f"{ply_path} has {gaussians.feature_dim} sem_* properties, {decoder_path} takes {weight.shape[1]} "
            "channels; give the checkpoint that was saved with the PLY."
        )
    return FeatureScene(gaussians, FeatureDecoder.from_weights(weight.float()), capture, backbone), num_dropped


def _load_tensors(path: Path) -> Any:
    """What a checkpoint holds, without running code from it."""
    try:
        return load_torch_file(path)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}); copy it again.") from error


def _numbered(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}_{index}" for index in range(count))


def _count(names: tuple[str, ...], prefix: str, path: Path) -> int:
    count = sum(name.startswith(f"{prefix}_") for name in names)
    if any(name not in names for name in _numbered(prefix, count)):
        raise ValueError(f"{path} has {count} {prefix} properties, but not {prefix}_0 to {prefix}_{count - 1}.")
    return count
