"""How the plugin sits in nerfstudio: import order, what it drags in, error sentences, versions."""

import subprocess
import sys

import pytest

from fit3d_ns.plugin.method import describe_problem, is_listed_by_ns_train


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_dataparser__can_be_the_first_module_nerfstudio_loads() -> None:
    """nerfstudio loads dataparser entry points half-way through its own imports; a cycle would break every command."""
    result = run_python(
        "import nerfstudio.configs.dataparser_configs as configs\n"
        "assert 'fit3d' in configs.all_dataparsers\n"
        "import nerfstudio.configs.method_configs as methods\n"
        "assert {'fit3d-features', 'fit3d-features-paper'} <= set(methods.all_methods)\n"
    )
    assert result.returncode == 0, result.stderr


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
    ("package", "first", "beyond", "expected"),
    [
        ("torch", "1.0", "99", None),
        ("torch", "98", "99", "too old"),
        ("torch", "0.1", "0.2", "newer"),
        ("no-such-package-at-all", "1", "2", "not installed"),
    ],
)
def test_version_check__names_what_is_wrong(package: str, first: str, beyond: str, expected: str | None) -> None:
    problem = describe_problem(package, first, beyond)
    assert problem is None if expected is None else expected in str(problem)
