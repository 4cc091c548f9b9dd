"""`ClusterConfig`: scenes shared out to jobs of any scheduler, or to tasks that submitit starts here or on Slurm.

Each scene is worked on by itself and leaves files of its own, so a share can be done again at any time: what is
finished is passed over, what was begun goes on from its state. What is done with a scene is not known here.
"""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fit3d_ns.utils.errors import explain, find_errno, first_line
from fit3d_ns.utils.files import lock_file, remove
from fit3d_ns.utils.progress import LOGS, create_progress, notice

_MAX_REQUEUES = 100
"""How often a task may run out of time; each time it goes on from its state."""
_SECONDS_PER_CHECK = 5
_HOLD_USR2 = (
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
HOLDING_PYTHON = shlex.join([sys.executable, "-ISc", _HOLD_USR2])
"""Starts Python with USR2 held back, of which it would die while it imports; `Share` lets it through."""
_USED = {"here": {"shard", "on"}, "local": {"shard", "on", "time", "gpus", "array_parallelism"}}
"""The options that mean something where work is done; on Slurm all do."""


@dataclass(frozen=True)
class ClusterConfig:
    """Many scenes: where they are worked on, and how many at a time."""

    shard: str | None = None
    """Only a share of the scenes: `2/8` is the second of eight, the same one on every machine, for schedulers of all
    kinds. Failed and interrupted scenes are done by the same command once more."""
    on: Literal["here", "local", "slurm"] = "here"
    """One scene after the other in this process (`here`), or as tasks of submitit: processes of this machine (`local`)
    or an array of Slurm's (`slurm`). Account and quality of service: SBATCH_ACCOUNT, SBATCH_QOS."""
    partition: str | None = None
    """Slurm's partition; its default one without this."""
    time: int = 240
    """Minutes that a task may take; one that needs more, or is preempted, is requeued and goes on from its state."""
    cpus: int | None = None
    """Processor cores of a task on Slurm."""
    gpus: int = 0
    """CUDA cards of a task."""
    array_parallelism: int = 8
    """Most tasks that run at a time."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name not in _USED.get(self.on, {field.name}) and getattr(self, field.name) != field.default:
                raise ValueError(f"--{field.name.replace('_', '-')} changes nothing with --on {self.on}; leave it out.")
        if 0 in (self.time, self.cpus, self.array_parallelism):
            raise ValueError("--time, --cpus and --array-parallelism must be at least 1.")
        self._parse_shard()

    def choose(self, items: Sequence[Any]) -> list[Any]:
        """This shard's share of all items, every n-th; all of them without a shard."""
        number, count = self._parse_shard()
        return list(items)[number - 1 :: count]

    def split(self, count: int) -> list["ClusterConfig"]:
        """Shards of this one for `count` processes, in which they work."""
        number, shards = self._parse_shard()
        return [ClusterConfig(f"{number + shards * index}/{shards * count}") for index in range(count)]

    def _parse_shard(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)/(\d+)", "1/1" if self.shard is None else self.shard)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count:
            raise ValueError(f"--shard {self.shard} is no share; `2/8` is the second of eight.")
        return number, count


def work_on_each(outputs: Sequence[Path], work: Callable[[int], None]) -> dict[str, str]:
    """Makes one scene file after the other, by its index, with a `.log` beside it that other processes keep away from;
    returns what was wrong with those that failed."""
    failed = {}
    for index, path in enumerate(outputs):
        with ExitStack() as stack:
            try:
                log = stack.enter_context(lock_file(path.with_suffix(".log"), f"on {path}; wait for its end"))
                LOGS.append(log)
                stack.callback(LOGS.remove, log)
                notice(f"[{index + 1}/{len(outputs)}] {path.name}, on {os.uname().nodename}")
                work(index)
                notice(f"{path.name} is done")
            except Exception as error:
                if find_errno(error)[0] in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise  # The next scene would meet it too, after all its work.
                failed[path.stem] = _describe(error)
                notice(f"{path.name} failed: {failed[path.stem]}")
    return failed


Work = Callable[[ClusterConfig], dict[str, str]]


@dataclass(frozen=True)
class Share:
    """What one task does, which submitit calls again when its machine was taken away: the work on a shard's scenes."""

    work: Work
    cluster: ClusterConfig
    names: list[str]

    def __call__(self) -> dict[str, str]:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])  # submitit listens by now.
        try:
            return self.work(self.cluster)
        except Exception as error:
            return dict.fromkeys(self.names, _describe(error))

    def checkpoint(self) -> Any:
        """What submitit puts into the queue again: the same, for all progress is in files."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_tasks(cluster: ClusterConfig, names: Sequence[str], folder: Path, work: Work, rounds: int) -> dict[str, str]:
    """Has scenes made by tasks of submitit, whose files are in `folder` meanwhile; returns what was wrong with those
    that failed. `work`, as in `Share`, makes those of a shard that `choose` takes of `names`; where there are several
    shards it is done that many times, once all have ended."""
    chosen = cluster.choose(names)
    if not chosen:
        return {}
    folder = folder / f"tasks_{time.strftime('%Y-%m-%d_%H%M%S')}_{os.getpid()}"
    # More tasks in an array Slurm refuses unless its administrator allows them; a task may do several scenes.
    shards = cluster.split(min(len(chosen), 1000 if cluster.on == "slurm" else cluster.array_parallelism))
    shares = [Share(work, shard, shard.choose(names)) for shard in shards]
    jobs: list[Any] = []
    for _ in range(rounds if len(shares) > 1 else 1):
        jobs = _submit(cluster, shares, folder, jobs)
        number = jobs[0].job_id.split("_")[0]
        notice(f"{len(jobs)} tasks, number {number}, of {len(chosen)} scenes; they go on without this. Files: {folder}")
        if cluster.on == "local":
            _wait(cluster, jobs)
    _wait(cluster, jobs)
    failed: dict[str, str] = {}
    for job, share in zip(jobs, shares, strict=True):
        if job.paths.result_pickle.is_file() and job.exception() is None:
            failed |= job.result()
        else:
            last = ((job.stderr() or "").strip().splitlines() or ["it wrote nothing"])[-1]
            failed |= dict.fromkeys(share.names, f"its task was killed or did not start: {last}")
    remove(folder)
    return failed


def _submit(cluster: ClusterConfig, shares: Sequence[Share], folder: Path, after: Sequence[Any]) -> list[Any]:
    """One job of submitit for each share, on Slurm when all of `after` have ended; ValueError where it or Slurm is
    missing or refuses."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError(f"--on {cluster.on} needs submitit: pip install 'fit3d-ns[cluster]' ({error}).") from error
    if cluster.on == "local":
        local = submitit.LocalExecutor(folder, max_num_timeout=_MAX_REQUEUES, python=HOLDING_PYTHON)
        jobs = []
        for index, share in enumerate(shares):
            cards = range(index * cluster.gpus, (index + 1) * cluster.gpus)
            local.update_parameters(timeout_min=cluster.time, gpus_per_node=cluster.gpus, visible_gpus=tuple(cards))
            jobs.append(local.submit(share))
        return jobs
    try:
        slurm = submitit.SlurmExecutor(folder, max_num_timeout=_MAX_REQUEUES, python=HOLDING_PYTHON)
        # Job steps do not take the number over from the job.
        steps = [] if cluster.cpus is None else [f"--cpus-per-task={cluster.cpus}"]
        slurm.update_parameters(job_name="fit3d", partition=cluster.partition, time=cluster.time, srun_args=steps)
        slurm.update_parameters(cpus_per_task=cluster.cpus, gpus_per_node=cluster.gpus or None)
        slurm.update_parameters(array_parallelism=cluster.array_parallelism, additional_parameters={"requeue": True})
        if after:
            slurm.update_parameters(dependency=f"afterany:{after[0].job_id.split('_')[0]}")
        return slurm.submit_array(shares)
    except RuntimeError as error:
        raise ValueError(f"Slurm does not take the tasks: {first_line(error)}") from error


def _wait(cluster: ClusterConfig, jobs: Sequence[Any]) -> None:
    """Until every task has written its result or is gone; asks for neither Slurm's accounting nor each task's state."""
    squeue = ["squeue", "--noheader", "--jobs", jobs[0].job_id.split("_")[0]]
    folder, pending, is_gone, checked = jobs[0].paths.folder, jobs, False, time.monotonic()
    with create_progress() as bar:
        shown = bar.add_task("Tasks", total=len(jobs), note="")
        while pending:
            time.sleep(0.5)
            there = set(os.listdir(folder))
            pending = [job for job in pending if job.paths.result_pickle.name not in there]
            bar.update(shown, completed=len(jobs) - len(pending))
            if time.monotonic() - checked >= _SECONDS_PER_CHECK:
                was_gone, checked = is_gone, time.monotonic()
                if cluster.on == "slurm":
                    found = subprocess.run(squeue, capture_output=True, text=True)
                    # Without an answer nothing is known.
                    is_gone = not found.stdout and (found.returncode == 0 or "Invalid job id" in found.stderr)
                else:
                    is_gone = all(job.done() for job in pending)
                if was_gone and is_gone:  # Files of other machines may be seen a little later.
                    return


def _describe(error: Exception) -> str:
    """One sentence; for a bug also the traceback, as a notice."""
    sentence = explain(error)
    if sentence is None:
        notice(traceback.format_exc())
    return sentence or f"{type(error).__name__}: {first_line(error)}"
