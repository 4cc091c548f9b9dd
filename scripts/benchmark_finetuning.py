"""Times stage II: seconds per step split into load, target, forward/backward and optimizer, and what targets save.

    python scripts/benchmark_finetuning.py --output-path finetuning.json
    python scripts/benchmark_finetuning.py --scenes *.safetensors --backbone-weights FILE --output-path R.json

Without `--scenes` it makes scenes of random Gaussians at the paper's resolution, with noise for photographs, and trains
backbones with random weights: speed does not depend on what is seen. The first epoch, in which a CPU renders and keeps
its targets, is reported apart from the later ones.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn import functional as F

from fit3d_ns.data.frames import CaptureFiles, Frame
from fit3d_ns.data.images import save_image
from fit3d_ns.features import BackboneDescription, compute_patch_grid, create_token_model, describe_backbone
from fit3d_ns.finetuning.config import FinetuneConfig, RunConfig
from fit3d_ns.finetuning.draws import TrainingViews
from fit3d_ns.finetuning.optimization import OptimizationConfig
from fit3d_ns.finetuning.scene_bank import CPU_SCENES_GB, SceneBank
from fit3d_ns.finetuning.targets import TargetConfig, TargetRenderer, create_averages, create_target_store
from fit3d_ns.finetuning.trainer import FinetuneTrainer
from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.scene import (
    FeatureDecoder,
    FeatureScene,
    Gaussians,
    View,
    create_posed_capture,
    create_token_reader,
    load_scene,
    save_scene,
)
from fit3d_ns.training.processes import Processes, create_accelerator
from fit3d_ns.utils.progress import PhaseTimer, measure_peak_memory_mb, notice
from fit3d_ns.utils.results import ResultRecord, save_result

PAPER_SCENES, PAPER_GAUSSIANS, PAPER_SECONDS = 230, 1_000_000, 0.436
"""The paper trains on 230 scenes; its code takes 0.436 s per batch of 2 on an A100."""


@dataclass(frozen=True)
class Config:
    """What is timed."""

    output_path: Path
    """JSON with the figures."""
    scenes: tuple[Path, ...] = ()
    """Scene files to train on with their own backbone; made scenes otherwise."""
    backbone_weights: Path | None = None
    """Weights of the scenes' backbone."""
    backbones: tuple[str, ...] = ("dinov2_small", "dinov2_base")
    """Architectures to time on made scenes; weights are random."""
    width: int = 876
    """Width of made photographs in pixels."""
    height: int = 584
    """Height of made photographs in pixels."""
    num_gaussians: int = 100_000
    """Gaussians of each made scene."""
    num_images: int = 4
    """Photographs of each made scene."""
    epochs: int = 2
    """Epochs that are timed, at least 2."""
    max_steps: int = 20
    """Most optimizer steps of an epoch; images beyond them are left out, so that each epoch shows the same ones."""
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    """Batch size, precision and so on."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""


class SynchronisedTimer(PhaseTimer):
    """Waits for the device at both ends of a phase, so that queued work counts where it was asked for."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        _synchronise()
        with super().phase(name):
            yield
            _synchronise()


def main(config: Config) -> None:
    """Times every case and writes the record."""
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if config.scenes:
            recorded = load_scene(config.scenes[0]).backbone
            description = describe_backbone(recorded.backbone, config.backbone_weights)
            cases[recorded.backbone] = time_training(config.scenes, description, config, Path(folder))
        else:
            for name in config.backbones:
                description = describe_backbone(f"random:{name}")
                path = Path(folder) / f"{name}.safetensors"
                save_scene(make_scene(description, config, Path(folder) / name), path)
                cases[name] = time_training([path], description, config, Path(folder) / f"{name}_out")
    record = ResultRecord(
        kind="benchmark/finetuning",
        metrics={"cases": cases, "peak_memory_mb": measure_peak_memory_mb(), "paper_seconds_a100": PAPER_SECONDS},
        settings={**_plain(asdict(config)), "num_threads": torch.get_num_threads()},
        is_random=not config.scenes,
    )
    save_result(record, config.output_path)
    print(f"Figures: {config.output_path}")


def time_training(
    paths: Sequence[Path], description: BackboneDescription, config: Config, folder: Path
) -> dict[str, Any]:
    """Seconds per step of the first and of the later epochs, the target's two ways, and the memory of scenes."""
    bank = SceneBank(paths, config.device)
    bank.averages = create_averages(TargetConfig(), bank, folder)
    views = TrainingViews(bank.on_disk, [("train",)] * len(paths))
    per_epoch = limit_views(views, config.optimization.batch_size, config.max_steps)
    optimization = replace(config.optimization, max_steps=config.epochs * per_epoch, accumulation_steps=1)
    run = RunConfig(trackers=(), steps_per_validation=per_epoch, steps_per_checkpoint=10**9, resume="never")
    whole = FinetuneConfig(optimization=optimization, run=run)
    store = create_target_store(whole.targets, torch.device(config.device), folder)
    targets = TargetRenderer(bank, views, whole.targets, store)
    token_model = create_token_model(description)
    processes = Processes(create_accelerator(config.device, optimization.precision))
    timer = SynchronisedTimer()
    laps: list[dict[str, float]] = []

    def note_lap(*_: Any) -> dict[str, float]:
        laps.append(dict(timer.seconds))
        return {}

    # Compiling kernels is no part of an epoch; the scene is made ready there.
    view = next(view for own in views.views for view in own)
    time_target(load_scene(paths[0]).to(config.device), view, description, repeats=1)
    notice(f"Timing {description.label} on {len(paths)} scenes, {config.epochs} epochs of {per_epoch} steps")
    trainer = FinetuneTrainer(token_model, targets, whole, processes, folder, {}, note_lap, timer)
    trainer.run()
    note_lap()
    first = {name: seconds / per_epoch for name, seconds in laps[0].items()}
    later = {
        name: (seconds - laps[0][name]) / (per_epoch * (config.epochs - 1)) for name, seconds in timer.seconds.items()
    }
    scene = bank[next(index for index, own in enumerate(views.views) if own)]
    return {
        "first_epoch": _summarise(first),
        "later_epochs": _summarise(later),
        "target": time_target(scene, view, description),
        "memory": describe_memory(scene, description),
        "num_parameters": sum(parameter.numel() for parameter in trainer.backbone.parameters),
        "images_per_step": trainer.images_per_step,
        "image_size": [view.width, view.height],
        "num_gaussians": [scene.gaussians.num_gaussians for scene in bank.on_disk],
    }


def limit_views(views: TrainingViews, batch_size: int, max_steps: int) -> int:
    """Leaves so many views that whole steps show each once an epoch, evenly over scenes; returns the steps.

    Otherwise an epoch that ends early would leave views to be seen, and rendered, for the first time in later ones.

    Raises:
        ValueError: There are fewer views than one step takes.
    """
    steps = min(sum(views.views_per_scene) // batch_size, max_steps)
    if steps < 1:
        raise ValueError(f"{sum(views.views_per_scene)} views make no batch of {batch_size}; lower --batch-size.")
    kept: list[list[View]] = [[] for _ in views.views]
    for turn in range(max(views.views_per_scene)):
        for own, chosen in zip(views.views, kept, strict=True):
            if turn < len(own) and sum(map(len, kept)) < steps * batch_size:
                chosen.append(own[turn])
    views.views = kept
    return steps


def time_target(
    scene: FeatureScene, view: View, description: BackboneDescription, repeats: int = 3
) -> dict[str, float]:
    """One target read at the token grid, against decoding the full picture first as the public code does."""
    grid = compute_patch_grid(view.height, view.width, description.patch_size)

    def read_at_tokens() -> torch.Tensor:
        return scene.render_features(*view.camera, grid, "bilinear")

    @torch.no_grad()
    def decode_everything() -> torch.Tensor:
        low, alphas = scene.render_features_low(view.camera)
        # (h, w, e) -> (1, e, h, w)
        decoded = scene.decoder(low, alphas).permute(2, 0, 1)[None]
        return F.interpolate(decoded, size=grid, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)

    difference = float((read_at_tokens() - decode_everything()).abs().max())
    dim = scene.gaussians.feature_dim
    per_decoding = 9 * dim * description.embed_dim
    tokens, pixels = grid[0] * grid[1], view.width * view.height
    # On CUDA every pixel is blended, which is cheaper there than choosing.
    num_read = create_token_reader(view.width, view.height, grid, "bilinear").pixels.shape[0]
    blended = pixels if scene.gaussians.means.is_cuda else num_read
    # Each token mixes four pixels of every channel it reads: nine shifted maps, or the decoded one.
    return {
        "seconds_at_tokens": _time(read_at_tokens, repeats),
        "seconds_full_resolution": _time(decode_everything, repeats),
        "blended_pixels_at_tokens": float(blended),
        "blended_pixels_full_resolution": float(pixels),
        "decoder_multiply_adds_at_tokens": float(tokens * (per_decoding + 4 * 9 * dim)),
        "decoder_multiply_adds_full_resolution": float(pixels * per_decoding + tokens * 4 * description.embed_dim),
        "largest_difference": difference,
    }


def describe_memory(scene: FeatureScene, description: BackboneDescription) -> dict[str, float]:
    """What this scene takes, and what the paper's scenes of a million Gaussians would.

    Files are mapped: the system may hold them all in memory or drop them. What must fit are the budgets for ready
    scenes and for averaged features; averaged features beyond theirs lie on disk or are computed again.
    """
    count = scene.gaussians.num_gaussians
    ready = scene.num_bytes / count
    files_gb = PAPER_SCENES * PAPER_GAUSSIANS * scene.gaussians.bytes_per_gaussian / 1e9
    budget_gb, average_gb = CPU_SCENES_GB, TargetConfig().average_gb
    return {
        "file_bytes_per_gaussian": scene.gaussians.bytes_per_gaussian,
        "ready_bytes_per_gaussian": ready,
        "paper_files_gb": files_gb,
        "paper_ready_scene_gb": PAPER_GAUSSIANS * ready / 1e9,
        "paper_ready_scenes_in_budget": float(int(budget_gb * 1e9 // (PAPER_GAUSSIANS * ready))),
        "paper_averaged_features_gb": PAPER_SCENES * PAPER_GAUSSIANS * 2 * scene.gaussians.feature_dim / 1e9,
        "paper_files_and_budget_gb": files_gb + budget_gb + average_gb,
    }


def make_scene(description: BackboneDescription, config: Config, root: Path) -> FeatureScene:
    """Random Gaussians in front of a row of cameras, whose photographs are noise."""
    generator = torch.Generator().manual_seed(0)
    (root / "images").mkdir(parents=True)
    lens = Lens(
        fx=0.8 * config.width,
        fy=0.8 * config.width,
        cx=config.width / 2,
        cy=config.height / 2,
        width=config.width,
        height=config.height,
    )
    frames = []
    for index in range(config.num_images):
        pixels = torch.randint(0, 256, (config.height, config.width, 3), generator=generator, dtype=torch.uint8)
        path = root / "images" / f"{index}.jpg"
        save_image(pixels, path)
        camera_to_world = torch.eye(4)[:3].clone()
        camera_to_world[0, 3] = 0.1 * index
        frames.append(Frame(path, lens, camera_to_world))
    count, dim = config.num_gaussians, 64
    extent = torch.tensor([6.0, 4.0, 4.0])
    means = (torch.rand(count, 3, generator=generator) - 0.5) * extent - torch.tensor([0.0, 0.0, 4.0])
    gaussians = Gaussians.from_raw(
        means,
        torch.randn(count, 4, generator=generator),
        torch.full((count, 3), 0.03).log() + 0.5 * torch.randn(count, 3, generator=generator),
        torch.randn(count, generator=generator),
        torch.zeros(count, 3),
        torch.randn(count, dim, generator=generator),
    )
    return FeatureScene(
        gaussians=gaussians,
        decoder=FeatureDecoder(dim, description.embed_dim, bias=True),
        posed_capture=create_posed_capture(CaptureFiles(root, "nerfstudio", "made for timing", frames)),
        backbone=description,
    )


def _summarise(seconds: dict[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    shares = {f"{name}_share": value / total for name, value in seconds.items()}
    return {**{f"{name}_seconds": value for name, value in seconds.items()}, "step_seconds": total, **shares}


def _time(function: Any, repeats: int = 3) -> float:
    """Median seconds of a call; the first one is not counted."""
    function()
    measured = []
    for _ in range(repeats):
        _synchronise()
        start = time.perf_counter()
        function()
        _synchronise()
        measured.append(time.perf_counter() - start)
    return sorted(measured)[len(measured) // 2]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main(tyro.cli(Config))
