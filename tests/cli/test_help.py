"""Help pages: examples can be copied, versions are printed, settings of their own stand under headings."""

import importlib
import io
import os
import re
import runpy
import shlex
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from unittest.mock import patch

import pytest

from fit3d_ns.cli import command as command_module
from fit3d_ns.utils.progress import notice

COMMANDS = ("lift", "export", "finetune", "probe", "report", "demo", "view", "push", "synthesize")
LARGEST_GROUP = 20


@dataclass(frozen=True)
class Nothing:
    """No option."""


def capture_call(name):
    module = importlib.import_module(f"fit3d_ns.cli.{name}")
    # Where it is called from: a command's own module, or that which makes its `main`.
    with patch.object(module if hasattr(module, "run_command") else command_module, "run_command") as called:
        module.main([])
    return called.call_args


@pytest.mark.parametrize("name", COMMANDS)
def test_examples__can_be_parsed(name):
    call = capture_call(name)
    config, examples = call.args[0], call.kwargs["examples"]
    assert len(examples) == 2
    for example in examples:
        words = shlex.split(example)
        if words[0] == "features":
            figures = importlib.import_module("fit3d_ns.cli.figures")
            config, words = figures.FeaturesCommand, words[1:]
        assert isinstance(command_module.parse(config, words), config)


def read_help(name, capsys, monkeypatch, columns=120):
    monkeypatch.setenv("COLUMNS", str(columns))
    arguments = ["features", "--help"] if name == "figures" else ["--help"]
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"fit3d_ns.cli.{name}").main(arguments)
    assert not end.value.code
    return capsys.readouterr().out


def list_groups(page):
    """The flags of a help page by heading, with boxes as in a terminal or without as in a log."""
    groups = {}
    for line in page.splitlines():
        if heading := re.fullmatch(r"[╭─ ]+(\S.* options|options|positional arguments)[ ─╮]+", line):
            assert heading[1] not in groups
            groups[heading[1]] = []
        elif flag := re.match(r"[│ ] (-[-\w]+)", line):
            groups[next(reversed(groups))].append(flag[1])
    return groups


@pytest.mark.parametrize("name", (*COMMANDS, "figures"))
def test_help__is_in_groups_and_says_no_none(name, capsys, monkeypatch):
    page = read_help(name, capsys, monkeypatch)
    groups = list_groups(page)
    assert "options options" not in groups and max(map(len, groups.values())) <= LARGEST_GROUP
    assert "--version" in groups["options"] and "None" not in page and "(default: )" not in page
    assert page.count(f"  fit3d-{'report features' if name == 'figures' else name} ") == 2


def test_help__of_many_options_is_sorted_by_what_they_are_about(capsys, monkeypatch):
    groups = list_groups(read_help("probe", capsys, monkeypatch))
    assert list(groups)[2:4] == ["input options", "output options"] and list(groups)[-1] == "machine options"
    assert {"--train", "--test", "--layout"} <= set(groups["input options"])
    assert "--learning-rate" in list_groups(read_help("finetune", capsys, monkeypatch))["optimization options"]


def test_help__names_what_stands_without_a_flag(capsys, monkeypatch):
    assert "FOLDER NAME" in read_help("push", capsys, monkeypatch)
    assert "{segmentation,depth," in read_help("probe", capsys, monkeypatch)


def test_help__fits_a_narrow_terminal_and_fills_its_lines(capsys, monkeypatch):
    """Docstrings of several lines become one paragraph, whatever their width in the source."""
    page = read_help("finetune", capsys, monkeypatch, columns=80)
    assert max(len(line) for line in page.splitlines() if line.startswith(("│", "  -"))) <= 80
    assert (
        " ".join(re.findall(r"[^\s│]+", page)).count(
            "whose config.yml names code that is run: only of people you trust."
        )
        == 1
    )


@pytest.mark.parametrize("name", (*COMMANDS, "info"))
def test_module__is_a_command_for_python_as_well(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--version"])
    # What jaxtyping's checks made of the module would be stored where every process looks for it.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    runpy.run_module(f"fit3d_ns.cli.{name}", run_name="__main__", alter_sys=False)
    assert capsys.readouterr().out == f"fit3d-{name} {metadata.version('fit3d-ns')}\n"


def test_version__needs_no_other_argument(capsys):
    from fit3d_ns.cli import lift

    lift.main(["--version"])
    assert capsys.readouterr().out == f"fit3d-lift {metadata.version('fit3d-ns')}\n"


def test_notice__shows_markdown_as_it_looks(capsys):
    notice("| angle | recall |\n|---|---|\n| all | 0.1 → 0.2 |", is_markdown=True)
    shown = capsys.readouterr().err
    assert re.search(r"angle +recall", shown) and "0.1 → 0.2" in shown and "|" not in shown


def test_output__that_the_terminal_has_no_letters_for_is_escaped(monkeypatch):
    """As in containers without a locale, and for names of files that are no text."""
    shown = {}
    for stream, encoding in (("stdout", "ascii"), ("stderr", "utf-8")):
        shown[stream] = io.BytesIO()
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(shown[stream], encoding, write_through=True))

    def show(config):
        print("mIoU ↑ of café")
        notice(os.fsdecode(b"caf\xe9 is lifted"))

    command_module.run_command(Nothing, show, prog="fit3d-x", description="", args=[])
    assert shown["stdout"].getvalue() == b"mIoU \\u2191 of caf\\xe9\n"
    assert shown["stderr"].getvalue() == b"caf\\udce9 is lifted\n"


@pytest.mark.parametrize("arguments", [[], ["--debug"]])
def test_warnings__of_other_libraries_are_shown_to_who_debugs(arguments):
    def warn(config):
        warnings.warn("`jit` is deprecated.", FutureWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        command_module.run_command(Nothing, warn, prog="fit3d-x", description="", args=arguments)
    assert len(shown) == len(arguments)


@pytest.mark.parametrize("value", ["nan", "inf", "1e308"])
def test_numbers__that_nobody_can_compute_with_are_refused(tmp_path, capsys, value):
    from fit3d_ns.cli import finetune

    with pytest.raises(SystemExit):
        finetune.main(["--ckpts", "x", "--output-dir", str(tmp_path / "out"), "--prefix-anchor", value])
    printed = capsys.readouterr().err
    assert "prefix" in printed and "Traceback" not in printed


def test_numbers__infinity_is_taken_where_its_help_offers_it(tmp_path, capsys):
    from fit3d_ns.cli import lift

    arguments = ["--scene", str(tmp_path / "none.safetensors"), "--output-path", str(tmp_path / "out.safetensors")]
    for flag, is_taken in (("--decoder-ridge", True), ("--regularization", False)):
        with pytest.raises(SystemExit):
            lift.main([*arguments, flag, "inf"])
        printed = capsys.readouterr().err
        assert ("is no number to compute with" in printed) != is_taken, printed


def test_numbers__negative_ones_are_refused(capsys, tmp_path, monkeypatch):
    from fit3d_ns.cli import probe

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        probe.main(["depth", "--train", "x", "--test", "x", "--cache-gb", "-1", "--output-path", "x.json"])
    assert "--cache-gb -1.0 is negative" in (printed := capsys.readouterr().err) and "Traceback" not in printed
