"""Cells of the ablations: the commands of all stages, each once, and which of them are finished.

    OUTPUT/colour/SCENE-KEY/            nerfstudio's run: Gaussians of a scene
           scenes/LIFT-KEY/*.safetensors    features on them
           finetuned/NAME-KEY/          backbone and report.json
           probes/NAME-KEY.json         record of fit3d-probe
           features/  logs/  report/

A KEY is made from everything that the result depends on, so other settings go to another place and what lies there
already is of the same settings. Results appear when they are complete, so what exists is finished.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ablation_tables import MAIN, AblationTable, Variant

from fit3d_ns.utils.files import hash_bytes, hash_file, read_json


@dataclass(frozen=True)
class Cell:
    """One command and its result."""

    name: str
    """Readable and unique."""
    command: tuple[str, ...]
    """Program and arguments."""
    result: Path
    """Is there once the command has finished."""
    needs: tuple["Cell", ...] = ()
    """Cells whose results it reads."""
    seeds: tuple[int, ...] = ()
    """Of a probe: which have to be in the record."""
    checkpoints: Path | None = None
    """Of a nerfstudio run: where an interrupted one goes on from."""

    def is_done(self) -> bool:
        """True if the result is there, with all seeds."""
        if not self.result.is_file():
            return False
        if not self.seeds:
            return True
        return {str(seed) for seed in self.seeds} <= set(read_json(self.result)["metrics"].get("per_seed", {}))

    def create_command(self) -> list[str]:
        """The command; one that was interrupted is told where to go on, if it does not find that itself."""
        folder = self.checkpoints
        is_begun = folder is not None and folder.is_dir() and any(folder.glob("*.ckpt"))
        return [*self.command, *(("--load-dir", str(folder)) if is_begun else ())]


@dataclass(frozen=True)
class ProbeData:
    """What heads are trained and tested on."""

    name: str
    """As in `AblationTable.data`, `task:data set`."""
    train: tuple[Path, ...]
    """Of fit3d-probe; empty for consistency and correspondence."""
    test: tuple[Path, ...]
    """Of fit3d-probe."""

    @property
    def task(self) -> str:
        """What is probed."""
        return self.name.split(":")[0]


@dataclass(frozen=True)
class Plan:
    """Everything the tables have in common."""

    output: Path
    """Folder of all results."""
    scenes: tuple[Path, ...]
    """Captures of stages I and II."""
    data: tuple[ProbeData, ...]
    """What is probed on."""
    backbone: str
    """The main backbone."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Weights files by backbone; timm's download for others."""
    seeds: tuple[int, ...] = (0,)
    """Of the probes."""
    colour_steps: int | None = None
    """Of stage I; the method's default if None."""
    finetune_steps: int | None = None
    """Of one "epoch" of stage II; real epochs if None."""
    probe_iterations: int | None = None
    """Of segmentation and depth heads; the probe's own if None."""
    paper: bool = False
    """All values of the public code: features trained beside the colour, stages II and III with --paper."""

    def __post_init__(self) -> None:
        names = [scene.name for scene in self.scenes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"Two scenes are called {twice[0]}; rename one, results go by name.")

    def create_cells(self, table: AblationTable) -> list[Cell]:
        """The probes of a table, row by row; what they need hangs on them."""
        # Correspondence asks of the same views what consistency asks, and more; a table of its own is enough.
        chosen = [
            data
            for data in self.data
            if table.only_task == data.task or (table.only_task is None and data.task != "correspondence")
        ]
        return [
            self._create_probe(table, backbone, variant, data)
            for backbone in table.backbones
            for variant in table.variants
            for data in chosen
        ]

    def _create_probe(self, table: AblationTable, backbone: str, variant: Variant, data: ProbeData) -> Cell:
        name = self._name(backbone)
        trained = self._create_finetuning(backbone, variant) if variant.needs_finetuning else None
        decisive = ["--assembly", variant.assembly, *self._backbone_flags(name), *table.probe_flags]
        if data.task in ("segmentation", "depth") and self.probe_iterations is not None:
            decisive += ["--num-iterations", str(self.probe_iterations)]
        if trained is not None:
            folder = trained.result.parent
            decisive += [
                "--finetuned",
                str(folder if variant.wise_ft is None else folder / f"wise-ft-{variant.wise_ft:g}"),
            ]
        decisive += ["--paper"] if self.paper else []
        features = _shorten(name) if trained is None else _label_finetuning(name, variant)
        label = "-".join([data.name.replace(":", "-"), variant.assembly, features])
        contents = [data.task, *map(_describe_data, data.test), "trained on", *map(_describe_data, data.train)]
        result = self.output / "probes" / f"{label}-{self._compute_key([*contents, *decisive])}.json"
        flags = [data.task, "--test", *map(str, data.test), *decisive]
        flags += ["--train", *map(str, data.train)] if data.train else []
        flags += ["--seeds", *map(str, self.seeds), "--output-path", str(result)]
        needs = () if trained is None else (trained,)
        return Cell(f"probe/{result.stem}", _program("probe", flags), result, needs, self.seeds)

    def _create_finetuning(self, backbone: str, variant: Variant) -> Cell:
        scenes = tuple(self._create_scene(scene, backbone, variant) for scene in self.scenes)
        decisive = ["--ckpts", *(str(scene.result) for scene in scenes)]
        name = self._name(backbone)
        decisive += ["--backbone-weights", str(self.weights[name])] if name in self.weights else []
        if self.finetune_steps is not None:
            decisive += ["--max-steps", str(variant.epochs * self.finetune_steps)]
        else:
            decisive += ["--epochs", str(variant.epochs)]
        decisive += [*variant.finetune_flags, *(["--paper"] if self.paper else [])]
        label = _label_finetuning(name, variant)
        folder = self.output / "finetuned" / f"{label}-{self._compute_key(decisive)}"
        command = _program("finetune", [*decisive, "--output-dir", str(folder)])
        return Cell(f"finetune/{folder.name}", command, folder / "report.json", scenes)

    def _create_scene(self, scene: Path, backbone: str, variant: Variant) -> Cell:
        """Lifted onto the colours of the scene or, with the paper's values, trained beside them and exported."""
        name, paper = self._name(backbone), self.paper
        flags = [*self._backbone_flags(name), "--feature-dim", str(variant.feature_dim)]
        run = self._create_run(scene, _as_training_flags(flags) if paper else _COLOUR_ONLY)
        decisive = [] if paper else [*flags, *variant.lift_flags]
        label = f"{_shorten(name)}-d{variant.feature_dim}-{self._compute_key([*decisive, str(paper)])}"
        path = self.output / "scenes" / label / f"{run.result.parents[2].name}.safetensors"
        source = ["--load-config", str(run.result.parent / "config.yml"), "--output-path", str(path)]
        if not paper:
            source += ["--feature-cache", str(self.output / "features")]
        command = _program("export" if paper else "lift", source + decisive)
        return Cell(f"scene/{label}/{path.stem}", command, path, (run,))

    def _create_run(self, scene: Path, flags: Sequence[str]) -> Cell:
        method = "fit3d-features-paper" if self.paper else "fit3d-features"
        steps = [] if self.colour_steps is None else ["--max-num-iterations", str(self.colour_steps)]
        key = self._compute_key([method, *flags, *steps, _describe_data(scene)])
        experiment = f"{scene.name}-{key}"
        folder = self.output / "colour" / experiment / method / "run"
        command = (_find_program("ns-train"), method, "--data", str(scene), *flags, *steps, "--vis", "tensorboard",
                   "--output-dir", str(self.output / "colour"), "--experiment-name", experiment,
                   "--timestamp", "run")  # fmt: skip
        return Cell(f"colour/{experiment}", command, folder / "results.json", (), (), folder / "nerfstudio_models")

    def _name(self, backbone: str) -> str:
        return self.backbone if backbone == MAIN else backbone

    def _backbone_flags(self, name: str) -> list[str]:
        weights = self.weights.get(name)
        return ["--backbone", name, *([] if weights is None else ["--backbone-weights", str(weights)])]

    def _compute_key(self, decisive: Sequence[str]) -> str:
        """Of the arguments, wherever the output folder lies, and of what weights files hold."""
        files = {str(path): path for path in self.weights.values()}
        texts = [
            _hash_once(files[text]) if text in files else text.replace(str(self.output), "OUTPUT") for text in decisive
        ]
        return hash_bytes(*(text.encode() for text in texts))[:8]


def find_missing(cells: Sequence[Cell]) -> list[Cell]:
    """What has to run for these cells, each once, every one after those it needs.

    What only finished cells need may be deleted and is not made again.
    """
    ordered: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        if cell.name not in ordered and not cell.is_done():
            for needed in cell.needs:
                add(needed)
            ordered[cell.name] = cell

    for cell in cells:
        add(cell)
    return list(ordered.values())


_COLOUR_ONLY = ("--pipeline.model.feature-loss-weight", "0")


@lru_cache
def _hash_once(path: Path) -> str:
    return hash_file(path)


def _program(name: str, arguments: Sequence[str]) -> tuple[str, ...]:
    """One of our commands, run by this interpreter."""
    return (sys.executable, "-m", f"fit3d_ns.cli.{name}", *arguments)


def _find_program(name: str) -> str:
    """A program of this interpreter's environment, else of the path."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else name


def _as_training_flags(flags: Sequence[str]) -> list[str]:
    """Flags of fit3d-lift as ns-train names them."""
    renamed = {"--backbone": "datamanager.backbone", "--backbone-weights": "datamanager.backbone-weights",
               "--feature-dim": "model.feature-dim"}  # fmt: skip
    return [f"--pipeline.{renamed[flag]}" if flag in renamed else flag for flag in flags]


def _describe_data(path: Path) -> str:
    """Of a capture: changes with its frames, cameras and name, not with its place; of anything else its place."""
    dslr = path / "dslr"
    files = [*sorted((dslr / "nerfstudio").glob("*.json")), *sorted(dslr.glob("*.json"))]
    if not files:
        return str(path)
    return f"{path.name} {hash_bytes(*(hash_file(file).encode() for file in files))}"


def _shorten(backbone: str) -> str:
    """A backbone's name as part of a file name."""
    return backbone.split(".")[0].replace("random:", "random-").replace("/", "-").replace(":", "-")


def _label_finetuning(backbone: str, variant: Variant) -> str:
    """What stages I and II were, as part of a file name."""
    parts = [_shorten(backbone), f"d{variant.feature_dim}", f"e{variant.epochs}", variant.label]
    return "-".join(part for part in parts if part)
