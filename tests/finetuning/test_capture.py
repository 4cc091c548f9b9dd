"""From a distorted capture on disk through the lift to fine-tuning: the same pixels, and views the lift never saw."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fit3d_ns.data.images import load_image
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.features import FeatureCache, TokenModel, create_token_model, describe_backbone
from fit3d_ns.finetuning.draws import AugmentationConfig, Draw, TrainingViews
from fit3d_ns.finetuning.optimization import TokenModule
from fit3d_ns.finetuning.scene_bank import SceneBank
from fit3d_ns.finetuning.targets import TargetConfig, TargetRenderer
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.lift_scene import LiftSetup, lift_scene
from fit3d_ns.lifting.sources import LiftSource
from fit3d_ns.scene import Gaussians, create_posed_capture, save_scene
from tests.finetuning.finetuning_scene import BACKBONE, HEIGHT, PATCH, WIDTH

NUM_FRAMES, NUM_TEST = 6, 2
PLAIN = AugmentationConfig(flip_probability=0.0)


def write_capture(root, width=WIDTH, height=HEIGHT):
    """nerfstudio's layout with strong barrel and tangential distortion, a mask, and the last frames held out."""
    (root / "images").mkdir(parents=True)
    names, frames = [f"images/{index}.png" for index in range(NUM_FRAMES)], []
    generator = np.random.default_rng(0)
    for index, name in enumerate(names):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / name)
        mask = np.full((height, width), 255, dtype=np.uint8)
        mask[:, : 3 + index] = 0
        Image.fromarray(mask).save(root / f"images/mask_{index}.png")
        pose = np.eye(4)
        pose[:3, 3] = [0.1 * index - 0.2, 0.05, 2.0]
        frames.append({"file_path": name, "mask_path": f"images/mask_{index}.png", "transform_matrix": pose.tolist()})
    content = {
        "camera_model": "OPENCV",
        "fl_x": 35.0,
        "fl_y": 36.0,
        "cx": 0.48 * width,
        "cy": 0.53 * height,
        "w": width,
        "h": height,
        "k1": -0.18,
        "k2": 0.03,
        "p1": 0.002,
        "p2": -0.003,
        "frames": frames,
        "train_filenames": names[:-NUM_TEST],
        "test_filenames": names[-NUM_TEST:],
    }
    (root / "transforms.json").write_text(json.dumps(content))
    return root


def lift(root, folder):
    """The scene file of a real lift of the capture: tokens extracted, features solved."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    gaussians = Gaussians.from_raw(
        draw(60, 3) * 0.6, draw(60, 4), draw(60, 3) * 0.3 - 1.5, draw(60) + 1.0, draw(60, 3), torch.zeros(60, 0)
    )
    capture = create_posed_capture(read_capture(root))
    description = describe_backbone(BACKBONE)
    cache = FeatureCache(folder / "tokens", description)
    scene, _ = lift_scene(
        LiftSource(gaussians, capture, "made by a test"), LiftSetup(cache, LiftConfig(feature_dim=4, max_passes=2))
    )
    save_scene(scene, folder / "scene.safetensors")
    return folder / "scene.safetensors"


@pytest.fixture
def watched(monkeypatch):
    """What timm's model is shown: resized to patches and normalised, whoever asks."""
    shown, prepare = [], TokenModel.forward_unnormed

    def record(self, images, layers):
        forward = self.model.forward_intermediates

        def note(inputs, **settings):
            shown.extend(inputs.detach().clone())
            return forward(inputs, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(self.model, "forward_intermediates", note, raising=False)
            return prepare(self, images, layers)

    monkeypatch.setattr(TokenModel, "forward_unnormed", record)
    return shown


# The second size is no multiple of the patch, so both stages have to resize as well.
@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (45, 37)], ids=["whole patches", "odd size"])
def test_stages__show_the_backbone_the_same_pixels_of_a_distorted_capture(tmp_path, watched, size):
    root = write_capture(tmp_path / "capture", *size)
    path = lift(root, tmp_path)
    lifted = {image.numpy().tobytes() for image in watched}
    assert len(lifted) == NUM_FRAMES
    watched.clear()
    bank = SceneBank([path])
    views = TrainingViews(bank.on_disk, [("train", "test")])
    module = TokenModule(create_token_model(BACKBONE))
    for index in range(NUM_FRAMES):
        module([views.load_sample(Draw(0, 0, index), PLAIN, PATCH, 0, "bilinear").image[None]])
    assert {image.numpy().tobytes() for image in watched} == lifted
    # Undistorting did something: the photograph itself is another picture.
    view = views.views[0][0]
    assert not torch.equal(views.captures[0].load_image(view), load_image(view.frame.image_path))
    assert view.frame.lens.distortion != () and view.name == "images/0.png"


def test_novel_views__targets_come_from_a_scene_that_was_lifted_without_them(tmp_path, watched):
    """At the photograph's own camera, by the literal computation; the photograph has no part in the features."""
    path = lift(write_capture(tmp_path / "capture"), tmp_path)
    other = write_capture(tmp_path / "other" / "capture")
    for index in range(NUM_FRAMES - NUM_TEST, NUM_FRAMES):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 9, dtype=np.uint8)).save(other / f"images/{index}.png")
    without = SceneBank([lift(other, tmp_path / "other")]).on_disk[0]
    bank = SceneBank([path])
    assert torch.equal(without.gaussians.features, bank.on_disk[0].gaussians.features)
    views = TrainingViews(bank.on_disk, [("train", "test")])
    novel = [index for index, view in enumerate(views.views[0]) if view.split == "test"]
    assert len(novel) == NUM_TEST
    config = TargetConfig(weight_by_opacity=False, token_reading="bilinear")
    targets = TargetRenderer(bank, views, config)
    for index in novel:
        sample = views.load_sample(Draw(0, 0, index), PLAIN, PATCH, 0, "bilinear")
        scene, view = bank[0], sample.view
        assert view.K[0, 2] != pytest.approx(WIDTH / 2, abs=0.1)
        low, alphas = scene.render_features_low(view.camera)
        decoded = F.conv2d(low.permute(2, 0, 1)[None], scene.decoder.weight, padding=1)
        if scene.decoder.bias is not None:
            decoded = decoded + scene.decoder.bias[:, None, None] * alphas
        expected = F.interpolate(decoded.detach(), size=sample.patch_grid, mode="bilinear", align_corners=False)[0]
        found = targets.render(sample).features
        torch.testing.assert_close(found, expected.permute(1, 2, 0), rtol=1e-4, atol=1e-4)
        moved = replace(sample, view=views.views[0][0])
        assert not torch.allclose(targets.render(moved).features, found, atol=1e-2)
