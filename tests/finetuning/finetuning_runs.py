"""Builds small trainers; imported by tests and by the processes they start."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fit3d_ns.features import create_token_model
from fit3d_ns.finetuning.config import FinetuneConfig, RunConfig
from fit3d_ns.finetuning.draws import TrainingViews
from fit3d_ns.finetuning.optimization import copy_original
from fit3d_ns.finetuning.scene_bank import SceneBank
from fit3d_ns.finetuning.targets import TargetRenderer
from fit3d_ns.finetuning.trainer import FinetuneTrainer
from fit3d_ns.training.processes import Processes, create_accelerator
from fit3d_ns.utils.tensor_files import TensorStore
from tests.finetuning import finetuning_scene  # noqa: F401 - registers the backbone with timm.
from tests.finetuning.finetuning_scene import BACKBONE

RUN = RunConfig(trackers=(), num_workers=1, steps_per_checkpoint=10**6)


def create_trainer(scenes: Sequence[Path], folder: Path, config: FinetuneConfig, **settings: Any) -> FinetuneTrainer:
    token_model = create_token_model(BACKBONE)
    bank = SceneBank(scenes)
    views = TrainingViews(bank.on_disk, [config.run.splits] * len(bank.on_disk))
    cache = TensorStore(1.0, None)
    targets = TargetRenderer(bank, views, config.targets, cache, copy_original(token_model))
    accelerator = settings.pop("accelerator", None)
    processes = Processes(accelerator or create_accelerator("cpu", config.optimization.precision))
    inputs = settings.pop("inputs", {"test": True})
    return FinetuneTrainer(token_model, targets, config, processes, folder, inputs, **settings)


def configure(run: RunConfig = RUN, **parts: Any) -> FinetuneConfig:
    return replace(FinetuneConfig(run=run), **parts)


def collect_weights(trainer: FinetuneTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.bare.token_model.model.state_dict().items()}


def drop_key_biases(name: str, value: torch.Tensor) -> torch.Tensor:
    """A key bias moves no softmax: its gradient is rounding, which Adam blows up."""
    if not name.endswith("qkv.bias"):
        return value
    query, _, rest = value.chunk(3)
    return torch.cat([query, rest])
