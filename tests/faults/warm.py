"""Imported by the server that children are forked from: whatever commands import late, and the kernels, loaded once."""

import tempfile
from pathlib import Path

import pycolmap  # noqa: F401
import sklearn.neighbors  # noqa: F401
import torch
import torch.utils.tensorboard
import torchmetrics.image.lpip  # noqa: F401
import tyro
from PIL import Image

from tests.finetuning.finetuning_scene import create_scene

# Loads the parser, and the formats of pictures.
tyro.cli(int, args=["1"])
Image.init()

with tempfile.TemporaryDirectory() as _folder, torch.no_grad():
    _scene = create_scene(Path(_folder))
    _view = _scene.posed_capture.views[0]
    _scene.render_depth(_view.camera._replace(width=16, height=12))
