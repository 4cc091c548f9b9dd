"""`read_ply_source`: a lift's source from a PLY and a capture, once it is known where among the cameras the PLY lies.

A PLY does not say which world it is in (`worlds.py`), nor in which order its quaternions are written: renderings are
compared with photographs, so that no mistake passes unnoticed.

A world is moved until renderings fit by seven numbers: rotation (3, radians), translation (3, in shares of the depth)
and logarithm of the scale, all about the middle of the cameras. Least squares (scipy's) of differences between
renderings and photographs, averaged over squares of pixels: coarse ones first, from which a scale that is a fifth off
still finds back. Derivatives are differences too, so that any rasterizer serves.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.data.frames import CaptureFiles
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.data.scannetpp import colmap_to_world
from fit3d_ns.geometry.cameras import transform_points
from fit3d_ns.lifting.sources import LiftSource, PhotoFit, PlyConfig, compare_views, compare_with_photographs
from fit3d_ns.lifting.worlds import TRANSFORMS_NAME, WORLDS, PlyWorld, WorldChange, find_changes, read_similarity
from fit3d_ns.scene import create_posed_capture
from fit3d_ns.scene.splat_files import Splats, list_splats
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.selection import select_evenly

CLEARLY_BETTER_DB = 3.0
"""A world that fits better by this much is the right one."""
CHECKED_SIDE = 480
"""Photographs of the check are reduced to about this longer side, in pixels."""
NUM_ALIGNED_VIEWS, ALIGNED_SIDE = 8, 80
"""Views, and their longer side in pixels, by which a world is moved."""
ALIGNED_DB, ALIGNED_SHARES = 0.3, (0.025, 0.5)
"""A splat is a little off where a world nearby fits the photographs by so many dB better, and moves the median Gaussian
by so much of the depth; what fits far away does so by chance."""
_LEVELS = ((8, 20), (4, 10), (2, 10))

OTHER_ORDER_DB = 1.0
"""Quaternions are taken as xyzw where they fit better by this much."""
_HALF_TURN = WorldChange(torch.diag(torch.tensor([1.0, -1.0, -1.0, 0.0]))[:3], 1.0)
_NUDGES = np.array([0.01] * 6 + [0.02])
"""Differences for derivatives on squares of 4 pixels; on others in proportion."""


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
    splats = (read or list_splats(ply, data, keep_features=False)[0][2])()
    files = read_capture(data, is_strict=config.strict)
    notice(files.description)
    if splats.decoder is not None and config.ply_world == "dataset":
        config = replace(config, ply_world="colmap")
        files = files if files.colmap_to_world is not None else replace(files, colmap_to_world=colmap_to_world())
    placement = PlyPlacement(ply, data, splats, files, config, device)
    changes, others = placement.list_changes(), placement.list_other_changes()
    if config.align:
        points = None if files.points is None else files.points.xyz
        changes = changes + sum(others.values(), list_likely(changes[0], points, splats.gaussians.means))
    change, fit = placement.find_best(changes)
    fit = placement.choose_quaternion_order(change, fit)
    if config.align:
        change = placement.align(change, fit)
    elif config.smallest_psnr > 0:
        what = f"{ply} in the {config.ply_world} world" if config.ply_transform is None else placement.description
        fits = {world: placement.find_best(found)[1] for world, found in others.items()}
        _check_fit(what, data, fit, fits, config)
        placement.refuse_if_moved(what, change, fit)
    return placement.create(change, config.choose_factor(files))


@dataclass
class PlyPlacement:
    """Gaussians among the cameras of a capture, in any world that is tried."""

    ply: Path
    data: Path
    splats: Splats
    files: CaptureFiles
    config: PlyConfig
    device: torch.device | str

    def __post_init__(self) -> None:
        named = self.config.ply_transform
        where = f"in the {self.config.ply_world} world" if named is None else f"moved by {named.name}"
        self.description = f"PLY {self.ply.name} {where}"
        self._longer = max(max(frame.lens.width, frame.lens.height) for frame in self.files.frames)
        self._checked_factor = max(math.ceil(self._longer / CHECKED_SIDE), self.config.choose_factor(self.files))
        self._transforms = _find_transforms(self.ply, self.config)
        self._loaded: dict[str, tuple[Tensor, Tensor]] = {}

    def list_changes(self) -> list[WorldChange]:
        """How the dataset's world may become the one that the user names."""
        changes = self._find(self.config.ply_world)
        if self.config.ply_transform is None:
            return changes
        return [own.after(change) for own in read_similarity(self.config.ply_transform) for change in changes]

    def list_other_changes(self) -> dict[PlyWorld, list[WorldChange]]:
        """The same of all other worlds that are known for this capture; none where nothing is checked."""
        others: dict[PlyWorld, list[WorldChange]] = {}
        for world in WORLDS if self.config.smallest_psnr > 0 or self.config.align else ():
            if world != self.config.ply_world or self.config.ply_transform is not None:
                with suppress(ValueError):
                    others[world] = self._find(world)
        return others

    def create(self, change: WorldChange, factor: int, files: CaptureFiles | None = None) -> LiftSource:
        """The source in a world, from photographs that are reduced by a factor; other files have fewer frames."""
        (gaussians, num_dropped, decoder), mode = self.splats, self.config.rasterize_mode
        capture = create_posed_capture(files or self.files, change.transform, change.scale, factor)
        return LiftSource(gaussians, capture, self.description, mode, num_dropped=num_dropped, decoder=decoder)

    def measure(self, change: WorldChange) -> PhotoFit:
        return compare_with_photographs(self.create(change, self._checked_factor), self.device, self._loaded)

    def find_best(self, changes: list[WorldChange]) -> tuple[WorldChange, PhotoFit]:
        fits = [self.measure(change) for change in changes]
        best = max(range(len(changes)), key=lambda index: (fits[index].is_seen, fits[index].psnr))
        return changes[best], fits[best]

    def choose_quaternion_order(self, change: WorldChange, fit: PhotoFit) -> PhotoFit:
        """Takes quaternions as xyzw where that fits clearly better; how the order that is taken fits."""
        given = self.splats
        quats = given.gaussians.quats[:, [3, 0, 1, 2]]
        self.splats = given._replace(gaussians=replace(given.gaussians, quats=quats))
        other = self.measure(change)
        if other.psnr > fit.psnr + OTHER_ORDER_DB:
            notice(
                f"The quaternions of {self.ply} are in the order xyzw, which is {other.psnr - fit.psnr:.1f} dB better."
            )
            return other
        self.splats = given
        return fit

    def align(self, change: WorldChange, fit: PhotoFit) -> WorldChange:
        """The world nearby that fits best, which is said; ValueError where it does not fit either."""
        refined = self._refine(change, _LEVELS)[0]
        better = self.measure(refined)
        if better.psnr < fit.psnr:
            refined, better = change, fit
        matrix = (refined.transform * refined.scale).double().numpy().round(4).tolist()
        gain = f"{fit.psnr:.1f} -> {better.psnr:.1f} dB"
        notice(f"{self.ply} is aligned, {gain}: scale {refined.scale:.4g}, in all {matrix}.")
        _check_fit(f"{self.ply}, aligned,", self.data, better, {}, self.config)
        return refined

    def refuse_if_moved(self, what: str, change: WorldChange, fit: PhotoFit) -> None:
        """Raises ValueError where a world a little off fits clearly better; what fits far away does so by chance."""
        refined, depth = self._refine(change, ((2, 3),))
        better, means = self.measure(refined), self.splats.gaussians.means
        here = (means / change.scale - change.transform[:, 3]) @ change.transform[:, :3]
        moved = transform_points(here, refined.transform, refined.scale)
        share = float((moved - means).norm(dim=1).median()) / depth
        if better.psnr > fit.psnr + ALIGNED_DB and ALIGNED_SHARES[0] < share < ALIGNED_SHARES[1]:
            raise ValueError(
                f"{what} is not where the cameras of {self.data} are: moved or turned by {share:.0%} of the depth it "
                f"fits by {better.psnr - fit.psnr:.1f} dB better; add --align, or correct --ply-world or "
                "--ply-transform (--smallest-psnr 0 lifts nevertheless)."
            )

    def _find(self, world: PlyWorld) -> list[WorldChange]:
        changes = find_changes(world, self.files, self._transforms)
        # y of SPZ points up, z backwards: some tools turn a PLY's world around for it, some do not.
        return changes + [_HALF_TURN.after(change) for change in changes if self.ply.suffix.lower() == ".spz"]

    def _refine(self, change: WorldChange, levels: Sequence[tuple[int, int]]) -> tuple[WorldChange, float]:
        """The world nearby whose renderings are most like a few small photographs, and the depth of the scene."""
        frames = [frame for frame in self.files.frames if frame.split == "train" and not frame.is_bad]
        few = replace(self.files, frames=select_evenly(frames, NUM_ALIGNED_VIEWS), points=None)
        factor, loaded = math.ceil(self._longer / ALIGNED_SIDE), dict[str, tuple[Tensor, Tensor]]()

        def compute_residuals(change: WorldChange, side: int) -> Tensor:
            views = compare_views(self.create(change, factor, few), NUM_ALIGNED_VIEWS, self.device, loaded)
            squares = [F.avg_pool2d((error * mask[..., None]).permute(2, 0, 1), side) for error, mask, _ in views]
            return torch.cat([square.flatten() for square in squares]).double().cpu()

        notice(f"Comparing renderings of {self.ply.name} with photographs, here and nearby.")
        views = self.create(change, self._checked_factor).capture.views
        pivot = torch.stack([view.camera_to_world[:, 3] for view in views]).mean(dim=0)
        depth = float((self.splats.gaussians.means - pivot).norm(dim=1).median())
        return refine_world(change, compute_residuals, pivot, depth, levels), depth


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


def refine_world(
    change: WorldChange,
    compute_residuals: Callable[[WorldChange, int], Float[Tensor, " residuals"]],
    pivot: Float[Tensor, " 3"],
    depth: float,
    levels: Sequence[tuple[int, int]],
) -> WorldChange:
    """The world nearby whose residuals (of a world, and squares with a side in pixels) have the least sum of squares.

    It turns and grows about `pivot`; what is seen is at the distance `depth`, both in the world that `change` leads to.
    `levels` are sides of squares with the most steps for each.
    """
    for side, num_steps in levels:

        def compare(places: np.ndarray, side: int = side, start: WorldChange = change) -> np.ndarray:
            # scipy's steps are shares of the variables, which therefore begin at 1.
            motion = torch.from_numpy(places - 1.0)
            return compute_residuals(_move(motion, pivot, depth).after(start), side).numpy()

        nudges = _NUDGES * side / 4
        found = least_squares(compare, np.ones(7), diff_step=nudges, x_scale=nudges, xtol=1e-4, max_nfev=num_steps + 1)
        change = _move(torch.from_numpy(found.x - 1.0), pivot, depth).after(change)
    return change


def list_likely(
    change: WorldChange, points: Float[Tensor, "points 3"] | None, means: Float[Tensor, "num_gaussians 3"]
) -> list[WorldChange]:
    """The world with its axes exchanged in all 24 ways, as it is and, by the seed points, as large as the splat."""
    turns = torch.from_numpy(Rotation.create_group("O").as_matrix()).float()
    likely = [WorldChange(F.pad(turn, (0, 1)), 1.0) for turn in turns]
    if points is not None:
        middle, reach = _measure(transform_points(points.float(), change.transform, change.scale))
        end, end_reach = _measure(means)
        scale = end_reach / max(reach, 1e-12)
        likely += [WorldChange(torch.cat([turn, (end / scale - turn @ middle)[:, None]], 1), scale) for turn in turns]
    return [other.after(change) for other in likely]


def _measure(points: Float[Tensor, "points 3"]) -> tuple[Float[Tensor, " 3"], float]:
    """Middle and reach, by medians: splats have outliers."""
    middle = torch.from_numpy(np.median(points.numpy(), axis=0))
    return middle, float((points - middle).norm(dim=1).median())


def _move(motion: Float[Tensor, " 7"], pivot: Float[Tensor, " 3"], depth: float) -> WorldChange:
    rotation = torch.from_numpy(Rotation.from_rotvec(motion[:3].numpy()).as_matrix())
    scale = math.exp(float(motion[6]))
    # x -> scale R (x - pivot) + pivot + t
    translation = (pivot.double() + depth * motion[3:6]) / scale - rotation @ pivot.double()
    return WorldChange(torch.cat([rotation, translation[:, None]], dim=1).float(), scale)
