"""What keeps or limits what is trained, and where curves go: reachable by a flag, explained in the help, recorded."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fit3d_ns.cli import finetune as module
from fit3d_ns.features import create_token_model
from fit3d_ns.finetuning.config import FinetuneConfig, RunConfig
from fit3d_ns.finetuning.optimization import AnchorConfig, TrainableConfig, compute_outputs
from tests.finetuning import finetuning_runs
from tests.finetuning.finetuning_scene import BACKBONE, save_new_scene

# Few fast steps: what is compared is the direction in which a flag moves the result.
SMALL = ["--max-steps", "8", "--max-validation-views", "2", "--device", "cpu", "--learning-rate", "3e-3"]
ANCHORS = {"l2_sp": 100.0, "feature_anchor": 30.0, "prefix_anchor": 30.0, "pre_norm": 30.0}


def run(scene, out, *arguments):
    """The report, the model card and the weights of a run of the command."""
    module.main([str(word) for word in ("--ckpts", scene, "--output-dir", out, *SMALL, *arguments)])
    return json.loads((out / "report.json").read_text()), (out / "README.md").read_text(), load_weights(out)


def load_weights(out):
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return save_new_scene(tmp_path_factory.mktemp("scene"), num_frames=8, num_test=2)


@pytest.fixture(scope="module")
def plain(scene, tmp_path_factory):
    """A run without any of the flags."""
    return run(scene, tmp_path_factory.mktemp("plain"), "--trackers")


def compute_distances(weights):
    """How far a backbone has gone from the original, by what each anchor holds, on images of its own."""
    original, moved = create_token_model(BACKBONE).eval(), create_token_model(BACKBONE).eval()
    moved.model.load_state_dict(weights)
    images = torch.rand(6, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = compute_outputs(original, images), compute_outputs(moved, images)
    start = original.model.state_dict()
    return {
        "l2_sp": sum(float((value - start[name]).square().sum()) for name, value in weights.items()),
        "feature_anchor": float((after.patch_tokens - before.patch_tokens).abs().mean()),
        "prefix_anchor": float((after.prefix_tokens - before.prefix_tokens).abs().mean()),
    }


@pytest.mark.parametrize("name", ANCHORS)
def test_anchors__are_reached_by_their_flag_recorded_and_felt(scene, plain, tmp_path, name):
    report, card, weights = run(scene, tmp_path, "--trackers", f"--{name.replace('_', '-')}", str(ANCHORS[name]))
    assert report["settings"]["anchors"] == {**plain[0]["settings"]["anchors"], name: ANCHORS[name]}
    assert f"| anchors.{name} | {ANCHORS[name]} |" in card and f"| anchors.{name} | 0.0 |" in plain[1]
    if name == "pre_norm":
        # What it moves has tests of its own.
        assert any(not torch.equal(value, plain[2][key]) for key, value in weights.items())
    else:
        assert compute_distances(weights)[name] < 0.8 * compute_distances(plain[2])[name]


def test_wise_ft__is_recorded_and_its_folders_are_named(scene, plain, tmp_path):
    report, card, weights = run(scene, tmp_path, "--trackers", "--wise-ft", "0.25", "1")
    assert report["settings"]["anchors"]["wise_ft"] == [0.25, 1.0] and plain[0]["settings"]["anchors"]["wise_ft"] == []
    assert "`wise-ft-0.25`, `wise-ft-1`" in card and "| anchors.wise_ft | [0.25, 1.0] |" in card
    assert "WiSE-FT" not in plain[1]
    assert all(torch.equal(value, weights[key]) for key, value in load_weights(tmp_path / "wise-ft-1").items())
    mixed = (tmp_path / "wise-ft-0.25" / "README.md").read_text()
    assert "Weights: 0.25 of the fine-tuned and 0.75 of the original ones" in mixed and "Mixtures" not in mixed
    # Mixing is no training: the weights are those of the plain run.
    assert all(torch.equal(value, plain[2][key]) for key, value in weights.items())


@pytest.mark.parametrize(
    ("arguments", "recorded", "moved"),
    [
        (("last-blocks", "--num-blocks", "1"), {"num_blocks": 1}, r"blocks\.1\..*|norm\..*"),
        (("lora", "--lora-rank", "2", "--lora-alpha", "4"), {"lora_rank": 2, "lora_alpha": 4.0}, r".*attn.*\.weight"),
        (("adapter", "--adapter-window", "3"), {"adapter_window": 3}, "nothing"),
    ],
    ids=["last-blocks", "lora", "adapter"],
)  # fmt: skip
def test_train__is_reached_by_its_flags_recorded_and_moves_no_other_weight(scene, tmp_path, arguments, recorded, moved):
    report, card, weights = run(scene, tmp_path, "--trackers", "--train", *arguments)
    settings = report["settings"]["trainable"]
    assert settings["train"] == arguments[0] and recorded.items() <= settings.items()
    assert all(f"| trainable.{name} | {value} |" in card for name, value in {"train": arguments[0], **recorded}.items())
    start = create_token_model(BACKBONE).model.state_dict()
    changed = [name for name, value in weights.items() if not torch.equal(value, start[name])]
    assert all(re.fullmatch(moved, name) for name in changed)
    assert (len(changed) == 0) == (arguments[0] == "adapter")
    assert (tmp_path / "adapter.safetensors").is_file() == (arguments[0] == "adapter")


def test_report__counts_the_images_that_the_lift_has_not_seen(scene, plain, tmp_path):
    assert (plain[0]["num_images"], plain[0]["num_novel_images"]) == (6, 0)
    report, _, _ = run(scene, tmp_path, "--trackers", "--splits", "train", "test")
    assert (report["num_images"], report["num_novel_images"]) == (8, 2)


def test_help__explains_each_flag_in_a_sentence_with_its_range(capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().out)
    ranges = {
        "--l2-sp FLOAT": "L2-SP: adds half this times the squared distance of the trained weights .* 0 (off) and above",
        "--feature-anchor FLOAT": "Feature anchor: weight of the L1 .* 0 (off) and above",
        "--prefix-anchor FLOAT": "Prefix anchor: weight of the L1 .* class token and registers .* 0 (off) and above",
        "--pre-norm FLOAT": "weight of the L1 .* before the final norm.* 0 (off) and above",
        "--wise-ft [FLOAT [FLOAT ...]]": "WiSE-FT: also saves mixtures .* each 0 to 1",
        "--train {all,last-blocks,lora,adapter}": "`all` (paper), `last-blocks`, `lora` .*, or `adapter`",
        "--num-blocks INT": "number of last blocks .* 1 to the backbone's number of blocks",
        "--lora-rank INT": "rank of the matrices, 1 and above",
        "--lora-alpha FLOAT": "over the rank; above 0",
        "--adapter-window INT": "windows in tokens, 1 and above",
        "--average-gb FLOAT": "in memory take at most this many 1e9 bytes, 0 and above",
        "--trackers [{tensorboard,wandb} [{tensorboard,wandb} ...]]": "WANDB_MODE=offline",
    }
    for flag, words in ranges.items():
        found = re.search(re.escape(flag) + r" (.*?\(default)", text)
        assert found is not None, flag
        pattern = re.escape(words).replace(re.escape(".*"), ".*")
        assert re.search(pattern, found[1], re.IGNORECASE), (flag, found[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: AnchorConfig(l2_sp=-1.0), "l2_sp"),
        (lambda: AnchorConfig(wise_ft=(0.5, 1.5)), "wise_ft is 1.5; it must be at least 0 and at most 1"),
        (lambda: TrainableConfig(num_blocks=0), "num_blocks"),
        (lambda: TrainableConfig(lora_alpha=0.0), "lora_alpha"),
        (lambda: FinetuneConfig(trainable=TrainableConfig(train="adapter"), anchors=AnchorConfig(wise_ft=(0.5,))),
         "--wise-ft"),
        (lambda: FinetuneConfig(trainable=TrainableConfig(train="adapter"), run=RunConfig(format="fit3d")),
         "--format fit3d"),
        (lambda: FinetuneConfig(trainable=TrainableConfig(train="adapter"), anchors=AnchorConfig(prefix_anchor=1.0)),
         "--prefix-anchor"),
        (lambda: FinetuneConfig(trainable=TrainableConfig(train="adapter"), anchors=AnchorConfig(pre_norm=1.0)),
         "--pre-norm"),
    ],
)  # fmt: skip
def test_settings__out_of_range_or_without_effect_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_prefix_anchor__needs_prefix_tokens(scene, tmp_path, monkeypatch):
    create = finetuning_runs.create_token_model

    def create_bare(name):
        token_model = create(name)
        token_model.description = replace(token_model.description, num_prefix_tokens=0)
        return token_model

    monkeypatch.setattr(finetuning_runs, "create_token_model", create_bare)
    config = finetuning_runs.configure(anchors=AnchorConfig(prefix_anchor=1.0))
    with pytest.raises(ValueError, match="--prefix-anchor: .* has no class token or registers"):
        finetuning_runs.create_trainer([scene], tmp_path, config)


def test_wandb__in_offline_mode_writes_its_run_below_the_output_folder(scene, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "out"
    try:
        report, _, _ = run(scene, out, "--trackers", "wandb", "tensorboard", "--steps-per-validation", "4")
    finally:
        wandb.teardown()
    assert report["steps"] == 8 and wandb.run is None
    (curves,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    content = curves.read_bytes()
    assert b"learning_rate" in content and b"validation/feature_l1" in content
    assert any((out / "tensorboard").rglob("events*")) and not any((tmp_path / "elsewhere").iterdir())


def test_wandb__that_does_not_start_ends_the_run_before_anything_is_measured(scene, tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")

    def refuse(**settings):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(SystemExit) as exit_:
        run(scene, tmp_path, "--trackers", "wandb")
    said = capsys.readouterr().err
    assert exit_.value.code == 1 and "--trackers wandb does not start (No API key configured." in said
    assert "WANDB_MODE=offline" in said and "Measuring" not in said and "Traceback" not in said
