"""Compares five ways of lifting a scene at one geometry, and measures how the lift scales.

    python scripts/benchmark_lifting.py --data SCENE --backbone-weights FILE --output-path R.json
    python scripts/benchmark_lifting.py --scaling --output-path R.json

Geometry comes from a short colour training (see `lifting_colour.py`). `joint` is the paper's schedule: one feature step
at each colour step; `gradient` descends on the finished geometry; `weighted_sum` and `cg` are the closed form read with
the PCA decoder; `default` is `solve_features` as shipped. `feature_seconds` counts feature passes and solves, and
neither the backbone nor the disk: tokens of all methods wait in memory.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from lifting_colour import ColourTraining
from lifting_methods import (
    JointTraining,
    Lifted,
    PeakMemory,
    create_closed_form_configs,
    lift_by_gradient,
    lift_closed_form,
    measure,
)
from lifting_run import measure_run
from lifting_scaling import AXES, measure_scaling
from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis, fit_colours, fit_pca, map_to_colours
from fit3d_ns.data.images import save_image
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.features import create_extractor
from fit3d_ns.lifting.blending import prepare_views
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.solver import solve_features
from fit3d_ns.lifting.views import LiftView, create_lift_views
from fit3d_ns.rasterization import rasterize_features
from fit3d_ns.scene import ActivatedGaussians, PosedCapture, create_posed_capture
from fit3d_ns.utils.files import write_json
from fit3d_ns.utils.progress import notice, track
from fit3d_ns.utils.results import collect_versions

LEARNING_RATES = (1e-3, 1e-2, 1e-1)
"""Of these, gradient descent on fixed geometry gets the one with the lowest held-out error, to its advantage."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured, on what."""

    output_path: Path
    """JSON file with all figures."""
    data: Path | None = None
    """Scene folder in any layout the method reads; None measures only what needs no scene."""
    backbone: str = "vit_tiny_patch16_224"
    """Backbone whose tokens are lifted."""
    backbone_weights: Path | None = None
    """Weights of the backbone; None downloads timm's."""
    steps: int = 1000
    """Colour steps, and so feature steps of `joint`."""
    gradient_steps: int = 500
    """Steps of `gradient`, for each learning rate tried."""
    joint_rate: Literal["scaled", "paper"] = "scaled"
    """`paper` keeps 6.25e-5, made for 30,000 steps; `scaled` multiplies it by 30,000 / steps."""
    max_points: int | None = 30_000
    """At most this many of the scene's points become Gaussians; None takes all."""
    dims: tuple[int, ...] = (16, 32, 64, 128)
    """Feature dimensions of the dimension table; empty for none."""
    picture_path: Path | None = None
    """PNG with the PCA colours of one held-out view: tokens, then each method."""
    methods: bool = True
    """Compare the methods at one geometry; off, only what is asked for below is measured."""
    run_steps: int = 0
    """Also train a whole run of this many steps, and compare its time with that of its colour alone; 0 for none."""
    scaling: bool = False
    """Also measure time and memory against views, Gaussians and dims on synthetic scenes."""
    lift: LiftConfig = LiftConfig()
    """What `default` is."""


def main(config: BenchmarkConfig) -> None:
    record: dict[str, Any] = {"settings": asdict(config), "versions": collect_versions()}
    if config.data is not None and config.methods:
        record.update(measure_scene(config))
    if config.data is not None and config.run_steps > 0:
        record["run"] = measure_run(config.data, config.backbone, config.backbone_weights, config.run_steps)
    if config.scaling:
        record["scaling"] = measure_scaling(AXES)
    write_json(config.output_path, record)
    notice(f"Figures: {config.output_path}")


def measure_scene(config: BenchmarkConfig) -> dict[str, Any]:
    """Trains the geometry with `joint` beside it, then measures every method on it."""
    assert config.data is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capture = create_posed_capture(read_capture(config.data))
    tokens = extract_tokens(capture, config, device)
    colour = ColourTraining(capture, device, config.max_points)
    train, test = (
        create_lift_views(capture, capture.select(split), lambda view: tokens[view.name]) for split in ("train", "test")
    )
    joint = JointTraining(
        colour.num_gaussians, config.lift.feature_dim, tokens, config.steps, config.joint_rate, device
    )
    with PeakMemory() as memory:
        colour.run(config.steps, joint.on_step)
    gaussians = colour.gaussians
    lifted = {"joint": joint.finish(len(train), memory.peak_mb)}
    for name, closed_form in create_closed_form_configs(config.lift).items():
        lifted[name] = lift_closed_form(gaussians, train, closed_form)
    mean_token = torch.cat([tokens[view.name].float().flatten(0, 1) for view in train]).mean(dim=0)
    candidates = [
        lift_by_gradient(gaussians, train, config.lift.feature_dim, config.gradient_steps, rate)
        for rate in LEARNING_RATES
    ]
    lifted["gradient"] = min(candidates, key=lambda item: measure(item, gaussians, test, mean_token)["feature_l1"])
    methods = {
        name: measure(lifted[name], gaussians, test, mean_token)
        for name in ("joint", "gradient", "weighted_sum", "cg", "default")
    }
    print_table(methods)
    if config.picture_path is not None:
        save_pictures(lifted, gaussians, test[len(test) // 2], config.picture_path)
    return {
        "geometry": {
            "num_gaussians": len(gaussians),
            "psnr": colour.compute_psnr("test"),
            "colour_seconds": colour.seconds,
            "num_train": len(train),
            "num_test": len(test),
        },
        "methods": methods,
        "dims": measure_dims(gaussians, train, test, config),
    }


def extract_tokens(capture: PosedCapture, config: BenchmarkConfig, device: torch.device) -> dict[str, Tensor]:
    """Patch tokens [h, w, E] of all views by name, half precision, in memory."""
    extractor = create_extractor(config.backbone, config.backbone_weights, device=device)
    tokens = {}
    for view in track(capture.views, "Extracting tokens"):
        # (H, W, 3) -> (1, 3, H, W)
        image = capture.load_image(view).permute(2, 0, 1)[None].to(device).float() / 255.0
        output = extractor(image)
        tokens[view.name] = output.patch_tokens[0].reshape(*output.patch_grid, -1).half().cpu()
    return tokens


def measure_dims(
    gaussians: ActivatedGaussians, train: list[LiftView], test: list[LiftView], config: BenchmarkConfig
) -> list[dict[str, Any]]:
    """Variance kept by the basis beside the held-out error after lifting, for each dimension."""
    embed_dim = train[0].read_tokens(torch.device("cpu")).shape[-1]
    rows = []
    for dim in config.dims:
        if dim > embed_dim:
            notice(f"No row for {dim} dims: the backbone's tokens have {embed_dim}.")
            continue
        lift = replace(config.lift, feature_dim=dim)
        with PeakMemory() as memory:
            result = solve_features(gaussians, train, lift)
        seconds = sum(result.seconds.values())
        lifted = Lifted(result.features, result.decoder, seconds, result.num_passes, memory.peak_mb)
        figures = measure(lifted, gaussians, test, result.basis.mean)
        rows.append({"feature_dim": dim, "variance_kept": result.basis.explained_share, **figures})
        row = rows[-1]
        print(
            f"D = {dim:>3}: variance kept {row['variance_kept']:.3f}, L1 {row['feature_l1']:.4f}, "
            f"cosine {row['feature_cosine']:.4f}, {row['feature_seconds']:.1f} s",
            flush=True,
        )
    return rows


def print_table(methods: dict[str, dict[str, Any]]) -> None:
    """One line per method, the constant guess first."""
    first = next(iter(methods.values()))
    print(f"{'method':<14}{'L1':>9}{'cosine':>9}{'seconds':>10}{'passes':>8}{'peak MB':>9}  read by")
    print(f"{'mean token':<14}{first['mean_token_l1']:>9.4f}{first['mean_token_cosine']:>9.4f}")
    for name, row in methods.items():
        print(
            f"{name:<14}{row['feature_l1']:>9.4f}{row['feature_cosine']:>9.4f}{row['feature_seconds']:>10.2f}"
            f"{row['passes']:>8.1f}{row['peak_mb']:>9.0f}  {row['token_reading']}",
            flush=True,
        )


@torch.no_grad()
def save_pictures(lifted: dict[str, Lifted], gaussians: ActivatedGaussians, view: LiftView, path: Path) -> None:
    """Tokens and all methods side by side, in the colours of the tokens' own first three components."""
    prepared = prepare_views(gaussians, [view])
    basis: PcaBasis = fit_pca(prepared.tokens, 3)
    basis = fit_colours(basis, prepared.tokens)
    # The tokens themselves, each held constant over its patch.
    identity = torch.nn.functional.interpolate(
        prepared.tokens.permute(2, 0, 1)[None], size=(view.camera.height, view.camera.width), mode="nearest"
    )[0].permute(1, 2, 0)
    coefficients = (identity - basis.mean) @ basis.components.T
    pictures = [((coefficients - basis.colour_low) / (basis.colour_high - basis.colour_low)).clamp(0.0, 1.0)]
    for name in ("joint", "gradient", "weighted_sum", "cg", "default"):
        low = rasterize_features(lifted[name].features, prepared.info)[0]
        decoder = lifted[name].decoder.project(basis.components, basis.mean)
        pictures.append(map_to_colours(decoder(low, prepared.alphas), basis, prepared.alphas))
    row = torch.cat([picture.cpu() for picture in pictures], dim=1)
    save_image((row * 255.0).round().to(torch.uint8), path)
    notice(f"Picture, tokens then joint, gradient, weighted sum, CG, default: {path}")


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig))
