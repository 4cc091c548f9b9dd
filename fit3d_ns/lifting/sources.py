"""`LiftSource`: what a scene is lifted from, Gaussians and the photographs of the same scene in one frame."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fit3d_ns.data.frames import CaptureFiles
from fit3d_ns.lifting.worlds import PlyWorld
from fit3d_ns.rasterization import RasterizeMode
from fit3d_ns.scene import ActivatedGaussians, FeatureDecoder, Gaussians, PosedCapture, View, load_scene
from fit3d_ns.scene.posed_capture import MAX_SIDE, choose_downscale_factor, parse_capture, record_capture
from fit3d_ns.scene.scene_file import find_geometry_seconds
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.selection import select_evenly

NUM_CHECKED_VIEWS = 3
"""Views that are rendered and compared with their photographs before a lift."""
SMALLEST_PSNR = 12.0
"""Mean PSNR in dB over them, below which Gaussians and photographs hardly belong together."""


@dataclass(frozen=True)
class LiftSource:
    """Fixed geometry and its capture."""

    gaussians: Gaussians
    """As they will be stored, half precision included; features are used only where there is a `decoder`."""
    capture: PosedCapture
    """Views in the Gaussians' frame; `train` views are lifted, the others held out."""
    description: str
    """Where it came from, for the record and for messages."""
    rasterize_mode: RasterizeMode = "classic"
    """Mode the Gaussians were trained in."""
    eps2d: float = 0.3
    """Blur of projected Gaussians in squared pixels, as trained."""
    num_dropped: int = 0
    """Gaussians left out because a number was NaN, infinite or too large."""
    training_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase of what made the Gaussians; empty where they are not known."""
    decoder: FeatureDecoder | None = None
    """What decodes the Gaussians' features, where they come with some that are to be kept."""
    recipe: str = ""
    """What the Gaussians were made from, where that tells them apart better than their numbers do."""

    def __post_init__(self) -> None:
        """Raises ValueError now, not after the lift, for what cannot be lifted or stored."""
        root = self.capture.root
        if self.gaussians.num_gaussians == 0:
            raise ValueError(f"{self.description} holds no usable Gaussian: all {self.num_dropped} NaN or too large.")
        if not self.capture.select("train"):
            raise ValueError(f"The capture in {root} has no train views; there is nothing to lift from.")
        try:
            parse_capture(record_capture(self.capture))
        except ValueError as error:
            problem = f"The capture in {root} cannot be written into a scene file ({error})"
            raise ValueError(f"{problem}; give the folder above all photographs and masks as --data.") from error

    def activate(self, device: torch.device | str = "cpu") -> ActivatedGaussians:
        """The Gaussians as the rasterizer takes them, from what will be stored, so that metrics are the file's."""
        return self.gaussians.to(device).activate(self.rasterize_mode, self.eps2d)

    @torch.no_grad()
    def render(self, view: View, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Colour [H, W, 3] in [0, 1] before black, and opacity [H, W]."""
        activated = self.activate(device)
        coefficients = self.gaussians.to(device).colours
        colours, alphas = activated.render(coefficients, view.camera, sh_degree=self.gaussians.sh_degree)
        return colours.clamp(0.0, 1.0), alphas


@dataclass(frozen=True)
class PhotoFit:
    """How renderings agree with photographs."""

    psnr: float
    """Mean over the checked views of the peak signal-to-noise ratio in dB, before black, under the valid masks."""
    coverage: float
    """Mean rendered opacity, 0 to 1."""

    @property
    def is_seen(self) -> bool:
        """False where next to nothing is drawn; `psnr` then compares photographs with black."""
        return self.coverage >= 0.01


@dataclass(frozen=True)
class PlyConfig:
    """What a PLY does not say about itself."""

    ply_world: PlyWorld = "dataset"
    """With --ply: whose world it is in. `dataset` is that of the camera file, `colmap` that of COLMAP's model,
    `training` nerfstudio's training frame (what ns-export writes), `gsplat` the normalised one of gsplat's example
    trainer."""
    ply_transform: Path | None = None
    """With --ply: a file (.txt, .npy, .json) with the 4x4 matrix, a rotation with one scale and a translation, between
    --ply-world and the PLY's own world, in either direction."""
    align: bool = False
    """With --ply: find by itself where the PLY lies: of all worlds, also with other axes or of another size, the one
    that fits best is moved, turned and scaled until renderings look like the photographs. What was found is said."""
    dataparser_transforms: Path | None = None
    """With --ply-world training: the run's dataparser_transforms.json or the run's folder; by default it is looked for
    next to the PLY, and where there is none, nerfstudio's defaults are taken."""
    rasterize_mode: RasterizeMode = "classic"
    """With --ply: the mode the Gaussians were trained in."""
    downscale_factor: int | None = None
    """With --ply or --surface: photographs are reduced by this factor, at least 1; by default by the power of two that
    brings their longer side to at most 1600 pixels."""
    strict: bool = False
    """With --ply or --surface: refuse a capture with missing photographs; otherwise their frames are left out."""
    smallest_psnr: float = SMALLEST_PSNR
    """With --ply or --surface: below this many dB between three renderings and their photographs the lift is refused,
    and that of a PLY also where another world fits clearly better; 0 never refuses (for photographs before another
    background than black)."""

    def choose_factor(self, files: CaptureFiles) -> int:
        """What photographs of a capture are reduced by."""
        if self.downscale_factor is not None:
            return self.downscale_factor
        longer = max(max(frame.lens.width, frame.lens.height) for frame in files.frames)
        return choose_downscale_factor(longer, MAX_SIDE, "--downscale-factor 1")


def read_scene_source(path: Path, data_root: Path | None = None) -> LiftSource:
    """Reads a scene file to lift its geometry again, with its corrected cameras and splits, but not its features.

    ValueError where it is not a scene file, or its photographs are neither in their place nor in `data_root`.
    """
    scene = load_scene(path)
    scene.check()
    return LiftSource(
        scene.gaussians.with_features(scene.gaussians.features[:, :0]),
        scene.capture(data_root),
        f"scene file {Path(path).name}",
        scene.rasterize_mode,
        scene.eps2d,
        training_seconds=find_geometry_seconds(scene.metrics),
    )


@torch.no_grad()
def compare_with_photographs(
    source: LiftSource, device: torch.device | str = "cpu", loaded: dict[str, tuple[Tensor, Tensor]] | None = None
) -> PhotoFit:
    """Renders a few train views and compares them with their photographs, which must be there.

    `loaded` keeps photographs and masks by name, for comparisons of several sources of one capture.
    """
    psnrs, coverages = [], []
    for error, mask, alphas in compare_views(source, NUM_CHECKED_VIEWS, device, {} if loaded is None else loaded):
        psnrs.append(-10.0 * float(error.square()[mask].mean().clamp(min=1e-10).log10()))
        coverages.append(float(alphas[mask].mean()))
    return PhotoFit(psnr=sum(psnrs) / len(psnrs), coverage=sum(coverages) / len(coverages))


@torch.no_grad()
def compare_views(
    source: LiftSource, num_views: int, device: torch.device | str, loaded: dict[str, tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of some train views: rendering less photograph [H, W, 3], valid mask and rendered opacity [H, W]."""
    for view in select_evenly(source.capture.select("train"), num_views):
        rendered, alphas = source.render(view, device)
        if view.name not in loaded:
            photograph = source.capture.load_image(view).to(rendered.device).float() / 255.0
            mask = source.capture.load_valid_mask(view).to(rendered.device)
            loaded[view.name] = photograph, mask if bool(mask.any()) else torch.ones_like(mask)
        photograph, mask = loaded[view.name]
        yield rendered - photograph, mask, alphas


def check_photographs(source: LiftSource, device: str) -> PhotoFit:
    """How renderings agree with photographs, as `compare_with_photographs` finds; a notice where they hardly do."""
    fit = compare_with_photographs(source, device)
    if not fit.is_seen or fit.psnr < SMALLEST_PSNR:
        said = f"Renderings of {source.description} are {fit.psnr:.1f} dB from their photographs"
        asked = "was it trained to its end, and does --data hold the same photographs?"
        notice(f"{said} (below {SMALLEST_PSNR:g}); {asked}")
    return fit
