"""Help pages: examples can be copied, versions are printed, settings of their own stand under headings."""

import importlib
import io
import os
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from unittest.mock import patch

import pytest
import tyro

from fit3d_ns.cli import command as command_module
from fit3d_ns.utils.progress import notice

COMMANDS = ("lift", "export", "finetune", "probe", "report", "demo", "view", "push", "synthesize")


@dataclass(frozen=True)
class Nothing:
    """No option."""


def capture_call(name):
    module = importlib.import_module(f"fit3d_ns.cli.{name}")
    with patch.object(module, "run_command") as called:
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
        tyro.cli(command_module._command_line_class(config), args=words)


def test_help__has_headings_and_examples(capsys):
    from fit3d_ns.cli import finetune

    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    page = capsys.readouterr().out
    assert "optimization options" in page and "fit3d-finetune --ckpts" in page


def test_version__needs_no_other_argument(capsys):
    from fit3d_ns.cli import lift

    lift.main(["--version"])
    assert capsys.readouterr().out == f"fit3d-lift {metadata.version('fit3d-ns')}\n"


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


@pytest.mark.parametrize("value", ["nan", "inf", "1e308"])
def test_numbers__that_nobody_can_compute_with_are_refused(tmp_path, capsys, value):
    from fit3d_ns.cli import finetune

    with pytest.raises(SystemExit):
        finetune.main(["--ckpts", "x", "--output-dir", str(tmp_path / "out"), "--prefix-anchor", value])
    assert "--prefix-anchor" in (printed := capsys.readouterr().err) and "Traceback" not in printed


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
