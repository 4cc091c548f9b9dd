"""`LiftSource`: what a scene is lifted from: Gaussians without features, and the captured views that saw them.

Gaussians and views share the capture's training frame. A PLY's world is met by moving the cameras, never the
Gaussians (`ply_world.py`), so colours that depend on the direction stay right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from fit3d_ns.geometry.cameras import viewmats_from_camera_to_worlds
from fit3d_ns.lifting.inputs import LiftGaussians
from fit3d_ns.rasterization import RasterizeMode, rasterization
from fit3d_ns.scene import FeatureGaussians, PosedCapture, View, create_gaussians, find_invalid, load_scene
from fit3d_ns.scene.capture_record import parse_capture, record_capture
from fit3d_ns.scene.gaussians import activate
from fit3d_ns.scene.scene_costs import find_geometry_seconds
from fit3d_ns.utils.progress import notice

NUM_CHECKED_VIEWS = 3
"""Views that are rendered and compared with their photographs before a lift."""

SMALLEST_PSNR = 12.0
"""Mean PSNR in dB over them, below which Gaussians and photographs hardly belong together."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class LiftSource:
    """Fixed geometry and its capture."""

    gaussians: FeatureGaussians
    """As they will be stored, half precision included; features have 0 channels."""
    capture: PosedCapture
    """Views in the Gaussians' frame; `train` views are lifted, the others held out."""
    description: str
    """Where it came from, for the figures and for messages."""
    rasterize_mode: RasterizeMode = "classic"
    """Mode the Gaussians were trained in."""
    eps2d: float = 0.3
    """Blur of projected Gaussians in squared pixels, as trained."""
    num_dropped: int = 0
    """Gaussians left out because a number was NaN, infinite or too large."""
    training_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase of the run that made the Gaussians; empty where they are not known."""


@dataclass(frozen=True)
class PhotoFit:
    """How renderings agree with photographs."""

    psnr: float
    """Mean over the checked views of the peak signal-to-noise ratio in dB, before black, under the valid masks."""
    coverage: float
    """Mean rendered opacity, 0 to 1."""

    @property
    def is_seen(self) -> bool:
        """False where next to nothing is drawn; the figure then compares photographs with black."""
        return self.coverage >= 0.01


def create_lift_source(
    raw: dict[str, Shaped[Tensor, "num_gaussians ..."]],
    capture: PosedCapture,
    description: str,
    *,
    rasterize_mode: RasterizeMode = "classic",
    eps2d: float = 0.3,
    num_dropped: int = 0,
    training_seconds: dict[str, float] | None = None,
) -> LiftSource:
    """Brings raw Gaussians into their stored types; those that cannot be stored or drawn are left out and counted.

    Args:
        raw: `means quats log_scales opacity_logits sh_dc` and, if there are any, `sh_rest`, as in `create_gaussians`.
        capture: The views in the Gaussians' frame.
        description: Where they come from.
        rasterize_mode: Mode the Gaussians were trained in.
        eps2d: Blur they were trained with.
        num_dropped: How many a reader has left out already.
        training_seconds: Seconds by phase of the run that made the Gaussians, if they are known.

    Raises:
        ValueError: No Gaussian is usable, there are no train views, or a file of the capture lies outside its root.
    """
    raw = {**raw, "opacity_logits": raw["opacity_logits"].reshape(-1)}
    # A scale that overflows when it is activated can be stored, but not drawn.
    invalid = find_invalid(**raw) | ~raw["log_scales"].detach().half().float().exp().isfinite().all(dim=1)
    if bool(invalid.all()):
        raise ValueError(f"{description} holds no usable Gaussian: all {len(invalid)} are NaN, infinite or too large.")
    kept = {name: tensor.detach().cpu()[~invalid.cpu()] for name, tensor in raw.items()}
    gaussians = create_gaussians(**kept, features=torch.zeros(len(kept["means"]), 0))
    _check_capture(capture)
    num_dropped += int(invalid.sum())
    return LiftSource(gaussians, capture, description, rasterize_mode, eps2d, num_dropped, dict(training_seconds or {}))


def read_scene_source(path: Path, data_root: Path | None = None) -> LiftSource:
    """Reads a scene file to lift it anew: geometry, corrected cameras and splits are in it.

    Args:
        path: A scene file; its features are not used.
        data_root: Where the photographs lie now, if they were moved.

    Raises:
        ValueError: No scene file, or its photographs are not there.
    """
    scene = load_scene(path)
    known = scene.gaussians.tensors()
    names = ("means", "quats", "log_scales", "opacity_logits", "sh_dc", "sh_rest")
    raw = {name: known[name] for name in names if name in known}
    return create_lift_source(
        raw,
        scene.capture(data_root),
        f"scene file {Path(path).name}",
        rasterize_mode=scene.rasterize_mode,
        eps2d=scene.eps2d,
        training_seconds=find_geometry_seconds(scene.metrics),
    )


def create_lift_gaussians(source: LiftSource, device: torch.device | str = "cpu") -> LiftGaussians:
    """The Gaussians as a lift takes them: activated from what will be stored, so that its figures are the file's."""
    activated = activate(source.gaussians.to(device))
    return LiftGaussians(
        means=activated.means,
        quats=activated.quats,
        scales=activated.scales,
        opacities=activated.opacities,
        rasterize_mode=source.rasterize_mode,
        eps2d=source.eps2d,
    )


def select_evenly(items: Sequence[_Item], count: int | None) -> list[_Item]:
    """`count` items at even distances, in order; all of them where there are no more, or where it is None."""
    if count is None or count >= len(items):
        return list(items)
    # The middle of each of `count` equal parts.
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


@torch.no_grad()
def compare_with_photographs(
    source: LiftSource, device: torch.device | str = "cpu", num_views: int = NUM_CHECKED_VIEWS
) -> PhotoFit:
    """Renders a few train views and compares them with their photographs.

    Raises:
        ValueError: A photograph or mask cannot be read.
    """
    fits = [_compare(source, view, device) for view in select_evenly(source.capture.select("train"), num_views)]
    return PhotoFit(
        psnr=sum(fit.psnr for fit in fits) / len(fits), coverage=sum(fit.coverage for fit in fits) / len(fits)
    )


def warn_of_poor_fit(source: LiftSource, fit: PhotoFit) -> None:
    """A notice where Gaussians and cameras belong together and renderings still do not look like the photographs."""
    if fit.is_seen and fit.psnr >= SMALLEST_PSNR:
        return
    notice(
        f"Renderings of {source.description} are {fit.psnr:.1f} dB from their photographs (below {SMALLEST_PSNR:g}); "
        "was it trained to its end, and does --data hold the same photographs?"
    )


def render_photograph(source: LiftSource, view: View, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Colour [H, W, 3] in [0, 1] before black, and opacity [H, W]."""
    gaussians = source.gaussians.to(device)
    activated = activate(gaussians)
    colours = gaussians.sh_dc[:, None].float()
    if gaussians.sh_rest is not None:
        colours = torch.cat([colours, gaussians.sh_rest.float()], dim=1)
    renders, alphas, _ = rasterization(
        activated.means,
        activated.quats,
        activated.scales,
        activated.opacities,
        colours,
        viewmats_from_camera_to_worlds(view.camera_to_world.to(activated.means))[None],
        view.K.to(activated.means)[None],
        view.width,
        view.height,
        sh_degree=gaussians.sh_degree,
        rasterize_mode=source.rasterize_mode,
        eps2d=source.eps2d,
    )
    return renders[0].clamp(0.0, 1.0), alphas[0, ..., 0]


def _compare(source: LiftSource, view: View, device: torch.device | str) -> PhotoFit:
    rendered, alphas = render_photograph(source, view, device)
    photograph = source.capture.load_image(view).to(rendered.device).float() / 255.0
    mask = source.capture.load_valid_mask(view).to(rendered.device)
    if not bool(mask.any()):
        mask = torch.ones_like(mask)
    error = (rendered - photograph).square()[mask].mean().clamp(min=1e-10)
    return PhotoFit(psnr=-10.0 * float(error.log10()), coverage=float(alphas[mask].mean()))


def _check_capture(capture: PosedCapture) -> None:
    """A capture that the scene file cannot hold is found now, not after the lift."""
    if not capture.select("train"):
        raise ValueError(f"The capture in {capture.root} has no train views; there is nothing to lift from.")
    try:
        parse_capture(record_capture(capture))
    except ValueError as error:
        raise ValueError(
            f"The capture in {capture.root} cannot be written into a scene file ({error}); give the folder above all "
            "photographs and masks as --data."
        ) from error
