"""Stage II: lifted scenes teach the 2D backbone. `finetune.py` runs it, `load_finetuned` opens what comes out."""

from fit3d_ns.finetuning.backbone_folder import load_finetuned
