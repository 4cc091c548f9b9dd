"""Every option of every command reaches the code that uses it, or is refused; none is overwritten in silence.

A command's `main` runs with one option changed, up to the functions of the library, which only note what they are
given. What they are given must then differ from what they are given without the change. Options that sit in a config
which the library takes whole must also be read somewhere: an attribute of that name outside the class that declares it.
"""

import ast
import copy
import dataclasses
import importlib
import itertools
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial, reduce
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import tyro

from fit3d_ns.features import BackboneDescription
from fit3d_ns.probing.probe_runs import choose_values
from fit3d_ns.report.compared_backbones import read_models

PACKAGE = Path(__file__).parents[1] / "fit3d_ns"
TOY_FOLDER = PACKAGE / "features" / "toy_rooms_vit"

KEPT = {"choose_device"}
"""Functions that commands resolve their options with; these stay as they are."""

AUTO = object()
"""An answer of the type that the function promises, for functions of the command's own module."""


class Stub(MagicMock):
    """Whatever the library would have returned."""

    def __format__(self, spec: str) -> str:
        return "stub"


FakeGaussians = dataclasses.make_dataclass("FakeGaussians", ["sh_rest"])
FakeScene = dataclasses.make_dataclass("FakeScene", ["gaussians"])
"""A scene with the part that `fit3d-export` can leave out."""


BACKBONE = BackboneDescription("m", "m", 14, 384, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "0" * 16)
"""What `fit3d-lift` holds the number of features against."""

OWN_VALUES = {
    "--shard": [["1/2"]],
    "--folder": [[f"{TOY_FOLDER}/../{TOY_FOLDER.name}", "me/vit"]],
    "--name": [[str(TOY_FOLDER), "me/other"]],
    "--root": [["scannetpp", "other"]],
    "--dataset": [["scannetpp", "other"]],
}
"""Values of options that want a form of their own; for one of two positional words, both."""
NEEDED_WORDS = {("--format", "ply"): ("--output-path", "out.ply")}
"""What a value is refused without."""


@dataclass(frozen=True)
class Command:
    """A command, the lines on which its options are tried, and the library's answers where a stub is not enough."""

    module: str
    config: str
    lines: tuple[str, ...]
    answers: dict[str, Any] = field(default_factory=dict)


COMMANDS = {
    "fit3d-export": Command(
        "fit3d_ns.cli.export",
        "ExportConfig",
        ("--load-config run --output-path out.safetensors", "--load-config run --format ply --output-path out.ply"),
        {
            "fit3d_ns.plugin.run_reader.load_run_scene": FakeScene(FakeGaussians(1)),
            "fit3d_ns.cli.export.change_gaussians": FakeScene(FakeGaussians(1)),
            "fit3d_ns.cli.export.describe_scene": {},
        },
    ),
    "fit3d-lift": Command(
        "fit3d_ns.cli.lift",
        "LiftCommand",
        (
            "--scene a.safetensors --backbone m --output-path out.safetensors",
            "--scene a.safetensors b.safetensors --backbone m --output-path out",
            "--load-config run --output-path out.safetensors",
            "--ply a.ply --data scene --output-path out.safetensors",
            "--surface depth --data scene --output-path out.safetensors",
            "--surface mesh --data scene --output-path out.safetensors",
            "--train 9 --data scene --output-path out",
            "--scene a.safetensors b.safetensors --backbone m --output-path out --on slurm",
        ),
        {
            "fit3d_ns.cli.lift._write_metrics": None,
            "fit3d_ns.plugin.run_reader.read_backbone": ("m", None, "timm"),
            "fit3d_ns.cli.lift.describe_forecast": "",
            "fit3d_ns.cli.lift.describe_backbone": BACKBONE,
            "fit3d_ns.cli.lift.has_features": False,
            "fit3d_ns.cli.lift.list_splats": lambda path, data, keep: [("a", data, None)],
        },
    ),
    "fit3d-finetune": Command(
        "fit3d_ns.cli.finetune",
        "FinetuneCommand",
        ("--ckpts a.safetensors --output-dir out", "--ckpts a.safetensors --output-dir out --on slurm"),
        {
            "fit3d_ns.cli.finetune._submit": None,
            "fit3d_ns.cli.finetune.find_scenes": lambda names, *rest: [Path(name) for name in names],
            "fit3d_ns.cli.finetune.prepare_scene_files": lambda group, *rest, **more: group,
        },
    ),
    "fit3d-probe": Command(
        "fit3d_ns.cli.probe",
        "ProbeCommand",
        tuple(
            f"{task} --train a --test b --output-path out.json"
            for task in (
                "segmentation",
                "depth",
                "classification",
                "consistency",
                "correspondence",
                "normals",
                "retrieval",
            )
        ),
        {"fit3d_ns.cli.probe.choose_values": choose_values},
    ),
    "fit3d-bench": Command(
        "fit3d_ns.cli.bench",
        "BenchCommand",
        ("--backbones m --data a:b",),
        {
            "fit3d_ns.cli.bench.read_models": lambda models: read_models(["random:test_vit"]),
            "fit3d_ns.cli.bench.choose_values": choose_values,
            "fit3d_ns.cli.bench.forecast_seconds": 1.0,
            "fit3d_ns.cli.bench.read_results": ([], []),
            "fit3d_ns.cli.bench.write_report": lambda *given, **named: ([Stub()], []),
            "fit3d_ns.cli.bench.save_bars": None,
        },
    ),
    "fit3d-report": Command(
        "fit3d_ns.cli.report",
        "ReportCommand",
        ("results.json",),
        {"fit3d_ns.cli.report.write_report": ([], [Stub()])},
    ),
    "fit3d-report features": Command(
        "fit3d_ns.cli.figures",
        "FeaturesCommand",
        ("features a.png --models m --output-path out.png", "features a.mp4 --models m --output-path out.png"),
        {
            "fit3d_ns.cli.figures.read_models": [Stub()],
            "fit3d_ns.report.feature_figure.load_clip": ([], 10.0),
            "fit3d_ns.report.feature_figure.save_feature_figure": AUTO,
            "fit3d_ns.report.feature_figure.save_feature_video": {"backbones": [{"temporal_consistency": {}}]},
            "fit3d_ns.cli.figures.is_clip": lambda path: path.suffix == ".mp4",
        },
    ),
    "fit3d-report predictions": Command(
        "fit3d_ns.cli.figures", "PredictionsCommand", ("predictions a b --output-path out.png",)
    ),
    "fit3d-demo": Command(
        "fit3d_ns.cli.demo",
        "DemoCommand",
        ("",),
        {"fit3d_ns.cli.demo.read_models": [Stub()], "fit3d_ns.cli.demo.Event": Stub()},
    ),
    "fit3d-view": Command(
        "fit3d_ns.cli.view",
        "ViewCommand",
        ("a.safetensors", "a.safetensors --finetuned vit"),
        {"fit3d_ns.cli.view.Event": Stub()},
    ),
    "fit3d-prepare": Command(
        "fit3d_ns.cli.prepare",
        "PrepareCommand",
        ("scannetpp root",),
        {
            "fit3d_ns.cli.prepare.find_scenes": lambda root, names: [Path(root, name) for name in (*names, "scene")],
            "fit3d_ns.cli.prepare.prepare_scene": {"frames": 1, "frames_made": 1, "seconds": 1.0},
        },
    ),
    "fit3d-push": Command(
        "fit3d_ns.cli.push",
        "PushCommand",
        (f"{TOY_FOLDER} me/vit", f"{TOY_FOLDER} me/vit --yes"),
        {"fit3d_ns.cli.push.send": "", "fit3d_ns.cli.push.get_token": "token"},
    ),
    "fit3d-synthesize": Command(
        "fit3d_ns.cli.synthesize",
        "SynthesisConfig",
        ("--output-dir out",),
        {"fit3d_ns.cli.synthesize.synthesize_scenes": {"scenes": []}},
    ),
}

TRAINER_CONFIGS = {
    "trainer.FeatureTrainerConfig": (),
    "datamanager.FeatureDatamanagerConfig": ("pipeline", "datamanager"),
    "dataparser.FeatureDataParserConfig": ("pipeline", "datamanager", "dataparser"),
    "model_config.FeatureSplatfactoModelConfig": ("pipeline", "model"),
}
"""Configs of `ns-train fit3d-features` that this package declares, and where they stand; `lift` is in the model's."""


@dataclass(frozen=True)
class Option:
    """One leaf of a command's dataclasses."""

    owner: type
    name: str
    path: tuple[str, ...]
    kind: Any
    default: Any
    is_positional: bool = False

    @property
    def flag(self) -> str:
        return "--" + ".".join(part for part in self.path if part).replace("_", "-")


def walk(config: type, prefix: tuple[str, ...] = (), own_only: bool = False, is_flat: bool = False) -> Iterator[Option]:
    """The options of a dataclass and of those inside it: of our commands flat, for `ns-train` with prefixes."""
    hints = typing.get_type_hints(config, include_extras=True)
    for item in dataclasses.fields(config):
        if item.name == "_target" or not item.init or (own_only and item.name not in config.__annotations__):
            continue
        kind, name, is_positional = hints[item.name], item.name, False
        while typing.get_origin(kind) is typing.Annotated:
            for extra in kind.__metadata__:
                given = getattr(extra, "name", None)
                name = name if given is None or "Positional" in repr(extra) else given
                is_positional |= "ositional" in repr(extra)
            kind = kind.__origin__
        if dataclasses.is_dataclass(kind):
            yield from walk(kind, (*prefix, "" if is_flat else name), is_flat=is_flat)
            continue
        has_factory = item.default_factory is not dataclasses.MISSING
        default = item.default_factory() if has_factory else item.default
        yield Option(config, item.name, (*prefix, name), kind, default, is_positional)


def list_values(kind: Any, default: Any) -> list[list[str]]:
    """Words of the command line that may stand for another value of a type, the likeliest first."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        parts = [list_values(part, default) for part in arguments if part is not type(None)]
        return [value for values in parts for value in values]
    if origin is typing.Literal:
        return [[str(choice)] for choice in arguments if choice != default]
    if origin in (tuple, list):
        inner = list_values(arguments[0], None)
        count = 1 if Ellipsis in arguments or origin is list else len(arguments)
        return [word * count for word in inner] + [sorted(itertools.chain(*inner[:2]))] + [word * 2 for word in inner]
    if kind is bool:
        return [[str(not default)]]
    if kind is int:
        numbers = [default + 1, default * 2, default - 1] if isinstance(default, int) else []
        return [[str(number)] for number in (*numbers, 3, 2, 1, 16, 0, 100)]
    if kind is float:
        numbers = [default * 0.5, default * 2, default + 0.1] if isinstance(default, (int, float)) else []
        return [[str(number)] for number in (*numbers, 0.25, 0.0, 0.75, 1.5, 10.0) if number != default]
    if kind in (str, Path):
        return [["changed"], ["changed.safetensors"], ["changed.png"]]
    pytest.fail(f"An option of {kind}: teach this test how to change it.")


def spell(option: Option, words: list[str], with_pairs: bool = True) -> list[str]:
    """The arguments that give an option these words."""
    if option.is_positional:
        return words
    if option.kind is bool and with_pairs:
        *head, last = option.flag.removeprefix("--").split(".")
        return [f"--{'.'.join([*head, last if words == ['True'] else 'no-' + last])}"]
    return [option.flag, *words]


def describe(value: Any) -> Any:
    """Plain values that are equal where two commands gave the library the same."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: describe(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return (type(value).__name__, parts)
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return list(map(describe, value))
    if isinstance(value, partial):
        return [getattr(value.func, "__name__", ""), describe(value.args), describe(value.keywords)]
    if isinstance(value, (str, int, float, bool, Path, type(None))):
        return repr(value)
    return type(value).__name__


def run(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[Any]]:
    """Exit code of a command whose library only takes notes, and the notes."""
    notes: list[Any] = []

    def note(name: str, answer: Any) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            notes.append([name, describe(given), describe(named)])
            is_function = isinstance(answer, types.FunctionType)
            return answer(*given, **named) if is_function else answer

        called.__name__ = name
        return called

    module = importlib.import_module(command.module)
    with monkeypatch.context() as patches:
        for name, value in vars(module).items():
            home = getattr(value, "__module__", None) or ""
            is_library = home.startswith("fit3d_ns.") and home not in (module.__name__, "fit3d_ns.cli.command")
            is_code = isinstance(value, types.FunctionType) or (isinstance(value, type) and _is_plain_class(value))
            if is_library and is_code and name not in KEPT:
                answer = command.answers.get(f"{module.__name__}.{name}", create_stub(value))
                patches.setattr(module, name, note(name, answer))
        for where, answer in command.answers.items():
            home, _, name = where.rpartition(".")
            own = create_stub(getattr(importlib.import_module(home), name)) if answer is AUTO else answer
            patches.setattr(where, note(name, own))
        patches.setattr(sys, "argv", ["command", *arguments])
        # With a card in sight, `auto` and `cpu` are not the same.
        patches.setattr("torch.cuda.is_available", lambda: True)
        try:
            module.main()
        except SystemExit as stop:
            return int(stop.code or 0), notes
    return 0, notes


def create_stub(called: Any) -> Any:
    """What a function or class of the library returns, of the type that it promises."""
    return _stand_in(called if isinstance(called, type) else typing.get_type_hints(called).get("return"))


def _stand_in(promised: Any) -> Any:
    origin, parts = typing.get_origin(promised), typing.get_args(promised)
    if origin is tuple and Ellipsis not in parts:
        return tuple(map(_stand_in, parts))
    if origin in (list, dict, tuple):
        return origin()
    stub, classes = Stub(), [kind for kind in (promised, *parts) if isinstance(kind, type)]
    if classes:
        stub.__class__ = classes[0]
    return stub


def _is_plain_class(value: type) -> bool:
    return not dataclasses.is_dataclass(value) and not issubclass(value, (BaseException, tuple))


def list_options() -> list[Any]:
    cases = []
    for name, command in COMMANDS.items():
        config = getattr(importlib.import_module(command.module), command.config)
        cases += [pytest.param(command, option, id=f"{name} {option.flag}") for option in walk(config, is_flat=True)]
    return cases


@pytest.mark.parametrize(("command", "option"), list_options())
def test_option__reaches_the_library_or_is_refused(
    command: Command, option: Option, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes = []
    for line in command.lines:
        base = line.split()
        code, expected = run(command, base, monkeypatch)
        assert code == 0, f"{line} is not a command line that works"
        for words in OWN_VALUES.get(option.flag) or list_values(option.kind, option.default):
            code, notes = run(command, _replace(base, option, words), monkeypatch)
            assert code in (0, 1, 2)
            outcomes.append("refused" if code else "same" if notes == expected else "arrived")
            if outcomes[-1] == "arrived":
                return
    assert "same" not in outcomes, f"{option.flag} changes nothing that the library is given"
    raise AssertionError(f"{option.flag} is refused with every value tried: {list_values(option.kind, option.default)}")


def _replace(base: list[str], option: Option, words: list[str]) -> list[str]:
    """The line with an option's words in place of those it has, or after them all."""
    added = spell(option, words)
    if option.is_positional:
        first = next((index for index, word in enumerate(base) if word.startswith("--")), len(base))
        start = 1 if base[0] in ("features", "predictions") else 0
        return [*base[:start], *added, *base[first:]]
    if option.flag not in base:
        return [*base, *added, *NEEDED_WORDS.get((option.flag, *words), ())]
    start = base.index(option.flag)
    end = next((i for i in range(start + 1, len(base)) if base[i].startswith("--")), len(base))
    return [*base[:start], *added, *base[end:]]


def list_trainer_options() -> list[Option]:
    """Options of `ns-train fit3d-features` that this package declares."""
    options: list[Option] = []
    for where, prefix in TRAINER_CONFIGS.items():
        module, name = where.split(".")
        config = getattr(importlib.import_module(f"fit3d_ns.plugin.{module}"), name)
        options += walk(config, prefix, own_only=True)
    return options


def parse_trainer(arguments: list[str]) -> Any:
    from fit3d_ns.plugin.method import fit3d_features

    default = copy.deepcopy(fit3d_features.config)
    # nerfstudio's own options; tests check types, and nerfstudio writes integers where it declares floats.
    default.optimizers = {}
    kind: Any = tyro.conf.SuppressFixed[tyro.conf.FlagConversionOff[type(default)]]
    return tyro.cli(kind, default=default, args=arguments)


def test_ns_train__keeps_every_option_until_the_trainer_is_built(tmp_path: Path) -> None:
    """All options at once, through the resolution before set-up; the options of the solve arrive in the lift's."""
    options, default = list_trainer_options(), parse_trainer([])
    arguments: list[str] = []
    for option in sorted(options, key=lambda option: "dataparser" in option.path):
        if "dataparser" in option.path:
            # nerfstudio's way: a dataparser is a word, after which its options stand without a prefix.
            arguments += [] if "fit3d" in arguments else ["fit3d"]
            option = dataclasses.replace(option, path=option.path[-1:])
        is_path = Path in (option.kind, *typing.get_args(option.kind))
        words = [str(tmp_path)] if is_path else list_values(option.kind, option.default)[0]
        arguments += spell(option, words, with_pairs=False)
    config = parse_trainer(arguments)
    before = {option.path: reduce(getattr, option.path, config) for option in options}
    for option in options:
        assert before[option.path] != reduce(getattr, option.path, default), f"{option.flag} did not change"
    config.set_experiment_name()
    config.set_timestamp()
    for option in options:
        assert reduce(getattr, option.path, config) == before[option.path], f"{option.flag} was overwritten"
    model = config.pipeline.model
    lift = model.create_lift_config(max_passes=3, decoder_share=1.0)
    for item in dataclasses.fields(model.lift):
        if item.name not in ("max_passes", "decoder_share"):
            assert getattr(lift, item.name) == getattr(model.lift, item.name), item.name
    assert lift.decoder_share == min(model.lift.decoder_share, 1.0)
    assert (lift.feature_dim, lift.decoder_bias) == (model.feature_dim, model.decoder_bias)


@pytest.mark.parametrize(
    "flag",
    [
        "pipeline.model.lift.feature-dim",
        "pipeline.model.lift.decoder-bias",
        "pipeline.model.lift.accumulation-aware",
        "pipeline.model.lift.seconds-per-checkpoint",
        "pipeline.datamanager.tokens-in-training",
        "pipeline.datamanager.with-features",
    ],
)
def test_ns_train__does_not_know_options_that_would_be_overwritten(flag: str) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_trainer([f"--{flag}", "1"])
    assert stop.value.code == 2


def list_declared() -> list[Any]:
    """Fields of configs that the library takes whole; a command's own are followed by the test above."""
    from fit3d_ns.cli.synthesize import SynthesisConfig
    from fit3d_ns.probing.probe_runs import DEFAULT_CONFIGS

    own = {getattr(importlib.import_module(command.module), command.config) for command in COMMANDS.values()}
    options = [case.values[1] for case in list_options() if case.values[1].owner not in own]
    # What this package only gives another default is read by nerfstudio.
    options += [option for option in list_trainer_options() if not _is_inherited(option)]
    for config in (*map(type, DEFAULT_CONFIGS.values()), SynthesisConfig):
        options += walk(config)
    found = {(option.owner, option.name): option for option in options}
    return [pytest.param(owner, name, id=f"{owner.__name__}.{name}") for owner, name in found]


def _is_inherited(option: Option) -> bool:
    return any(option.name in vars(base).get("__annotations__", {}) for base in option.owner.__mro__[1:])


@pytest.mark.parametrize(("owner", "name"), list_declared())
def test_option__is_read_outside_its_declaration(owner: type, name: str) -> None:
    assert name in list_read_names(), f"nothing reads {owner.__name__}.{name}"


@lru_cache(maxsize=1)
def list_read_names() -> set[str]:
    """Names of all attributes that the package reads; what a config checks when it is made is not a use of it."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in _walk_without_checks(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def _walk_without_checks(node: ast.AST) -> Iterator[ast.AST]:
    if not (isinstance(node, ast.FunctionDef) and node.name == "__post_init__"):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from _walk_without_checks(child)
