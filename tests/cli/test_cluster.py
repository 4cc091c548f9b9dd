"""Many scenes in one command: shares of them, tasks of submitit, what a failed scene and a preempted task leave.

Slurm itself is tried by `scripts/test_slurm.sh`.
"""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from fit3d_ns.cli import cluster as module
from fit3d_ns.cli import lift
from fit3d_ns.cli.cluster import ClusterConfig, run_tasks, work_on_each
from fit3d_ns.cli.command import parse, spell
from fit3d_ns.cli.finetune import FinetuneCommand
from fit3d_ns.lifting.passes import LiftState, ViewPasses, load_state
from fit3d_ns.lifting.shared_lift import NUM_SHARED_ROUNDS
from tests.cli.test_lift import run_main
from tests.cluster_tasks import NAMES, fail_or_die
from tests.faults.world import collect_results, find_differences
from tests.lift_capture import BACKBONE, write_capture, write_gaussians
from tests.test_options import list_values, walk
from tests.test_options import spell as spell_option

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Three scene files, and the options of lifting them again."""
    root = tmp_path_factory.mktemp("scenes")
    options = ["--backbone", BACKBONE, "--feature-cache", str(root / "cache"), "--device", "cpu", "--feature-dim", "4"]
    for name in "abc":
        raw = write_capture(root / name, 12, ord(name))
        words = ["--ply", str(write_gaussians(root / f"{name}.ply", raw)), "--data", str(root / name)]
        lift.main([*words, "--output-path", str(root / f"{name}.safetensors"), "--max-passes", "1", *options])
    return [str(root / f"{name}.safetensors") for name in "abc"], [*options, "--max-passes", "3"]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_choose__shards_are_all_items_once_and_split_again(count):
    items = list(range(10))
    shards = [ClusterConfig(shard=f"{number}/{count}") for number in range(1, count + 1)]
    assert sorted(item for shard in shards for item in shard.choose(items)) == items
    assert max(len(shard.choose(items)) for shard in shards) - min(len(shard.choose(items)) for shard in shards) <= 1
    for shard in shards:
        parts = [part.choose(items) for part in dataclasses.replace(shard, on="slurm").split(4)]
        assert sorted(item for part in parts for item in part) == shard.choose(items)


@pytest.mark.parametrize("shard", ["", "3", "0/2", "3/2", "-1/2", "1/2/3", "1/0", "a/b"])
def test_config__refuses_what_is_no_share(shard):
    with pytest.raises(ValueError, match="is no share"):
        ClusterConfig(shard=shard)


def test_config__refuses_options_that_would_change_nothing():
    for options in ({"partition": "gpu"}, {"time": 5}, {"cpus": 2}, {"gpus": 1}, {"array_parallelism": 2}):
        ClusterConfig(on="slurm", **options)
        with pytest.raises(ValueError, match="changes nothing with --on here"):
            ClusterConfig(**options)
    with pytest.raises(ValueError, match="--partition changes nothing with --on local"):
        ClusterConfig(on="local", partition="gpu")
    with pytest.raises(ValueError, match="at least 1"):
        ClusterConfig(on="local", array_parallelism=0)


@pytest.mark.parametrize("command", [lift.LiftCommand, FinetuneCommand])
def test_spell__is_the_command_line_that_was_parsed(command):
    base = ["--output-path", "out"] if command is lift.LiftCommand else ["--output-dir", "o", "--ckpts", "a", "b c"]
    num_parsed = 0
    for option in walk(command, is_flat=True):
        for words in list_values(option.kind, option.default):
            try:
                parsed = parse(command, [*base, *spell_option(option, words)])
            except (SystemExit, ValueError):
                continue
            num_parsed += spell(parsed) != base
            assert parse(command, spell(parsed)) == parsed
            break
    assert num_parsed > 30


def test_lift__a_failed_scene_stops_no_other_and_is_repeated_by_the_command_that_is_printed(
    scenes, tmp_path, capsys, monkeypatch
):
    (a, b, c), options = scenes
    shutil.copy(b, whole := tmp_path / "b.safetensors")
    shutil.copy(b, broken := tmp_path / "broken.safetensors")
    os.truncate(broken, 1000)
    words = ["--scene", a, broken, whole, *options, "--output-path", tmp_path / "out"]
    code, out, err = run_main(capsys, words)
    assert code == 1 and "1 of the scenes failed" in err and "Failed: broken: " in out
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"a.json", "b.json"}
    log = (tmp_path / "out" / "broken.log").read_text()
    assert "broken.safetensors failed: " in log and "Traceback" not in log
    assert (tmp_path / "out" / "a.log").read_text().count("a.safetensors is done") == 1
    shutil.copy(c, broken)
    again = shlex.split(re.search("^fit3d-lift (.+)$", out, re.MULTILINE).group(1))
    assert str(broken) in again and a not in again
    code, out, err = run_main(capsys, again)
    assert code == 0 and "lifted already" not in err
    # The whole command passes over all of them.
    code, _, err = run_main(capsys, words)
    assert code == 0 and err.count("lifted already") == 3
    # A bug is no reason to stop either.
    monkeypatch.setattr(lift, "lift_to_file", lambda *_: 1 // 0)
    code, out, err = run_main(capsys, [*words, "--overwrite"])
    assert code == 1 and out.count("ZeroDivisionError") == 3 and "Traceback" in (tmp_path / "out" / "a.log").read_text()


def test_lift__shards_together_are_the_whole(scenes, tmp_path, capsys):
    sources, options = scenes
    for name, order in (("1/2", sources), ("2/2", sources[::-1])):
        words = ["--scene", *order, *options, "--output-path", tmp_path / "out", "--shard", name]
        assert run_main(capsys, words)[0] == 0
        if name == "1/2":
            assert {path.stem for path in (tmp_path / "out").iterdir()} == {"a", "c"}
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"a", "b", "c"}
    # More shards than scenes: some have nothing to do.
    assert run_main(capsys, [*words[:-1], "9/9"])[0] == 0
    code, out, _ = run_main(capsys, [*words[:-1], "1/2", "--on", "local", "--dry-run"])
    assert code == 0 and "2 scenes: about" in out


def test_lift__shards_share_a_decoder(scenes, tmp_path, capsys, monkeypatch):
    sources, options = scenes
    words = ["--scene", *sources, *options, "--shared-decoder", "--output-path"]
    assert run_main(capsys, [*words, tmp_path / "serial"])[0] == 0
    for number in range(NUM_SHARED_ROUNDS):
        for name in ("1/2", "2/2"):
            code, out, err = run_main(capsys, [*words, tmp_path / "shards", "--shard", name])
            assert code == 0 and ("run all shards once more" in err) == (number == 0), err
    assert find_differences(*(collect_results(tmp_path / name) for name in ("serial", "shards"))) == []


def test_lift__tasks_of_this_machine_make_what_one_process_makes(scenes, tmp_path, capsys, monkeypatch):
    sources, options = scenes
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    words = ["--scene", *sources, *options, "--output-path"]
    assert run_main(capsys, [*words, tmp_path / "serial"])[0] == 0
    tasks = ["--on", "local", "--array-parallelism", "2"]
    code, out, err = run_main(capsys, ["--scene", broken, *words[1:], tmp_path / "tasks", *tasks])
    assert code == 1 and "Failed: broken: " in out and "2 tasks, number " in err
    (tmp_path / "tasks" / "broken.log").unlink()
    assert find_differences(*(collect_results(tmp_path / name) for name in ("serial", "tasks"))) == []


def test_run_tasks__says_what_became_of_each_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(module, "_SECONDS_PER_CHECK", 1)
    failed = run_tasks(ClusterConfig(on="local"), NAMES, tmp_path, fail_or_die, 1)
    assert failed.keys() == {"failing", "dying"} and failed["failing"] == "It cannot be done."
    assert "was killed" in failed["dying"]
    # The preempted task was started again, and found what it had left.
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"preempted": "twice", "well": "once"}


def test_run_tasks__starts_a_round_when_the_one_before_has_ended(tmp_path, monkeypatch):
    class Job:
        def __init__(self, number: int):
            self.job_id, self.paths = f"{number}_0", MagicMock()

        def exception(self) -> None:
            return None

        def result(self) -> dict[str, str]:
            return {"a": f"in round {self.job_id}"}

    after = []
    monkeypatch.setattr(module, "_submit", lambda *args: after.append(args[3]) or [Job(len(after)), Job(len(after))])
    monkeypatch.setattr(module, "_wait", lambda *args: None)
    found = run_tasks(ClusterConfig(on="slurm"), ["a", "b"], tmp_path, fail_or_die, 3)
    assert [[job.job_id for job in jobs] for jobs in after] == [[], ["1_0"] * 2, ["2_0"] * 2]
    assert found == {"a": "in round 3_0"}


def test_share__usr2_waits_while_python_imports():
    """Before submitit listens, that signal would end the task instead of requeueing it."""
    code = """
import os, signal
os.kill(os.getpid(), signal.SIGUSR2)
from fit3d_ns.cli.cluster import ClusterConfig, Share
signal.signal(signal.SIGUSR2, lambda *_: print("heard"))
print("imported")
Share(lambda cluster: print("working") or {}, ClusterConfig(), [])()
"""
    start = shlex.split(module.HOLDING_PYTHON)
    done = subprocess.run([*start, "-u", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["imported", "heard", "working"], done.stderr


def test_run_tasks__needs_what_it_runs_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="Slurm does not take the tasks: Could not detect"):
        run_tasks(ClusterConfig(on="slurm"), ["a"], tmp_path, fail_or_die, 1)
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(ValueError, match="needs submitit: pip install"):
        run_tasks(ClusterConfig(on="local"), ["a"], tmp_path, fail_or_die, 1)


def test_work_on_each__keeps_a_scene_from_a_second_process(tmp_path):
    path = tmp_path / "a.safetensors"
    inner = {}
    assert work_on_each([path], lambda _: inner.update(work_on_each([path], lambda _: None))) == {}
    assert inner == {"a": f"Another process works on {path}; wait for its end."}


def test_work_on_each__stops_at_a_full_disk(tmp_path):
    seen = []

    def work(index):
        seen.append(index)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        work_on_each([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], work)
    assert seen == [0]


def test_passes__save_before_a_scheduler_takes_the_task_back(tmp_path):
    """USR2 is what submitit requeues at; SIGTERM, which comes before it, says nothing while it has the process."""

    class Requeued(BaseException):
        pass

    def requeue(*_):
        raise Requeued

    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    heard = []
    passes = ViewPasses(LiftState({}), 5, state_path=tmp_path / "state", seconds_per_checkpoint=1e9)

    def add(index):
        for number in {1: [signal.SIGTERM], 3: [signal.SIGUSR2]}.get(index, []):
            signal.raise_signal(number)

    signal.signal(signal.SIGUSR2, requeue)
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with pytest.raises(Requeued):
            passes.run("pass", {}, add)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert heard == [signal.SIGTERM]
    assert load_state(tmp_path / "state", {}, torch.device("cpu")).next_view == 4


if shutil.which("slurmctld"):

    @pytest.mark.slow
    def test_slurm__a_short_array():
        environment = {**os.environ, "PARTS": "array decoder", "PYTHON": sys.executable}
        subprocess.run(["bash", "scripts/test_slurm.sh", "4", "3"], check=True, cwd=ROOT, env=environment)
