"""Stage II: lifted scenes teach the 2D backbone. `finetune` runs it, `load_finetuned` opens what comes out."""

from fit3d_ns.finetuning.backbone_folder import load_finetuned
from fit3d_ns.finetuning.config import FinetuneConfig
from fit3d_ns.finetuning.finetune import FinetuneInputs, finetune

__all__ = ["FinetuneConfig", "FinetuneInputs", "finetune", "load_finetuned"]
