"""`FeatureTrainer`: nerfstudio's trainer with a resume that continues the run it resumes.

`--max-num-iterations` is the total, where nerfstudio runs that many more. After loading, the optimizers hold the loaded
parameters, where nerfstudio's Adam updates those from before; random states, data order and strategy are restored.
Checkpoints are whole, Ctrl-C saves and exits 130, step counts that were left open are resolved before set-up and
written to config.yml, and a run ends with its metrics, as a table and as `results.json`.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.misc import step_check
from nerfstudio.utils.writer import EventName, TimeWriter
from rich.console import Console
from rich.table import Table

from fit3d_ns.features.sources import find_backbone_folder
from fit3d_ns.plugin import checkpoints
from fit3d_ns.plugin.schedulers import RunLengthDecaySchedulerConfig
from fit3d_ns.rasterization import prepare_rasterizer
from fit3d_ns.utils.errors import check_writable, install_error_sentences
from fit3d_ns.utils.files import lock_folder, write_atomically
from fit3d_ns.utils.progress import PhaseTimer, measure_peak_memory_mb, notice
from fit3d_ns.utils.results import ResultRecord, load_result, save_result
from fit3d_ns.utils.selection import capture_random_states, restore_random_states
from fit3d_ns.utils.stopping import EXIT_INTERRUPTED, StopRequest, ignore_other_processes, interrupt_on_signals

SUMMARY_NAME = "results.json"
"""File next to config.yml with what a finished run reports: metrics, time per phase, memory, size."""


@dataclass
class FeatureTrainerConfig(TrainerConfig):
    """nerfstudio's trainer options; `--max-num-iterations` is the total, also after a resume."""

    _target: type = field(default_factory=lambda: FeatureTrainer)
    """The trainer's class."""
    steps_per_save: int | None = None  # type: ignore[assignment]
    """Steps between checkpoints; a tenth of the run by default."""
    steps_per_eval_image: int | None = None  # type: ignore[assignment]
    """Steps between evaluations of one held-out image; a tenth of the run by default, 0 for never."""

    def set_timestamp(self) -> None:
        """nerfstudio's first call on the parsed config: the open step counts are filled here, before it is saved."""
        super().set_timestamp()
        install_error_sentences()
        interrupt_on_signals()
        self.resolve()
        check_writable(self.get_base_dir() / SUMMARY_NAME)

    def set_experiment_name(self) -> None:
        """Uses the scene folder's full name, including dots; `--data .` resolves to the current folder's name."""
        data, name = self.pipeline.datamanager.data, getattr(self, "experiment_name", None)
        if name is None and data is not None and not Path(data).is_file():
            self.experiment_name = Path(data).resolve().name
        super().set_experiment_name()

    def save_config(self) -> None:
        """Writes config.yml as nerfstudio does, whole or not at all."""
        with write_atomically(self.get_base_dir() / "config.yml") as temporary:
            temporary.write_text(yaml.dump(self), "utf8")

    def resolve(self) -> None:
        """Fills every step count that was left open and checks what can be checked before anything is built.

        A ValueError names an option that cannot be honoured here.
        """
        if self.machine.device_type == "cuda" and not torch.cuda.is_available():
            raise ValueError("There is no CUDA device for --machine.device-type cuda; use --machine.device-type cpu.")
        prepare_rasterizer(self.machine.device_type)
        datamanager = self.pipeline.datamanager
        data = Path(datamanager.data or datamanager.dataparser.data)
        if datamanager.data is None and data == Path():
            raise ValueError("--data is missing; give the scene's folder.")
        if not data.exists():
            raise ValueError(f"No such scene: {data}; check the path given as --data.")
        if datamanager.backbone_weights is not None:
            # A relative path would be lost to commands that start in another folder, a link's suffix by following it.
            datamanager.backbone_weights = Path(datamanager.backbone_weights).absolute()
        folder = find_backbone_folder(datamanager.backbone)
        if folder is not None:
            datamanager.backbone = str(folder.resolve())
        self.pipeline.model.resolve_steps(self.max_num_iterations)
        self.pipeline.model.check_features()
        tenth = max(self.max_num_iterations // 10, 1)
        if self.steps_per_save is None:
            self.steps_per_save = tenth
        if self.steps_per_eval_image is None:
            self.steps_per_eval_image = tenth
        for group in self.optimizers.values():
            if isinstance(group["scheduler"], RunLengthDecaySchedulerConfig):
                group["scheduler"].resolve(self.max_num_iterations)
        if self.machine.device_type == "cpu":
            self.mixed_precision = False


class FeatureTrainer(Trainer):
    """Trains colour, lifts features, and leaves a checkpoint, metrics and a config behind."""

    config: FeatureTrainerConfig
    training_state: Literal["training", "paused", "completed"]

    def __init__(self, config: FeatureTrainerConfig, local_rank: int = 0, world_size: int = 1) -> None:
        config.resolve()
        super().__init__(config, local_rank, world_size)
        self.timer = PhaseTimer()
        self._locks = ExitStack()

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """Builds everything; features are extracted here, so that what can fail fails before training."""
        with self._exit_when_interrupted("Interrupted while setting up; nothing was trained."):
            if self.local_rank == 0:
                self._locks.enter_context(lock_folder(self.base_dir))
            with self.timer.phase("setup"), ignore_other_processes():
                super().setup(test_mode)
            with self.timer.phase("features"):
                self.pipeline.prepare_features()

    def train(self) -> None:
        """Runs the steps up to `max_num_iterations`; an interrupt ends it at the next step boundary."""
        datamanager = self.pipeline.datamanager
        datamanager.train_dataparser_outputs.save_dataparser_transform(self.base_dir / "dataparser_transforms.json")
        with self._locks, self._exit_when_interrupted(f"Stopped at once; what was saved is in {self.base_dir}."):
            self._init_viewer_state()
            self.stop_training = False
            is_trained = False
            with StopRequest() as stop, TimeWriter(writer, EventName.TOTAL_TRAIN_TIME):
                for step in range(self._start_step, self.config.max_num_iterations):
                    while self.training_state == "paused" and not (self.stop_training or stop.is_requested):
                        time.sleep(0.01)
                    if self.stop_training or stop.is_requested:
                        break
                    self.step = step
                    self._run_step(step)
                    is_trained = True
            if stop.is_requested:
                if is_trained:
                    self.save_checkpoint(self.step)
                resume = f"--load-dir {self.checkpoint_dir}"
                notice(f"Interrupted after step {self.step}; go on with the same command and {resume}.")
                sys.exit(EXIT_INTERRUPTED)
            self._finish(is_trained)

    @contextmanager
    def _exit_when_interrupted(self, text: str) -> Iterator[None]:
        """nerfstudio would print a traceback and call it a success."""
        try:
            yield
        except KeyboardInterrupt:
            notice(text)
            sys.exit(EXIT_INTERRUPTED)

    def _finish(self, is_trained: bool) -> None:
        """Saves, evaluates all held-out frames, writes the metrics, and says where everything is; of a run that was
        finished before, what is missing."""
        self.training_state = "completed"
        record = None if is_trained else self._find_record()
        if is_trained:
            with self.timer.phase("saving"):
                self.save_checkpoint(self.step)
            writer.write_out_storage()
            self._run_callbacks(self.step, TrainingCallbackLocation.AFTER_TRAIN)
        else:
            rest = "metrics are measured now" if record is None else f"metrics are in {self.base_dir / SUMMARY_NAME}"
            said = f"The checkpoint is at step {self._start_step} of {self.config.max_num_iterations}: nothing to train"
            notice(f"{said}; {rest}.")
            path = self.checkpoint_dir / f"step-{self.step:09d}.ckpt"
            if not path.is_file():
                self.save_checkpoint(self.step)
            elif self.config.save_only_latest_checkpoint and self.local_rank == 0:
                checkpoints.remove_other_checkpoints(path)
        if record is None:
            with self.train_lock, self.timer.phase("evaluation"):
                metrics = self.pipeline.get_average_eval_image_metrics(get_std=True)
            record = self._create_record(metrics)
            save_result(record, self.base_dir / SUMMARY_NAME)
            self._print_record(record)
        # Features are solved last, so this is when there is something to see; a script waits for nobody.
        if not self.config.viewer.quit_on_train_completion and sys.stdin.isatty() and sys.stdout.isatty():
            with suppress(KeyboardInterrupt):
                self._train_complete_viewer()

    def _find_record(self) -> ResultRecord | None:
        """The metrics of this run, if they were written and are of as many steps."""
        with suppress(ValueError):
            record = load_result(self.base_dir / SUMMARY_NAME)
            if record.settings.get("max_num_iterations") == self.config.max_num_iterations:
                return record
        return None

    def save_checkpoint(self, step: int) -> None:
        """Saves everything after step `step` was taken, atomically."""
        if self.local_rank != 0:
            return
        path = self.checkpoint_dir / f"step-{step:09d}.ckpt"
        state = {
            "step": step,
            "pipeline": self.pipeline.state_dict(),
            "optimizers": {name: item.state_dict() for name, item in self.optimizers.optimizers.items()},
            "schedulers": {name: item.state_dict() for name, item in self.optimizers.schedulers.items()},
            "scalers": self.grad_scaler.state_dict(),
            "fit3d": {
                "random": capture_random_states(),
                "run": self.pipeline.capture_run_state(),
                "seconds": dict(self.timer.seconds),
            },
        }
        keep_older = not self.config.save_only_latest_checkpoint
        checkpoints.save_checkpoint_file(checkpoints.make_plain(state), path, keep_older)

    def _load_checkpoint(self) -> None:
        if (path := self.config.load_checkpoint) is not None:
            state = checkpoints.load_checkpoint_file(path)
        elif self.config.load_dir is not None:
            state, path = checkpoints.load_latest_checkpoint(self.config.load_dir, self.config.load_step)
        else:
            return
        self._start_step = state["step"] + 1
        self.step = state["step"]
        self.pipeline.load_pipeline(state["pipeline"], state["step"])
        self._point_optimizers_at_parameters()
        self.optimizers.load_optimizers(state["optimizers"])
        if "schedulers" in state and self.config.load_scheduler:
            self.optimizers.load_schedulers(state["schedulers"])
        self.grad_scaler.load_state_dict(state["scalers"])
        if "fit3d" in state:
            self.pipeline.restore_run_state(state["fit3d"]["run"])
            self._random_states = state["fit3d"]["random"]
            self.timer.seconds.update(state["fit3d"].get("seconds", {}))
        notice(f"Resumed from {path}, step {self._start_step} of {self.config.max_num_iterations}.")

    def _point_optimizers_at_parameters(self) -> None:
        """Loading replaced every Gaussian parameter; Adam would go on updating the ones from before."""
        for name, parameters in self.pipeline.get_param_groups().items():
            optimizer = self.optimizers.optimizers[name]
            optimizer.state.clear()
            optimizer.param_groups[0]["params"] = list(parameters)
            self.optimizers.parameters[name] = list(parameters)

    def _run_step(self, step: int) -> None:
        # Set-up, the viewer and feature extraction may draw random numbers; the run goes on from where it was saved.
        if hasattr(self, "_random_states"):
            restore_random_states(self._random_states)
            del self._random_states
        with self.train_lock, TimeWriter(writer, EventName.ITER_TRAIN_TIME, step=step) as duration:
            with self.timer.phase("colour"):
                self.pipeline.train()
                self._run_callbacks(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
                loss, loss_dict, metrics_dict = self.train_iteration(step)
                self._run_callbacks(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
            with self.timer.phase("solve"):
                self.pipeline.solve_features_if_due(step, self.config.max_num_iterations)
        self._log(step, duration, loss, loss_dict, metrics_dict)
        with self.timer.phase("viewer"):
            self._update_viewer_state(step)
        if self.pipeline.datamanager.eval_dataset and step + 1 < self.config.max_num_iterations:
            with self.train_lock, self.timer.phase("evaluation"):
                self.eval_iteration(step)
        if step_check(step, self.config.steps_per_save) and step + 1 < self.config.max_num_iterations:
            with self.timer.phase("saving"):
                self.save_checkpoint(step)
        writer.write_out_storage()

    def _log(self, step: int, duration: Any, loss: Any, losses: dict[str, Any], metrics: dict[str, Any]) -> None:
        if step > self._start_step + 1:
            pixels = self.pipeline.datamanager.get_train_rays_per_batch()
            rate = pixels / max(1e-3, duration.duration)
            writer.put_time(name=EventName.TRAIN_RAYS_PER_SEC, duration=rate, step=step, avg_over_steps=True)
        if step_check(step, self.config.logging.steps_per_log, run_at_zero=True):
            writer.put_scalar(name="Train Loss", scalar=loss, step=step)
            writer.put_dict(name="Train Loss Dict", scalar_dict=losses, step=step)
            writer.put_dict(name="Train Metrics Dict", scalar_dict=metrics, step=step)

    def _run_callbacks(self, step: int, location: TrainingCallbackLocation) -> None:
        for callback in self.callbacks:
            callback.run_callback_at_location(step, location=location)

    def _create_record(self, metrics: dict[str, float]) -> ResultRecord:
        """The record of a finished run, from its means over the held-out frames."""
        config, model, datamanager = self.config, self.pipeline.model, self.pipeline.datamanager
        backbone = None if datamanager.cache is None else datamanager.cache.description.to_metadata()
        reported: dict[str, Any] = {key: value for key, value in metrics.items() if not key.startswith("fps")}
        reported |= {
            "num_gaussians": int(model.num_points),
            "num_train_views": len(datamanager.train_dataset),
            "num_eval_views": len(datamanager.eval_dataset),
            "seconds": {name: round(value, 3) for name, value in self.timer.seconds.items()},
            "milliseconds_per_step": 1000 * self.timer.seconds.get("colour", 0.0) / max(self.step + 1, 1),
            "peak_memory_mb": round(measure_peak_memory_mb(), 1),
        }
        if torch.cuda.is_available():
            reported["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
        settings = {
            "method": config.method_name,
            "scene": datamanager.train_dataset.metadata.get("scene_id", Path(config.data or ".").name),
            "max_num_iterations": config.max_num_iterations,
            "feature_dim": config.pipeline.model.feature_dim,
            "feature_schedule": config.pipeline.model.feature_schedule,
            "device": str(model.device),
            "backbone": backbone,
        }
        return ResultRecord("stage1", reported, settings, is_random=bool(backbone and backbone["is_random"]))

    def _print_record(self, record: ResultRecord) -> None:
        title = "fit3d-features" + (" (RANDOM weights: no measure of quality)" if record.is_random else "")
        table = Table(title=title, show_header=False)
        for name, value in record.metrics.items():
            if name == "seconds":
                table.add_row("seconds", ", ".join(f"{phase} {spent:.1f}" for phase, spent in value.items()))
            elif not name.endswith("_std"):
                table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        Console(soft_wrap=True).print(table)
        # The table cuts what is long, and takes square brackets for markup.
        print(f"Metrics: {self.base_dir / SUMMARY_NAME}\nConfig: {self.base_dir / 'config.yml'}")
        print(f"Next: fit3d-export --load-config {self.base_dir / 'config.yml'} --output-path scene.safetensors")
