"""PLY files for other viewers: features as colours, Gaussians where the dataset's cameras are."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fit3d_ns.analysis.pca import apply_pca, fit_colours, fit_pca, map_to_colours
from fit3d_ns.cli.export import change_gaussians, main
from fit3d_ns.data.frames import CaptureFiles
from fit3d_ns.geometry.cameras import Camera
from fit3d_ns.scene import FeatureScene, create_posed_capture
from tests.finetuning.finetuning_scene import create_scene


@pytest.fixture
def scene(tmp_path: Path) -> FeatureScene:
    """Its training frame is the dataset's world, turned by 50 degrees about an oblique axis, moved, and shrunk."""
    scene = create_scene(tmp_path)
    axis, angle = torch.tensor([0.36, 0.48, 0.8]), math.radians(50)
    cross = torch.tensor([[0.0, -0.8, 0.48], [0.8, 0.0, -0.36], [-0.48, 0.36, 0.0]])
    rotation = (
        math.cos(angle) * torch.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * torch.outer(axis, axis)
    )
    transform = torch.cat([rotation, torch.tensor([[0.3], [-0.2], [0.5]])], dim=1)
    frames = [view.frame for view in scene.posed_capture.views]
    files = CaptureFiles(scene.posed_capture.root, "nerfstudio", "made by a test", frames, None, True, "room")
    return replace(scene, posed_capture=create_posed_capture(files, transform, 0.4))


def test_world__the_datasets_cameras_see_what_the_training_cameras_saw(scene: FeatureScene) -> None:
    # The Gaussians of the fixture are where its frames look, so they are moved to the training frame first.
    capture = scene.posed_capture
    rotation, translation = capture.dataparser_transform[:, :3], capture.dataparser_transform[:, 3]
    means = (scene.gaussians.means @ rotation.T + translation) * capture.dataparser_scale
    gaussians = replace(scene.gaussians, means=means, log_scales=scene.gaussians.log_scales.float() + math.log(0.4))
    trained = replace(scene, gaussians=gaussians)
    moved = change_gaussians(trained, "photograph", "dataset")
    torch.testing.assert_close(moved.gaussians.means, scene.gaussians.means)
    view = capture.views[0]
    seen = Camera(view.frame.camera_to_world, view.K, view.width, view.height)
    before, after = trained.render_rgb(*view.camera), moved.render_rgb(*seen)
    assert before.std() > 0.05
    torch.testing.assert_close(after, before, atol=2e-3, rtol=0)  # rotations are kept in half precision


def test_color__is_that_of_the_decoded_feature(scene: FeatureScene) -> None:
    """A Gaussian that fills the picture decodes to the sum over the decoder's taps; its colour is that token's."""
    gaussians, decoder = scene.gaussians, scene.decoder
    assert decoder.bias is not None
    tokens = gaussians.features.float() @ decoder.weight.sum(dim=(2, 3)).T + decoder.bias
    basis = fit_colours(fit_pca(tokens, 3), tokens)
    painted = change_gaussians(replace(scene, pca=basis), "pca", "training").gaussians
    expected = map_to_colours(apply_pca(tokens, basis), basis)
    torch.testing.assert_close(0.5 + painted.sh_dc / (2 * math.pi**0.5), expected, atol=1e-4, rtol=0)
    assert painted.sh_rest is None and torch.equal(painted.features, gaussians.features)


def test_export__refuses_a_scene_file_with_other_colours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--load-config", "run", "--output-path", "a.safetensors", "--color", "pca"])
    assert stop.value.code == 1 and "Add --format ply" in capsys.readouterr().err
