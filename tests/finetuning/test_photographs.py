"""Photographs of anything else beside the scenes: their share, and that the original's tokens are kept on them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fit3d_ns.data.images import save_image
from fit3d_ns.features import create_token_model
from fit3d_ns.finetuning.config import FinetuneConfig
from fit3d_ns.finetuning.optimization import AnchorConfig, OptimizationConfig
from fit3d_ns.finetuning.photographs import Photographs
from tests.finetuning.finetuning_runs import collect_weights, configure, create_trainer
from tests.finetuning.finetuning_scene import BACKBONE, save_new_scene

FAST = OptimizationConfig(max_steps=24, learning_rate=1e-3, schedule="cosine")


@pytest.fixture
def folder(tmp_path):
    """Four photographs of stripes, of two sizes, one of them a folder below."""
    folder = tmp_path / "streets"
    (folder / "more").mkdir(parents=True)
    for index in range(4):
        width, height = ((60, 40), (33, 70))[index % 2]
        rows = torch.arange(height)[:, None, None] // (index + 2) % 2 * 255
        colours = torch.tensor([255, 120, 40]).roll(index)
        image = (rows * colours / 255).expand(height, width, 3).to(torch.uint8)
        save_image(image, folder / ("more" if index == 3 else ".") / f"{index}.png")
    return folder


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_load__any_number_of_draws_has_the_share(folder, share):
    photographs = Photographs(AnchorConfig(photographs=(folder,), photograph_share=share), (32, 24), seed=1)
    assert len(photographs.paths) == 4
    loaded = [photographs.load(position) for position in range(90)]
    number = sum(len(images) for images in loaded)
    assert number == pytest.approx(share * (number + 90), abs=1.0)
    images = torch.cat(loaded)
    assert images.shape[1:] == (3, 24, 32)
    assert float(images.min()) >= 0.0 and float(images.max()) <= 1.0 + 1e-6
    assert len({image.numpy().tobytes() for image in images}) >= 4  # Cut at several places.
    again = Photographs(AnchorConfig(photographs=(folder,), photograph_share=share), (32, 24), seed=1)
    assert torch.equal(again.load(89), loaded[89])


def test_load__a_folder_without_photographs_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--photographs: there are no photographs in .*empty"):
        Photographs(AnchorConfig(photographs=(folder, tmp_path / "empty")), (32, 24), seed=1)


def test_run__keeps_the_originals_tokens_of_photographs(folder, tmp_path):
    scenes = [save_new_scene(tmp_path, "room")]
    shown = Photographs(AnchorConfig(photographs=(folder,), photograph_share=0.5), (48, 40), seed=9)
    images = torch.cat([shown.load(position) for position in range(16)])
    with torch.no_grad():
        original = create_token_model(BACKBONE)(images).maps
    moved, first = {}, {}
    for name, anchors in {
        "without": AnchorConfig(),
        "with": AnchorConfig(photographs=(folder,), photograph_share=0.5),
    }.items():
        trainer = create_trainer(scenes, tmp_path / name, configure(optimization=FAST, anchors=anchors))
        trainer.run()
        with torch.no_grad():
            moved[name] = float((trainer.bare.token_model(images).maps - original).abs().mean())
        first[name] = trainer.losses[0]
    assert moved["with"] < 0.7 * moved["without"]
    assert first["with"] == first["without"]  # What is reported is the scenes' alone.


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_run__photographs_do_not_pull_at_what_has_not_moved(folder, tmp_path, precision):
    """The original's tokens take the trained backbone's arithmetic: rounding alone would push as hard as any error."""
    scenes = [save_new_scene(tmp_path, "room")]
    optimization = OptimizationConfig(max_steps=1, learning_rate=1e-12, precision=precision)
    anchors = AnchorConfig(photographs=(folder,), photograph_share=0.5)
    trainer = create_trainer(scenes, tmp_path / "out", configure(optimization=optimization, anchors=anchors))
    results = []
    run_step = trainer.train_step.run
    trainer.train_step.run = lambda *parts: results.append(run_step(*parts)) or results[-1]
    trainer.run()
    assert trainer.photographs.load(0).shape[0] == 1
    assert [result["anchor_loss"] for result in results] == [0.0]


def test_load__thin_and_small_photographs_are_enlarged(tmp_path):
    for name, size in {"wide": (1, 90), "tall": (90, 1), "dot": (1, 1)}.items():
        (tmp_path / "thin").mkdir(exist_ok=True)
        save_image(torch.full((*size, 3), 200, dtype=torch.uint8), tmp_path / "thin" / f"{name}.png")
    photographs = Photographs(AnchorConfig(photographs=(tmp_path / "thin",), photograph_share=0.5), (320, 150), seed=1)
    for position in range(12):
        assert photographs.load(position) == pytest.approx(200 / 255, abs=1e-5)


def test_photographs__damaged_ones_are_named_at_the_start_and_folders_named_twice_count_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    both = Photographs(AnchorConfig(photographs=(folder, Path("../streets"), folder / "more")), (32, 24), seed=1)
    assert len(both.paths) == 4
    (folder / "9.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"9\.png"):
        Photographs(AnchorConfig(photographs=(folder,)), (32, 24), seed=1)


def test_resume__notices_other_photographs(folder, tmp_path):
    scenes = [save_new_scene(tmp_path, "room")]
    anchors = AnchorConfig(photographs=(folder,), photograph_share=0.3)
    config = configure(optimization=replace(FAST, max_steps=2), anchors=anchors)
    trainer = create_trainer(scenes, tmp_path / "out", config)
    trainer.run()
    assert create_trainer(scenes, tmp_path / "out", config).step == 2
    (folder / "0.png").unlink()
    with pytest.raises(ValueError, match="photographs"):
        create_trainer(scenes, tmp_path / "out", config)


def test_decisive__is_as_before_without_photographs():
    assert not {"photographs", "photograph_share"} & set(FinetuneConfig().decisive["anchors"])


def test_two_halves__of_a_batch_take_the_photographs_of_the_whole(folder, tmp_path):
    """Accumulated batches of one image are one batch of two, photographs and all."""
    scenes = [save_new_scene(tmp_path, "room")]
    anchors = AnchorConfig(photographs=(folder,), photograph_share=0.4)
    weights = []
    for size in (1, 2):
        optimization = replace(FAST, max_steps=3, batch_size=size, accumulation_steps=2 // size)
        trainer = create_trainer(scenes, tmp_path / str(size), configure(optimization=optimization, anchors=anchors))
        trainer.run()
        weights.append(collect_weights(trainer)["patch_embed.proj.weight"])
    torch.testing.assert_close(*weights, rtol=0.0, atol=1e-6)
