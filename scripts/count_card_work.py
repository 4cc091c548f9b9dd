"""Counts what each stage gives a card to do, on a card that is only pretended, and what that has to take at least.

    python scripts/count_card_work.py --output-path card_work.json

Every stage runs by its own command or class on small random scenes, with gsplat's Python and a stand-in for its
compiled module (tests/gsplat_kernels.py). Launches, bytes, floating-point operations and waits of the host grow like
Gaussians and pixels, so three small sizes give them for the paper's; backbones run at the paper's own size. Seconds are
at least those that bytes and operations take on a card of given speed, with gsplat's blending by the measured time of
its kernels, which no count gives; or those that the launches take, if that is more.
"""

import contextlib
import copy
import io
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import trimesh
import tyro
from PIL import Image
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from fit3d_ns.cli import finetune, lift
from fit3d_ns.features import compute_patch_grid, create_extractor, create_token_model
from fit3d_ns.finetuning.draws import Sample
from fit3d_ns.finetuning.targets import TargetRenderer
from fit3d_ns.geometry.cameras import create_K, viewmats_from_camera_to_worlds
from fit3d_ns.plugin.method import fit3d_features
from fit3d_ns.plugin.trainer import FeatureTrainer
from fit3d_ns.rasterization import rasterization
from fit3d_ns.scene import Gaussians
from fit3d_ns.scene.ply import write_ply
from tests.gsplat_kernels import KernelCalls, replace_kernels
from tests.lift_capture import create_pose
from tests.pretended_cuda import Card, pretend_cuda

GAUSSIANS, WIDTH, HEIGHT, VIEWS, PASSES, STEPS = 1_000_000, 876, 584, 600, 17, 70_000
SIZES = ((300, 96, 64), (900, 96, 64), (300, 192, 128))
"""Gaussians, width, height: three that tell how counts grow."""
KINDS = ("launches", "bytes", "flops", "waits", "blendings")


@dataclass(frozen=True)
class Speed:
    """What a card does in a second, by its data sheet; TF32 without sparsity."""

    bytes: float
    flops: float
    launches: float = 250_000.0
    """Of PyTorch from one Python thread."""


CARDS = {"H100": Speed(3.35e12, 495e12), "RTX 4090": Speed(1.01e12, 82.6e12)}


@dataclass(frozen=True)
class Config:
    """Where the counts go."""

    output_path: Path
    """JSON with the counts of each stage at the paper's size."""


Work = dict[str, float]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps what commands print, and prints it if they fail."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code:
            sys.exit(said.getvalue())


class Counts:
    """Counts what functions do on the pretended card."""

    def __init__(self, card: Card, calls: KernelCalls) -> None:
        self.card, self.calls = card, calls

    def count(self, run: Callable[[], object]) -> Work:
        self.card.clear()
        self.calls.channels.clear()
        with silence():
            run()
        work: Counter[str] = self.card.work
        blendings = sum(channels / 64 for channels in self.calls.channels)
        return {
            **{kind: float(work[kind]) for kind in KINDS[:3]},
            "waits": self.card.waits.total(),
            "blendings": blendings,
        }


def combine(terms: list[tuple[float, Work]]) -> Work:
    return {kind: sum(factor * work[kind] for factor, work in terms) for kind in KINDS}


def extrapolate(works: list[Work], gaussians: int, pixels: int) -> Work:
    """From counts at the three sizes to those at another one: a + b * Gaussians + c * pixels."""
    matrix = np.array([[1.0, number, width * height] for number, width, height in SIZES])
    wanted = np.linalg.solve(matrix.T, np.array([1.0, gaussians, pixels]))
    return {kind: max(float(wanted @ [work[kind] for work in works]), 0.0) for kind in KINDS}


def write_room(folder: Path, number: int, width: int, height: int, num_frames: int = 9) -> tuple[Path, Path]:
    """A shell of Gaussians, photographed from within; the capture and the PLY."""
    generator = torch.Generator().manual_seed(0)
    (folder / "images").mkdir(parents=True)
    focal, centre = 0.6 * width, (width / 2, height / 2)
    places = 3.0 * F.normalize(torch.randn(number, 3, generator=generator), dim=1)
    size = math.log(3.0 / math.sqrt(number))
    raw = {
        "means": places, "quats": torch.randn(number, 4, generator=generator),
        "log_scales": torch.full((number, 3), size), "opacity_logits": torch.full((number,), 3.0),
        "sh_dc": torch.randn(number, 3, generator=generator),
    }  # fmt: skip
    write_ply(Gaussians.from_raw(**raw), folder / "cloud.ply")
    frames = []
    for index in range(num_frames):
        pose = create_pose(2 * math.pi * index / num_frames)
        picture, _, _ = rasterization(
            places, raw["quats"], raw["log_scales"].exp(), raw["opacity_logits"].sigmoid(), raw["sh_dc"][:, None],
            viewmats_from_camera_to_worlds(pose[None]), create_K(focal, focal, *centre)[None], width, height,
            sh_degree=0,
        )  # fmt: skip
        name = f"images/{index:03d}.png"
        Image.fromarray((picture[0].clamp(0, 1) * 255).byte().numpy()).save(folder / name)
        frames.append({"file_path": name, "transform_matrix": [*pose.tolist(), [0.0, 0.0, 0.0, 1.0]]})
    trimesh.PointCloud(places.numpy(), np.full((number, 4), 90, np.uint8)).export(folder / "points.ply")
    content = {
        "camera_model": "PINHOLE", "fl_x": focal, "fl_y": focal, "cx": centre[0], "cy": centre[1], "w": width,
        "h": height, "frames": frames, "ply_file_path": "points.ply",
    }  # fmt: skip
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder, folder / "cloud.ply"


def count_lift(counts: Counts, folder: Path) -> dict[str, Work]:
    """One view's share in the weighted sum and the decoder, one view in one pass, and the rest of a pass."""
    by_size: list[dict[str, Work]] = []
    for number, width, height in SIZES:
        capture, ply = write_room(folder / f"lift_{number}_{width}", number, width, height)

        def lift_with(views: int, passes: int, capture: Path = capture, ply: Path = ply) -> Work:
            words = ["--ply", ply, "--data", capture, "--backbone", "toy_rooms_vit", "--views", views]
            words += [
                "--max-passes",
                passes,
                "--tolerance",
                0,
                "--feature-cache",
                folder / "tokens",
                "--device",
                "cuda",
            ]
            path = capture / f"{views}_{passes}.safetensors"
            # A finished scene would be passed over.
            path.unlink(missing_ok=True)
            return counts.count(lambda: lift.main([str(word) for word in [*words, "--output-path", path]]))

        lift_with(6, 1)
        few, more = lift_with(3, 1), lift_with(6, 1)
        few_long, more_long = lift_with(3, 3), lift_with(6, 3)
        view_in_pass = combine([(1 / 6, more_long), (-1 / 6, more), (-1 / 6, few_long), (1 / 6, few)])
        rest = combine([(1 / 2, few_long), (-1 / 2, few), (-3, view_in_pass)])
        once = combine([(1 / 3, more), (-1 / 3, few), (-1, view_in_pass)])
        by_size.append({"lift: a view, once": once, "lift: a view in a pass": view_in_pass, "lift: a pass": rest})
    pixels = WIDTH * HEIGHT
    return {name: extrapolate([one[name] for one in by_size], GAUSSIANS, pixels) for name in by_size[0]}


class EnoughError(Exception):
    """Ends a training whose steps have been counted."""


def watch_steps(counts: Counts, seen: list[Work]) -> Callable[..., object]:
    """`FeatureTrainer.train_iteration` that counts what each of five steps does."""
    iterate = FeatureTrainer.train_iteration

    def step_once(trainer: FeatureTrainer, step: int) -> object:
        if len(seen) == 5:
            raise EnoughError
        made: list[object] = []
        seen.append(counts.count(lambda: made.append(iterate(trainer, step))))
        return made[0]

    return step_once


def watch_targets(counts: Counts, seen: list[Work]) -> Callable[..., object]:
    """`TargetRenderer.render` that counts what each target takes."""
    render = TargetRenderer.render

    def render_once(renderer: TargetRenderer, sample: Sample) -> object:
        made: list[object] = []
        seen.append(counts.count(lambda: made.append(render(renderer, sample))))
        return made[0]

    return render_once


def count_steps(counts: Counts, folder: Path) -> dict[str, Work]:
    """A step of colour, and the target of an image in stage II: the least of several, without what is done once."""
    steps: list[Work] = []
    targets: list[Work] = []
    for number, width, height in SIZES:
        capture, ply = write_room(folder / f"steps_{number}_{width}", number, width, height)
        config = copy.deepcopy(fit3d_features.config)
        config.output_dir, config.timestamp, config.experiment_name = folder / "outputs", f"{number}_{width}", "count"
        config.max_num_iterations, config.vis, config.machine.device_type = 30_000, "tensorboard", "cuda"
        config.logging.local_writer.enable = False
        config.pipeline.datamanager.data, config.pipeline.datamanager.backbone = capture, "toy_rooms_vit"
        config.pipeline.datamanager.feature_cache = folder / "tokens"
        seen: list[Work] = []
        with (
            silence(),
            contextlib.suppress(EnoughError),
            mock.patch.object(FeatureTrainer, "train_iteration", watch_steps(counts, seen)),
        ):
            trainer = config.setup(local_rank=0, world_size=1)
            trainer.setup()
            trainer.train()
        steps.append(min(seen, key=lambda work: work["bytes"]))

        scene = capture / "scene.safetensors"
        words = ["--ply", ply, "--data", capture, "--backbone", "toy_rooms_vit", "--max-passes", 1]
        seen = []
        with silence():
            lift.main([str(word) for word in [*words, "--feature-cache", folder / "tokens", "--output-path", scene]])
            words = ["--ckpts", scene, "--max-steps", 4, "--max-validation-views", 1, "--device", "cuda"]
            with mock.patch.object(TargetRenderer, "render", watch_targets(counts, seen)):
                finetune.main([str(word) for word in [*words, "--output-dir", capture / "finetuned"]])
        targets.append(min(seen, key=lambda work: work["bytes"]))
    pixels = WIDTH * HEIGHT
    return {
        "colour: a step": extrapolate(steps, GAUSSIANS, pixels),
        "stage II: an image's target": extrapolate(targets, GAUSSIANS, pixels),
    }


def count_backbone(counts: Counts, name: str) -> dict[str, Work]:
    """At the paper's size: one image forward, one forward and backward, and an AdamW step."""
    extractor = create_extractor(f"random:{name}", device=torch.device("cuda"))
    image = torch.rand(1, 3, HEIGHT, WIDTH)
    forward = counts.count(lambda: extractor(image))
    model = create_token_model(f"random:{name}").to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    rows, columns = compute_patch_grid(HEIGHT, WIDTH, model.description.patch_size)
    target = torch.zeros(1, rows * columns, model.description.embed_dim).to("cuda")
    both = counts.count(lambda: (model(image.to("cuda")).maps.flatten(1, 2) - target).abs().sum().backward())
    optimizer.step()
    update = counts.count(optimizer.step)
    return {f"{name}: an image forward": forward, f"{name}: forward and backward": both, f"{name}: AdamW": update}


def compute_seconds(work: Work, speed: Speed, blending: float = 0.0) -> float:
    """At least: the slower of host and card, waits apart (a wait costs what is under way, not more)."""
    on_card = work["bytes"] / speed.bytes + work["flops"] / speed.flops + work["blendings"] * blending
    return max(on_card, work["launches"] / speed.launches)


STAGES: dict[str, list[tuple[float, str]]] = {
    "features of 600 views, ViT-S": [(VIEWS, "dinov2_small: an image forward")],
    "features of 600 views, ViT-B": [(VIEWS, "dinov2_base: an image forward")],
    "lift of 600 views": [
        (VIEWS, "lift: a view, once"), (VIEWS * PASSES, "lift: a view in a pass"), (PASSES, "lift: a pass"),
    ],
    "colour, 30,000 steps": [(30_000, "colour: a step")],
    "stage II, 70,000 steps of 2, ViT-S": [
        (2 * STEPS, "stage II: an image's target"), (2 * STEPS, "dinov2_small: forward and backward"),
        (STEPS, "dinov2_small: AdamW"),
    ],
    "stage II, 70,000 steps of 2, ViT-B": [
        (2 * STEPS, "stage II: an image's target"), (2 * STEPS, "dinov2_base: forward and backward"),
        (STEPS, "dinov2_base: AdamW"),
    ],
}  # fmt: skip
BLENDING = {
    "lift: a view, once": 0.00284,
    "lift: a view in a pass": 0.0009,
    "colour: a step": 0.00284,
    "stage II: an image's target": 0.00074,
}
"""Seconds that gsplat takes on an H100 to blend 64 channels of a million Gaussians, and back where the stage goes back:
of whole pictures, and of the samples of a pass (measured, docs/costs.md). An RTX 4090 has as many multiprocessors."""


def main(config: Config) -> None:
    works: dict[str, Work] = {}
    with tempfile.TemporaryDirectory() as folder, pretend_cuda() as card, replace_kernels() as calls:
        counts = Counts(card, calls)
        works |= count_steps(counts, Path(folder))
        # At the paper's size one view is blended at a time.
        with mock.patch("fit3d_ns.lifting.blending.choose_views_per_call", lambda *_: 1):
            works |= count_lift(counts, Path(folder))
        for name in ("dinov2_small", "dinov2_base"):
            works |= count_backbone(counts, name)
    config.output_path.write_text(json.dumps(works, indent=2))
    print(
        "| counted | launches | GB | GFLOP | waits of the host | blendings of 64 channels |\n|---|---|---|---|---|---|"
    )
    for name, work in works.items():
        numbers = (
            f"{work['launches']:.0f} | {work['bytes'] / 1e9:.3g} | {work['flops'] / 1e9:.3g} | {work['waits']:.1f}"
        )
        print(f"| {name} | {numbers} | {work['blendings']:.1f} |")
    print(f"\n| stage | {' | '.join(f'{name}, at least s' for name in CARDS)} |\n|---|{'---|' * len(CARDS)}")
    for stage, parts in STAGES.items():
        seconds = [
            sum(factor * compute_seconds(works[name], speed, BLENDING.get(name, 0.0)) for factor, name in parts)
            for speed in CARDS.values()
        ]
        print(f"| {stage} | {' | '.join(f'{value:.1f}' for value in seconds)} |")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
