"""Imported by the server that children are forked from: has the kernels loaded, which is most of a small command."""

import tempfile
from pathlib import Path

import torch

from tests.finetuning.finetuning_scene import create_scene

with tempfile.TemporaryDirectory() as _folder, torch.no_grad():
    _scene = create_scene(Path(_folder))
    _view = _scene.posed_capture.views[0]
    _scene.render_depth(_view.camera_to_world, _view.K, 16, 12)
