"""The training loop: its loss and gradient written out, resume to the bit, signals, and losses that are not finite."""

import json
import os
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fit3d_ns.features import create_token_model
from fit3d_ns.finetuning.draws import AugmentationConfig, SamplingConfig, TrainingViews
from fit3d_ns.finetuning.optimization import (
    AnchorConfig,
    OptimizationConfig,
    TokenModule,
    TrainableConfig,
    freeze_unreachable,
)
from fit3d_ns.finetuning.scene_bank import SceneBank, compute_scene_hash
from fit3d_ns.finetuning.targets import TargetConfig
from fit3d_ns.finetuning.trainer import Interrupted
from fit3d_ns.scene import FeatureScene, PosedCapture, load_scene
from fit3d_ns.utils.stopping import StopRequest
from tests.finetuning.finetuning_runs import RUN, collect_weights, configure, create_trainer
from tests.finetuning.finetuning_scene import BACKBONE, create_lens, save_new_scene

FAST = OptimizationConfig(max_steps=4, learning_rate=1e-3)


@pytest.fixture
def scenes(tmp_path):
    return [save_new_scene(tmp_path, "small"), save_new_scene(tmp_path, "large", lens=create_lens(48, 40), seed=1)]


def test_first_step__is_masked_l1_written_out(scenes, tmp_path):
    """Loss and clipped gradient of the first step, from images, scene and backbone alone."""
    config = configure(
        optimization=replace(FAST, max_steps=1, batch_size=3, learning_rate=1e-9),
        augmentation=AugmentationConfig(flip_probability=0.0),
        targets=replace(configure().targets, weight_by_opacity=False),
    )
    trainer = create_trainer(scenes, tmp_path / "out", config)
    captured = {}
    clip = trainer.accelerator.clip_grad_norm_

    def capture(parameters, norm):
        captured.update({name: value.grad.clone() for name, value in trainer.bare.named_parameters()})
        return clip(parameters, norm)

    trainer.accelerator.clip_grad_norm_ = capture
    trainer.run()
    model = create_token_model(BACKBONE)
    numerator, denominator = 0.0, 0.0
    for position in range(3):
        draw = trainer.sequence[position]
        scene = load_scene(scenes[draw.scene])
        view = scene.posed_capture.select("train")[draw.view]
        image = scene.posed_capture.load_image(view).permute(2, 0, 1)[None].float() / 255.0
        low, alphas = scene.render_features_low(view.camera)
        full = scene.decoder(low, alphas).detach().permute(2, 0, 1)[None]
        grid = (view.height // 8, view.width // 8)
        target = F.interpolate(full, size=grid, mode="bilinear", align_corners=False)
        mask = scene.posed_capture.load_valid_mask(view).float()[None, None]
        mask = F.interpolate(mask, size=grid, mode="bilinear", align_corners=False)
        tokens = model(image).maps.permute(0, 3, 1, 2)
        # Targets are kept in half precision.
        numerator = numerator + ((tokens - target.half().float()).abs() * mask.half().float()).sum()
        denominator = denominator + mask.sum() * tokens.shape[1]
    loss = numerator / denominator
    assert trainer.losses[0] == pytest.approx(float(loss.detach()), rel=1e-4)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        found = captured[f"token_model.{name}"]
        assert float((found - gradient).norm()) <= 1e-3 * float(gradient.norm()) + 1e-6, name


def test_training__lowers_the_loss(scenes, tmp_path):
    trainer = create_trainer(scenes, tmp_path / "out", configure(optimization=replace(FAST, max_steps=40)))
    trainer.run()
    first, last = trainer.summarise_losses()
    assert last < 0.9 * first and trainer.step == 40 == len(trainer.losses)


def test_geometry_head__is_asked_for_depth_and_normals_and_left_out_of_the_weights(scenes, tmp_path):
    config = configure(
        optimization=replace(FAST, max_steps=40, learning_rate=1e-3), targets=TargetConfig(geometry_weight=2.0)
    )
    trainer = create_trainer(scenes, tmp_path / "out", config)
    steps = trainer._iterate(StopRequest())
    first, _ = next(steps)
    # It begins at zero.
    numerator = denominator = 0.0
    for position in range(config.optimization.batch_size):
        target = trainer.targets.render(trainer._load((position, trainer.sequence[position]))[0])
        assert target.geometry is not None
        numerator += float((target.geometry.abs().mean(dim=-1) * target.weights).sum())
        denominator += float(target.weights.sum())
    assert first["anchor_loss"] == pytest.approx(2.0 * numerator / denominator, rel=1e-4)
    backbone, head = trainer.backbone.optimizer.param_groups
    assert head["lr"] == pytest.approx(20.0 * backbone["lr"]) and len(head["params"]) == 2
    *_, (last, _) = steps
    assert last["anchor_loss"] < 0.9 * first["anchor_loss"]
    assert not [name for name in collect_weights(trainer) if "geometry" in name]


def test_accumulation__equals_one_large_batch(scenes, tmp_path):
    losses, weights = [], []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        optimization = replace(FAST, batch_size=batch_size, accumulation_steps=accumulation, learning_rate=1e-5)
        trainer = create_trainer(scenes, tmp_path / f"out{batch_size}", configure(optimization=optimization))
        trainer.run()
        losses.append(trainer.losses)
        weights.append(collect_weights(trainer)["patch_embed.proj.weight"])
    for other_losses, other_weights in zip(losses[1:], weights[1:], strict=True):
        assert other_losses == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(other_weights, weights[0], rtol=0.0, atol=1e-6)


CONFIGS = {
    "plain": {},
    "averages and anchors": {
        "optimization": OptimizationConfig(max_steps=7, learning_rate=1e-3, ema_decay=0.9, schedule="cosine"),
        "anchors": AnchorConfig(l2_sp=0.1, feature_anchor=0.3, prefix_anchor=0.2, pre_norm=0.5),
        "targets": TargetConfig(geometry_weight=2.0),
    },
    "all augmentation": {"augmentation": AugmentationConfig(min_crop=0.7, min_scale=0.8, max_scale=1.2, jitter=0.2)},
    "LoRA": {"trainable": TrainableConfig(train="lora", lora_rank=2)},
    "last block, scenes": {
        "trainable": TrainableConfig(train="last-blocks", num_blocks=1),
        "sampling": SamplingConfig(sampling="scenes"),
    },
}


@pytest.mark.parametrize("parts", [*CONFIGS.values(), "photographs"], ids=[*CONFIGS, "photographs"])
def test_resume__gives_the_same_weights_to_the_bit(scenes, tmp_path, parts):
    if parts == "photographs":
        # Those of another scene.
        save_new_scene(tmp_path / "others", "room", seed=5)
        parts = {"anchors": AnchorConfig(photographs=(tmp_path / "others",), photograph_share=0.3)}
    config = configure(**{"optimization": OptimizationConfig(max_steps=7, learning_rate=1e-3), **parts})
    torch.manual_seed(0)
    whole = create_trainer(scenes, tmp_path / "whole", config)
    whole.run()
    # Killed after step 5; the newest checkpoint is of step 4.
    run = replace(RUN, steps_per_checkpoint=2)
    torch.manual_seed(0)
    killed = create_trainer(scenes, tmp_path / "killed", replace(config, run=run))
    for _ in zip(range(5), killed._iterate(StopRequest()), strict=False):
        if killed.step % 2 == 0:
            killed.save_checkpoint()
    assert killed.checkpoints.find_steps() == [2, 4]
    torch.manual_seed(123)
    resumed = create_trainer(scenes, tmp_path / "killed", replace(config, run=run))
    assert resumed.step == 4
    resumed.run()
    assert resumed.losses == whole.losses
    whole.backbone.swap_averages()
    resumed.backbone.swap_averages()
    for name, value in collect_weights(whole).items():
        assert torch.equal(collect_weights(resumed)[name], value), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal__saves_at_the_step_boundary_and_the_same_command_goes_on(scenes, tmp_path, number):
    trainer = create_trainer(scenes, tmp_path / "out", configure(optimization=FAST))
    before = signal.getsignal(number)
    run_step = trainer.train_step.run

    def interrupt(*arguments):
        if trainer.step == 1:
            os.kill(os.getpid(), number)
        return run_step(*arguments)

    trainer.train_step.run = interrupt
    # The signal comes in the second step, which is the one that ends next.
    with pytest.raises(Interrupted, match="stopped at step 2 of 4"):
        trainer.run()
    assert signal.getsignal(number) == before
    assert trainer.checkpoints.find_steps() == [2]
    again = create_trainer(scenes, tmp_path / "out", configure(optimization=FAST))
    assert again.step == 2
    again.run()
    whole = create_trainer(scenes, tmp_path / "whole", configure(optimization=FAST))
    whole.run()
    assert again.losses == whole.losses


def test_resume__refuses_another_batch_size_and_fewer_steps(scenes, tmp_path):
    create_trainer(scenes, tmp_path / "out", configure(optimization=FAST)).run()
    with pytest.raises(ValueError, match="optimization.batch_size 2 against 1"):
        create_trainer(scenes, tmp_path / "out", configure(optimization=replace(FAST, batch_size=1)))
    with pytest.raises(ValueError, match="has 4 steps, this run ends at 3"):
        create_trainer(scenes, tmp_path / "out", configure(optimization=replace(FAST, max_steps=3)))
    with pytest.raises(ValueError, match="learning_rate 0.001 against 0.5"):
        create_trainer(scenes, tmp_path / "out", configure(optimization=replace(FAST, learning_rate=0.5)))
    longer = create_trainer(scenes, tmp_path / "out", configure(optimization=replace(FAST, max_steps=6)))
    assert longer.step == 4
    anew = configure(run=replace(RUN, resume="never"), optimization=replace(FAST, batch_size=1))
    assert create_trainer(scenes, tmp_path / "out", anew).step == 0
    with pytest.raises(ValueError, match="no checkpoint"):
        create_trainer(scenes, tmp_path / "empty", configure(run=replace(RUN, resume="require")))


def test_loss_that_is_not_finite__stops_at_once_names_the_view_and_keeps_the_evidence(scenes, tmp_path):
    trainer = create_trainer(scenes, tmp_path / "out", configure(optimization=FAST))
    run_step = trainer.train_step.run

    def poison(batches, *arguments):
        if trainer.step == 2:
            batches[0][0].targets[0, 3] = float("nan")
        return run_step(batches, *arguments)

    trainer.train_step.run = poison
    with pytest.raises(
        ValueError, match=r"loss is not finite for \w+/images/\d.png at step 2; .*not-finite-0"
    ) as error:
        trainer.run()
    evidence = json.loads((tmp_path / "out" / "not-finite-0.json").read_text())
    assert evidence["step"] == 2 and len(evidence["views"]) == 2
    # The image whose target was spoilt, and not the other one of its batch.
    broken, fine = sorted(evidence["views"], key=lambda view: not view["broken"])
    assert broken["broken"] and not fine["broken"]
    assert f"{broken['scene']}/{broken['view']} at step" in str(error.value)
    assert (tmp_path / "out" / "not-finite-0.safetensors").is_file()
    assert all(bool(torch.isfinite(value).all()) for value in trainer.bare.state_dict().values())


def test_images_that_break_while_training__end_the_run_with_their_name(scenes, tmp_path):
    config = configure(run=replace(RUN, num_workers=0), optimization=FAST)
    trainer = create_trainer(scenes, tmp_path / "out", config)
    for capture in trainer.views.captures:
        for view in capture.views:
            view.frame.image_path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"images/\d.png"):
        trainer.run()


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (1, 3)])
def test_draws__of_all_processes_show_each_image_once_an_epoch_and_drop_the_rest(
    scenes, tmp_path, number, batch_size, accumulation
):
    per_step = number * batch_size * accumulation
    optimization = OptimizationConfig(epochs=1.0, batch_size=batch_size, accumulation_steps=accumulation)
    trainer = create_trainer(scenes, tmp_path / "out", configure(optimization=replace(optimization, max_steps=1)))
    num_images = trainer.sequence.num_images
    trainer.num_steps = optimization.count_steps(num_images, number)
    trainer.config = replace(trainer.config, optimization=optimization)
    drawn = []
    for rank in range(number):
        trainer.processes = SimpleNamespace(number=number, rank=rank)
        drawn += [(draw.epoch, draw.scene, draw.view) for _, draw in trainer._draw()]
    every = {(0, scene, view) for scene in range(2) for view in range(5)}
    assert num_images == len(every)
    assert len(drawn) == len(set(drawn)) == 10 // per_step * per_step and set(drawn) <= every


def test_resume__refuses_another_list_of_photographs(scenes, tmp_path):
    """With a photograph less, all later draws would be others, in silence."""

    def create(views_of):
        bank = SceneBank(scenes)
        views = TrainingViews(bank.on_disk, [("train",)] * 2)
        return create_trainer(scenes, tmp_path / "out", configure(optimization=FAST), inputs=views_of(views))

    create(lambda views: {"views": views.views_hash}).run()
    (tmp_path / "data" / "small" / "images" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"views 10 images \S+ against 9 images \S+"):
        create(lambda views: {"views": views.views_hash})


def test_resume__refuses_other_masks_and_knows_what_earlier_versions_recorded(scenes, tmp_path):
    bank = SceneBank(scenes)
    views = TrainingViews(bank.on_disk, [("train",)] * 2)

    def read():
        return {"views": views.views_hash, "scenes": [compute_scene_hash(scene) for scene in bank.on_disk]}

    now = read()
    earlier = {"views": now["views"].split("-")[0], "scenes": [name.split("-")[0] for name in now["scenes"]]}
    config = configure(optimization=FAST)
    create_trainer(scenes, tmp_path / "earlier", config, inputs=earlier).run()
    create_trainer(scenes, tmp_path / "out", config, inputs=now).run()
    for folder in ("earlier", "out"):
        assert create_trainer(scenes, tmp_path / folder, config, inputs=now).step > 0
    mask = next(view.frame.mask_path for view in views.views[0] if view.frame.mask_path)
    mask.write_bytes(mask.read_bytes() + b"another")
    with pytest.raises(ValueError, match=r"views 10 images \S+ against 10 images \S+"):
        create_trainer(scenes, tmp_path / "out", config, inputs=read())
    with pytest.raises(ValueError, match="scenes"):
        create_trainer(scenes, tmp_path / "earlier", config, inputs={**now, "scenes": ["0-1", "2-3"]})


def test_steps__without_a_valid_token_move_nothing_whatever_the_anchors(scenes, tmp_path):
    for scene in SceneBank(scenes).on_disk:
        for view in scene.posed_capture.views:
            if view.frame.mask_path is not None:
                Image.fromarray(np.zeros((view.height, view.width), np.uint8)).save(view.frame.mask_path)
    optimization = replace(FAST, weight_decay=0.0)
    config = configure(
        optimization=optimization, anchors=AnchorConfig(pre_norm=1.0), targets=TargetConfig(geometry_weight=1.0)
    )
    trainer = create_trainer(scenes, tmp_path / "out", config)
    before = collect_weights(trainer)
    trainer.run()
    assert set(trainer.losses) == {0.0}
    assert all(torch.equal(value, before[name]) for name, value in collect_weights(trainer).items())


def test_workers__load_and_never_render(scenes, tmp_path, monkeypatch):
    trainer = create_trainer(scenes, tmp_path / "out", configure(optimization=FAST, run=replace(RUN, num_workers=2)))
    rendering, loading = set(), set()
    render, load = FeatureScene.render_features_with_alpha, PosedCapture.load_image

    def note(threads, function):
        def wrapped(*arguments, **settings):
            threads.add(threading.current_thread())
            return function(*arguments, **settings)

        return wrapped

    monkeypatch.setattr(FeatureScene, "render_features_with_alpha", note(rendering, render))
    monkeypatch.setattr(PosedCapture, "load_image", note(loading, load))
    trainer.run()
    assert rendering == {threading.main_thread()} and threading.main_thread() not in loading and loading


def test_last_blocks__leaves_all_else_as_it_was(scenes, tmp_path):
    config = configure(optimization=FAST, trainable=TrainableConfig(train="last-blocks", num_blocks=1))
    trainer = create_trainer(scenes, tmp_path / "out", config)
    before = collect_weights(trainer)
    trainer.run()
    changed = {name for name, value in collect_weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("blocks.1.", "norm.")) for name in changed)
    with pytest.raises(ValueError, match="--num-blocks 3"):
        create_trainer(
            scenes, tmp_path / "other", configure(trainable=TrainableConfig(train="last-blocks", num_blocks=3))
        )


def test_freeze_unreachable__freezes_what_has_no_gradient_and_nothing_else():
    token_model = create_token_model(BACKBONE)
    token_model.model.unused = torch.nn.Parameter(torch.ones(3))
    module = TokenModule(token_model)
    assert freeze_unreachable(module, AnchorConfig()) == ["token_model.model.unused"]
    assert all(value.requires_grad for name, value in module.named_parameters() if "unused" not in name)


def test_pre_norm_and_prefix_anchors__move_tokens_where_they_say(scenes, tmp_path):
    """A strong prefix anchor keeps the class token; without one it drifts."""
    images = torch.rand(4, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    original = create_token_model(BACKBONE).eval()
    drift = {}
    for strength in (0.0, 20.0):
        config = configure(optimization=replace(FAST, max_steps=30), anchors=AnchorConfig(prefix_anchor=strength))
        trainer = create_trainer(scenes, tmp_path / f"out{strength}", config)
        trainer.run()
        with torch.no_grad():
            moved = trainer.bare.token_model(images).prefix_tokens - original(images).prefix_tokens
        drift[strength] = float(moved.abs().mean())
    assert drift[20.0] < 0.5 * drift[0.0]


def test_adapter__is_trained_behind_the_frozen_backbone_and_resumes_to_the_bit(scenes, tmp_path):
    config = configure(optimization=FAST, trainable=TrainableConfig(train="adapter", adapter_window=2))
    run = replace(RUN, steps_per_checkpoint=2)
    trainers = []
    for folder in ("whole", "resumed"):
        torch.manual_seed(0)
        trainer = create_trainer(scenes, tmp_path / folder, replace(config, run=run))
        before = collect_weights(trainer)
        if folder == "resumed":
            for _ in zip(range(2), trainer._iterate(StopRequest()), strict=False):
                pass
            trainer.save_checkpoint()
            torch.manual_seed(1)
            trainer = create_trainer(scenes, tmp_path / folder, replace(config, run=run))
            assert trainer.step == 2
        trainer.run()
        assert all(torch.equal(value, before[name]) for name, value in collect_weights(trainer).items())
        trainers.append(trainer)
    whole, resumed = (trainer.bare.state_dict() for trainer in trainers)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
