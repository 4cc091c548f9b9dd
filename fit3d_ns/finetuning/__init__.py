"""Stage II: lifted scenes teach the 2D backbone. `finetune` runs it, `load_finetuned` opens what comes out."""

from fit3d_ns.finetuning.backbone_folder import load_finetuned, save_finetuned
from fit3d_ns.finetuning.config import PAPER, FinetuneConfig, RunConfig
from fit3d_ns.finetuning.draws import AugmentationConfig, SamplingConfig
from fit3d_ns.finetuning.finetune import FinetuneInputs, finetune
from fit3d_ns.finetuning.losses import AnchorConfig
from fit3d_ns.finetuning.optimization import OptimizationConfig, TrainableConfig
from fit3d_ns.finetuning.scene_bank import SceneBank, find_scenes, prepare_scene_files
from fit3d_ns.finetuning.targets import TargetConfig, TargetRenderer
from fit3d_ns.finetuning.trainer import FinetuneTrainer, Interrupted

__all__ = [
    "PAPER",
    "AnchorConfig",
    "AugmentationConfig",
    "FinetuneConfig",
    "FinetuneInputs",
    "FinetuneTrainer",
    "Interrupted",
    "OptimizationConfig",
    "RunConfig",
    "SamplingConfig",
    "SceneBank",
    "TargetConfig",
    "TargetRenderer",
    "TrainableConfig",
    "find_scenes",
    "finetune",
    "load_finetuned",
    "prepare_scene_files",
    "save_finetuned",
]
