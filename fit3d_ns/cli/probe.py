"""`fit3d-probe`: measures what features are worth: linear probes, nearest neighbours, normals, multi-view."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fit3d_ns.cli.command import Heading, create_main
from fit3d_ns.features.backbones import Normalization
from fit3d_ns.probing.datasets import LabelledOptions
from fit3d_ns.probing.depth import ClassTokenChoice
from fit3d_ns.probing.frozen_features import BackboneConfig
from fit3d_ns.probing.head_probe import CacheRule, Selection
from fit3d_ns.probing.probe_runs import DEFAULT_CONFIGS, PRESETS, ProbeRequest, Task, choose_values, run_probe
from fit3d_ns.training.processes import Precision
from fit3d_ns.utils.device import DeviceChoice
from fit3d_ns.utils.results import ResultRecord

Paths = tuple[Path, ...]


@dataclass(frozen=True)
class ProbeCommand:
    """Flags of the command; those that are not given take the task's defaults, or the paper's with `--paper`."""

    task: Annotated[Task, tyro.conf.Positional]
    """What is measured."""
    output_path: Annotated[Path, Heading("output")]
    """JSON record; seeds it already holds for the same settings are not run again."""
    test: Annotated[Paths, Heading("input")]
    """Folders that are measured: a scene with depth, a plain folder (images/, labels/ or depths/), or the root of an
    official set; for consistency, correspondence and normals captures with depth, or scene files;
    for correspondence also NAVI (the download, an object or one of its sets) or SPair-71k."""
    train: Paths = ()
    """Folders that heads are trained on. A single scene takes part whole, unless it is in --test as well."""
    backbones: Annotated[BackboneConfig, Heading("backbone")] = BackboneConfig()
    seeds: Annotated[tuple[int, ...], Heading("training")] = (0,)
    """Seeds; one head is trained for each, and the record has mean and spread."""
    paper: bool = False
    """Takes every value of the public code; flags that are given still win."""
    dinov3: bool = False
    """Takes the values of DINOv3's evaluation (segmentation, depth); flags that are given still win."""
    probe3d: bool = False
    """Takes probe3d's inputs (correspondence): tokens before the final norm, images padded to the patch grid, mean and
    deviation .5 (for NAVI and SPair-71k add --normalization imagenet), and --ratio-matches 1000."""
    num_iterations: int | None = None
    """Training iterations. By default 60 epochs but at least 800, and at most the published 40,000 (segmentation),
    38,400 (depth) or 12,500 (classification); the published number with --paper."""
    batch_size: int | None = None
    """Images per iteration over all devices; 16 (segmentation, depth) or 128 (classification) by default."""
    learning_rate: float | None = None
    """Peak learning rate (segmentation, depth). By default the published 1e-3 (segmentation, 768 inputs) or 1e-4
    (depth, 1152 inputs), scaled up for fewer iterations and narrower heads; unscaled with --paper."""
    short_side: int | None = None
    """Shorter side to which images are resized, pixels; by default 512, or twice the images' own if that is smaller
    (segmentation), or the images' own (depth); retrieval takes both."""
    head: Literal["linear", "dpt"] | None = None
    """Head of the depth and normals probes; `linear` by default, `dpt` is Table 12's."""
    class_token: ClassTokenChoice | None = None
    """Whose class token the depth probe reads beside the patch tokens. By default `auto`, the original's as published;
    `validated` trains a head with and one without it and keeps the better one on a part of the training data."""
    gradient_loss_weight: float | None = None
    """Weight of the depth probe's loss on differences between neighbouring pixels; 0 by default, also with --paper."""
    selection: Selection | None = None
    """Which checkpoint counts. By default the best on a tenth of the training data; with --paper the last
    (segmentation) or the best on the test data (depth, classification)."""
    cache: Annotated[CacheRule | None, Heading("machine")] = None
    """Whether frozen features are computed once, which replaces random crops and colours by fixed views. By default
    `auto`, which does so where they fit into --cache-gb; `never` with --paper."""
    cache_gb: float = 4.0
    """Most memory that kept features may take, in 1e9 bytes."""
    max_views: Annotated[int | None, Heading("view")] = None
    """Views per scene (consistency, correspondence, normals); 32 by default."""
    max_pairs: int | None = None
    """Pairs of views per scene (consistency, correspondence); 100 by default."""
    ratio_matches: int | None = None
    """Recall is also measured on this many most distinct matches of each pair, by Lowe's ratio test over all points of
    the grid, as probe3d measures it with 1000 (consistency, correspondence). By default only in NAVI."""
    angle_edges: tuple[float, ...] | None = None
    """Edges of the bins of viewing angles, degrees (consistency, correspondence); 0 15 30 60 180 by default, and
    0 30 60 90 120 for NAVI, where no wider ones are compared."""
    splits: tuple[Literal["train", "val", "test"], ...] | None = None
    """Which frames of a capture take part (consistency, correspondence, normals); all by default."""
    data_root: Path | None = None
    """Where the photographs of scene files are now, if they were moved (consistency, correspondence, normals): a
    capture's folder or one above several."""
    num_neighbours: Annotated[int | None, Heading("retrieval")] = None
    """Patches of the training images that each patch asks; 30 by default."""
    memory_patches: int | None = None
    """Most patches that are asked, drawn at random of all; 1,024,000 by default."""
    memory_views: int | None = None
    """Only so many views of each scene, evenly spread, are asked, by all its others in --train and --test; metrics also
    come by the angle between a view and the nearest of them."""
    data: Annotated[LabelledOptions, Heading("input")] = LabelledOptions()
    predictions: Annotated[Path | None, Heading("output")] = None
    """Folder for pictures of what the first seed's head predicts for some test frames (segmentation, depth)."""
    device: Annotated[DeviceChoice, Heading("machine")] = "auto"
    """Where the probe runs; `accelerate launch -m fit3d_ns.cli.probe ...` uses several devices."""
    precision: Precision = "fp32"
    """Precision in which the head is trained."""


def probe(command: ProbeCommand) -> None:
    record = run_probe(create_request(command))
    print(describe_metrics(record))
    print(f"Metrics: {command.output_path}")


def create_request(command: ProbeCommand) -> ProbeRequest:
    """Defaults or the paper's values first, flags that were given after; ValueError for one the task does not have."""
    presets = [name for name in PRESETS if getattr(command, name)]
    if len(presets) > 1:
        raise ValueError(f"--{' and --'.join(presets)} stand in each other's place; choose one.")
    preset = presets[0] if presets else ""
    if preset in ("dinov3", "probe3d") and command.task not in PRESETS[preset][0]:
        raise ValueError(f"--{preset} has values for {' and '.join(PRESETS[preset][0])}; leave it out.")
    config: Any
    config, run = choose_values(command.task, command.test, preset)
    of_tasks = {item.name for each in DEFAULT_CONFIGS.values() for item in fields(each)}
    given = {name: value for name, value in vars(command).items() if name in of_tasks and value is not None}
    for name in given:
        if not hasattr(config, name):
            raise ValueError(f"--{name.replace('_', '-')} means nothing to the {command.task} probe; leave it out.")
    if command.task == "normals" and command.num_iterations is not None and command.head != "dpt":
        raise ValueError("--num-iterations trains the head of --head dpt; the linear one is solved: leave it out.")
    chosen = {name: getattr(command, name) for name in ("selection", "cache") if getattr(command, name) is not None}
    backbones = command.backbones
    usual: dict[str, Normalization] = {"paper": "imagenet", "probe3d": "half"}
    same = "task output_path train test seeds device precision predictions".split()
    return ProbeRequest(
        backbones=replace(
            backbones,
            normalization=backbones.normalization or usual.get(preset, "timm"),
            patch_fit=backbones.patch_fit or ("pad-stretch" if command.paper else "pad"),
        ),
        config=replace(config, **given),
        run=replace(run, cache_gb=command.cache_gb, **chosen),
        options=command.data,
        **{name: getattr(command, name) for name in same},
    )


def describe_metrics(record: ResultRecord) -> str:
    """One line with the main metrics, mean and spread."""
    spread = record.metrics.get("spread", {})
    parts = []
    for name, value in record.metrics.items():
        if isinstance(value, (int, float)) and not name.startswith("num_"):
            deviation = f" +- {spread[name]:.4f}" if isinstance(spread.get(name), float) else ""
            parts.append(f"{name} {value:.4f}{deviation}")
    random = " (random weights: these metrics say nothing about quality)" if record.is_random else ""
    return f"{record.kind} {record.settings.get('assembly')}: {', '.join(parts)}{random}"


main = create_main("fit3d-probe", ProbeCommand, probe)
