"""Training of heads: schedules and orders by hand, optimisation against closed forms, memory against fresh features."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fit3d_ns.probing.classification import ClassificationInputs
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet
from fit3d_ns.probing.frozen_features import Assembler, FrozenFeatures
from fit3d_ns.probing.head_probe import ProbeSets, RunConfig
from fit3d_ns.probing.head_trainer import LossSum, OptimizationConfig, Schedule, compute_one_cycle_momentum, train_head
from fit3d_ns.probing.heads import DepthBins, LinearDepthHead, SegmentationHead
from fit3d_ns.probing.pictures import Picture, PictureKey
from fit3d_ns.probing.samples import (
    Draw,
    FeatureMemory,
    check_batch,
    iterate_augmented,
    iterate_draws,
    stack_features,
)
from fit3d_ns.probing.segmentation import SegmentationConfig, SegmentationProbe
from fit3d_ns.training.processes import create_accelerator
from tests.probing.probe_backbones import MeanColourBackbones


def test_schedule__poly_with_warm_up_at_given_points() -> None:
    schedule = Schedule("poly", 40_000, 1500, warmup_ratio=1e-6)
    assert schedule.compute_factor(0) == pytest.approx(1e-6)
    # Half of the warm-up is half of what poly says there.
    assert schedule.compute_factor(750) == pytest.approx((1 - 750 / 40_000) * 0.5, rel=1e-5)
    assert schedule.compute_factor(1500) == pytest.approx(1 - 1500 / 40_000)
    assert schedule.compute_factor(39_999) == pytest.approx(1 / 40_000)


def test_schedule__cosine_and_one_cycle() -> None:
    schedule = Schedule("cosine", 38_400, 12_800, warmup_ratio=1e-3, min_ratio=1e-8)
    assert schedule.compute_factor(0) == pytest.approx(1e-3)
    assert schedule.compute_factor(12_800) == pytest.approx(0.75), "cos(60 degrees) is one half"
    assert schedule.compute_factor(19_200) == pytest.approx(0.5)
    assert schedule.compute_factor(38_400) == pytest.approx(1e-8)
    momenta = [compute_one_cycle_momentum(iteration, 1000) for iteration in range(1000)]
    assert momenta[0] == pytest.approx(0.95) and momenta[-1] == pytest.approx(0.95)
    assert min(momenta) == pytest.approx(0.85, abs=1e-5) and momenta.index(min(momenta)) == 299
    assert compute_one_cycle_momentum(0, 1) > 0.0


def test_iterate_draws__every_sample_once_per_epoch_and_shares_that_add_up() -> None:
    whole = [draw for batch in iterate_draws(10, 4, 10, seed=3) for draw in batch]
    assert [position for position, _ in whole] == list(range(40))
    for epoch in range(4):
        assert sorted(index for _, index in whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert [index for _, index in whole[:10]] != [draw.index for draw in whole[10:20]]
    shares = zip(*(iterate_draws(10, 4, 10, 3, process, 2) for process in range(2)), strict=True)
    assert [draw for first, second in shares for draw in first + second] == whole
    assert next(iterate_draws(10, 4, 10, seed=4)) != whole[:4]


def test_check_batch__uneven_shares_are_refused() -> None:
    check_batch(16, 4, 2)
    with pytest.raises(ValueError, match="batch of 16 cannot be split over 3 processes"):
        check_batch(16, 3)
    with pytest.raises(ValueError, match="multiple of 8"):
        check_batch(4, 4, 2)


def create_regression(seed: int = 0) -> tuple[FrozenFeatures, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(6, 1, 1, 4, 5, 3, generator=generator)
    weights = torch.randn(2, 3, generator=generator)
    targets = torch.einsum("blhwc,kc->bkhw", maps[:, 0], weights) + 0.1 * torch.randn(6, 2, 4, 5, generator=generator)
    return FrozenFeatures(maps, torch.zeros(6, 1, 1, 3)), targets


class LinearMap(nn.Module):
    """The classifier of the segmentation head without its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.assembler = Assembler("original", 3, "none")
        self.classifier = nn.Conv2d(3, 2, kernel_size=1)

    def forward(self, features: FrozenFeatures) -> torch.Tensor:
        return self.classifier(self.assembler(features))


def compute_square_loss(predictions: torch.Tensor, targets: torch.Tensor, iteration: int) -> LossSum:
    return LossSum((predictions - targets).square().sum(), torch.tensor(float(targets.numel())))


def iterate_batches(
    features: FrozenFeatures, targets: torch.Tensor, config: OptimizationConfig
) -> Iterator[tuple[FrozenFeatures, torch.Tensor]]:
    for draws in iterate_draws(len(targets), config.batch_size, config.schedule.num_iterations, seed=0):
        rows = [index for _, index in draws]
        yield FrozenFeatures(features.maps[rows], features.class_tokens[rows]), targets[rows]


def test_train_head__reaches_the_least_squares_solution() -> None:
    features, targets = create_regression()
    torch.manual_seed(0)
    head = LinearMap()
    config = OptimizationConfig(Schedule("poly", 600, 30), batch_size=6, learning_rate=0.05, weight_decay=0.0)
    batches = iterate_batches(features, targets, config)
    trained = train_head(head, batches, compute_square_loss, config, accelerator=create_accelerator("cpu"))
    inputs = features.maps.reshape(-1, 3).numpy()
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    expected = np.linalg.lstsq(inputs, targets.permute(0, 2, 3, 1).reshape(-1, 2).numpy(), rcond=None)[0]
    # Adam with a decaying rate stops within a thousandth of the optimum.
    np.testing.assert_allclose(head.classifier.weight[:, :, 0, 0].detach().T, expected[:3], atol=2e-3)
    np.testing.assert_allclose(head.classifier.bias.detach(), expected[3], atol=2e-3)
    assert trained.iteration == 600 and trained.scores == {} and not head.training


def test_train_head__equals_a_plain_loop_over_torchs_adamw() -> None:
    """Learning rate, momentum, weight decay and clipping of every iteration, written out with mmcv's formulas."""
    features, targets = create_regression()
    total, warmup, peak = 12, 4, 0.05
    config = OptimizationConfig(
        Schedule("cosine", total, warmup, warmup_ratio=1e-3, min_ratio=1e-8),
        batch_size=6,
        learning_rate=peak,
        weight_decay=0.01,
        max_gradient_norm=0.2,
        has_one_cycle_momentum=True,
    )
    torch.manual_seed(0)
    head, plain = LinearMap(), LinearMap()
    plain.load_state_dict(head.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=peak, weight_decay=0.01)
    norms = []
    for iteration in range(total):
        rate = 1e-8 + (1 - 1e-8) * (1 + math.cos(math.pi * iteration / total)) / 2
        if iteration < warmup:
            rate *= 1 - (1 - iteration / warmup) * (1 - 1e-3)
        # Down over the first 30 % of the iterations, up over the rest.
        turn, end = 0.3 * total - 1, total - 1
        share = iteration / turn if iteration <= turn else 1 + (iteration - turn) / (end - turn)
        momentum = 0.9 + 0.05 * math.cos(math.pi * share)
        optimizer.param_groups[0].update(lr=peak * rate, betas=(momentum, 0.999))
        optimizer.zero_grad()
        (plain(features) - targets).square().mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), 0.2)))
        optimizer.step()
    assert max(norms) > 0.2, "clipping has to act"
    # The order of a whole batch only changes the rounding of its mean.
    batches = iterate_batches(features, targets, config)
    train_head(head, batches, compute_square_loss, config, accelerator=create_accelerator("cpu"))
    torch.testing.assert_close(head.classifier.weight, plain.classifier.weight)
    torch.testing.assert_close(head.classifier.bias, plain.classifier.bias)


def test_train_head__keeps_the_best_scored_checkpoint() -> None:
    features, targets = create_regression()
    scores = iter([0.1, 0.9, 0.4])
    snapshots: list[torch.Tensor] = []

    def score(head: nn.Module) -> float:
        assert isinstance(head, LinearMap) and not head.training
        snapshots.append(head.classifier.weight.detach().clone())
        return next(scores)

    head = LinearMap()
    config = OptimizationConfig(Schedule("poly", 12), batch_size=2, learning_rate=0.05, weight_decay=0.0)
    trained = train_head(
        head,
        iterate_batches(features, targets, config),
        compute_square_loss,
        config,
        accelerator=create_accelerator("cpu"),
        compute_score=score,
        iterations_per_evaluation=4,
    )
    assert trained.iteration == 8 and trained.scores == {4: 0.1, 8: 0.9, 12: 0.4}
    assert torch.equal(head.classifier.weight, snapshots[1]) and not torch.equal(snapshots[1], snapshots[2])


def test_train_head__a_loss_that_is_not_finite_stops_at_once() -> None:
    features, targets = create_regression()
    config = OptimizationConfig(Schedule("poly", 12), batch_size=2, learning_rate=0.05, weight_decay=0.0)
    batches = iterate_batches(features, targets * math.nan, config)
    with pytest.raises(ValueError, match="not finite at iteration 1"):
        train_head(LinearMap(), batches, compute_square_loss, config, accelerator=create_accelerator("cpu"))


def test_stack_features__a_linear_head_sees_no_difference_to_pictures_alone() -> None:
    """Tokens are repeated beyond the edge, as bilinear upsampling does, and targets there do not count."""
    generator = torch.Generator().manual_seed(0)
    entries = []
    for h, w in ((2, 3), (4, 2), (4, 3)):
        maps, tokens = torch.randn(1, 1, 1, h, w, 5, generator=generator), torch.randn(1, 1, 1, 5, generator=generator)
        target = torch.randint(0, 9, (2 * h, 2 * w), generator=generator).to(torch.uint8)
        entries.append((FrozenFeatures(maps, tokens), target))
    features, targets = stack_features(entries, 255)
    torch.manual_seed(0)
    head = LinearDepthHead(Assembler("original", 5), DepthBins(0.5, 4.0, num_bins=8))
    nn.init.normal_(head.token_layer.weight)
    depth = F.interpolate(head(features)[:, None], scale_factor=0.5)[:, 0]
    assert targets.shape == (3, 8, 6)
    for index, (own, target) in enumerate(entries):
        rows, columns = target.shape
        torch.testing.assert_close(targets[index, :rows, :columns], target)
        assert int((targets[index] != 255).sum()) == rows * columns
        alone = F.interpolate(head(own)[:, None], scale_factor=0.5)[0, 0]
        torch.testing.assert_close(depth[index, :rows, :columns], alone)


def create_striped_frame(index: int) -> LabelledFrame:
    """Red pixels are class 0, green ones class 1, blue ones do not count."""
    generator = torch.Generator().manual_seed(index)
    kinds = torch.randint(0, 3, (4, 6), generator=generator).repeat_interleave(4, 0).repeat_interleave(4, 1)
    labels = torch.tensor([0, 1, 255], dtype=torch.uint8)[kinds]
    image = (torch.eye(3)[kinds] * 200).to(torch.uint8)
    return LabelledFrame(str(index), load_image=lambda: image, load_labels=lambda: labels)


def create_segmentation_probe(cache: str, backbones: MeanColourBackbones, **changes: object) -> SegmentationProbe:
    frames = [create_striped_frame(index) for index in range(6)]
    train, test = LabelledSet("toy", frames[:4], ("red", "green")), LabelledSet("toy", frames[4:], ("red", "green"))
    config = SegmentationConfig(short_side=16, num_iterations=40, batch_size=2, learning_rate=0.05, **changes)  # type: ignore[arg-type]
    run = RunConfig(cache=cache, selection="last")  # type: ignore[arg-type]
    return SegmentationProbe(
        config, run, ProbeSets(train, test, None), backbones, "original", create_accelerator("cpu")
    )


@pytest.mark.parametrize("cache", ["always", "never"])
def test_segmentation_probe__separable_features_are_separated(cache: str) -> None:
    outcome = create_segmentation_probe(cache, MeanColourBackbones()).run_seed(0)
    # Patches have one colour each; only pixels between two patches' centres can be wrong, through upsampling.
    loss_first, loss_last = outcome.summarise_losses()
    assert outcome.metrics["miou"] > 0.8 and loss_last < 0.5 * loss_first
    assert len(outcome.losses) == 40 and isinstance(outcome.head, SegmentationHead)


def test_segmentation_probe__each_picture_passes_the_backbone_once() -> None:
    backbones = MeanColourBackbones()
    probe = create_segmentation_probe("always", backbones)
    first = probe.run_seed(0)
    seen = backbones.num_images
    # Two windows of six frames, the four training ones mirrored as well.
    assert seen <= 2 * (6 + 4)
    assert probe.run_seed(0).metrics == first.metrics
    probe.run_seed(1)
    assert backbones.num_images <= 2 * (6 + 4)


def test_segmentation_probe__metrics_do_not_depend_on_the_memory_budget() -> None:
    metrics = []
    for gigabytes in (4.0, 2e-6, 0.0):
        probe = create_segmentation_probe("always", MeanColourBackbones())
        probe.memory = FeatureMemory(probe.backbones, gigabytes)
        metrics.append(probe.run_seed(0).metrics)
    assert metrics[0] == metrics[1] == metrics[2]


def test_segmentation_probe__ignored_pixels_do_not_change_the_loss() -> None:
    probe = create_segmentation_probe("always", MeanColourBackbones())
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 2, 4, 6, generator=generator), torch.randint(0, 2, (2, 4, 6), generator=generator)
    labels[:, :2] = 255
    loss = probe.compute_loss(logits, labels.to(torch.uint8), 0)
    expected = nn.functional.cross_entropy(logits[:, :, 2:], labels[:, 2:], reduction="sum")
    torch.testing.assert_close(loss.total, expected)
    assert float(loss.count) == 2 * 2 * 6
    paper = create_segmentation_probe("always", MeanColourBackbones(), loss_average="all")
    assert float(paper.compute_loss(logits, labels.to(torch.uint8), 0).count) == 2 * 4 * 6


class NoisyInputs(ClassificationInputs):
    """Pictures of one value: a random one, whose targets say which sample they are of, or the name of the frame."""

    def load(self, frame: LabelledFrame, key: PictureKey) -> Picture:
        return Picture(torch.full((3, 4, 4), float(frame.name)), torch.zeros(1))

    def augment(self, frame: LabelledFrame, generator: np.random.Generator) -> Picture:
        return Picture(torch.full((3, 4, 4), float(generator.random())), torch.tensor(float(frame.name)))


def test_iterate_augmented__depends_on_position_alone() -> None:
    frames = [create_striped_frame(index) for index in range(3)]

    def load(*batches: list[Draw]) -> torch.Tensor:
        loaded = iterate_augmented(batches, frames, NoisyInputs(4, 4), MeanColourBackbones(), 1, 2, len(batches[0]))
        values = []
        for draws, (features, targets) in zip(batches, loaded, strict=True):
            assert targets.tolist() == [float(index) for _, index in draws]
            values.append(features.maps[:, 0, 0, 0, 0, 0])
        return torch.cat(values)

    draws = [(position, position % 3) for position in range(6)]
    together = load(draws)
    torch.testing.assert_close(load(draws[:3], draws[3:]), together)
    torch.testing.assert_close(load(draws[4:]), together[4:])
    assert len(set(together.tolist())) == 6


def test_feature_memory__half_precision_unless_features_are_too_large() -> None:
    backbones = MeanColourBackbones()
    memory = FeatureMemory(backbones, 1.0)
    for value, dtype in ((0.5, torch.float16), (1e5, torch.float32)):
        frame = replace(create_striped_frame(0), name=str(value))
        [(features, _)] = memory.fetch([PictureKey(value)], [frame], NoisyInputs(4, 4))
        assert features.maps.dtype == dtype and float(features.maps.max()) == value
