"""`LiftSource`: what a scene is lifted from, Gaussians and the photographs of the same scene; read from files.

Gaussians and views share one frame. A PLY does not say which world it is in (`worlds.py`), nor in which order its
quaternions are written: renderings are compared with photographs, so that no mistake passes unnoticed.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.data.frames import CaptureFiles
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.data.scannetpp import colmap_to_world
from fit3d_ns.geometry.cameras import transform_points
from fit3d_ns.lifting.alignment import list_likely, refine_world
from fit3d_ns.lifting.worlds import TRANSFORMS_NAME, WORLDS, PlyWorld, WorldChange, find_changes, read_similarity
from fit3d_ns.rasterization import RasterizeMode
from fit3d_ns.scene import ActivatedGaussians, Gaussians, PosedCapture, View, create_posed_capture, load_scene
from fit3d_ns.scene.feature_decoder import FeatureDecoder
from fit3d_ns.scene.posed_capture import MAX_SIDE, choose_downscale_factor, parse_capture, record_capture
from fit3d_ns.scene.scene_file import find_geometry_seconds
from fit3d_ns.scene.splat_files import Splats, list_splats
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.selection import select_evenly

NUM_CHECKED_VIEWS = 3
"""Views that are rendered and compared with their photographs before a lift."""

SMALLEST_PSNR = 12.0
"""Mean PSNR in dB over them, below which Gaussians and photographs hardly belong together."""

CLEARLY_BETTER_DB = 3.0
"""A world that fits better by this much is the right one."""

CHECKED_SIDE = 480
"""Photographs of the check are reduced to about this longer side, in pixels."""

NUM_ALIGNED_VIEWS, ALIGNED_SIDE = 8, 80
"""Views, and their longer side in pixels, by which a world is moved."""

ALIGNED_DB, ALIGNED_SHARES = 0.5, (0.03, 0.5)
"""A splat is a little off where a world nearby fits the photographs by so many dB better, and moves the median Gaussian
by so much of the depth; what fits far away does so by chance."""

_LEVELS = ((8, 20), (4, 10), (2, 10))

OTHER_ORDER_DB = 1.0
"""Quaternions are taken as xyzw where they fit better by this much."""

_HALF_TURN = WorldChange(torch.diag(torch.tensor([1.0, -1.0, -1.0, 0.0]))[:3], 1.0)


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


def read_ply_source(
    ply: Path,
    data: Path,
    config: PlyConfig,
    device: torch.device | str = "cpu",
    read: Callable[[], Splats] | None = None,
) -> LiftSource:
    """Reads a PLY and its capture, and compares renderings with photographs before anything else is done.

    Another `read` may keep features. Gaussians that have some lie, if nothing else is said, in the world that FiT3D's
    code makes of ScanNet++'s. ValueError where something cannot be read, the world is not known for this capture, or it
    is the wrong one: then the message says which one fits.
    """
    gaussians, dropped, decoder = (read or list_splats(ply, data, keep_features=False)[0][2])()
    files = read_capture(data, is_strict=config.strict)
    notice(files.description)
    if decoder is not None and config.ply_world == "dataset":
        config = replace(config, ply_world="colmap")
        files = files if files.colmap_to_world is not None else replace(files, colmap_to_world=colmap_to_world())
    description = f"PLY {ply.name} in the {config.ply_world} world"
    factor = config.choose_factor(files)
    longer = max(max(frame.lens.width, frame.lens.height) for frame in files.frames)
    checked_factor = max(math.ceil(longer / CHECKED_SIDE), factor)
    photographs: dict[str, tuple[Tensor, Tensor]] = {}

    def create(change: WorldChange, factor: int = checked_factor, files: CaptureFiles = files) -> LiftSource:
        capture = create_posed_capture(files, change.transform, change.scale, factor)
        return LiftSource(gaussians, capture, description, config.rasterize_mode, num_dropped=dropped, decoder=decoder)

    def measure(source: LiftSource) -> PhotoFit:
        return compare_with_photographs(source, device, photographs)

    def find_best(changes: list[WorldChange]) -> tuple[WorldChange, PhotoFit]:
        fits = [measure(create(change)) for change in changes]
        best = max(range(len(changes)), key=lambda index: (fits[index].is_seen, fits[index].psnr))
        return changes[best], fits[best]

    transforms = _find_transforms(ply, config)

    def find(world: PlyWorld) -> list[WorldChange]:
        changes = find_changes(world, files, transforms)
        # y of SPZ points up, z backwards: some tools turn a PLY's world around for it, some do not.
        return changes + [_HALF_TURN.after(change) for change in changes if ply.suffix.lower() == ".spz"]

    changes = find(config.ply_world)
    if config.ply_transform is not None:
        changes = [own.after(change) for own in read_similarity(config.ply_transform) for change in changes]
        description = f"PLY {Path(ply).name} moved by {config.ply_transform.name}"
    worlds: dict[PlyWorld, list[WorldChange]] = {}
    for world in WORLDS if config.smallest_psnr > 0 or config.align else ():
        if world != config.ply_world or config.ply_transform is not None:
            with suppress(ValueError):
                worlds[world] = find(world)
    if config.align:
        points = None if files.points is None else files.points.xyz
        changes = changes + sum(worlds.values(), list_likely(changes[0], points, gaussians.means))
    change, fit = find_best(changes)
    turned = replace(gaussians, quats=gaussians.quats[:, [3, 0, 1, 2]])
    other_order = measure(replace(create(change), gaussians=turned))
    if other_order.psnr > fit.psnr + OTHER_ORDER_DB:
        notice(f"The quaternions of {ply} are in the order xyzw, which is {other_order.psnr - fit.psnr:.1f} dB better.")
        gaussians, fit = turned, other_order
    if config.smallest_psnr <= 0 and not config.align:
        return create(change, factor)
    what = f"{ply} in the {config.ply_world} world" if config.ply_transform is None else description
    if not config.align:
        _check_fit(what, data, fit, {world: find_best(worlds[world])[1] for world in worlds}, config)
    frames = [frame for frame in files.frames if frame.split == "train" and not frame.is_bad]
    few = replace(files, frames=select_evenly(frames, NUM_ALIGNED_VIEWS), points=None)
    small, pictures = math.ceil(longer / ALIGNED_SIDE), dict[str, tuple[Tensor, Tensor]]()

    def compute_residuals(change: WorldChange, side: int) -> Tensor:
        views = _compare_views(create(change, small, few), NUM_ALIGNED_VIEWS, device, pictures)
        squares = [F.avg_pool2d((error * mask[..., None]).permute(2, 0, 1), side) for error, mask, _ in views]
        return torch.cat([square.flatten() for square in squares]).double().cpu()

    notice(f"Comparing renderings of {ply.name} with photographs, here and nearby.")
    pivot = torch.stack([view.camera_to_world[:, 3] for view in create(change).capture.views]).mean(dim=0)
    depth = float((gaussians.means - pivot).norm(dim=1).median())
    refined = refine_world(change, compute_residuals, pivot, depth, _LEVELS if config.align else ((2, 3),))
    better = measure(create(refined))
    if config.align:
        if better.psnr < fit.psnr:
            refined, better = change, fit
        matrix = (refined.transform * refined.scale).double().numpy().round(4).tolist()
        notice(f"{ply} is aligned, {fit.psnr:.1f} -> {better.psnr:.1f} dB: scale {refined.scale:.4g}, in all {matrix}.")
        _check_fit(f"{ply}, aligned,", data, better, {}, config)
        return create(refined, factor)
    here = (gaussians.means / change.scale - change.transform[:, 3]) @ change.transform[:, :3]
    moved = transform_points(here, refined.transform, refined.scale)
    share = float((moved - gaussians.means).norm(dim=1).median()) / depth
    if better.psnr > fit.psnr + ALIGNED_DB and ALIGNED_SHARES[0] < share < ALIGNED_SHARES[1]:
        raise ValueError(
            f"{what} is not where the cameras of {data} are: moved or turned by {share:.0%} of the depth it fits "
            f"by {better.psnr - fit.psnr:.1f} dB better; add --align, or correct --ply-world or --ply-transform "
            "(--smallest-psnr 0 lifts nevertheless)."
        )
    return create(change, factor)


@torch.no_grad()
def compare_with_photographs(
    source: LiftSource, device: torch.device | str = "cpu", loaded: dict[str, tuple[Tensor, Tensor]] | None = None
) -> PhotoFit:
    """Renders a few train views and compares them with their photographs, which must be there.

    `loaded` keeps photographs and masks by name, for comparisons of several sources of one capture.
    """
    psnrs, coverages = [], []
    for error, mask, alphas in _compare_views(source, NUM_CHECKED_VIEWS, device, {} if loaded is None else loaded):
        psnrs.append(-10.0 * float(error.square()[mask].mean().clamp(min=1e-10).log10()))
        coverages.append(float(alphas[mask].mean()))
    return PhotoFit(psnr=sum(psnrs) / len(psnrs), coverage=sum(coverages) / len(coverages))


@torch.no_grad()
def _compare_views(
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


def warn_of_poor_fit(source: LiftSource, fit: PhotoFit) -> None:
    """A notice where Gaussians and cameras belong together and renderings still do not look like the photographs."""
    if fit.is_seen and fit.psnr >= SMALLEST_PSNR:
        return
    notice(
        f"Renderings of {source.description} are {fit.psnr:.1f} dB from their photographs (below {SMALLEST_PSNR:g}); "
        "was it trained to its end, and does --data hold the same photographs?"
    )


def _find_transforms(ply: Path, config: PlyConfig) -> Path:
    """Where the run's transforms are or would be; ValueError where they are named and are not there."""
    path = config.dataparser_transforms or (ply if ply.is_dir() else ply.parent)
    path = path / TRANSFORMS_NAME if path.is_dir() else path
    if config.ply_world == "training" and not path.is_file():
        if config.dataparser_transforms is not None:
            raise ValueError(f"There is no {path}; give the run's folder or its {TRANSFORMS_NAME}.")
        notice(
            f"There is no {path} (--dataparser-transforms names another place): the training frame is taken as "
            "nerfstudio's defaults place the cameras."
        )
    return path


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
