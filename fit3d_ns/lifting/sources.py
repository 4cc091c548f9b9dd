"""`LiftSource`: what a scene is lifted from, Gaussians and the photographs of the same scene; read from files.

Gaussians and views share one frame. A PLY does not say which world it is in. `dataset`: the world of the capture's
camera file. `colmap`: the world of COLMAP's model, from which ns-process-data and ScanNet++ moved their poses.
`training`: nerfstudio's training frame, as `ns-export gaussian-splat` writes it, known by the run's
`dataparser_transforms.json`. Each is a rigid motion and a scale of the dataset's world. The cameras are moved into the
PLY's world, never the Gaussians, so colours that depend on the direction stay right.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data.frames import CaptureFiles
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.geometry.cameras import viewmats_from_camera_to_worlds
from fit3d_ns.rasterization import RasterizeMode
from fit3d_ns.scene import ActivatedGaussians, Gaussians, PosedCapture, View, create_posed_capture, load_scene, read_ply
from fit3d_ns.scene.posed_capture import parse_capture, record_capture
from fit3d_ns.scene.scene_file import find_geometry_seconds
from fit3d_ns.utils.files import read_json
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.selection import select_evenly

NUM_CHECKED_VIEWS = 3
"""Views that are rendered and compared with their photographs before a lift."""

SMALLEST_PSNR = 12.0
"""Mean PSNR in dB over them, below which Gaussians and photographs hardly belong together."""

CLEARLY_BETTER_DB = 3.0
"""A world that fits by so much better is the right one."""

TRANSFORMS_NAME = "dataparser_transforms.json"
"""nerfstudio writes it into every run's folder."""

PlyWorld = Literal["dataset", "colmap", "training"]
_WORLDS: tuple[PlyWorld, ...] = ("dataset", "colmap", "training")


@dataclass(frozen=True)
class LiftSource:
    """Fixed geometry and its capture."""

    gaussians: Gaussians
    """As they will be stored, half precision included; features are not used."""
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
    """Seconds by phase of the run that made the Gaussians; empty where they are not known."""

    def __post_init__(self) -> None:
        """Raises ValueError now, not after the lift, for what cannot be lifted or stored."""
        root = self.capture.root
        if self.gaussians.num_gaussians == 0:
            raise ValueError(
                f"{self.description} holds no usable Gaussian: all {self.num_dropped} are NaN, infinite or too large."
            )
        if not self.capture.select("train"):
            raise ValueError(f"The capture in {root} has no train views; there is nothing to lift from.")
        try:
            parse_capture(record_capture(self.capture))
        except ValueError as error:
            raise ValueError(
                f"The capture in {root} cannot be written into a scene file ({error}); give the folder above all "
                "photographs and masks as --data."
            ) from error

    def activate(self, device: torch.device | str = "cpu") -> ActivatedGaussians:
        """The Gaussians as the rasterizer takes them, from what will be stored, so that metrics are the file's."""
        return self.gaussians.to(device).activate(self.rasterize_mode, self.eps2d)

    @torch.no_grad()
    def render(self, view: View, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Colour [H, W, 3] in [0, 1] before black, and opacity [H, W]."""
        activated = self.activate(device)
        colours, alphas = activated.render(
            self.gaussians.to(device).colours,
            viewmats_from_camera_to_worlds(view.camera_to_world.to(activated.means)),
            view.K,
            view.width,
            view.height,
            sh_degree=self.gaussians.sh_degree,
        )
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
    `training` nerfstudio's training frame (what ns-export writes)."""
    dataparser_transforms: Path | None = None
    """With --ply-world training: the run's dataparser_transforms.json or the run's folder; by default it is looked for
    next to the PLY."""
    rasterize_mode: RasterizeMode = "classic"
    """With --ply: the mode the Gaussians were trained in."""
    downscale_factor: int = 1
    """With --ply: photographs are reduced by this factor, at least 1."""
    strict: bool = False
    """With --ply: refuse a capture with missing photographs; otherwise their frames are left out."""
    smallest_psnr: float = SMALLEST_PSNR
    """With --ply: below this many dB between three renderings and their photographs the lift is refused, and where
    another world fits clearly better; 0 never refuses (for photographs before another background than black)."""


@dataclass(frozen=True)
class WorldChange:
    """From the dataset's world into another one: x -> (rotation x + translation) * scale."""

    transform: Float[Tensor, "3 4"]
    """Rigid motion."""
    scale: float
    """Factor afterwards, positive."""

    def after(self, first: "WorldChange") -> "WorldChange":
        """This change, applied after another one."""
        rotation, translation = self.transform[:, :3], self.transform[:, 3]
        # (R (R1 x + t1) s1 + t) s = (R R1 x + R t1 + t / s1) s1 s
        moved = rotation @ first.transform[:, 3] + translation / first.scale
        transform = torch.cat([rotation @ first.transform[:, :3], moved[:, None]], dim=1)
        return WorldChange(transform, first.scale * self.scale)


def read_scene_source(path: Path, data_root: Path | None = None) -> LiftSource:
    """Reads a scene file to lift its geometry again, with its corrected cameras and splits, but not its features.

    Raises:
        ValueError: The file is not a scene file, or its photographs are neither in their place nor in `data_root`.
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


def read_ply_source(ply: Path, data: Path, config: PlyConfig, device: torch.device | str = "cpu") -> LiftSource:
    """Reads a PLY and its capture, and holds renderings against photographs before anything else is done.

    Raises:
        ValueError: One of them cannot be read, the world is not known for this capture, or it is the wrong one; the
            message then says which one fits.
    """
    gaussians, num_dropped = read_ply(ply)
    files = read_capture(data, is_strict=config.strict)
    notice(files.description)
    gaussians = gaussians.with_features(gaussians.features[:, :0])
    description = f"PLY {Path(ply).name} in the {config.ply_world} world"

    def create(change: WorldChange) -> LiftSource:
        capture = create_posed_capture(files, change.transform, change.scale, config.downscale_factor)
        return LiftSource(gaussians, capture, description, config.rasterize_mode, num_dropped=num_dropped)

    source, fit = _find_best([create(change) for change in find_changes(config.ply_world, files, ply, config)], device)
    if config.smallest_psnr > 0:
        others = _try_other_worlds(ply, config, files, create, device)
        _check_fit(f"{ply} in the {config.ply_world} world", data, fit, others, config)
    return source


@torch.no_grad()
def compare_with_photographs(source: LiftSource, device: torch.device | str = "cpu") -> PhotoFit:
    """Renders a few train views and compares them with their photographs, which must be there."""
    psnrs, coverages = [], []
    for view in select_evenly(source.capture.select("train"), NUM_CHECKED_VIEWS):
        rendered, alphas = source.render(view, device)
        photograph = source.capture.load_image(view).to(rendered.device).float() / 255.0
        mask = source.capture.load_valid_mask(view).to(rendered.device)
        if not bool(mask.any()):
            mask = torch.ones_like(mask)
        error = (rendered - photograph).square()[mask].mean().clamp(min=1e-10)
        psnrs.append(-10.0 * float(error.log10()))
        coverages.append(float(alphas[mask].mean()))
    return PhotoFit(psnr=sum(psnrs) / len(psnrs), coverage=sum(coverages) / len(coverages))


def warn_of_poor_fit(source: LiftSource, fit: PhotoFit) -> None:
    """A notice where Gaussians and cameras belong together and renderings still do not look like the photographs."""
    if fit.is_seen and fit.psnr >= SMALLEST_PSNR:
        return
    notice(
        f"Renderings of {source.description} are {fit.psnr:.1f} dB from their photographs (below {SMALLEST_PSNR:g}); "
        "was it trained to its end, and does --data hold the same photographs?"
    )


def find_changes(world: PlyWorld, files: CaptureFiles, ply: Path, config: PlyConfig) -> list[WorldChange]:
    """How the dataset's world may become the given one; where a file leaves two readings open, both.

    Raises:
        ValueError: The capture knows no COLMAP world, or the transforms are missing or wrong.
    """
    if world == "dataset":
        return [WorldChange(torch.eye(4)[:3], 1.0)]
    if world == "colmap":
        if files.colmap_to_world is None:
            raise ValueError(
                f"{files.root} does not say where COLMAP's world lies (no applied_transform, no colmap/sparse/0); "
                "use --ply-world dataset or training."
            )
        return [invert_similarity(files.colmap_to_world, str(files.root))]
    training = _read_transforms(config.dataparser_transforms or Path(ply).parent)
    changes = [training]
    if files.colmap_to_world is not None and not torch.equal(files.colmap_to_world, torch.eye(4)[:3]):
        # nerfstudio's own dataparser folds `applied_transform` into what it records: its transform begins at COLMAP's
        # world. Ours and others begin at the dataset's. The file does not tell which it is; the photographs do.
        changes.append(training.after(invert_similarity(files.colmap_to_world, str(files.root))))
    return changes


def invert_similarity(matrix: Float[Tensor, "3 4"], source: str) -> WorldChange:
    """The inverse of a rotation with a scale and a translation; a matrix that mirrors or shears is a ValueError."""
    linear = matrix[:, :3].double()
    determinant = float(torch.linalg.det(linear))
    if not determinant > 0:
        raise ValueError(f"The applied_transform of {source} mirrors the world or is singular; correct it.")
    scale = determinant ** (1 / 3)
    rotation = (linear / scale).T
    if not torch.allclose(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-3):
        raise ValueError(f"The applied_transform of {source} is not a rotation with one scale; correct it.")
    translation = -rotation @ matrix[:, 3].double()
    return WorldChange(torch.cat([rotation, translation[:, None]], dim=1).float(), 1.0 / scale)


def _read_transforms(path: Path) -> WorldChange:
    """What nerfstudio recorded in a file or in a run's folder."""
    path = path / TRANSFORMS_NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"The training frame is not known: there is no {path}; give the run's folder or its {TRANSFORMS_NAME} with "
            "--dataparser-transforms."
        )
    content: Any = read_json(path)
    try:
        matrix = torch.tensor(content["transform"], dtype=torch.float32)[:3]
        scale = float(content["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what nerfstudio writes ({error!r}); give another file.") from error
    if matrix.shape != (3, 4) or not bool(matrix.isfinite().all()) or not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{path} holds no finite 3x4 `transform` with a positive `scale`; give another file.")
    return WorldChange(matrix, scale)


def _find_best(sources: list[LiftSource], device: torch.device | str) -> tuple[LiftSource, PhotoFit]:
    fits = [compare_with_photographs(source, device) for source in sources]
    best = max(range(len(sources)), key=lambda index: (fits[index].is_seen, fits[index].psnr))
    return sources[best], fits[best]


def _try_other_worlds(
    ply: Path, config: PlyConfig, files: CaptureFiles, create: Callable[[WorldChange], LiftSource], device: Any
) -> dict[PlyWorld, PhotoFit]:
    """How the PLY would fit if it were in each of the other worlds that are known for this capture."""
    fits: dict[PlyWorld, PhotoFit] = {}
    for world in _WORLDS:
        if world == config.ply_world:
            continue
        try:
            changes = find_changes(world, files, ply, config)
        except ValueError:
            continue
        fits[world] = _find_best([create(change) for change in changes], device)[1]
    return fits


def _check_fit(what: str, data: Path, fit: PhotoFit, others: dict[PlyWorld, PhotoFit], config: PlyConfig) -> None:
    """Raises ValueError where renderings and photographs do not belong together, and says which world fits better."""

    def is_good(fit: PhotoFit) -> bool:
        return fit.is_seen and fit.psnr >= config.smallest_psnr

    fitting = [world for world, other in others.items() if is_good(other)]
    best = max(fitting, key=lambda world: others[world].psnr, default=None)
    # Pictures of little contrast reach the threshold in any world: there the better one tells.
    is_beaten = best is not None and others[best].psnr > fit.psnr + CLEARLY_BETTER_DB
    if is_good(fit) and not is_beaten:
        return
    how = f"{fit.psnr:.1f} dB" if fit.is_seen else "nothing of it is in view"
    start = f"{what} does not show what the photographs of {data} show ({how}, {config.smallest_psnr:g} dB are needed)"
    if best is not None:
        raise ValueError(f"{start}; --ply-world {best} gives {others[best].psnr:.1f} dB: use that.")
    tried = ", ".join([config.ply_world, *others])
    raise ValueError(f"{start}, nor does any world that is known (tried {tried}); check --ply-world and --data.")
