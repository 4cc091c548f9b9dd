"""Half precision and torch.compile: the arithmetic of the backbone alone changes, and the loss scale resumes too."""

from dataclasses import replace

import pytest
import torch

from fit3d_ns.features import create_token_model
from fit3d_ns.finetuning.optimization import OptimizationConfig
from fit3d_ns.training.processes import create_accelerator
from fit3d_ns.utils.stopping import StopRequest
from tests.finetuning.finetuning_runs import RUN, collect_weights, configure, create_trainer
from tests.finetuning.finetuning_scene import BACKBONE, create_lens, save_new_scene

FAST = OptimizationConfig(max_steps=4, learning_rate=1e-3)


@pytest.fixture
def scenes(tmp_path):
    return [save_new_scene(tmp_path, "small"), save_new_scene(tmp_path, "large", lens=create_lens(48, 40), seed=1)]


def create_half_precision(precision, folder, scale=2.0**10):
    """bf16 as it is; fp16 as on CUDA, on a CPU: accelerate scales losses on devices alone, torch does so anywhere."""
    accelerator = create_accelerator("cpu", "bf16")
    if precision == "fp16":
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    return accelerator


def test_bf16__keeps_targets_loss_and_weights_in_float32(scenes, tmp_path):
    plain = create_trainer(scenes, tmp_path / "plain", configure(optimization=FAST))
    plain.run()
    config = configure(optimization=replace(FAST, precision="bf16"))
    half = create_trainer(scenes, tmp_path / "half", config)
    half.run()
    assert all(value.dtype == torch.float32 for value in half.bare.parameters())
    # bfloat16 keeps 8 bits: losses differ, but by rounding alone.
    assert half.losses != plain.losses
    assert half.losses == pytest.approx(plain.losses, rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision__targets_and_loss_are_those_of_float32_arithmetic(scenes, tmp_path, precision):
    """From the backbone's half-precision tokens on, the loss is what float64 gives: no bfloat16 (8 bits) anywhere."""
    config = configure(optimization=replace(FAST, max_steps=1))
    trainer = create_trainer(scenes, tmp_path / "out", config, accelerator=create_half_precision(precision, tmp_path))
    compute, seen = trainer.train_step._compute_losses, []

    def record(batch, totals):
        loss, anchor, tokens = compute(batch, totals)
        seen.append((batch, totals, loss.detach(), tokens))
        return loss, anchor, tokens

    trainer.train_step._compute_losses = record
    trainer.run()
    batch, totals, loss, tokens = seen[0]
    assert loss.dtype == torch.float32
    expected = 0.0
    for group, own in zip(batch, tokens, strict=True):
        assert group.targets.dtype == group.weights.dtype == torch.float32
        distance = (own.double() - group.targets.double()).abs().mean(dim=-1)
        expected += float((distance * group.weights.double()).sum())
    assert float(loss) == pytest.approx(expected / totals.weight, rel=1e-6)
    # The backbone itself did run in half precision.
    plain = create_token_model(BACKBONE)(batch[0].images).patch_tokens
    assert 1e-5 < float((tokens[0] - plain).abs().max().detach()) < 0.1


def test_fp16__the_scaler_is_saved_and_goes_on_to_the_bit(scenes, tmp_path):
    config = configure(optimization=replace(FAST, max_steps=5), run=replace(RUN, steps_per_checkpoint=3))

    def create(name):
        return create_trainer(
            scenes, tmp_path / name, config, accelerator=create_half_precision("fp16", tmp_path / name)
        )

    whole = create("whole")
    whole.run()
    first = create("resumed")
    for _ in zip(range(3), first._iterate(StopRequest()), strict=False):
        pass
    first.save_checkpoint()
    # Grown once after two good steps, and one step further on the way to the next time.
    saved = first.checkpoints.load(3)[1]["scaler"]
    assert saved["scale"] == 2.0**11 and saved["_growth_tracker"] == 1
    resumed = create("resumed")
    assert resumed.step == 3 and resumed.accelerator.scaler.get_scale() == 2.0**11
    resumed.run()
    assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    assert whole.accelerator.scaler.get_scale() == 2.0**12
    assert resumed.losses == whole.losses
    for name, value in collect_weights(whole).items():
        assert torch.equal(collect_weights(resumed)[name], value), name


def test_fp16__an_overflowing_gradient_moves_nothing_and_lowers_the_scale(scenes, tmp_path):
    config = configure(optimization=replace(FAST, max_steps=1))
    accelerator = create_half_precision("fp16", tmp_path, scale=2.0**60)
    trainer = create_trainer(scenes, tmp_path / "out", config, accelerator=accelerator)
    before = collect_weights(trainer)
    trainer.run()
    assert all(torch.equal(value, before[name]) for name, value in collect_weights(trainer).items())
    assert accelerator.scaler.get_scale() == 2.0**59


def test_fp16__a_gradient_that_is_never_finite_stops_the_run(scenes, tmp_path):
    config = configure(optimization=replace(FAST, max_steps=60))
    trainer = create_trainer(scenes, tmp_path / "out", config, accelerator=create_half_precision("fp16", tmp_path))
    trainer.bare.token_model.model.norm.bias.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match=r"gradient is not finite for .*images/\d.png"):
        trainer.run()


def test_compile__changes_nothing_but_the_speed(scenes, tmp_path, monkeypatch):
    plain = create_trainer(scenes, tmp_path / "plain", configure(optimization=FAST))
    plain.run()
    compiled, compile_module = [], torch.compile

    def compile_eagerly(function):
        # Traced and run as it is: generating code takes a compiler and a minute.
        compiled.append(function)
        return compile_module(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    trainer = create_trainer(scenes, tmp_path / "out", configure(optimization=replace(FAST, compile=True)))
    trainer.run()
    assert len(compiled) == 1
    assert trainer.losses == pytest.approx(plain.losses, rel=1e-5)
    assert collect_weights(trainer).keys() == collect_weights(plain).keys()
