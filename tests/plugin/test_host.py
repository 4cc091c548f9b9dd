"""How the plugin sits in nerfstudio: import order, what it drags in, error sentences, versions."""

import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import viser

from fit3d_ns.plugin.datamanager import name_own_flags
from fit3d_ns.plugin.method import check_versions, is_listed_by_ns_train
from fit3d_ns.plugin.trainer import FeatureTrainer
from fit3d_ns.utils.results import ResultRecord
from fit3d_ns.utils.stopping import ignore_other_processes


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_dataparser__can_be_the_first_module_nerfstudio_loads(parsed: subprocess.CompletedProcess[str]) -> None:
    """nerfstudio loads dataparser entry points half-way through its own imports; a cycle would break every command."""
    assert "'fit3d', 'fit3d-features', 'fit3d-features-paper'" in parsed.stdout, parsed.stderr


def test_method__brings_no_kernels_no_timm_and_no_matplotlib() -> None:
    """Every `ns-*` command of every method imports it."""
    result = run_python(
        "import sys\n"
        "import nerfstudio.engine.trainer, nerfstudio.models.splatfacto, nerfstudio.configs.dataparser_configs\n"
        "import nerfstudio.data.datamanagers.full_images_datamanager, nerfstudio.plugins.types\n"
        "before = set(sys.modules)\n"
        "import fit3d_ns.plugin.method\n"
        "added = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(added & {'timm', 'numba', 'sklearn', 'torchmetrics', 'pycolmap', 'accelerate', 'matplotlib'}))\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("[]"), result.stdout


def test_methods_are_listed() -> None:
    assert is_listed_by_ns_train()


def test_errors__become_one_sentence_with_exit_code_1() -> None:
    code = (
        "from fit3d_ns.utils.errors import install_error_sentences\n"
        "install_error_sentences()\n"
        "raise ValueError('No such scene: x; check the path.')\n"
    )
    plain, debug = run_python(code), run_python(code, FIT3D_DEBUG="1")
    assert plain.returncode == debug.returncode == 1
    assert "Traceback" not in plain.stderr and "fit3d: error: No such scene: x" in plain.stderr
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize(
    ("package", "versions", "expected"),
    [
        ("torch", ">=1.0,<99", None),
        ("torch", ">=98,<99", "tried with torch>=98,<99, found "),
        ("torch", ">=0.1,<0.2", "expect differences"),
        ("no-such-package-at-all", ">=1,<2", "not installed"),
    ],
)
def test_version_check__names_what_is_wrong(package: str, versions: str, expected: str | None) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_versions({package: versions})
    assert [expected in str(one.message) for one in said] == ([] if expected is None else [True])


@pytest.fixture(scope="module")
def parsed() -> subprocess.CompletedProcess[str]:
    """nerfstudio's own parser; in a process without type checks, which some of nerfstudio's defaults do not pass."""
    return run_python(
        "import nerfstudio.configs.dataparser_configs as configs\n"
        "import nerfstudio.configs.method_configs as methods\n"
        "import tyro\n"
        "from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion\n"
        "known = {*configs.all_dataparsers, *methods.all_methods}\n"
        "print(sorted(name for name in known if name.startswith('fit3d')))\n"
        "def parse(*flags): return tyro.cli(AnnotatedBaseConfigUnion, args=flags)\n"
        "for method in ('fit3d-features', 'fit3d-features-paper'):\n"
        "    print(parse(method).viewer.websocket_host)\n"
        "print(parse('fit3d-features', '--viewer.websocket-host', '0.0.0.0').viewer.websocket_host)\n"
        "writer = parse('fit3d-features').logging.local_writer\n"
        "print(writer.enable, writer.max_log_size)\n"
        "weights = ('--pipeline.datamanager.backbone-weights', 'FILE')\n"
        "print(parse('fit3d-features', *weights).pipeline.datamanager.backbone_weights)\n"
        "parse('fit3d-features').set_timestamp()\n"
    )


def test_train__parses_what_its_errors_and_documents_name(parsed: subprocess.CompletedProcess[str]) -> None:
    # Into a file or a pipe, nerfstudio's log is a line for each report instead of a table that is drawn again.
    expected = ["127.0.0.1", "127.0.0.1", "0.0.0.0", "True 0", "FILE"]
    assert parsed.stdout.splitlines()[-5:] == expected, parsed.stderr
    assert "fit3d: error: --data is missing; give the scene's folder." in parsed.stderr


def test_viewer__is_bound_to_this_machine_while_training(make_config: Callable[..., Any]) -> None:
    config = make_config("viewer", 2)
    config.vis = "viewer"
    config.set_timestamp()
    config.save_config()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    server = trainer.viewer_state.viser_server
    try:
        # All of 127.x.x.x is this machine: a socket that is bound to every address answers at the second one too.
        assert [is_open(host, server.get_port()) for host in ("127.0.0.1", "127.0.0.2")] == [True, False]
    finally:
        server.stop()


def is_open(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((host, port)) == 0


def test_errors_about_the_backbone__name_the_flags_of_ns_train() -> None:
    with pytest.raises(ValueError, match=r"^offline; give --pipeline\.datamanager\.backbone-weights FILE\.$"):
        with name_own_flags():
            raise ValueError("offline; give --backbone-weights FILE.")


def test_train__prints_paths_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are the markup of the library that draws the table."""
    folder = Path("/runs") / "[bold]kitchen" / "[demo]" / ("long" * 30)
    trainer: Any = SimpleNamespace(base_dir=folder)
    FeatureTrainer._print_record(trainer, ResultRecord("stage1", {"psnr": 20.0}))
    printed = capsys.readouterr().out
    assert f"{folder}/results.json" in printed and f"Config: {folder}/config.yml\n" in printed
    assert f"Next: fit3d-export --load-config {folder}/config.yml " in printed


def test_viewer__starts_though_other_processes_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(_: object) -> str:
        raise psutil.NoSuchProcess(1)

    monkeypatch.setattr(psutil.Process, "cwd", end)
    with pytest.raises(psutil.NoSuchProcess):
        viser.ViserServer("127.0.0.1", _find_free_port(), verbose=False)
    with ignore_other_processes():
        viser.ViserServer("127.0.0.1", _find_free_port(), verbose=False).stop()


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
