"""What the benchmark counts, on a scene so small that the figures can be counted by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fit3d_ns.finetuning.draws import TrainingViews
from fit3d_ns.finetuning.optimization import OptimizationConfig
from fit3d_ns.finetuning.scene_bank import SceneBank
from fit3d_ns.finetuning.targets import TargetRenderer
from fit3d_ns.finetuning.train_step import TrainStep
from fit3d_ns.scene import load_scene
from tests.finetuning.finetuning_scene import EMBED, PATCH, save_new_scene

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import benchmark_finetuning as module

PHASES = ("load", "target", "forward_backward", "optimizer")


@pytest.fixture
def config(tmp_path):
    return module.Config(
        tmp_path / "r.json",
        backbones=("finetuning_vit",),
        width=40,
        height=32,
        num_gaussians=50,
        num_images=5,
        epochs=3,
        optimization=OptimizationConfig(batch_size=2),
        device="cpu",
    )


def run(config, monkeypatch):
    """The one case's figures, and how many targets were rendered in each step."""
    rendered, render = [], TargetRenderer._render
    steps, run_step = [], TrainStep.run

    def count_render(self, sample):
        rendered.append(sample.name)
        return render(self, sample)

    def count_step(self, *arguments):
        steps.append(len(rendered))
        return run_step(self, *arguments)

    monkeypatch.setattr(TargetRenderer, "_render", count_render)
    monkeypatch.setattr(TrainStep, "run", count_step)
    module.main(config)
    (case,) = json.loads(config.output_path.read_text())["metrics"]["cases"].values()
    return case, steps


def test_benchmark__later_epochs_render_nothing_and_phases_add_up(config, monkeypatch):
    case, rendered = run(config, monkeypatch)
    # Five images make two steps of two; the fifth is left out, so that no later epoch meets it for the first time.
    assert rendered == [2, 4, 4, 4, 4, 4]
    for epoch in (case["first_epoch"], case["later_epochs"]):
        assert all(epoch[f"{phase}_seconds"] > 0 for phase in PHASES)
        assert epoch["step_seconds"] == pytest.approx(sum(epoch[f"{phase}_seconds"] for phase in PHASES))
        assert epoch["target_share"] == pytest.approx(epoch["target_seconds"] / epoch["step_seconds"])
    assert case["later_epochs"]["target_seconds"] < case["first_epoch"]["target_seconds"]


def test_benchmark__of_given_scenes_shows_the_same_images_in_every_epoch(config, tmp_path, monkeypatch):
    scenes = tuple(save_new_scene(tmp_path, f"room{index}", num_frames=8, seed=index) for index in range(2))
    _, rendered = run(replace(config, scenes=scenes, max_steps=3), monkeypatch)
    # Fourteen images are too many for three steps of two.
    assert rendered == [2, 4, 6, 6, 6, 6, 6, 6, 6]


def test_limit_views__takes_whole_steps_evenly_from_all_scenes(tmp_path):
    paths = [save_new_scene(tmp_path, f"room{index}", num_frames=frames) for index, frames in enumerate((9, 3))]
    views = TrainingViews(SceneBank(paths).on_disk, [("train",)] * 2)
    assert views.views_per_scene == [8, 2]
    assert module.limit_views(views, batch_size=3, max_steps=2) == 2
    assert views.views_per_scene == [4, 2]
    with pytest.raises(ValueError, match="6 views make no batch of 7"):
        module.limit_views(views, batch_size=7, max_steps=2)


def test_time_target__counts_pixels_and_multiply_adds_of_both_ways(tmp_path):
    scene = load_scene(save_new_scene(tmp_path))
    description = module.describe_backbone("random:finetuning_vit")
    figures = module.time_target(scene, scene.posed_capture.views[0], description)
    dim, (rows, columns) = scene.gaussians.feature_dim, (32 // PATCH, 40 // PATCH)
    # Between the two pixels at a token's centre, and one more to either side for the convolution: 4 of 8 are read.
    assert figures["blended_pixels_at_tokens"] == 4 * rows * 4 * columns
    assert figures["blended_pixels_full_resolution"] == 32 * 40
    assert figures["decoder_multiply_adds_at_tokens"] == rows * columns * (9 * dim * EMBED + 4 * 9 * dim)
    assert figures["decoder_multiply_adds_full_resolution"] == 32 * 40 * 9 * dim * EMBED + rows * columns * 4 * EMBED
    assert 0 < figures["seconds_at_tokens"] and 0 < figures["seconds_full_resolution"]
    assert figures["largest_difference"] < 1e-4


def test_describe_memory__the_papers_scenes_fit_a_machine_of_64_gb(config, tmp_path):
    """At D = 64 and the paper's numbers, from a scene whose bytes are counted."""
    description = module.describe_backbone("random:finetuning_vit")
    scene = module.make_scene(description, config, tmp_path / "made")
    held = sum(tensor.numel() * tensor.element_size() for tensor in scene.gaussians.tensors().values())
    memory = module.describe_memory(scene, description)
    # means 12, quats 8, scales 6, opacity 2, colour 6, features 128, weight 4, views 2, variance 2
    assert memory["file_bytes_per_gaussian"] == 170 == held / 50
    assert memory["paper_files_gb"] == pytest.approx(230 * 1e6 * 170 / 1e9)
    # Ready: the stored tensors, and in float32 means, quats, scales, opacities, features and a one.
    ready = 170 + 4 * (3 + 4 + 3 + 1 + 64 + 1)
    assert memory["ready_bytes_per_gaussian"] == pytest.approx(ready + 4 * 9 * 64 * EMBED / 50)
    assert memory["paper_files_and_budget_gb"] < 64
