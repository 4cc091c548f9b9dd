"""`fit3d-lift`: a backbone's features onto Gaussians that already exist: any splatfacto run, a PLY, a scene file."""

import dataclasses
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from fit3d_ns.cli.cluster import ClusterConfig, run_tasks, work_on_each
from fit3d_ns.cli.command import Heading, create_main, spell
from fit3d_ns.cli.export import describe_scene
from fit3d_ns.cli.runs import name_run, read_run_source, train_splats
from fit3d_ns.features import BackboneDescription, FeatureCache, create_extractor, describe_backbone
from fit3d_ns.features.backbones import Normalization
from fit3d_ns.lifting.config import LiftConfig, LiftSceneConfig
from fit3d_ns.lifting.lift_scene import LiftForecast, LiftSetup, forecast_lift, lift_to_file
from fit3d_ns.lifting.ply_sources import read_ply_source
from fit3d_ns.lifting.shared_lift import NUM_SHARED_ROUNDS, LiftTask, lift_together
from fit3d_ns.lifting.sources import LiftSource, PlyConfig, check_photographs, read_scene_source
from fit3d_ns.lifting.surfaces import Surface, SurfaceConfig, read_surface_source
from fit3d_ns.rasterization import prepare_rasterizer
from fit3d_ns.scene import FeatureScene, load_scene
from fit3d_ns.scene.splat_files import has_features, list_splats, read_model_name
from fit3d_ns.utils.device import DeviceChoice, choose_device
from fit3d_ns.utils.files import write_json
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.results import ResultRecord, load_result

DEFAULT_BACKBONE = "dinov2_small"
"""The backbone for sources that have no features yet."""


@dataclass(frozen=True)
class LiftCommand:
    """What is lifted from, whose features, where scenes go. Give one of --surface, --train, --load-config, --ply,
    --scene."""

    output_path: Annotated[Path, tyro.conf.arg(aliases=["--output-dir"]), Heading("output")]
    """The scene file to write, `.safetensors`, or a folder for one or several, named as what they are lifted from.
    Metrics go next to a scene, and so does the state of an interrupted lift, which the same command goes on from."""
    surface: Annotated[Surface | None, Heading("input")] = None
    """Geometry without training, from what the scenes of --data come with: `depth` of a sensor (`render_depth/`,
    `depth_file_path`), a triangle `mesh`, or the `points` of a dense cloud or laser scan."""
    train: int | None = None
    """Train Gaussians for the scenes of --data first, for so many steps (as good as any: 30000): `ns-train
    fit3d-features` in OUTPUT/splats, which goes on from its last checkpoint and is passed over once it is finished."""
    load_config: tuple[Path, ...] = ()
    """Splatfacto runs of all variants, ours or nerfstudio's: their config.yml or folder."""
    ply: Path | None = None
    """Gaussians as Inria's code, gsplat (all GPUs' ckpts/*.pt), nerfstudio or SuperSplat write them, or a run's folder;
    needs --data. A run of FiT3D's authors, or their pretrained_feat_gaussians_*.pth with the folder of its scenes as
    --data, keeps its features, unless --backbone names others or there is --shared-decoder."""
    scene: tuple[Path, ...] = ()
    """Scene files to lift again with another backbone or other settings: cameras and Gaussians are read from them."""
    data: tuple[Path, ...] = ()
    """The captured folder: of a PLY, of a run or scene whose data was moved, or with --surface of all scenes."""
    data_root: Path | None = None
    """Where the photographs of scene files are now, if they were moved: a capture's folder or one above several."""
    trust_config: bool = False
    """Also read runs of other packages' methods, whose config.yml names code that is run: only of people you trust."""
    shared_decoder: Annotated[bool, tyro.conf.FlagCreatePairsOff, Heading("output")] = False
    """Lift all scenes on one basis, with one decoder and one set of colours; each keeps a little less of its tokens.
    With --shard all shards are run three times, each time once all have ended."""
    backbone: Annotated[str | None, Heading("backbone")] = None
    """One of `dinov2_small dinov2_base dinov2_reg_small clip_base mae_base deit3_base toy_rooms_vit`, a timm ViT id,
    or a fine-tuned folder. By default, with weights and normalization, that of the first run or scene, else
    dinov2_small."""
    backbone_weights: Path | None = None
    """Weights file (.safetensors, .pth) instead of timm's download, for machines without network."""
    normalization: Normalization | None = None
    """Mean and standard deviation: the backbone's own (`timm`, the default), or ImageNet's, as in the authors' code."""
    feature_cache: Path = Path.home() / ".cache" / "fit3d_ns" / "features"
    """Folder of the feature cache, shared with runs: tokens of a photograph and a backbone are extracted once."""
    include_sh: Annotated[bool, Heading("output")] = False
    """Also store how colour depends on the direction; the file then grows by 90 bytes per Gaussian at degree 3."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Lift again what is lifted already from the same source with the same settings."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Lift one view only and say how long everything would take and how much memory; no scene is written."""
    device: Annotated[DeviceChoice, Heading("machine")] = "auto"
    """Where to work; `auto` takes CUDA where there is one."""
    from_ply: Annotated[PlyConfig, Heading("PLY")] = field(default_factory=PlyConfig)
    from_surface: Annotated[SurfaceConfig, Heading("surface")] = field(default_factory=SurfaceConfig)
    options: Annotated[LiftSceneConfig, Heading("view")] = field(default_factory=LiftSceneConfig)
    lift: LiftConfig = field(default_factory=LiftConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def keeps_features(self) -> bool:
        return self.ply is not None and not self.shared_decoder and has_features(self.ply, self.backbone)

    @property
    def is_folder(self) -> bool:
        is_packed = self.ply is not None and self.ply.suffix == ".pth"
        is_no_file = self.output_path.suffix != ".safetensors" if self.surface else not self.output_path.suffix
        if is_packed or self.train or is_no_file or self.output_path.is_dir():
            return True
        return self.shared_decoder or self.num_scenes > 1 or self.cluster != ClusterConfig()

    @property
    def is_captured(self) -> bool:
        return bool(self.surface or self.train)

    @property
    def num_scenes(self) -> int:
        return len(self.data) if self.is_captured else len(self.load_config) + len(self.scene) or 1


def lift(command: LiftCommand) -> None:
    _check(command)
    if command.cluster.on == "here" or command.dry_run:
        failed = lift_here(command, command.cluster)
    else:
        choose_backbone(command)  # What is missing is said before anything waits in a queue.
        names = [task.output_path.stem for task in create_tasks(command, command.device)]
        rounds = NUM_SHARED_ROUNDS if command.shared_decoder else 1
        failed = run_tasks(command.cluster, names, command.output_path, partial(lift_here, command), rounds)
    if failed:
        _report(failed, command)


def lift_here(command: LiftCommand, cluster: ClusterConfig) -> dict[str, str]:
    """Lifts a shard of the command's scenes in this process; returns what was wrong with those that failed, by name."""
    device = choose_device(command.device).type
    prepare_rasterizer(device)
    backbone = choose_backbone(command)
    cache = FeatureCache(command.feature_cache, backbone)
    setup = LiftSetup(cache, command.lift, command.options, device, command.include_sh)
    command.lift.check_width(backbone.embed_dim, backbone.label)
    if not cache.folder.exists() and not command.keeps_features:
        create_extractor(backbone)  # Weights that cannot be had are said before scenes are read.
    together = create_tasks(command, device)
    tasks = cluster.choose(together)
    finish = partial(_write_metrics, backbone=backbone, device=device)
    if command.dry_run:
        forecasts = []
        for task in tasks:
            source = task.read()
            check_photographs(source, device)
            if source.decoder is None:
                forecasts.append(forecast_lift(source, setup))
        print("\n".join(map(describe_forecast, forecasts)) or "The features are kept as they are: nothing is lifted.")
        if len(forecasts) > 1:
            print(f"{len(forecasts)} scenes: about {sum(forecast.seconds for forecast in forecasts):.0f} s together")
        return {}

    def lift_one(index: int) -> None:
        task = tasks[index]
        scene = lift_to_file(task.read(), setup, task.output_path, task.get_path("lift-state"), command.overwrite)
        finish(scene, task.output_path)

    try:
        if command.shared_decoder:
            options: dict[str, Any] = {"overwrite": command.overwrite, "on_scene": finish}
            failed, missing = lift_together(together, setup, tasks, work_on_each, **options)
            waits = f"Waits for {len(missing)} files of other scenes ({missing[:1]}); run all shards once more."
            if missing and command.cluster.on != "here":  # After the last task nobody else comes.
                return dict.fromkeys((task.output_path.stem for task in tasks), waits) | failed
            if missing:
                notice(waits)
            return failed
        if command.is_folder:
            return work_on_each([task.output_path for task in tasks], lift_one)
        lift_one(0)
        return {}
    except KeyboardInterrupt:
        for state in filter(Path.is_file, (task.get_path("lift-state") for task in tasks)):
            notice(f"The lift so far is kept in {state}; the same command goes on from there.")
        raise


def choose_backbone(command: LiftCommand) -> BackboneDescription:
    """The backbone that is asked for, else the source's own; ValueError if it is unknown or has no weights."""
    name = command.backbone
    if name is None:
        own = _find_own_backbone(command)
        if own is not None:
            notice(f"Features of {own.label}, as the source has them; another with --backbone.")
            return own
        if command.keeps_features:
            raise ValueError(f"{command.ply} does not say whose features it holds; name the ViT with --backbone.")
        name = DEFAULT_BACKBONE
        notice(f"Features of {name}; another with --backbone.")
    usual: Normalization = "imagenet" if command.keeps_features else "timm"  # FiT3D's authors use ImageNet's.
    return describe_backbone(name, command.backbone_weights, command.normalization or usual)


def create_tasks(command: LiftCommand, device: str) -> list[LiftTask]:
    """What is read, and where each scene goes; ValueError where two scenes would get one name."""
    trust, data = command.trust_config, next(iter(command.data), None)
    readers: list[tuple[str, Callable[[], LiftSource]]] = []
    if command.surface is not None:
        options = command.surface, command.from_surface, command.from_ply, device
        readers += [(name_capture(path), partial(read_surface_source, path, *options)) for path in command.data]
    elif command.train is not None:
        splats = partial(train_splats, command.output_path / "splats", command.train, device)
        readers += [(name_capture(path), partial(splats, path, name_capture(path))) for path in command.data]
    elif command.ply is not None:
        assert data is not None
        for name, folder, read in list_splats(command.ply, data, command.keeps_features):
            readers.append((name, partial(read_ply_source, command.ply, folder, command.from_ply, device, read)))
    root = command.data_root or data
    readers += [(path.stem, partial(read_scene_source, path, root)) for path in command.scene]
    readers += [(name_run(path), partial(read_run_source, path, data, trust)) for path in command.load_config]
    names = [name for name, _ in readers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice and command.is_folder:
        raise ValueError(f"Two scenes would be written as {twice[0]}.safetensors; lift them by commands of their own.")
    output = command.output_path
    return [
        LiftTask(partial(_read, read), output / f"{name}.safetensors" if command.is_folder else output)
        # The same order on every machine, whatever its shell makes of a pattern.
        for name, read in sorted(readers, key=lambda reader: reader[0])
    ]


def name_capture(path: Path) -> str:
    """The name of a captured scene's folder, that of ScanNet++'s scene for its `dslr`."""
    folder = path.parent if path.suffix == ".json" else path
    folder = folder.resolve() if folder.name == ".." else folder.absolute()
    return folder.parent.name if folder.name == "dslr" else folder.name


def describe_forecast(forecast: LiftForecast) -> str:
    """What `--dry-run` prints."""
    tokens = "tokens cached" if forecast.is_cached else "backbone included"
    return (
        f"{forecast.num_gaussians} Gaussians, {forecast.num_views} views to lift, {forecast.num_held_out} held out\n"
        f"Time: about {forecast.seconds:.0f} s (photographs {forecast.token_seconds:.0f} s, {tokens}; solve at most "
        f"{forecast.solve_seconds:.0f} s; evaluation {forecast.evaluation_seconds:.0f} s)\n"
        f"Memory: about {forecast.memory_mb:.0f} MB; scene file: {forecast.file_mb:.0f} MB"
    )


def _check(command: LiftCommand) -> None:
    """Raises ValueError for flags that do not go together."""
    names = ("surface", "train", "load_config", "ply", "scene")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(command, name)]
    if len(given) != 1:
        what = "none is given" if not given else " and ".join(given) + " are given"
        raise ValueError(f"Give one of --surface, --train, --load-config, --ply and --scene to lift from; {what}.")
    if command.ply is not None and not command.data:
        raise ValueError(f"A PLY has no cameras: give the folder of the photographs of {command.ply} with --data.")
    ply, surface = command.from_ply, command.from_surface
    for owner, is_given, config, options in (
        ("--ply", command.ply, ply, "ply_world ply_transform align dataparser_transforms rasterize_mode"),
        ("--surface", command.surface, surface, "cell_pixels refine_steps"),
        ("--surface depth", command.surface == "depth", surface, "depth_scale"),
        ("--surface mesh or points", command.surface in ("mesh", "points"), surface, "mesh"),
    ):
        for name in options.split() if not is_given else ():
            if getattr(config, name) != getattr(type(config)(), name):
                raise ValueError(f"--{name.replace('_', '-')} belongs to {owner}, which is not given.")
    if command.is_captured and not command.data:
        raise ValueError(f"{given[0]} needs the folders of the scenes with --data.")
    if command.train and command.dry_run:
        raise ValueError("--dry-run needs Gaussians, and those of --train are trained when the scene is lifted.")
    if command.surface is not None and command.num_scenes > 1 and command.from_surface.mesh is not None:
        raise ValueError("--mesh is the file of one scene; lift scenes with own files by commands of their own.")
    if not command.is_captured and len(command.data) > (1 if command.num_scenes == 1 else 0):
        raise ValueError(
            "--data is the folder of one scene; where several moved, --data-root takes the one above them."
        )
    if command.is_folder:
        is_named = command.output_path.suffix == ".safetensors" and not command.output_path.is_dir()
        if is_named or command.output_path.is_file():
            raise ValueError(f"--output-path {command.output_path} must be a folder: that is where several scenes go.")
        return
    if command.output_path.suffix != ".safetensors":
        raise ValueError(f"--output-path {command.output_path} must end in .safetensors.")


def _report(failed: dict[str, str], command: LiftCommand) -> None:
    """Says which scenes failed and the command that repeats them; raises ValueError."""
    for name, sentence in failed.items():
        print(f"Failed: {name}: {sentence}")
    # With a shard also a single scene goes into the folder.
    shard = command.cluster.shard if command.shared_decoder else None if len(failed) > 1 else "1/1"
    cluster = dataclasses.replace(command.cluster, shard=shard)
    again = dataclasses.replace(command, cluster=cluster)
    # Without a backbone's name the first of the sources says it; what is finished is passed over in any case.
    if command.is_captured and not command.shared_decoder:
        again = dataclasses.replace(again, data=tuple(path for path in command.data if name_capture(path) in failed))
    elif command.backbone is not None and command.ply is None and not command.shared_decoder:
        scenes = tuple(path for path in command.scene if path.stem in failed)
        runs = tuple(path for path in command.load_config if name_run(path) in failed)
        again = dataclasses.replace(again, scene=scenes, load_config=runs)
    print(f"Repeat with:\nfit3d-lift {shlex.join(spell(again))}")
    raise ValueError(f"{len(failed)} of the scenes failed; the last, {name}, because: {sentence}")


def _find_own_backbone(command: LiftCommand) -> BackboneDescription | None:
    """The backbone that the first scene or run has features of; None where it has none."""
    weights, normalization = command.backbone_weights, command.normalization
    if command.scene:
        return load_scene(command.scene[0]).backbone.with_weights(weights, normalization=normalization)
    if command.ply is not None and command.keeps_features and (model := read_model_name(command.ply)):
        return describe_backbone(model, weights, normalization or "imagenet")
    if not command.load_config:
        return None
    try:
        from fit3d_ns.plugin.run_reader import read_backbone
    except ImportError:
        # Reading the run says what is missing.
        return None
    found = read_backbone(command.load_config[0], command.trust_config)
    if found is None:
        return None
    name, recorded, usual = found
    weights = weights or (recorded if recorded is not None and recorded.is_file() else None)
    return describe_backbone(name, weights, normalization or usual)  # type: ignore[arg-type]


def _read(read: Callable[[], LiftSource]) -> LiftSource:
    """Reads a source and says what was left out of it."""
    source = read()
    if source.num_dropped:
        notice(f"Left out {source.num_dropped} Gaussians with NaN, infinite or oversized numbers.")
    return source


def _write_metrics(scene: FeatureScene, path: Path, backbone: BackboneDescription, device: str) -> None:
    """Writes the scene's JSON, if it is not there yet, and prints a summary."""
    metrics: dict[str, Any] = dict(scene.metrics)
    metrics_path = path.with_suffix(".json")
    with suppress(ValueError):
        if load_result(metrics_path).metrics == metrics:
            notice(f"{path} is lifted already with these settings; --overwrite lifts it again.")
            return
    settings = {"source": metrics["source"], "backbone": backbone.to_metadata(), "device": device}
    record = ResultRecord("lift", metrics, settings, backbone.is_random)
    description = describe_scene(scene, path)
    # The record holds the scene's metrics already.
    del description["run"]
    write_json(metrics_path, {**dataclasses.asdict(record), **description})
    summary = "Features and decoder as they were"
    if "seconds" in metrics:
        summary = f"{metrics['num_train_views']} views lifted in {sum(metrics['seconds'].values()):.1f} s"
    if "feature_cosine" in metrics:
        cosine, l1 = (
            f"{metrics[f'feature_{name}']:.4f} (mean token {metrics[f'feature_{name}_mean_token']:.4f})"
            for name in ("cosine", "l1")
        )
        summary += f"; held-out cosine {cosine}, L1 {l1}"
    print(f"Scene: {path}\nMetrics: {metrics_path}\n{summary}\nTo look at it: fit3d-view {path}")


main = create_main("fit3d-lift", LiftCommand, lift)
