"""What a probe decides for itself, and every value of the public code."""

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from fit3d_ns.cli.probe import ProbeCommand, create_request
from fit3d_ns.probing.classification import PAPER_CLASSIFICATION, ClassificationProbe
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet
from fit3d_ns.probing.depth import DINOV3_DEPTH, PAPER_DEPTH, DepthConfig, DepthProbe
from fit3d_ns.probing.frozen_features import Assembly, BackboneConfig, create_frozen_backbones
from fit3d_ns.probing.head_probe import (
    ProbeSets,
    PublishedTraining,
    RunConfig,
    resolve_cache,
    resolve_iterations,
    resolve_learning_rate,
)
from fit3d_ns.probing.head_trainer import OptimizationConfig, Schedule
from fit3d_ns.probing.heads import LinearDepthHead
from fit3d_ns.probing.probe_runs import DINOV3_RUN, PAPER_RUNS
from fit3d_ns.probing.segmentation import DINOV3_SEGMENTATION, PAPER_SEGMENTATION, SegmentationConfig, SegmentationProbe
from fit3d_ns.training.processes import create_accelerator
from tests.probing.probe_backbones import MeanColourBackbones, create_features
from tests.probing.test_training import create_segmentation_probe, create_striped_frame


def test_resolve_iterations__small_sets_are_trained_for_sixty_epochs() -> None:
    assert resolve_iterations(None, 40_000, 20_000, 16) == 40_000
    assert resolve_iterations(None, 40_000, 1600, 16) == 6000
    assert resolve_iterations(None, 40_000, 10, 16) == 800
    assert resolve_iterations(7, 40_000, 10, 16) == 7


def test_resolve_learning_rate__keeps_the_way_of_a_logit() -> None:
    published = PublishedTraining(num_iterations=40_000, learning_rate=1e-4, width=1000)
    assert resolve_learning_rate(published, 40_000, 1000) == pytest.approx(1e-4)
    assert resolve_learning_rate(published, 2000, 1000) == pytest.approx(2e-3)
    assert resolve_learning_rate(published, 2000, 500) == pytest.approx(4e-3)
    # A single step of a logit stays below four: 4000 / (10 * 100) would be larger than 4 / 100.
    assert resolve_learning_rate(published, 10, 100) == pytest.approx(0.04)


def test_learning_rate__duplicate_gets_half_of_the_originals_and_dpt_keeps_probe3ds() -> None:
    backbones = MeanColourBackbones()
    sets = ProbeSets(*[LabelledSet("toy", [create_striped_frame(0)], ("red", "green"))] * 3)
    accelerator = create_accelerator("cpu")
    config = SegmentationConfig(short_side=16, num_iterations=40_000)
    rates = {
        assembly: SegmentationProbe(config, RunConfig(), sets, backbones, assembly, accelerator).learning_rate
        for assembly in get_args(Assembly)
    }
    # Three channels instead of 768; all that read two maps of them have six inputs.
    assert rates["original"] == rates["finetuned"] == rates["add"] == pytest.approx(1e-3 * 768 / 3)
    assert rates["concat"] == rates["duplicate"] == rates["linear"] == pytest.approx(1e-3 * 768 / 6)
    depth = torch.ones(16, 24)
    frame = replace(create_striped_frame(0), load_depth=lambda: depth)
    sets = ProbeSets(*[LabelledSet("toy", [frame])] * 3)
    for head, expected in (("linear", 1e-4 * 1152 / 6), ("dpt", 5e-4)):
        probe = DepthProbe(
            DepthConfig(head=head, num_iterations=38_400),  # type: ignore[arg-type]
            RunConfig(),
            sets,
            backbones,
            "original",
            accelerator,
        )
        assert probe.learning_rates == {"auto": pytest.approx(expected)}


def test_paper__every_value_of_the_public_segmentation_code() -> None:
    probe = create_segmentation_probe("never", MeanColourBackbones())
    assert PAPER_SEGMENTATION.learning_rate == 1e-3
    probe.config, probe.num_iterations, probe.learning_rate = PAPER_SEGMENTATION, 40_000, 1e-3
    optimization = probe.create_optimization()
    assert (PAPER_SEGMENTATION.short_side, PAPER_SEGMENTATION.crop_side, PAPER_SEGMENTATION.stride) == (512, 512, 341)
    assert PAPER_SEGMENTATION.num_iterations == 40_000 and PAPER_SEGMENTATION.max_class_share == 0.75
    assert optimization == OptimizationConfig(
        Schedule("poly", 40_000, 1500, warmup_ratio=1e-6, min_ratio=0.0),
        batch_size=16,
        learning_rate=1e-3,
        weight_decay=1e-4,
        max_gradient_norm=None,
        has_one_cycle_momentum=False,
    )
    assert PAPER_RUNS["segmentation"].selection == "last" and PAPER_RUNS["segmentation"].cache == "never"


def test_paper__every_value_of_the_public_depth_and_classification_code() -> None:
    backbones = create_frozen_backbones(BackboneConfig("original", "random:test_vit"), norm=False)
    image, depth = torch.zeros(480, 640, 3, dtype=torch.uint8), torch.full((480, 640), 2.0)
    frames = [LabelledFrame(str(index), lambda: image, load_depth=lambda: depth, class_index=0) for index in range(2)]
    sets = ProbeSets(*[LabelledSet("toy", frames, ("a",))] * 3)
    accelerator = create_accelerator("cpu")
    probe = DepthProbe(PAPER_DEPTH, PAPER_RUNS["depth"], sets, backbones, "original", accelerator)
    assert tuple(probe.learning_rates) == ("auto",), "the original's class token"
    assert probe.create_optimization("auto") == OptimizationConfig(
        Schedule("cosine", 38_400, 12_800, warmup_ratio=1e-3, min_ratio=1e-8),
        batch_size=16,
        learning_rate=1e-4,
        weight_decay=0.01,
        max_gradient_norm=35.0,
        has_one_cycle_momentum=True,
        images_per_group=2,
    )
    assert probe.inputs.crop_size == (416, 544) and PAPER_DEPTH.loss_warmup_iterations == 100
    assert PAPER_DEPTH.num_bins == 256 and PAPER_DEPTH.is_flip_averaged
    torch.manual_seed(0)
    head = probe.create_head("auto")
    assert isinstance(head, LinearDepthHead) and head.class_layer is not None
    inputs = head.token_layer.in_features + head.class_layer.in_features
    reference = torch.nn.Conv2d(inputs, 256, 1)
    for ours, theirs in (
        (head.token_layer.weight, reference.weight),
        (head.class_layer.weight, reference.weight),
        (head.token_layer.bias, reference.bias),
    ):
        assert float(ours.abs().max()) <= inputs**-0.5 and float(ours.std() / theirs.std()) == pytest.approx(1, abs=0.1)
    # The public SigLoss has no largest depth in its configuration; 12 m are beyond the 10 m of evaluation.
    predictions = torch.tensor([[[2.0, 3.0], [5.0, 9.0]]])
    targets = torch.tensor([[[2.5, 0.0], [4.0, 12.0]]])
    loss = probe.compute_loss(predictions, targets, iteration=500)
    logs = [math.log(p + 1e-3) - math.log(d + 1e-3) for p, d in ((2.0, 2.5), (5.0, 4.0), (9.0, 12.0))]
    mean = sum(logs) / 3
    variance = sum((value - mean) ** 2 for value in logs) / 2
    assert float(loss.total) == pytest.approx(math.sqrt(variance + 0.15 * mean**2), rel=1e-5)
    classification = ClassificationProbe(
        PAPER_CLASSIFICATION, PAPER_RUNS["classification"], sets, backbones, "original", accelerator
    )
    assert classification.create_optimization() == OptimizationConfig(
        Schedule("cosine", 12_500), batch_size=128, learning_rate=0.5, weight_decay=0.0, optimizer="sgd"
    )


def test_dinov3__every_value_of_its_evaluation() -> None:
    probe = create_segmentation_probe("never", MeanColourBackbones())
    probe.config, probe.num_iterations, probe.learning_rate = DINOV3_SEGMENTATION, 40_000, 1e-3
    optimization = probe.create_optimization()
    assert (optimization.learning_rate, optimization.weight_decay, optimization.batch_size) == (1e-3, 1e-3, 16)
    assert (DINOV3_SEGMENTATION.crop_side, DINOV3_SEGMENTATION.stride) == (512, 341)
    assert DINOV3_SEGMENTATION.num_iterations == 40_000 and DINOV3_SEGMENTATION.learning_rate == 1e-3
    image, depth = torch.zeros(32, 48, 3, dtype=torch.uint8), torch.full((32, 48), 2.0)
    frames = [LabelledFrame(str(index), lambda: image, load_depth=lambda: depth) for index in range(2)]
    sets = ProbeSets(*[LabelledSet("toy", frames)] * 3)
    backbones = create_frozen_backbones(BackboneConfig("original", "random:test_vit"), norm=True)
    accelerator = create_accelerator("cpu")
    depth_probe = DepthProbe(DINOV3_DEPTH, DINOV3_RUN, sets, backbones, "original", accelerator)
    assert (
        tuple(depth_probe.learning_rates) == ("none",)
        and DINOV3_DEPTH.gradient_loss_weight == 0
        and DINOV3_DEPTH.is_flip_averaged
    )
    optimization = depth_probe.create_optimization("none")
    assert (optimization.learning_rate, optimization.weight_decay, optimization.batch_size) == (3e-4, 1e-4, 16)
    assert optimization.schedule.num_iterations == 38_400 and optimization.schedule.num_warmup_iterations == 12_800
    head = depth_probe.create_head("none")
    assert isinstance(head, LinearDepthHead) and head.class_layer is None
    # In training tokens have mean 0 and deviation 1 before the linear layer, whatever they were.
    features = create_features(0, batch=4, embed=64)
    maps, token_layer = features.maps * 7 + 3, head.token_layer
    seen = []
    token_layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    head.train()(replace(features, maps=maps))
    assert seen[0].mean(dim=(0, 1, 2)).abs().max() < 1e-5
    torch.testing.assert_close(seen[0].std(dim=(0, 1, 2), correction=0), torch.ones(64), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="segmentation and depth"):
        create_request(ProbeCommand("normals", Path("r.json"), (Path("a"),), dinov3=True))
    request = create_request(ProbeCommand("depth", Path("r.json"), (Path("a"),), dinov3=True, learning_rate=1e-2))
    assert request.config == replace(DINOV3_DEPTH, learning_rate=1e-2) and request.run.selection == "last"


@pytest.mark.parametrize(
    ("rule", "needed", "expected"),
    [("auto", 1.0, True), ("auto", 3.0, False), ("always", 3.0, True), ("never", 1.0, False)],
)
def test_resolve_cache__features_are_kept_where_they_fit(
    rule: str, needed: float, expected: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve_cache(RunConfig(cache=rule, cache_gb=2.0), needed, "fixed windows") is expected  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert ("fixed windows instead of the published random augmentation" in said) is expected
