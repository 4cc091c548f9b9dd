"""`run_command`: what all `fit3d-*` commands share: parsing, errors in one sentence, exit codes."""

import ast
import inspect
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from configparser import ConfigParser
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, make_dataclass
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NewType, TypeVar, get_args, get_origin, get_type_hints

import tyro

from fit3d_ns.utils.errors import allow_any_letter, check_writable, explain, explain_thread_errors, shows_tracebacks
from fit3d_ns.utils.stopping import EXIT_INTERRUPTED, interrupt_on_signals

Config = TypeVar("Config")

Heading = NewType("Heading", str)
"""In an option's annotation: what is written over it, and over those below it in its dataclass, in the help."""
_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
_LARGEST_NUMBER = 1e30
"""Products of larger ones leave what 32 bits can hold."""
EXIT_USER_ERROR = 1


@dataclass(frozen=True)
class _General:
    """What all commands take."""

    debug: _Flag = False
    """Show the traceback of an error (also: FIT3D_DEBUG=1)."""
    version: _Flag = False
    """Print the version and do nothing else."""


def run_command(
    config_class: type[Config],
    function: Callable[[Config], None],
    *,
    prog: str,
    description: str,
    examples: Sequence[str] = (),
    args: Sequence[str] | None = None,
) -> None:
    """Parses the command line into `config_class`, runs `function` on it and leaves the process with its exit code.

    A `ValueError` (and a missing, unreadable or unwritable file) is the user's to correct: it becomes one sentence on
    standard error and exit code 1. Ctrl-C becomes exit code 130. Everything else is our fault and shows its traceback.
    `--debug`, or `FIT3D_DEBUG=1` in the environment, shows the traceback always.

    The field docstrings of `config_class` are the help, below `description` and `examples` (without the program's
    name) and under headings (`Heading`); `args` come without it too.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if "--version" in arguments:
        print(f"{prog} {metadata.version('fit3d-ns')}")
        return
    if examples:
        description += "\n\nExamples:\n" + "\n".join(f"  {prog} {example}" for example in examples)
    # Asked for by name before parsing: a config that refuses its values does so while it is built.
    debug = shows_tracebacks() or "--debug" in arguments
    # A polite kill ends a command as Ctrl-C does, also outside the loops that save what they have.
    interrupt_on_signals()
    allow_any_letter()
    if not debug:
        explain_thread_errors()
        warnings.simplefilter("ignore", FutureWarning)  # Those are for the authors of other libraries.
    try:
        config = parse(config_class, arguments, prog=prog, description=description)
        _check_numbers(config)
        for name in ("output_path", "output_dir"):
            # What cannot be written should not take an hour to say so.
            output = getattr(config, name, None)
            if output is not None:
                check_writable(Path(output) / "file" if name == "output_dir" else Path(output))
        function(config)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output (`head`) has seen enough; Python would complain once more while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_USER_ERROR)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"{prog}: error: {sentence}", file=sys.stderr)
        if not debug:
            print("FIT3D_DEBUG=1 shows the traceback.", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def parse(config_class: type[Config], args: Sequence[str], *, prog: str = "", description: str = "") -> Config:
    """Reads a command line, or prints the help and leaves the process. Names of options are unique: no prefixes."""
    parsed: Any = tyro.cli(_create_form(config_class), prog=prog, description=description, args=args)  # type: ignore[arg-type]
    return _build(config_class, {name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def run_named(prog: str, config_class: type[Config], function: Callable[[Config], None], args: Any = None) -> None:
    """`run_command` with the description and the examples that stand in `commands.ini`."""
    texts = ConfigParser(interpolation=None)
    texts.read(Path(__file__).with_name("commands.ini"), encoding="utf-8")
    description, examples = texts[prog]["description"], texts[prog].get("examples", "").split("\n")[1:]
    run_command(config_class, function, prog=prog, description=description, examples=examples, args=args)


def create_main(prog: str, config_class: type[Config], function: Callable[[Config], None]) -> Callable[..., None]:
    """The entry point of a command: `run_named`, on the command line where it is not given other arguments.

    Where the module of `function` is what Python runs (`python -m`), it runs at once: a module ends with it.
    """
    main = partial(run_named, prog, config_class, function)
    if function.__module__ == "__main__":
        main()
    return main


def spell(config: Any) -> list[str]:
    """The words of a command line that give a command's dataclass its values, where these are not the default ones."""
    words: list[str] = []
    for (*_, item, _, usual), (*_, value) in zip(_list_options(type(config)), _list_options(config), strict=True):
        flag = item.name.replace("_", "-")
        if isinstance(value, bool) and value != usual:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != usual:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def _check_numbers(config: Any) -> None:
    """ValueError for an option below 0, or too large; fields with `may_be_infinite` in their metadata take infinity."""
    for *_, item, _, value in _list_options(config):
        for number in value if isinstance(value, tuple) else (value,):
            if number == float("inf") and item.metadata.get("may_be_infinite"):
                continue
            flag = f"--{item.name.replace('_', '-')}"
            if isinstance(number, (int, float)) and number < 0:
                raise ValueError(f"{flag} {number} is negative; no option takes that.")
            if isinstance(number, float) and not abs(number) <= _LARGEST_NUMBER:
                raise ValueError(f"{flag} {number} is no number to compute with; give one below {_LARGEST_NUMBER:g}.")


@lru_cache
def _create_form(config_class: type) -> type:
    """A dataclass for tyro with one dataclass of options for each heading."""
    groups: dict[str, tuple[str, list[Any]]] = {}
    for title, text, item, hint, default in [*_list_options(config_class), *_list_options(_General)]:
        groups.setdefault(title, (text, []))[1].append((item.name, hint, default))
    form: list[Any] = []
    for title in sorted(groups, key=lambda title: (title == "machine") - (title == "input")):
        text, options = groups[title]
        group = make_dataclass("Group", options, kw_only=True, namespace={"__doc__": text})
        named: Any = Annotated[group, tyro.conf.arg(name=title, help=text), tyro.conf.OmitArgPrefixes]
        form.append((title.lower() or "command", named))
    return make_dataclass("Form", form)


def _list_options(config: Any, title: str = "", text: str = "") -> Iterator[tuple[str, str, Field, Any, Any]]:
    """Heading, what is said below it, field, annotation for tyro, and value (of a class: default) of each option."""
    config_class = config if isinstance(config, type) else type(config)
    hints, texts = _read_fields(config_class)
    for item in fields(config):
        hint, usual = hints[item.name], getattr(config, item.name, MISSING)
        inner, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        heading = next((extra for extra in extras if isinstance(extra, str)), "")
        if is_dataclass(inner):
            heading = heading or item.name.removesuffix("s")
            yield from _list_options(inner if usual is MISSING else usual, heading, inspect.getdoc(inner) or "")
            continue
        title, text = (heading, "") if heading else (title, text)
        # tyro would write `{None}|INT`, and below it `(default: None)`.
        metavar = None if usual is not None else _name(*(part for part in get_args(inner) if part is not NoneType))
        metavar = item.name.upper() if tyro.conf.Positional in extras and get_origin(inner) is not Literal else metavar
        behaviour = "(required)" if usual is MISSING else "(optional)" if usual in (None, ()) else None
        explained = tyro.conf.arg(help=texts.get(item.name, ""), metavar=metavar, help_behavior_hint=behaviour)
        yield title, text, item, Annotated[hint, explained], usual


def _name(kind: Any) -> str:
    """A type as tyro's help spells it."""
    words = get_args(kind)
    if get_origin(kind) is tuple:
        return f"[{_name(words[0])} [{_name(words[0])} ...]]"
    return "{" + ",".join(map(str, words)) + "}" if get_origin(kind) is Literal else kind.__name__.upper()


@lru_cache
def _read_fields(config_class: type) -> tuple[dict[str, Any], dict[str, str]]:
    """The annotations of a dataclass, and the docstrings below its fields, inherited ones too, as one paragraph."""
    texts = {}
    for part in filter(is_dataclass, reversed(config_class.__mro__)):
        body: Any = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        for item, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[ast.unparse(item.target)] = " ".join(ast.literal_eval(below.value).split())
    return get_type_hints(config_class, include_extras=True), texts


def _build(config_class: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(config_class)
    kinds = {item.name: hints[item.name] for item in fields(config_class)}
    return config_class(**{n: _build(kind, values) if is_dataclass(kind) else values[n] for n, kind in kinds.items()})
