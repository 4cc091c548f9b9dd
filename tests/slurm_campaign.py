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
        command = [sys.executable, "-m", "fit3d_ns.cli.lift", *sources, "--output-path", "serial"]
        _, _, usage = os.wait4(subprocess.Popen(command, stdout=quiet, stderr=quiet).pid, 0)
    serial_seconds, serial_cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    start = time.perf_counter()
    print(f"One process took {serial_seconds:.0f} s; now as an array", flush=True)
    words = [*sources, "--output-path", "array", "--on", "slurm", "--array-parallelism", str(at_a_time)]
    killed, task_cpu, num_commands, waiting = Counter[str](), dict[int, float](), 0, 0.0
    random_ = random.Random(int(os.environ.get("FIT3D_FAULTS_SEED", "0")))
    while words:
        print(f"{sum(word.endswith('.safetensors') for word in words)} scenes to do", flush=True)
        words, cpu = run(words, random_, num_kills, killed, task_cpu)
        num_commands, waiting = num_commands + 1, waiting + cpu
    seconds, num_tasks = time.perf_counter() - start, num_scenes + killed.total()
    check(num_scenes)
    assert killed.total() == num_kills, killed
    print(
        f"{num_scenes} scenes, {at_a_time} at a time, {dict(killed)}, {num_commands} commands: {seconds:.0f} s; one "
        f"process {serial_seconds:.0f} s. Load {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores. A task beyond its "
        f"scene: {(seconds * at_a_time - serial_seconds) / num_tasks:.1f} s of its slot, waiting and other load "
        f"included, {(sum(task_cpu.values()) - serial_cpu) / num_tasks:.1f} s of a core. The command that waits: "
        f"{waiting / num_scenes:.2f} s of a core a scene."
    )


def run(
    words: Sequence[str], random_: random.Random, num_kills: int, killed: Counter[str], seconds: dict[int, float]
) -> tuple[list[str], float]:
    """Runs the command and kills some of its tasks; returns the words of the command that repeats failed scenes, and
    the seconds of a core that this one took. Notes those of each task, but for its last second, in `seconds`."""
    with open("command.log", "a+") as log:
        command = subprocess.Popen([sys.executable, "-m", "fit3d_ns.cli.lift", *words], stdout=log, stderr=log)
        atexit.register(command.terminate)
        next_kill, next_look = time.monotonic() + 10, 0.0
        while (ended := os.wait4(command.pid, os.WNOHANG))[0] == 0:
            time.sleep(0.02)
            if time.monotonic() > next_look:
                for process in find_tasks().values():
                    with suppress(psutil.Error):
                        seconds[process] = sum(psutil.Process(process).cpu_times()[:2])
                next_look = time.monotonic() + 1
            if killed.total() < num_kills and time.monotonic() > next_kill and (tasks := find_tasks()):
                # Every other one while a scene is solved, the others while Python imports.
                task, kind = random_.choice(sorted(tasks.items())), KINDS[killed.total() % 3]
                is_solving, is_importing = any(Path("array").glob("*.lift-state")), has_bit(task[1], "SigBlk")
                if (is_solving if killed.total() % 2 else is_importing) and kill(task, kind):
                    killed[f"{kind} while importing" if is_importing else kind] += 1
                    next_kill = time.monotonic() + random_.uniform(1, 20)
    command.returncode, cpu = os.waitstatus_to_exitcode(ended[1]), ended[2].ru_utime + ended[2].ru_stime
    text = Path("command.log").read_text()
    if command.returncode == 0:
        return [], cpu
    again = re.findall(r"^fit3d-lift (.+)$", text, re.MULTILINE)
    assert command.returncode == 1 and again, text
    return shlex.split(again[-1]), cpu


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
    if kind == "USR2" and not has_bit(process, "SigBlk") and not has_bit(process, "SigCgt"):
        return False  # Its first milliseconds, before Python runs.
    words = ["scontrol", "requeue", name] if kind == "requeue" else ["scancel", "--signal=USR2", name]
    return subprocess.run(words, capture_output=True).returncode == 0


def has_bit(process: int, mask: str) -> bool:
    """Whether a process holds USR2 back (`SigBlk`) or handles it (`SigCgt`)."""
    try:
        found = re.search(rf"{mask}:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return False
    return found is not None and bool(int(found.group(1), 16) >> (signal.SIGUSR2 - 1) & 1)


def check(num_scenes: int) -> None:
    expected, found = collect_results(Path("serial")), collect_results(Path("array"))
    assert len(expected) == 3 * num_scenes
    assert find_differences(expected, found) == [], find_differences(expected, found)
    for log in Path("array").glob("*.log"):
        text = log.read_text()
        assert text.count(" is done") - text.count("lifted already") <= 1, text
    assert sorted(path.name for path in Path("array").iterdir()) == sorted(expected)
    for _ in range(50):  # The last ones have written their results and end.
        if not find_tasks():
            break
        time.sleep(0.2)
    assert not find_tasks()
    shutil.rmtree("array")


def fine_tune() -> None:
    """Stage II on two nodes by `scripts/finetune.sbatch`, told to leave in the middle, and one of its nodes lost later,
    equals an undisturbed run to the bit."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = ["--ckpts", "scenes/s000.safetensors", "--max-steps", "60", "--max-validation-views", "2"]
    words += ["--steps-per-checkpoint", "10", "--device", "cpu"]
    command = shutil.which("fit3d-finetune")
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "2", command, *words, "--output-dir", "undisturbed"]
    subprocess.run(torchrun, check=True, capture_output=True)
    batch = ["sbatch", "--parsable", "--nodes", "2", str(ROOT / "scripts" / "finetune.sbatch"), *words]
    environment = {**os.environ, "PROCESSES_PER_NODE": "1"}
    found = subprocess.run([*batch, "--output-dir", "job"], check=True, capture_output=True, text=True, env=environment)
    job, log = found.stdout.strip(), Path(f"slurm-{found.stdout.strip()}.out")
    blows = [
        ["scancel", "--batch", "--signal=USR2", job],
        ["scontrol", "update", "nodename=node2", "state=down", "reason=lost"],
    ]
    while job in subprocess.run(["squeue", "--noheader", "--format=%i"], capture_output=True, text=True).stdout:
        time.sleep(0.1)
        # The first comes at the first steps, the second after checkpoints of the second start.
        *before, text = (log.read_text() if log.is_file() else "").split("the same command goes on")
        if blows and re.search(r"Fine-tuning: step [3-5]\d of" if before else r"Fine-tuning: step", text):
            subprocess.run(blows.pop(0), check=True)
            if not blows:
                time.sleep(3)
                subprocess.run(["scontrol", "update", "nodename=node2", "state=resume"], check=True)
    text = log.read_text()
    assert not blows and Path("job/report.json").is_file(), text
    expected, found_ = (collect_results(Path(name)) for name in ("undisturbed", "job"))
    assert expected["model.safetensors"] == found_["model.safetensors"], text
    begun = re.findall(r"[^\n]*checkpoint[^\n]*", text)
    print(f"Stage II on two nodes: {begun}; then as if undisturbed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
    fine_tune()
