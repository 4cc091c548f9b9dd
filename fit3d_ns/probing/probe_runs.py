"""`run_probe`: from folders, backbones and seeds to one result file; a finished seed is never run twice."""

import io
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from fit3d_ns.data.images import MILLIMETRES_PER_METRE
from fit3d_ns.probing.classification import PAPER_CLASSIFICATION, ClassificationConfig, ClassificationProbe
from fit3d_ns.probing.datasets import LabelledOptions, check_options, read_labelled_set
from fit3d_ns.probing.datasets.frames import LabelledSet, LabelledSplit, check_same_kind, compute_data_hash, join_sets
from fit3d_ns.probing.datasets.navi import NAVI_EDGES, find_navi_sets
from fit3d_ns.probing.datasets.scannet import is_capture, is_scannetpp_scene
from fit3d_ns.probing.depth import DINOV3_DEPTH, PAPER_DEPTH, DepthConfig, DepthProbe
from fit3d_ns.probing.frozen_features import Assembler, BackboneConfig, create_frozen_backbones, describe_backbones
from fit3d_ns.probing.head_probe import HeadProbe, MapProbe, ProbeSets, RunConfig, create_sets, resolve_iterations
from fit3d_ns.probing.keypoints import is_spair, measure_keypoints
from fit3d_ns.probing.multiview import MultiviewConfig, ViewsConfig, load_views, measure_views
from fit3d_ns.probing.normals import NormalsConfig, measure_dpt_normals, measure_normals
from fit3d_ns.probing.result_records import ResultFile, read_costs, read_report
from fit3d_ns.probing.retrieval import RetrievalConfig, measure_retrieval, split_views
from fit3d_ns.probing.segmentation import DINOV3_SEGMENTATION, PAPER_SEGMENTATION, SegmentationConfig, SegmentationProbe
from fit3d_ns.training.processes import Precision, create_accelerator
from fit3d_ns.utils.device import DeviceChoice, choose_device
from fit3d_ns.utils.files import hash_bytes, hash_file
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.results import ResultRecord, load_result
from fit3d_ns.utils.selection import select_evenly

Task = Literal["segmentation", "depth", "classification", "consistency", "correspondence", "normals", "retrieval"]
TaskConfig = SegmentationConfig | DepthConfig | ClassificationConfig | ViewsConfig | RetrievalConfig

PAPER_RUNS = {
    # The last checkpoint of 40,000 iterations.
    "segmentation": RunConfig(cache="never", selection="last"),
    # The best AbsRel on the test data among those after every 6,400 of 38,400 iterations.
    "depth": RunConfig(cache="never", selection="test", num_evaluations=6),
    # The best of all learning rates on the test data, every 1,250 of 12,500 iterations.
    "classification": RunConfig(cache="never", selection="test", num_evaluations=10),
}
_PAPER = PAPER_SEGMENTATION, PAPER_DEPTH, PAPER_CLASSIFICATION
PAPER_CONFIGS: dict[str, TaskConfig] = dict(zip(PAPER_RUNS, _PAPER, strict=True))
DINOV3_CONFIGS: dict[str, TaskConfig] = {"segmentation": DINOV3_SEGMENTATION, "depth": DINOV3_DEPTH}
DINOV3_RUN = RunConfig(cache="never", selection="last")
PROBE3D_MATCHES = 1000
"""Most distinct matches of each pair that probe3d counts."""
PROBE3D_CONFIGS: dict[str, TaskConfig] = {
    "correspondence": MultiviewConfig(ratio_matches=PROBE3D_MATCHES, is_probe3d=True)
}
PRESETS: dict[str, tuple[dict[str, TaskConfig], dict[str, RunConfig]]] = {
    "paper": (PAPER_CONFIGS, PAPER_RUNS),
    "dinov3": (DINOV3_CONFIGS, dict.fromkeys(DINOV3_CONFIGS, DINOV3_RUN)),
    "probe3d": (PROBE3D_CONFIGS, {}),
}
DEFAULT_CONFIGS: dict[str, TaskConfig] = {
    **{"segmentation": SegmentationConfig(), "depth": DepthConfig(), "classification": ClassificationConfig()},
    **{"consistency": MultiviewConfig(), "correspondence": MultiviewConfig(), "normals": NormalsConfig()},
    "retrieval": RetrievalConfig(),
}
_UNRECORDED = "data_root recall_pixels recall_centimetres grid_scale max_points ratio_pixels seed".split()
"""Values of the multi-view measures that are always the same, or given by task and seed."""
# Left out of records where they say what was always done.
_LATER = ("is_probe3d", False), ("head", "linear"), ("num_iterations", None), ("memory_views", None)
PROBES: dict[str, type[HeadProbe]] = {kind.task: kind for kind in (SegmentationProbe, DepthProbe, ClassificationProbe)}


@dataclass(frozen=True)
class ProbeRequest:
    """One cell of a table."""

    task: Task
    backbones: BackboneConfig
    output_path: Path
    train: Sequence[Path] = ()
    """Folders that heads are trained on; not used by consistency and correspondence."""
    test: Sequence[Path] = ()
    """Folders, or scene files, that are measured."""
    seeds: Sequence[int] = (0,)
    """One head is trained for each."""
    config: TaskConfig | None = None
    """Values of the task; its defaults if None."""
    run: RunConfig = field(default_factory=RunConfig)
    options: LabelledOptions = field(default_factory=LabelledOptions)
    max_frames: int | None = None
    """Of each labelled set, evenly spread."""
    device: DeviceChoice = "auto"
    precision: Precision = "fp32"
    """Arithmetic of the head's training."""
    predictions: Path | None = None
    """Folder for pictures of what the first seed's head predicts for test frames (segmentation, depth)."""


def choose_values(task: Task, test: Sequence[Path], preset: str = "") -> tuple[TaskConfig, RunConfig]:
    """A task's values, those of a preset where it has some; NAVI is measured as by probe3d."""
    configs, runs = PRESETS.get(preset, ({}, {}))
    config = configs.get(task, DEFAULT_CONFIGS[task])
    if isinstance(config, MultiviewConfig) and any(map(find_navi_sets, test)):
        config = replace(config, angle_edges=NAVI_EDGES, ratio_matches=PROBE3D_MATCHES)
    return config, runs.get(task, RunConfig())


def run_probe(request: ProbeRequest) -> ResultRecord:
    """Runs the seeds that are not in the result file yet; ValueError names folders or settings that do not fit."""
    if not request.seeds:
        raise ValueError("No seed is given; name at least one with --seeds.")
    if request.predictions is not None and not issubclass(PROBES.get(request.task, object), MapProbe):
        raise ValueError(f"--predictions means nothing to the {request.task} probe; leave it out.")
    if request.task not in PROBES:
        if request.backbones.assembly == "linear":
            raise ValueError("Linear fusion is trained with a head, which this probe has not; choose another assembly.")
        return _run_retrieval(request) if request.task == "retrieval" else _run_multiview(request)
    kind = PROBES[request.task]
    config = request.config or DEFAULT_CONFIGS[request.task]
    norm = kind.has_norm or getattr(config, "is_normed", False)
    described = describe_backbones(request.backbones, norm=norm)
    train, test = _read_sets(request, kind)
    settings: dict[str, Any] = {
        **{"patch_fit": request.backbones.patch_fit, "train": _describe_set(train), "test": _describe_set(test)},
        # Records from before there were these two are of the same settings.
        "config": {n: value for n, value in asdict(config).items() if n not in ("is_published", "is_normed") or value},
        "run": {name: value for name, value in asdict(request.run).items() if name != "num_threads"},
        "precision": request.precision,
    }
    if request.task == "depth":
        # An option once; records hold it.
        settings["config"]["bin_normalization"] = "linear"
    if request.options.depth_scale not in (None, MILLIMETRES_PER_METRE):
        # The hash of the data reads no pixel, so another unit has to be named here.
        settings["depth_scale"] = request.options.depth_scale
    file, missing, done = _open_record(request, settings, described)
    if not missing:
        return load_result(file.path)
    accelerator = create_accelerator(request.device, request.precision)
    num_layers = 4 if isinstance(config, DepthConfig) and config.head == "dpt" else 1
    device = accelerator.device
    backbones = create_frozen_backbones(request.backbones, norm=norm, num_layers=num_layers, device=device)
    sets = create_sets(train, test, request.run)
    probe = kind(config, request.run, sets, backbones, request.backbones.assembly, accelerator)
    earlier = load_result(file.path).settings if file.path.is_file() else {}
    training: dict[str, Any] = {name: earlier[name] for name in ("training", "chosen", "finetuning") if name in earlier}
    training |= {"chosen": probe.describe(), **_read_costs(request.backbones, _list_tested(train, test))}
    for seed in missing:
        start = time.perf_counter()
        trained = probe.run_seed(seed)
        done[seed] = trained.metrics
        losses = dict(zip(("loss_first", "loss_last"), trained.summarise_losses(), strict=True))
        scores = {str(iteration): score for iteration, score in trained.scores.items()}
        said = {"iteration": trained.iteration, **losses, "scores": scores, "seconds": time.perf_counter() - start}
        training["training"] = {**training.get("training", {}), str(seed): {**said, **trained.choices}}
        file.save(done, training, accelerator.is_main_process)
        wants_pictures = accelerator.is_main_process and seed == missing[0]
        if wants_pictures and request.predictions is not None and isinstance(probe, MapProbe):
            probe.save_predictions(trained, seed, request.predictions)
    return file.save(done, training, accelerator.is_main_process)


def forecast_seconds(request: ProbeRequest, few: int = 4) -> float:
    """About how long a request takes, by runs on few images; ValueError where data lack something.

    The first run is not counted, because it loads what all need. Then come one, one with twice the iterations (or seeds
    of few pairs), and one with twice the images: both grow with the request, and what is left is done once.
    """
    config: Any = request.config or DEFAULT_CONFIGS[request.task]
    times, is_paired = [], hasattr(config, "max_pairs")
    repeats = config.max_pairs / few if is_paired else 0.0
    share = getattr(config, "max_views", few) / few
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        for number, (count, work) in enumerate(((few, 1), (few, 1), (few, 2), (2 * few, 1))):
            # Few views of a scene, where they are compared, would not see the same places.
            cut = {"max_pairs": few} if is_paired else {"num_iterations": 4 * few * work, "max_views": count}
            small = replace(config, **{name: value for name, value in cut.items() if hasattr(config, name)})
            seeds, path, start = range(work if is_paired else 1), Path(folder, str(number)), time.perf_counter()
            record = run_probe(replace(request, config=small, max_frames=count, seeds=seeds, output_path=path))
            times.append(time.perf_counter() - start)
        if not isinstance(config, ViewsConfig):
            kind = PROBES[record.settings["test"].get("labels", [request.task])[0]]
            train, test = (labelled.frames for labelled in _read_sets(request, kind))
            share = (len(train) + len(test)) / (2 * few)
            if kind.task == request.task:
                given = config.num_iterations, kind.published_iterations, len(train), config.batch_size
                repeats = resolve_iterations(*given) / (4 * few)
    more_work, more_images = (max(seconds - times[1], 0.0) for seconds in times[2:])
    once = max(times[1] - more_work - more_images, 0.0)
    return once + more_images * share + more_work * repeats * len(request.seeds)


def resolve_scene_split(path: Path, split: LabelledSplit, others: Sequence[Path]) -> LabelledSplit | None:
    """Which frames of a folder take part: its train or test part, or all (None).

    A single scene that is only trained on, or only tested on, takes part whole; its lists divide one of `others`.
    """
    is_shared = path.resolve() in {other.resolve() for other in others}
    return None if (is_scannetpp_scene(path) or is_capture(path)) and not is_shared else split


def _read_sets(request: ProbeRequest, kind: type[HeadProbe]) -> tuple[LabelledSet, LabelledSet]:
    for paths, flag in ((request.train, "--train"), (request.test, "--test")):
        if not paths:
            raise ValueError(f"A {request.task} probe needs data; name folders with {flag}.")
    check_options([*request.train, *request.test], request.task, request.options)

    def read(paths: Sequence[Path], split: LabelledSplit, others: Sequence[Path]) -> LabelledSet:
        parts = [resolve_scene_split(path, split, others) for path in paths]
        pairs = zip(paths, parts, strict=True)
        found = join_sets([read_labelled_set(path, part, kind.labels, request.options) for path, part in pairs])
        return replace(found, frames=select_evenly(found.frames, request.max_frames or len(found.frames)))

    first, second = read(request.train, "train", request.test), read(request.test, "test", request.train)
    check_same_kind(first, second)
    trained = {frame.key for frame in first.frames}
    num_common = sum(frame.key in trained for frame in second.frames)
    if num_common:
        notice(f"{num_common} of {len(second.frames)} test frames are trained on as well; the metrics flatter.")
    return first, second


def _run_retrieval(request: ProbeRequest) -> ResultRecord:
    sets: dict[str, tuple[LabelledSet, LabelledSet]] = {}
    for kind in (PROBES["segmentation"], PROBES["depth"]):
        try:
            sets[kind.task] = _read_sets(request, kind)
        except ValueError as error:
            notice(missed := f"Retrieval leaves out {kind.task}: {error}")
    if not sets:
        raise ValueError(missed)
    config: Any = request.config or DEFAULT_CONFIGS["retrieval"]
    if config.memory_views:
        sets = {name: split_views(pair, config.memory_views) for name, pair in sets.items()}
    values = {name: value for name, value in asdict(config).items() if (name, value) not in _LATER}
    settings: dict[str, Any] = {"patch_fit": request.backbones.patch_fit, "config": values}
    settings["depth_scale"] = request.options.depth_scale or MILLIMETRES_PER_METRE
    for index, part in enumerate(("train", "test")):
        described = [_describe_set(pair[index]) for pair in sets.values()]
        settings[part] = {**described[0], "data_hash": [item["data_hash"] for item in described], "labels": [*sets]}
    file, missing, done = _open_record(request, settings, describe_backbones(request.backbones, norm=True))
    if not missing:
        return load_result(file.path)
    costs = _read_costs(request.backbones, _list_tested(*next(iter(sets.values()))))
    accelerator = create_accelerator(request.device, request.precision)
    backbones = create_frozen_backbones(request.backbones, norm=True, device=accelerator.device)
    rest = backbones, request.backbones.assembly, accelerator
    for name, pair in sets.items():
        run = replace(request.run, cache="never")
        probe: Any = PROBES[name](config.configure(name), run, ProbeSets(*pair, None), *rest)
        for seed, metrics in measure_retrieval(probe, config, missing).items():
            known, bins = done.get(seed, {}), metrics.get("by_angle", {})
            merged = {angles: known.get("by_angle", {}).get(angles, {}) | item for angles, item in bins.items()}
            done[seed] = known | metrics | ({"by_angle": merged} if merged else {})
    return file.save(done, costs, accelerator.is_main_process)


def _run_multiview(request: ProbeRequest) -> ResultRecord:
    config = request.config or DEFAULT_CONFIGS[request.task]
    assert isinstance(config, ViewsConfig)
    # Tokens are compared at the pixels they stand for, so images are resized as stages I and II do.
    is_probe3d = isinstance(config, MultiviewConfig) and config.is_probe3d
    is_dpt = isinstance(config, NormalsConfig) and config.head == "dpt"
    norm = not (is_probe3d or is_dpt)
    chosen = replace(request.backbones, patch_fit="pad-stretch" if is_probe3d else "resize")
    described = describe_backbones(chosen, norm=norm)
    shows_keypoints = any(map(is_spair, request.test))
    if shows_keypoints and (request.task != "correspondence" or len(request.test) > 1):
        raise ValueError("SPair-71k has keypoints instead of depth: the correspondence probe reads it, and alone.")
    for path in (*request.train, *request.test):
        if not path.exists():
            raise ValueError(f"No such capture or scene file: {path}; check --train and --test.")
    check_options(request.test, request.task, request.options)
    is_paired = isinstance(config, MultiviewConfig)
    given = {"test": request.test} if is_paired else {"train": request.train, "test": request.test}
    for part, paths in given.items():
        if not paths:
            raise ValueError(f"{request.task} needs captures with depth, or scene files; name some with --{part}.")
    settings: dict[str, Any] = {
        part: {"scenes": [path.name for path in paths], "sizes": [_measure(path) for path in paths]}
        for part, paths in given.items()
    }
    # The first two were options once; records hold them, and not what came later.
    settings["config"] = ({"gaps": (), "angle_kind": "rotation"} if is_paired else {}) | {
        name: value for name, value in asdict(config).items() if name not in _UNRECORDED and (name, value) not in _LATER
    }
    file, missing, done = _open_record(request, settings, described)
    if not missing:
        return load_result(file.path)
    names = {path.stem if path.is_file() else path.name for path in request.test} if "train" in config.splits else set()
    costs = _read_costs(chosen, names, "; --splits val test measures on held-out views")
    device = choose_device(request.device)
    backbones = create_frozen_backbones(chosen, norm=norm, num_layers=4 if is_dpt else 1, device=device)
    if shows_keypoints:
        assert isinstance(config, MultiviewConfig)
        assembler = Assembler(chosen.assembly, backbones.embed_dim, "none")
        return file.save(done | measure_keypoints(request.test[0], config, backbones, assembler, missing), costs)
    read = {
        path: [load_views(at, config, backbones, chosen.assembly, device) for at in find_navi_sets(path) or [path]]
        for path in dict.fromkeys(path for paths in given.values() for path in paths)
    }
    scenes = {part: [scene for path in paths for scene in read[path]] for part, paths in given.items()}
    if isinstance(config, NormalsConfig):
        common = [path.name for path in request.test if path.resolve() in map(Path.resolve, request.train)]
        if common:
            notice(f"{', '.join(common)}: trained on and measured alike; the metrics flatter.")
        if config.head == "linear":
            return file.save(done | dict.fromkeys(missing, measure_normals(**scenes)), costs)
        accelerator = create_accelerator(request.device, request.precision)
        done |= {seed: measure_dpt_normals(config, chosen.assembly, accelerator, seed, **scenes) for seed in missing}
        return file.save(done, costs, accelerator.is_main_process)
    if isinstance(config, MultiviewConfig) and request.task in ("consistency", "correspondence"):
        done |= {seed: measure_views(request.task, config, scenes["test"], seed) for seed in missing}
    return file.save(done, costs)


def _open_record(
    request: ProbeRequest, settings: dict[str, Any], described: dict[Any, Any]
) -> tuple[ResultFile, list[int], dict[int, dict[str, Any]]]:
    """The result file, the seeds that it lacks, and the metrics of those it has."""
    backbones = {part: description.to_metadata() for part, description in described.items()}
    settings = {"task": request.task, "assembly": request.backbones.assembly, "backbones": backbones, **settings}
    # What fine-tuning began with random weights stays of no worth.
    report = read_report(request.backbones) or {}
    is_random = bool(report.get("is_random", False)) or any(item.is_random for item in described.values())
    file = ResultFile(Path(request.output_path), f"probe/{request.task}", settings, is_random)
    done = file.load_seeds()
    missing = [seed for seed in dict.fromkeys(request.seeds) if seed not in done]
    if done:
        held = ", ".join(map(str, sorted(done)))
        rest = f"running {', '.join(map(str, missing))}" if missing else "nothing is left to run"
        notice(f"{file.path} already holds seeds {held} of these settings; {rest}.")
    return file, missing, done


def _list_tested(train: LabelledSet, test: LabelledSet) -> set[str]:
    """Scenes that are tested on alone; those in both sets are divided."""
    tested, trained = ({frame.group.rpartition("/")[2] for frame in part.frames} for part in (test, train))
    return tested - trained


def _read_costs(chosen: BackboneConfig, tested: set[str], advice: str = "") -> dict[str, Any]:
    """What `read_costs` says; a notice names the tested scenes that taught the fine-tuned backbone."""
    costs = read_costs(chosen)
    if known := sorted(tested.intersection(costs.get("finetuning", {}).get("scenes", []))):
        notice(f"The fine-tuned backbone was trained on views of {', '.join(known)}: the metrics flatter{advice}.")
    return costs


def _describe_set(labelled_set: LabelledSet) -> dict[str, Any]:
    sizes = {"num_frames": len(labelled_set.frames), "num_classes": labelled_set.num_classes}
    return {"name": labelled_set.name, **sizes, "data_hash": compute_data_hash(labelled_set)}


def _measure(path: Path) -> str:
    """Hash of a scene file, which stays as long when its numbers change, or of names and sizes of a capture's files."""
    if path.is_file():
        return hash_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hash_bytes(*(f"{file.relative_to(path)} {file.stat().st_size}" for file in files))
