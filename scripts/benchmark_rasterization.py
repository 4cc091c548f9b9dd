"""Times the rasterizer: colour and 64-d features, forward and backward with all gradients.

    python scripts/benchmark_rasterization.py --output-path outputs/benchmark_rasterization.json

Scenes: S is 20,000 Gaussians at 320x240, M 100,000 at 640x480, with about 290 and 360 Gaussians per tile: at least as
dense as an indoor scene that was trained at that size. Wall time is the median over the repeats. CPU time is the
smallest over the repeats, all threads together; on a machine that is busy with other things it is the steadier figure.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fit3d_ns.rasterization import project, rasterization, rasterize_features
from fit3d_ns.utils.results import ResultRecord, save_result

SCENES = {"S": (20_000, 320, 240), "M": (100_000, 640, 480)}
PARTS = ("colour forward", "colour backward", "features forward", "features backward")
MEDIAN_SIGMA = 2.0
SH_DEGREE = 3


@dataclass(frozen=True)
class BenchmarkScene:
    """Random Gaussians in front of one camera."""

    gaussians: list[Tensor]
    """Means, quats, scales, opacities, harmonics coefficients."""
    viewmats: Tensor
    Ks: Tensor
    width: int
    height: int


def make_scene(num_gaussians: int, width: int, height: int, device: str, seed: int = 0) -> BenchmarkScene:
    """Anisotropic Gaussians of `MEDIAN_SIGMA` pixels, a tenth of them outside the image, 1 to 5 units deep."""
    generator = torch.Generator().manual_seed(seed)
    focal = 0.8 * width
    depths = 1 + 4 * torch.rand(num_gaussians, 1, generator=generator)
    sideways = torch.rand(num_gaussians, 2, generator=generator) - 0.5
    means = torch.cat([sideways * 1.1 * torch.tensor([width, height]) / focal * depths, depths], dim=1)
    scales = torch.exp(0.5 * torch.randn(num_gaussians, 3, generator=generator)) * MEDIAN_SIGMA * depths / focal
    quats = torch.randn(num_gaussians, 4, generator=generator)
    opacities = torch.sigmoid(1.5 * torch.randn(num_gaussians, generator=generator))
    coefficients = 0.2 * torch.randn(num_gaussians, (SH_DEGREE + 1) ** 2, 3, generator=generator)
    Ks = torch.tensor([[[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]])
    gaussians = [tensor.to(device) for tensor in (means, quats, scales, opacities, coefficients)]
    return BenchmarkScene(gaussians, torch.eye(4, device=device)[None], Ks.to(device), width, height)


def run_once(scene: BenchmarkScene, feature_dim: int, backend: str) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of the four parts of one training step."""
    device = scene.viewmats.device
    leaves = [tensor.clone().requires_grad_() for tensor in (*scene.gaussians, scene.viewmats)]
    features = torch.randn(len(leaves[0]), feature_dim, device=device, requires_grad=True)
    v_image = torch.randn(1, scene.height, scene.width, 3, device=device)
    v_alpha = torch.randn(1, scene.height, scene.width, 1, device=device)
    v_maps = torch.randn(1, scene.height, scene.width, feature_dim, device=device)
    wall, cpu = [], []

    def mark() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter())
        cpu.append(time.process_time())

    mark()
    image, alpha, info = rasterization(
        *leaves, scene.Ks, scene.width, scene.height, sh_degree=SH_DEGREE, backend=backend
    )  # fmt: skip
    mark()
    torch.autograd.backward([image, alpha], [v_image, v_alpha])
    mark()
    maps = rasterize_features(features, info)
    mark()
    maps.backward(v_maps)
    mark()
    return _differences(wall), _differences(cpu)


def benchmark_scene(name: str, num_repeats: int, feature_dim: int, backend: str, device: str) -> dict:
    """Milliseconds per part, and what the scene is like."""
    num_gaussians, width, height = SCENES[name]
    scene = make_scene(num_gaussians, width, height, device)
    started = time.perf_counter()
    run_once(scene, feature_dim, backend)
    first_seconds = time.perf_counter() - started
    runs = [run_once(scene, feature_dim, backend) for _ in range(num_repeats)]
    wall = 1000 * torch.tensor([wall for wall, _ in runs]).median(dim=0).values
    cpu = 1000 * torch.tensor([cpu for _, cpu in runs]).amin(dim=0)
    totals = 1000 * torch.tensor([sum(wall) for wall, _ in runs])
    info = project(*scene.gaussians[:4], scene.viewmats, scene.Ks, width, height, backend=backend)
    return {
        "num_gaussians": num_gaussians,
        "width": width,
        "height": height,
        "gaussians_per_tile": len(info["flatten_ids"]) / info["isect_offsets"].numel(),
        "first_call_s": first_seconds,
        "wall_ms": dict(zip(PARTS, wall.tolist(), strict=True)) | {"total": totals.median().item()},
        "best_total_ms": totals.min().item(),
        "cpu_ms": dict(zip(PARTS, cpu.tolist(), strict=True)) | {"total": cpu.sum().item()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-path", type=Path, required=True, help="JSON file for the figures.")
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--num-repeats", type=int, default=10, help="Timed runs per scene, after one that is not.")
    parser.add_argument("--feature-dim", type=int, default=64)
    parser.add_argument("--backend", choices=["auto", "cpu", "gsplat", "reference"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    results = {}
    print(f"{'':22}" + "".join(f"{part:>20}" for part in (*PARTS, "total")))
    for name in arguments.scenes:
        result = benchmark_scene(
            name, arguments.num_repeats, arguments.feature_dim, arguments.backend, arguments.device
        )
        results[name] = result
        for kind in ("wall_ms", "cpu_ms"):
            row = "".join(f"{result[kind][part]:>20.1f}" for part in (*PARTS, "total"))
            print(f"{name + ' ' + kind.replace('_', ' '):22}{row}")
        print(
            f"  {result['gaussians_per_tile']:.0f} Gaussians per tile, best total {result['best_total_ms']:.1f} ms,"
            f" first call {result['first_call_s']:.1f} s"
        )
    settings = {
        "feature_dim": arguments.feature_dim,
        "backend": arguments.backend,
        "device": arguments.device,
        "num_threads": torch.get_num_threads(),
        "num_repeats": arguments.num_repeats,
    }
    save_result(ResultRecord("benchmark/rasterization", results, settings), arguments.output_path)
    print(f"Wrote {arguments.output_path}")


def _differences(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


if __name__ == "__main__":
    main()
