"""What `scripts/test_slurm.sh` has its Slurm do; PARTS chooses of `array decoder train nodes tables`.

Tiny scenes as one array, with tasks killed and requeued at random. Asserted: after the command, and its own repetitions
where tasks were killed for good, every scene is there, lifted to its end once, equal to the bit to what one process
makes of it, and nothing else is left. Then scenes that share a decoder, one that is trained first, stage II on two
nodes, and a graph of jobs.
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


def make_scenes(num_scenes: int) -> None:
    print(f"Making {num_scenes} scenes", flush=True)
    with open("serial.log", "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
        for number in range(num_scenes):
            name = f"s{number:03d}"
            ply = write_gaussians(Path(f"{name}.ply"), write_capture(Path("captures") / name, seed=number))
            made = ["--output-path", f"scenes/{name}.safetensors", "--max-passes", "1"]
            lift.main(["--ply", str(ply), "--data", f"captures/{name}", *made, *OPTIONS])


def lift_array(num_scenes: int, num_kills: int, at_a_time: int) -> None:
    """All scenes as one array, with kills, against one process."""
    with open("serial.log", "a") as quiet:
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
    # A short array may be over before.
    assert killed.total() == num_kills or num_scenes < 10 * num_kills, killed
    print(
        f"{num_scenes} scenes, {at_a_time} at a time, {dict(killed)}, {num_commands} commands: {seconds:.0f} s; one "
        f"process {serial_seconds:.0f} s. Load {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores. A task beyond its "
        f"scene: {(seconds * at_a_time - serial_seconds) / num_tasks:.1f} s of its slot, waiting and other load "
        f"included, {(sum(task_cpu.values()) - serial_cpu) / num_tasks:.1f} s of a core. The command that waits: "
        f"{waiting / num_scenes:.2f} s of a core a scene.",
        flush=True,
    )


def run(
    words: Sequence[str],
    random_: random.Random,
    num_kills: int,
    killed: Counter[str],
    seconds: dict[int, float],
    folder: Path = Path("array"),
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
            # Every other one while a scene is solved, the others while Python imports.
            is_solving, is_odd = any(folder.glob("*.lift-state")), killed.total() % 2 == 1
            is_due = killed.total() < num_kills and time.monotonic() > next_kill
            if is_due and (is_solving or not is_odd) and (tasks := find_tasks()):
                task, kind = random_.choice(sorted(tasks.items())), KINDS[killed.total() % 3]
                is_importing = has_bit(task[1], "SigBlk")
                if (is_odd or is_importing) and kill(task, kind):
                    killed[f"{kind} while importing" if is_importing else kind] += 1
                    next_kill = time.monotonic() + random_.uniform(1, 20)
    command.returncode, cpu = os.waitstatus_to_exitcode(ended[1]), ended[2].ru_utime + ended[2].ru_stime
    text = Path("command.log").read_text()
    if command.returncode == 0:
        return [], cpu
    again = re.findall(r"^fit3d-lift (.+)$", text, re.MULTILINE)
    assert command.returncode == 1 and again, text
    print("\n".join(re.findall(r"^Failed: .+$", text, re.MULTILINE)), flush=True)
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
    """Stage II on two nodes by `fit3d-finetune --on slurm`, told to leave, and one node lost later, equals
    an undisturbed run to the bit."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = ["--ckpts", "scenes/s000.safetensors", "--max-steps", "60", "--max-validation-views", "2"]
    words += ["--steps-per-checkpoint", "10", "--device", "cpu"]
    command = shutil.which("fit3d-finetune")
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "2", command, *words, "--output-dir", "undisturbed"]
    subprocess.run(torchrun, check=True, capture_output=True)
    batch = [command, *words, "--on", "slurm", "--nodes", "2", "--output-dir", "job"]
    found = subprocess.run(batch, check=True, capture_output=True, text=True)
    job = re.findall(r"Slurm's job (\d+)", found.stdout)[0]
    log = Path(f"job/slurm-{job}.log")
    blows = [
        ["scancel", "--batch", "--signal=USR2", job],
        ["scontrol", "update", "nodename=node2", "state=down", "reason=lost"],
    ]
    while job in subprocess.run(["squeue", "--noheader", "--format=%i"], capture_output=True, text=True).stdout:
        time.sleep(0.1)
        # The first comes at the first steps, the second after checkpoints of the second start.
        *before, text = (log.read_text() if log.is_file() else "").split("the same command goes on")
        is_due = re.search(r"Fine-tuning: step [3-5]\d of" if before else r"Fine-tuning: step", text)
        if is_due and len(blows) == (1 if before else 2):
            subprocess.run(blows.pop(0), check=True)
            if not blows:
                time.sleep(3)
                subprocess.run(["scontrol", "update", "nodename=node2", "state=resume"], check=True)
    text = log.read_text()
    assert not blows and Path("job/report.json").is_file(), text
    expected, found_ = (collect_results(Path(name)) for name in ("undisturbed", "job"))
    assert expected["model.safetensors"] == found_["model.safetensors"], text
    stops = re.findall(r"stopped at step \d+|Node failure on \w+|Resuming from step \d+", text)
    print(f"Stage II on two nodes: {', '.join(stops)}; then as if undisturbed", flush=True)


def share_decoder(num_scenes: int) -> None:
    """Three scenes on one basis with one decoder, as three arrays whose tasks are killed, equal one process."""
    scenes = sorted(map(str, Path("scenes").glob("*.safetensors")))[:num_scenes]
    words = ["--scene", *scenes, *OPTIONS, *OFTEN, "--shared-decoder", "--output-path"]
    with open("serial.log", "a") as quiet:
        command = [sys.executable, "-m", "fit3d_ns.cli.lift", *words, "shared_serial"]
        subprocess.run(command, check=True, stdout=quiet, stderr=quiet)
    words, killed, num_commands = [*words, "shared", "--on", "slurm", "--array-parallelism", "2"], Counter[str](), 0
    while words:
        words, _ = run(words, random.Random(0), 3, killed, {}, Path("shared"))
        num_commands += 1
    differences = find_differences(*(collect_results(Path(name)) for name in ("shared_serial", "shared")))
    assert differences == [], differences
    for log in Path("shared").glob("*.log"):
        # A lift begins with this pass, and is done once.
        assert log.read_text().count("Lifting, decoder") == 1, log.read_text()
    print(
        f"A decoder of {num_scenes} scenes by tasks, {dict(killed)}, {num_commands} commands: as one process",
        flush=True,
    )


def train_splats() -> None:
    """`fit3d-lift --train` told to leave in the middle of `ns-train`: it goes on, to the bits of an undisturbed one."""
    words = [sys.executable, "-m", "fit3d_ns.cli.lift", "--train", "600", "--data", "captures/s000", *OPTIONS]
    with open("train.log", "a") as log:
        command = subprocess.Popen([*words, "--output-path", "trained", "--on", "slurm"], stdout=log, stderr=log)
        run, left = Path("trained/splats/s000/fit3d-features/steps_600"), list[str]()
        while command.poll() is None:
            time.sleep(0.2)
            said = Path("trained/splats/s000.log")
            is_training = said.is_file() and re.search(r"^1\d0 \(", said.read_text(), re.MULTILINE)
            if not left and is_training and (tasks := find_tasks()):
                assert kill(next(iter(tasks.items())), "USR2")
                while not (left := [path.name for path in run.rglob("*.ckpt")]):
                    time.sleep(0.2)
        subprocess.run([*words, "--output-path", "undisturbed_training/"], stdout=log, stderr=log, check=True)
    assert command.returncode == 0 and left, Path("train.log").read_text()
    found, expected = (collect_results(Path(name)) for name in ("trained", "undisturbed_training"))
    assert found["s000.safetensors"] == expected["s000.safetensors"]
    print(f"Gaussians trained in a task: left at {left[0]}, then as if undisturbed", flush=True)


def make_tables() -> None:
    """Table 1 of two rooms by `reproduce_small.sh --on slurm`: a graph of jobs, down to the report."""
    make = [sys.executable, "-m", "fit3d_ns.cli.synthesize", "--output-dir", "rooms", "--num-scenes", "2"]
    subprocess.run([*make, "--num-frames", "6", "--width", "64", "--height", "48"], check=True, capture_output=True)
    words = ["small", "--train", "rooms/room_00", "--test", "rooms/room_01", "--backbone", BACKBONE, "--steps", "2"]
    words += ["--colour-steps", "6", "--probe-iterations", "2", "--tables", "1", "--output", "tables"]
    program = [sys.executable, str(ROOT / "scripts" / "ablations.py"), *words]
    asked = subprocess.run([*program, "--dry-run"], check=True, capture_output=True, text=True).stdout
    start = time.perf_counter()
    subprocess.run([*program, "--on", "slurm"], check=True, capture_output=True)
    while subprocess.run(["squeue", "--noheader"], capture_output=True, text=True).stdout:
        time.sleep(1)
    logs = "".join(path.read_text() for path in Path("tables").rglob("*.log"))
    assert Path("tables/report/tables.html").is_file(), logs
    left = subprocess.run([*program, "--dry-run"], check=True, capture_output=True, text=True).stdout
    jobs = [re.search(r"(\d+) jobs in (\d+) arrays", text).groups() for text in (asked, left)]
    assert jobs[1] == ("1", "0"), left
    print(
        f"Tables of two rooms: {jobs[0][0]} jobs in {jobs[0][1]} arrays, {time.perf_counter() - start:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    scenes, kills, tasks = map(int, sys.argv[2:5])
    parts = os.environ.get("PARTS", "array decoder train nodes tables").split()
    make_scenes(scenes)
    if "array" in parts:
        lift_array(scenes, kills, tasks)
    if "decoder" in parts:
        share_decoder(3)
    if "train" in parts:
        train_splats()
    if "nodes" in parts:
        fine_tune()
    if "tables" in parts:
        make_tables()
