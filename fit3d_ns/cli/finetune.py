"""`fit3d-finetune`: many lifted scenes teach one vision transformer (stage II)."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fit3d_ns.cli.command import Heading, run_named, spell
from fit3d_ns.cli.runs import import_run_reader
from fit3d_ns.finetuning.config import PAPER, FinetuneConfig
from fit3d_ns.finetuning.finetune import REPORT_NAME, FinetuneInputs, finetune
from fit3d_ns.finetuning.scene_bank import find_scenes, prepare_scene_files
from fit3d_ns.finetuning.trainer import Interrupted
from fit3d_ns.scene import FeatureScene
from fit3d_ns.training.processes import Processes, create_accelerator
from fit3d_ns.utils.device import DeviceChoice
from fit3d_ns.utils.errors import first_line
from fit3d_ns.utils.files import lock_folder
from fit3d_ns.utils.progress import notice

EXPORT_FOLDER = "exported_scenes"
"""Below the output folder: scene files of nerfstudio runs that were given."""
_PAPER_FLAG = "--paper"


@dataclass(frozen=True)
class SlurmConfig:
    """One training on a cluster: torchrun on each node, by `finetune.sbatch`."""

    on: Literal["here", "slurm"] = "here"
    """Train in this process (`here`), or submit a job to Slurm that does, and goes on in the queue when its time is up
    or it is preempted. Scenes and result have to lie where all nodes see them. Account: SBATCH_ACCOUNT."""
    nodes: int = 1
    """Nodes of the job."""
    gpus: int = 0
    """CUDA cards of each node, with a process each."""
    partition: str | None = None
    """Slurm's partition; its default one without this."""
    time: int = 240
    """Minutes before the job is requeued."""

    def __post_init__(self) -> None:
        if self.on == "here" and (self.nodes, self.gpus, self.partition, self.time) != (1, 0, None, 240):
            raise ValueError(
                "--nodes, --gpus, --partition and --time change nothing without --on slurm; leave them out."
            )
        if 0 in (self.nodes, self.time):
            raise ValueError("--nodes and --time must be at least 1.")


@dataclass(frozen=True)
class FinetuneCommand:
    """Scenes, backbone, where the result goes, and all settings of the training."""

    ckpts: Annotated[tuple[str, ...], Heading("input")]
    """Scenes to train on: scene files, globs of them, nerfstudio run folders or their config.yml."""
    output_dir: Annotated[Path, Heading("output")]
    """Folder of the result; an interrupted run goes on there."""
    val_ckpts: Annotated[tuple[str, ...], Heading("input")] = ()
    """Scenes to validate on, as `--ckpts`. Without them, views that the training leaves out are taken."""
    trust_config: bool = False
    """Also read runs of other packages' methods, whose config.yml names code that is run: only of people you trust."""
    backbone: Annotated[str | None, Heading("backbone")] = None
    """Name of the backbone; by default the one the scenes were lifted with."""
    backbone_weights: Path | None = None
    """File with the backbone's weights; by default the one that the scenes were lifted with, else timm's download."""
    device: Annotated[DeviceChoice, Heading("machine")] = "auto"
    """Where to train; `auto` takes CUDA where there is one."""
    cluster: SlurmConfig = field(default_factory=SlurmConfig)
    paper: Annotated[bool, tyro.conf.FlagCreatePairsOff, Heading("optimization")] = False
    """Set every value of the paper's public code; flags that are given still win."""
    config: FinetuneConfig = field(default_factory=FinetuneConfig)


@dataclass(frozen=True)
class PaperFinetuneCommand(FinetuneCommand):
    """The same with the public code's values as defaults."""

    paper: Annotated[bool, Heading("optimization")] = True
    """Every value of the paper's public code is set; flags that are given still win."""
    config: FinetuneConfig = PAPER


def run_finetune(command: FinetuneCommand) -> None:
    """Finds the scenes, exports runs among them, trains, and prints where the results are."""
    config, folder = command.config, command.output_dir
    scenes, validation = find_scenes(command.ckpts), find_scenes(command.val_ckpts, "--val-ckpts")
    both = sorted(set(scenes) & set(validation))
    if both:
        raise ValueError(f"{both[0]} is given to --ckpts and to --val-ckpts; take it out of one of them.")
    if command.cluster.on == "slurm":
        return _submit(command)
    accelerator = create_accelerator(command.device, config.optimization.precision, config.run.trackers, folder)
    processes = Processes(accelerator)
    groups, load_run = (scenes, validation), partial(_load_run, trust_config=command.trust_config)
    with ExitStack() as locks:

        def prepare() -> None:
            locks.enter_context(lock_folder(folder))
            for group in groups:
                prepare_scene_files(group, folder / EXPORT_FOLDER, load_run)

        processes.run_on_main(prepare)
        files = [prepare_scene_files(group, folder / EXPORT_FOLDER, load_run, may_export=False) for group in groups]
        inputs = FinetuneInputs(files[0], files[1], command.backbone, command.backbone_weights)
        try:
            finetune(inputs, config, folder, command.device, accelerator)
        except Interrupted as interruption:
            if processes.is_main:
                notice(f"Fine-tuning {interruption}.")
            raise
        processes.close()
    if processes.is_main:
        share = f"fit3d-push {folder} USER/NAME"
        print(f"Fine-tuned backbone: {folder}\nMetrics: {folder / REPORT_NAME}\nTo share it: {share}")


def main(args: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if args is None else args)
    # The flag chooses the defaults, so explicit flags win wherever they stand.
    command: type[Any] = PaperFinetuneCommand if _PAPER_FLAG in arguments else FinetuneCommand
    rest = [argument for argument in arguments if argument != _PAPER_FLAG]
    run_named("fit3d-finetune", command, run_finetune, rest)


def _submit(command: FinetuneCommand) -> None:
    """Hands the command to Slurm, whose job runs it on its nodes, and prints the job and its log."""
    slurm, log = command.cluster, command.output_dir / "slurm-%j.log"
    words = ["sbatch", "--parsable", f"--nodes={slurm.nodes}", f"--time={slurm.time}", f"--output={log}"]
    words += [f"--gpus-per-node={slurm.gpus}"] if slurm.gpus else []
    words += [f"--partition={slurm.partition}"] if slurm.partition else []
    words += [str(Path(__file__).with_suffix(".sbatch")), *spell(replace(command, cluster=SlurmConfig()))]
    words += [_PAPER_FLAG] if isinstance(command, PaperFinetuneCommand) else []
    print(shlex.join(words))
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "FIT3D_PYTHON": sys.executable}
    try:
        found = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        raise ValueError("--on slurm needs Slurm's sbatch; the line above is for a machine that has it.") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"Slurm does not take the job: {first_line(ValueError(error.stderr))}") from None
    number = found.stdout.split(";")[0].strip()
    print(f"Slurm's job {number} fine-tunes into {command.output_dir}; log: {str(log).replace('%j', number)}")


def _load_run(config: Path, trust_config: bool) -> FeatureScene:
    reader = import_run_reader(config, "export the run with fit3d-export on a machine that has it.")
    return reader.load_run_scene(config, trust_config=trust_config)


if __name__ == "__main__":
    main()
