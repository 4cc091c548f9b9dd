"""What all tests share: one thread per process for torch's small operations, and no GPU tests where there is none."""

import os
import signal
import tempfile
from importlib.util import find_spec

import pytest
import torch

# Tests work on tiny tensors: threads only wait for each other there, and on a busy machine they wait long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# What tests confirm is not remembered for the person who runs them; commands in other processes take it over.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="fit3d-tests-")

# scripts/test.sh puts it into a folder of its own (tests/test_onnx.py).
collect_ignore = [] if find_spec("onnxruntime") else ["test_onnx.py"]

MAY_SKIP = "chromium and chromedriver are not installed"
"""The one reason that scripts/setup.sh cannot remove: a browser is the system's."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where scripts/setup.sh has installed everything, a test that is skipped has failed: it would guard nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("FIT3D_TESTS_SKIP_NOTHING", "0") == "0" or reporter is None:
        return
    skipped = [report for report in reporter.stats.get("skipped", []) if MAY_SKIP not in str(report.longrepr)]
    for report in skipped:
        reporter.write_line(f"\nSkipped where nothing may be: {report.nodeid}: {report.longrepr}")
    if skipped:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


LONGEST = (
    "tests/faults/test_damage.py", "tests/test_end_to_end.py", "tests/finetuning/test_finetune_command.py",
    "tests/faults",
)  # fmt: skip
"""What processes that share the tests begin with: of two, the first gets all the faults, whose world is made once."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders the tests for several processes, and deselects `gpu` tests on machines without CUDA.

    What is deselected never counts as passed or skipped.
    """
    items.sort(key=lambda item: next((n for n, start in enumerate(LONGEST) if item.nodeid.startswith(start)), 99))
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


# A shell that starts the tests in the background lets them, and every command they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
