"""A whole `fit3d-features` run beside its own colour steps: what solving adds to splatfacto's time."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.results import load_result


def measure_run(data: Path, backbone: str, weights: Path | None, num_steps: int) -> dict[str, Any]:
    """Trains a run in a process of its own.

    Colour steps do the same with features and without, to the bit, so their seconds in this run are colour alone.

    Args:
        data: Scene folder.
        backbone: Whose features.
        weights: Its weights file; timm's download if None.
        num_steps: Length of the run.

    Returns:
        Seconds of colour and of all solves, their `ratio` (colour and solves over colour), and held-out figures.

    Raises:
        RuntimeError: The run failed; its output was printed.
    """
    program = Path(sys.executable).with_name("ns-train")
    with tempfile.TemporaryDirectory() as folder:
        command = [str(program), "fit3d-features", "--data", str(data), "--max-num-iterations", str(num_steps)]
        command += ["--pipeline.datamanager.backbone", backbone, "--vis", "tensorboard", "--output-dir", folder]
        command += [] if weights is None else ["--pipeline.datamanager.backbone-weights", str(weights)]
        notice(f"A run of {num_steps} steps")
        done = subprocess.run([*command, "--timestamp", "run"], capture_output=True, text=True)
        found = list(Path(folder).glob("*/fit3d-features/run/results.json"))
        if done.returncode != 0 or not found:
            print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
            raise RuntimeError(f"ns-train ended with exit code {done.returncode}.")
        metrics = load_result(found[0]).metrics
    seconds = metrics["seconds"]
    figures = {name: metrics[name] for name in ("psnr", "feature_l1", "feature_cosine", "num_gaussians",
                                                "num_train_views", "peak_memory_mb")}  # fmt: skip
    ratio = (seconds["colour"] + seconds["solve"]) / seconds["colour"]
    print(
        f"run of {num_steps} steps, {figures['num_train_views']} views: colour {seconds['colour']:.1f} s, solves "
        f"{seconds['solve']:.1f} s, {ratio:.3f} times colour alone; PSNR {figures['psnr']:.2f}, "
        f"L1 {figures['feature_l1']:.4f}, cosine {figures['feature_cosine']:.4f}",
        flush=True,
    )
    return {
        "num_steps": num_steps,
        "colour_seconds": seconds["colour"],
        "solve_seconds": seconds["solve"],
        "ratio": ratio,
        **figures,
    }
