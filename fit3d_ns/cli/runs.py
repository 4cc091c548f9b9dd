"""nerfstudio runs that features are lifted onto: those that exist, and those that are trained first."""

import importlib
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from fit3d_ns.cli.cluster import HOLDING_PYTHON
from fit3d_ns.data.layouts import RUN_CONFIG, find_runs
from fit3d_ns.lifting.sources import LiftSource
from fit3d_ns.scene.scene_file import find_geometry_seconds
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.stopping import StopRequest


def name_run(path: Path) -> str:
    """A run's experiment: of nerfstudio's OUTPUT/EXPERIMENT/METHOD/TIMESTAMP/config.yml the second part.

    Like `read_run` this takes the config.yml, its folder, or a folder above it that holds one run.
    """
    folder = path.absolute()
    if not folder.is_dir():
        folder = folder.parent
    elif not (folder / RUN_CONFIG).is_file():
        # None or several are refused where the run is read.
        folder = next((config.parent for config in find_runs(folder)), folder)
    return folder.parents[1].name if len(folder.parents) > 2 else folder.name


def import_run_reader(path: Path, instead: str) -> Any:
    """`plugin/run_reader.py`, imported here so that commands work where nerfstudio is not installed; ValueError, which
    says what to do with the run at `path` instead."""
    try:
        return importlib.import_module("fit3d_ns.plugin.run_reader")
    except ImportError as error:
        problem = f"{path} is a nerfstudio run, and nerfstudio cannot be imported ({error})"
        raise ValueError(f"{problem}; {instead}") from error


def read_run_source(path: Path, data: Path | None, trust_config: bool) -> LiftSource:
    """A nerfstudio run."""
    reader = import_run_reader(path, "install it, or export the run as a PLY and lift that.")
    run = reader.read_run(path, data, trust_config)
    gaussians = run.create_gaussians()
    description = f"{run.config.method_name} run {run.config_path.parent.name}, step {run.step}"
    return LiftSource(
        gaussians,
        run.capture,
        description,
        run.rasterize_mode,
        num_dropped=len(run.gauss_params["means"]) - gaussians.num_gaussians,
        training_seconds=find_geometry_seconds(reader.read_run_figures(run.config_path)),
    )


def train_splats(folder: Path, num_steps: int, device: str, data: Path, name: str) -> LiftSource:
    """Gaussians of a capture, trained for their colours by `ns-train` unless that is done; a run that was interrupted
    goes on from its last checkpoint. ValueError where the training fails."""
    run, log = folder / name / "fit3d-features" / f"steps_{num_steps}", folder / f"{name}.log"
    if (run / "results.json").is_file():
        return read_run_source(run, data, False)
    words = ["--data", data, "--output-dir", folder, "--experiment-name", name, "--timestamp", run.name,
             "--max-num-iterations", num_steps, "--pipeline.model.feature-loss-weight", 0, "--vis", "tensorboard",
             "--machine.device-type", device]  # fmt: skip
    checkpoints = run / "nerfstudio_models"
    words += ["--load-dir", checkpoints] if any(checkpoints.glob("*.ckpt")) else []
    # A scheduler's USR2 goes to all processes of a task: it is held back there and heard here.
    command = [*shlex.split(HOLDING_PYTHON), "-m", "nerfstudio.scripts.train", "fit3d-features", *map(str, words)]
    folder.mkdir(parents=True, exist_ok=True)
    notice(f"Training the Gaussians of {name}, {num_steps} steps; what ns-train says is in {log}")
    with open(log, "a", encoding="utf-8") as file, StopRequest() as stop:
        training = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        while (code := training.poll()) is None:
            time.sleep(0.2)
            if stop.is_requested:
                training.terminate()  # It saves; further ones say nothing new.
    if stop.is_requested:
        stop.grant()
    if code:
        last = (log.read_text(encoding="utf-8").strip() or "it said nothing").splitlines()[-1]
        raise ValueError(f"ns-train ended with status {code} ({last.strip()}); all that it said is in {log}.")
    return read_run_source(run, data, False)
