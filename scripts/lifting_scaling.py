"""How the lift's time and memory grow with views, Gaussians and dims, on synthetic scenes; each axis on its own."""

import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.geometry.cameras import Camera, camera_to_worlds_from_viewmats
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.solver import solve_features
from fit3d_ns.lifting.views import LiftView
from fit3d_ns.scene import ActivatedGaussians
from fit3d_ns.utils.progress import measure_peak_memory_mb
from fit3d_ns.utils.selection import create_generator


@dataclass(frozen=True)
class ScalingCase:
    """One row of the table."""

    num_views: int = 20
    num_gaussians: int = 20_000
    feature_dim: int = 64
    width: int = 160
    height: int = 120
    embed_dim: int = 384
    max_passes: int = 1
    """Passes of the conjugate gradients; time is linear in them too."""


# Paper: up to 600 views a scene, about a million Gaussians, 384 channels without compression.
AXES: dict[str, tuple[int, ...]] = {
    "num_views": (10, 30, 100, 300, 600),
    "num_gaussians": (10_000, 30_000, 100_000, 300_000, 1_000_000),
    "feature_dim": (16, 32, 64, 128, 384),
}


def measure_scaling(axes: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """One row per case; each in a process of its own, so that peak memory is that case's."""
    rows = []
    for axis, values in axes.items():
        for value in values:
            arguments = [sys.executable, __file__, axis, str(value)]
            answer = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
            seconds, peak_mb, base_mb = (float(number) for number in answer.split()[-3:])
            case = asdict(ScalingCase(**{axis: value}))
            rows.append({"axis": axis, **case, "seconds": seconds, "peak_mb": peak_mb, "added_mb": peak_mb - base_mb})
            print(f"{axis:>14} {value:>9} {seconds:9.2f} s {peak_mb - base_mb:9.0f} MB", flush=True)
    return rows


def create_room(case: ScalingCase, device: torch.device) -> tuple[ActivatedGaussians, list[LiftView]]:
    """Gaussians on the walls of a box, seen from its middle; their size keeps the number per pixel the same."""
    generator = create_generator(0, "room")
    num = case.num_gaussians
    points = torch.rand(num, 3, generator=generator) * 2.0 - 1.0
    axis = torch.randint(3, (num,), generator=generator)
    points[torch.arange(num), axis] = torch.randint(2, (num,), generator=generator) * 2.0 - 1.0
    gaussians = ActivatedGaussians(
        means=(3.0 * points).to(device),
        quats=torch.randn(num, 4, generator=generator).to(device),
        # 36 units of area per unit of half-width squared, shared by all.
        scales=torch.full((num, 3), 1.2 * (6 * 36 / num) ** 0.5 / 2).to(device),
        opacities=torch.full((num,), 0.7).to(device),
    )
    return gaussians, [_create_view(case, index, generator) for index in range(case.num_views)]


def _create_view(case: ScalingCase, index: int, generator: torch.Generator) -> LiftView:
    angle = torch.tensor(2.399963 * index)
    cosine, sine = float(angle.cos()), float(angle.sin())
    viewmat = torch.tensor(
        [[cosine, 0.0, -sine, 0.0], [0.0, 1.0, 0.0, 0.1 * (index % 5)], [sine, 0.0, cosine, 0.0], [0.0, 0.0, 0.0, 1.0]]
    )
    focal = 0.8 * case.width
    K = torch.tensor([[focal, 0.0, case.width / 2], [0.0, focal, case.height / 2], [0.0, 0.0, 1.0]])
    seed = int(torch.randint(2**31, (1,), generator=generator))
    grid = (case.height // 14, case.width // 14)

    def load_tokens() -> Tensor:
        # Made anew at every reading, as a file would be read: tokens of all views are never in memory at once.
        own = torch.Generator().manual_seed(seed)
        return torch.randn(*grid, case.embed_dim, generator=own)

    camera = Camera(camera_to_worlds_from_viewmats(viewmat), K, case.width, case.height)
    return LiftView(camera, load_tokens, name=f"view {index}")


def _main(axis: str, value: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Compilation and warm-up are no part of a lift.
    warm_up = ScalingCase(num_views=1, num_gaussians=100, feature_dim=16)
    solve_features(*create_room(warm_up, device), LiftConfig(feature_dim=16, max_passes=1))
    case = ScalingCase(**{axis: value})
    gaussians, views = create_room(case, device)
    base_mb = measure_peak_memory_mb()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base_mb = torch.cuda.memory_allocated() / 1e6
    start = time.perf_counter()
    solve_features(
        gaussians,
        views,
        LiftConfig(feature_dim=case.feature_dim, max_passes=case.max_passes, tolerance=0.0, cache_memory_mb=0.0),
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak_mb = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else measure_peak_memory_mb()
    print(seconds, peak_mb, base_mb)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
