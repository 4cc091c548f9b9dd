"""Tiny scenes as one array on the Slurm of `scripts/test_slurm.sh`, with tasks killed and requeued at random.

Asserted: after the command, and its own repetitions where tasks were killed for good, every scene is there, lifted to
its end once, equal to the bit to what one process makes of it, and nothing else is left.
"""

import atexit
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import psutil

from fit3d_ns.cli import lift
from tests.faults.world import collect_results, find_differences
from tests.lift_capture import BACKBONE, write_capture, write_gaussians

OPTIONS = ["--backbone", BACKBONE, "--feature-cache", "cache", "--device", "cpu", "--feature-dim", "4"]
OFTEN = ["--max-passes", "8", "--tolerance", "0", "--seconds-per-checkpoint", "0"]
ROOT = Path(__file__).parents[1]
KINDS = ("requeue", "USR2", "KILL")
"""Slurm requeues the task (TERM, then KILL); the notice before preemption or the end of the time; a sudden death."""


def main(folder: Path, num_scenes: int, num_kills: int, at_a_time: int) -> None:
    os.chdir(folder)
    print(f"Making {num_scenes} scenes", flush=True)
    with open("serial.log", "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
        for number in range(num_scenes):
            name = f"s{number:03d}"
            ply = write_gaussians(Path(f"{name}.ply"), write_capture(Path("captures") / name, seed=number))
            made = ["--output-path", f"scenes/{name}.safetensors", "--max-passes", "1"]
            lift.main(["--ply", str(ply), "--data", f"captures/{name}", *made, *OPTIONS])
        sources = ["--scene", *sorted(map(str, Path("scenes").glob("*.safetensors"))), *OPTIONS, *OFTEN]
        start = time.perf_counter()
        lift.main([*sources, "--output-path", "serial"])
    serial_seconds = time.perf_counter() - start
    start = time.perf_counter()
    print(f"One process took {serial_seconds:.0f} s; now as an array", flush=True)
    words = [*sources, "--output-path", "array", "--on", "slurm", "--array-parallelism", str(at_a_time)]
    killed, num_commands = Counter[str](), 0
    random_ = random.Random(int(os.environ.get("FIT3D_FAULTS_SEED", "0")))
    while words:
        print(f"{sum(word.endswith('.safetensors') for word in words)} scenes to do", flush=True)
        words = run(words, random_, num_kills - killed.total(), killed)
        num_commands += 1
    seconds = time.perf_counter() - start
    check(num_scenes)
    print(
        f"{num_scenes} scenes, {at_a_time} at a time, {dict(killed)}, {num_commands} commands: {seconds:.0f} s; one "
        f"process {serial_seconds:.0f} s. Slot time of a task beyond its scene, waiting and other load included: "
        f"{(seconds * at_a_time - serial_seconds) / (num_scenes + killed.total()):.1f} s."
    )


def run(words: Sequence[str], random_: random.Random, num_kills: int, killed: Counter[str]) -> list[str]:
    """Runs the command and kills some of its tasks; returns the words of the command that repeats failed scenes."""
    with open("command.log", "a+") as log:
        command = subprocess.Popen([sys.executable, "-m", "fit3d_ns.cli.lift", *words], stdout=log, stderr=log)
        atexit.register(command.terminate)
        next_kill = time.monotonic() + 10
        while command.poll() is None:
            time.sleep(0.02)
            if killed.total() < num_kills and time.monotonic() > next_kill and (tasks := find_tasks()):
                # Every other one in the middle of a solve.
                if killed.total() % 2 == 0 or any(Path("array").glob("*.lift-state")):
                    kind = KINDS[killed.total() % 3]
                    if kill(random_.choice(sorted(tasks.items())), kind):
                        killed[kind] += 1
                        next_kill = time.monotonic() + random_.uniform(1, 20)
    text = Path("command.log").read_text()
    if command.returncode == 0:
        return []
    again = re.findall(r"^fit3d-lift (.+)$", text, re.MULTILINE)
    assert command.returncode == 1 and again, text
    return shlex.split(again[-1])


def find_tasks() -> dict[str, int]:
    """Slurm's name of each running task, and its process."""
    tasks = {}
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = process.info["cmdline"] or [""]
        is_task = Path(words[0]).name.startswith("python") and "submitit.core._submit" in words
        if is_task and process.info["cwd"] == os.getcwd():
            with suppress(psutil.Error):
                environment = process.environ()
                array = environment.get("SLURM_ARRAY_JOB_ID")
                name = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]
                tasks[name] = process.pid
    return tasks


def kill(task: tuple[str, int], kind: str) -> bool:
    """Whether there was something to kill: a task may just be at its end."""
    name, process = task
    if kind == "KILL":
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
            return True
        return False
    if kind == "USR2" and not listens(process):
        # One that still imports would die of it, and Slurm sends it minutes before the end.
        return False
    words = ["scontrol", "requeue", name] if kind == "requeue" else ["scancel", "--signal=USR2", name]
    return subprocess.run(words, capture_output=True).returncode == 0


def listens(process: int) -> bool:
    """Whether a process handles USR2."""
    try:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return False
    return caught is not None and bool(int(caught.group(1), 16) >> (signal.SIGUSR2 - 1) & 1)


def check(num_scenes: int) -> None:
    expected, found = collect_results(Path("serial")), collect_results(Path("array"))
    assert len(expected) == 3 * num_scenes
    assert find_differences(expected, found) == [], find_differences(expected, found)
    for log in Path("array").glob("*.log"):
        text = log.read_text()
        assert text.count(" is done") - text.count("lifted already") <= 1, text
    assert sorted(path.name for path in Path("array").iterdir()) == sorted(expected)
    assert not find_tasks()
    shutil.rmtree("array")


def fine_tune() -> None:
    """Stage II as `scripts/finetune.sbatch`, told to leave in the middle, equals an undisturbed run to the bit."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [
        "--ckpts",
        "scenes/s000.safetensors",
        "--max-steps",
        "60",
        "--max-validation-views",
        "2",
        "--device",
        "cpu",
    ]
    command = shutil.which("fit3d-finetune")
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "2", command, *words, "--output-dir", "undisturbed"]
    subprocess.run(torchrun, check=True, capture_output=True)
    batch = ["sbatch", "--parsable", "--cpus-per-task", "2", str(ROOT / "scripts" / "finetune.sbatch"), *words]
    environment = {**os.environ, "PROCESSES_PER_NODE": "2"}
    found = subprocess.run([*batch, "--output-dir", "job"], check=True, capture_output=True, text=True, env=environment)
    job, log = found.stdout.strip(), Path(f"slurm-{found.stdout.strip()}.out")
    was_told = False
    while job in subprocess.run(["squeue", "--noheader", "--format=%i"], capture_output=True, text=True).stdout:
        time.sleep(0.1)
        if not was_told and log.is_file() and "Fine-tuning: step" in log.read_text():
            was_told = subprocess.run(["scancel", "--batch", "--signal=USR2", job]).returncode == 0
    text = log.read_text()
    assert was_told and "the same command goes on" in text and Path("job/report.json").is_file(), text
    expected, found_ = (collect_results(Path(name)) for name in ("undisturbed", "job"))
    assert expected["model.safetensors"] == found_["model.safetensors"], text
    print(f"Stage II on Slurm: {re.findall('stopped at step .+?;', text)[0][:-1]}, then as if undisturbed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
    fine_tune()
