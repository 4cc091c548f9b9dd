"""`fit3d-lift`: a backbone's features onto Gaussians that already exist: any splatfacto run, a PLY, a scene file."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from fit3d_ns.cli.command import run_command
from fit3d_ns.cli.export import describe_scene
from fit3d_ns.features import FeatureCache, FeatureCacheConfig, describe_backbone
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.lift_forecast import LiftForecast, forecast_lift
from fit3d_ns.lifting.lift_scene import LiftSceneConfig, check_dimensions, lift_scene
from fit3d_ns.lifting.lift_source import LiftSource, compare_with_photographs, create_lift_source, read_scene_source
from fit3d_ns.lifting.ply_world import PlyConfig, read_ply_source
from fit3d_ns.scene import save_scene
from fit3d_ns.scene.scene_costs import find_geometry_seconds
from fit3d_ns.utils.files import write_json
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.results import ResultRecord

STATE_SUFFIX = ".lift-state"
"""Behind the output's name: what an interrupted lift goes on from."""
_FLAT = tyro.conf.arg(name="")


@dataclass(frozen=True)
class LiftCommand:
    """What is lifted from, whose features, and where the scene goes. Give one of --load-config, --ply and --scene."""

    output_path: Path
    """The scene file to write, `.safetensors`; its figures go beside it, and so does the state of an interrupted lift,
    which the same command goes on from."""
    load_config: Path | None = None
    """A splatfacto run, ours or nerfstudio's (also splatfacto-big, antialiased, with camera optimizer): its config.yml
    or folder. nerfstudio's config is code: read only those of people you trust."""
    ply: Path | None = None
    """Gaussians as Inria's code, gsplat, nerfstudio or SuperSplat write them; needs --data."""
    scene: Path | None = None
    """A scene file to lift anew with another backbone or other settings: cameras and Gaussians are read from it."""
    data: Path | None = None
    """The captured scene folder: of a PLY, or where a run's or scene's dataset lies now if it was moved."""
    backbone: str = "dinov2_small"
    """`dinov2_small dinov2_base dinov2_reg_small clip_base mae_base deit3_base`, any timm ViT id, a fine-tuned
    backbone's folder, or `random:<timm id>` for untrained weights (tests only)."""
    backbone_weights: Path | None = None
    """Weights file (.safetensors, .pth) instead of timm's download, for machines without network."""
    normalization: Literal["timm", "imagenet"] = "timm"
    """Mean and standard deviation: the backbone's own, or ImageNet's for all as in the authors' code."""
    feature_cache: Path = Path.home() / ".cache" / "fit3d_ns" / "features"
    """Folder of the feature cache, shared with runs: tokens of a photograph and a backbone are extracted once."""
    include_sh: bool = False
    """Also store how colour depends on the direction; the file then grows by 90 bytes per Gaussian at degree 3."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Lift one view only and say how long everything would take and how much memory; no scene is written."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to work; `auto` takes CUDA where there is one."""
    from_ply: Annotated[PlyConfig, _FLAT] = field(default_factory=PlyConfig)
    options: Annotated[LiftSceneConfig, _FLAT] = field(default_factory=LiftSceneConfig)
    lift: Annotated[LiftConfig, _FLAT] = field(default_factory=LiftConfig)

    @property
    def figures_path(self) -> Path:
        """The JSON beside the scene."""
        return self.output_path.with_suffix(".json")

    @property
    def state_path(self) -> Path:
        """What an interrupted lift goes on from."""
        return self.output_path.with_name(self.output_path.name + STATE_SUFFIX)


def lift(command: LiftCommand) -> None:
    """Reads, lifts, writes the scene and a JSON with its figures."""
    _check(command)
    device = _choose_device(command.device)
    backbone = describe_backbone(command.backbone, command.backbone_weights, command.normalization)
    check_dimensions(command.lift, backbone)
    cache = FeatureCache(FeatureCacheConfig(directory=command.feature_cache), backbone)
    source = read_source(command, device)
    if source.num_dropped:
        notice(f"Left out {source.num_dropped} Gaussians with NaN, infinite or oversized numbers.")
    if command.dry_run:
        forecast = forecast_lift(source, cache, command.lift, command.options, device, command.include_sh)
        print(describe_forecast(forecast))
        return
    try:
        scene = lift_scene(
            source,
            backbone,
            cache,
            command.lift,
            command.options,
            device=device,
            state_path=command.state_path,
        )
    except KeyboardInterrupt:
        if command.state_path.is_file():
            notice(f"The lift so far is kept in {command.state_path}; the same command goes on from there.")
        raise
    save_scene(scene, command.output_path, include_sh=command.include_sh)
    record = ResultRecord(
        kind="lift",
        metrics=dict(scene.figures),
        settings={"source": source.description, "backbone": backbone.to_metadata(), "device": device},
        is_random=backbone.is_random,
    )
    description = describe_scene(scene, command.output_path)
    # The record's metrics are the scene's figures; once is enough.
    del description["run"]
    write_json(command.figures_path, {**dataclasses.asdict(record), **description})
    print(f"Scene: {command.output_path}\nFigures: {command.figures_path}")
    print(_summarize(dict(scene.figures)))


def read_source(command: LiftCommand, device: str) -> LiftSource:
    """Gaussians and views from whichever of the three was given."""
    if command.ply is not None:
        assert command.data is not None
        return read_ply_source(command.ply, command.data, command.from_ply, device)
    if command.scene is not None:
        source = read_scene_source(command.scene, command.data)
    else:
        assert command.load_config is not None
        source = _read_run_source(command.load_config, command.data)
    fit = compare_with_photographs(source, device)
    smallest = command.from_ply.smallest_psnr
    if not fit.is_seen or fit.psnr < smallest:
        # Geometry and cameras were trained together: a low figure means an early stop, or other photographs.
        notice(
            f"Renderings of {source.description} are {fit.psnr:.1f} dB from their photographs (below {smallest:g}); "
            "was the run trained to its end, and does --data hold the same photographs?"
        )
    return source


def describe_forecast(forecast: LiftForecast) -> str:
    """What `--dry-run` prints."""
    tokens = "tokens cached" if forecast.is_cached else "backbone included"
    return (
        f"{forecast.num_gaussians} Gaussians, {forecast.num_views} views to lift, {forecast.num_held_out} held out\n"
        f"Time: about {forecast.seconds:.0f} s (photographs {forecast.token_seconds:.0f} s, {tokens}; solve at most "
        f"{forecast.solve_seconds:.0f} s; evaluation {forecast.evaluation_seconds:.0f} s)\n"
        f"Memory: about {forecast.memory_mb:.0f} MB; scene file: {forecast.file_mb:.0f} MB"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(
        LiftCommand,
        lift,
        prog="fit3d-lift",
        description="Lifts a vision transformer's features onto Gaussians that already exist, in closed form.",
        args=args,
    )


def _check(command: LiftCommand) -> None:
    """Raises ValueError for flags that do not go together."""
    given = [f"--{name}" for name, value in (("load-config", command.load_config), ("ply", command.ply),
                                              ("scene", command.scene)) if value is not None]  # fmt: skip
    if len(given) != 1:
        what = "none is given" if not given else " and ".join(given) + " are given"
        raise ValueError(f"Give one of --load-config, --ply and --scene to lift from; {what}.")
    if command.ply is not None and command.data is None:
        raise ValueError(f"A PLY has no cameras: give the folder of the photographs of {command.ply} with --data.")
    if command.output_path.suffix != ".safetensors":
        raise ValueError(f"--output-path {command.output_path} must end in .safetensors.")
    if command.output_path.is_dir():
        raise ValueError(f"--output-path {command.output_path} is a folder; give the name of a file in it.")


def _choose_device(device: Literal["auto", "cuda", "cpu"]) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine offers no CUDA device (see fit3d-info); take --device cpu.")
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _read_run_source(path: Path, data: Path | None) -> LiftSource:
    """A nerfstudio run; imported here so that PLYs are lifted where nerfstudio is not installed."""
    try:
        from fit3d_ns.plugin.run_reader import read_run
        from fit3d_ns.plugin.summary import read_run_figures
    except ImportError as error:
        raise ValueError(
            f"{path} is a nerfstudio run, and nerfstudio cannot be imported ({error}); install it, or export the run "
            "as a PLY and lift that."
        ) from error
    run = read_run(path, data)
    raw = {
        "means": run.gauss_params["means"],
        "quats": run.gauss_params["quats"],
        "log_scales": run.gauss_params["scales"],
        "opacity_logits": run.gauss_params["opacities"],
        "sh_dc": run.sh_dc,
        "sh_rest": run.gauss_params["features_rest"],
    }
    description = f"{run.config.method_name} run {run.config_path.parent.name}, step {run.step}"
    return create_lift_source(
        raw,
        run.capture,
        description,
        rasterize_mode=run.rasterize_mode,
        training_seconds=find_geometry_seconds(read_run_figures(run.config_path)),
    )


def _summarize(figures: dict[str, object]) -> str:
    seconds = figures["seconds"]
    assert isinstance(seconds, dict)
    took = f"{figures['num_train_views']} views lifted in {sum(seconds.values()):.1f} s"
    if "feature_cosine" not in figures:
        return took
    cosine, l1 = (
        f"{figures[f'feature_{name}']:.4f} (mean token {figures[f'feature_{name}_mean_token']:.4f})"
        for name in ("cosine", "l1")
    )
    return f"{took}; held-out cosine {cosine}, L1 {l1}"


if __name__ == "__main__":
    main()
