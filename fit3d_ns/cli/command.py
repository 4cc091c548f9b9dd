"""`run_command`: what all `fit3d-*` commands share: parsing, errors in one sentence, exit codes."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from fit3d_ns.utils.errors import allow_any_letter, check_writable, explain, explain_thread_errors, shows_tracebacks
from fit3d_ns.utils.stopping import interrupt_on_signals

Config = TypeVar("Config")

UNSET = tyro.conf.arg(help_behavior_hint="(optional)")
"""For options without a default value, whose help says what happens without them."""
GROUP = tyro.conf.OmitArgPrefixes
"""For settings that have a heading of their own in the help and no prefix in their names."""
_LARGEST_NUMBER = 1e30
"""Products of larger ones leave what 32 bits can hold."""
EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130


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
    name); `args` come without it too.
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
    try:
        parsed: Any = tyro.cli(_command_line_class(config_class), prog=prog, description=description, args=arguments)
        _check_numbers(parsed.config)
        for name in ("output_path", "output_dir"):
            # What cannot be written should not take an hour to say so.
            output = getattr(parsed.config, name, None)
            if output is not None:
                check_writable(Path(output) / "file" if name == "output_dir" else Path(output))
        function(parsed.config)
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


def spell(config: Any, default: Any = None) -> list[str]:
    """The words of a command line that give a command's dataclass its values, where these are not the default ones."""
    words: list[str] = []
    for field in fields(config):
        usual = field.default_factory() if field.default_factory is not MISSING else field.default
        value, usual = getattr(config, field.name), getattr(default, field.name, usual)
        flag = field.name.replace("_", "-")
        if is_dataclass(value):
            words += spell(value, usual)
        elif isinstance(value, bool) and value != usual:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != usual:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def _check_numbers(config: Any) -> None:
    """ValueError for an option, also of a nested group, with a number that nobody can compute with, or below 0.

    Infinity is one where the option's field says `may_be_infinite` in its metadata.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            _check_numbers(value)
        for number in value if isinstance(value, tuple) else (value,):
            if number == float("inf") and field.metadata.get("may_be_infinite"):
                continue
            flag = f"--{field.name.replace('_', '-')}"
            if isinstance(number, (int, float)) and number < 0:
                raise ValueError(f"{flag} {number} is negative; no option takes that.")
            if isinstance(number, float) and not abs(number) <= _LARGEST_NUMBER:
                raise ValueError(f"{flag} {number} is no number to compute with; give one below {_LARGEST_NUMBER:g}.")


def _command_line_class(config_class: type) -> type:
    """A dataclass of the command's own flags and `--debug`, both without a prefix."""

    @dataclass(frozen=True)
    class CommandLine:
        config: Annotated[config_class, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        debug: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Show the traceback of an error (also: FIT3D_DEBUG=1)."""
        version: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Print the version and do nothing else."""

    return CommandLine
