"""torch.hub: fine-tuned backbones as plain timm models that take images of any size.

    import torch
    vit = torch.hub.load("CLONE", "fit3d", "my_vit", source="local")          # a folder that fit3d-finetune wrote
    vit = torch.hub.load("CLONE", "dinov2_small_fine", source="local")        # what the authors of FiT3D published

`vit.forward_features(images)` gives tokens of images that are normalised by the mean and deviation in
`vit.pretrained_cfg`, or, for the published ones, by ImageNet's, with which they were trained.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fit3d_ns.features import create_token_model

dependencies = ["torch", "timm", "safetensors"]

_PUBLISHED = "https://huggingface.co/yuanwenyue/FiT3D/resolve/main/{}_finetuned.pth"


def fit3d(backbone: str, weights: str | None = None) -> nn.Module:
    """A backbone by name or folder, `weights` being a file with others than its own; in training mode, as timm's."""
    return create_token_model(backbone, weights).to_timm()


def _publish(name: str) -> Callable[..., nn.Module]:
    def load(weights: str | None = None) -> nn.Module:
        """The backbone with FiT3D's published weights, or those of a file that was downloaded before."""
        if weights is None:
            file = Path(torch.hub.get_dir()) / "checkpoints" / f"fit3d_{name}.pth"
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.is_file():
                torch.hub.download_url_to_file(_PUBLISHED.format(name), str(file))
            weights = str(file)
        return fit3d(name, weights)

    return load


dinov2_small_fine = _publish("dinov2_small")
dinov2_reg_small_fine = _publish("dinov2_reg_small")
clip_base_fine = _publish("clip_base")
mae_base_fine = _publish("mae_base")
deit3_base_fine = _publish("deit3_base")
