"""Figures against loops written out and against other libraries."""

import math

import numpy as np
import pytest
import torch

from fit3d_ns.probing.datasets.frames import IGNORE_INDEX
from fit3d_ns.probing.depth import DepthMetrics, create_window
from fit3d_ns.probing.segmentation import count_pixels, summarise_pixels


def draw_maps(seed: int, num_classes: int, size: tuple[int, int] = (7, 9)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, size, generator=generator).to(torch.uint8)
    predicted = torch.where(torch.rand(size, generator=generator) < 0.6, labels.long(), 0)
    labels[torch.rand(size, generator=generator) < 0.2] = IGNORE_INDEX
    return predicted, labels


def test_segmentation_metrics__equal_a_loop_over_pixels() -> None:
    # Class 4 occurs nowhere, class 3 only in the predictions of the second image.
    images = [draw_maps(0, 3), draw_maps(1, 3)]
    images[1][0][0, :4] = 3
    confusion = sum((count_pixels(*pair, 5) for pair in images), torch.zeros(5, 5, dtype=torch.int64))
    hits, truths, guesses = [0] * 5, [0] * 5, [0] * 5
    for predicted, labels in images:
        for guess, truth in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if truth != 255:
                hits[truth] += guess == truth
                truths[truth] += 1
                guesses[guess] += 1
    unions = [truths[index] + guesses[index] - hits[index] for index in range(5)]
    ious = [hits[index] / unions[index] for index in range(5) if truths[index]]
    figures = summarise_pixels(confusion, "abcde")
    assert figures["miou"] == pytest.approx(sum(ious) / len(ious))
    accuracies = [hits[index] / truths[index] for index in range(5) if truths[index]]
    assert figures["macc"] == pytest.approx(sum(accuracies) / len(accuracies))
    assert figures["aacc"] == pytest.approx(sum(hits) / sum(truths))
    # Classes that no label has do not count, guessed or not.
    assert math.isnan(figures["iou_by_class"]["e"]) and math.isnan(figures["iou_by_class"]["d"])


def test_segmentation_metrics__equal_torchmetrics_and_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score, jaccard_score
    from torchmetrics.classification import MulticlassJaccardIndex

    predicted, labels = draw_maps(2, 4, (40, 40))
    figures = summarise_pixels(count_pixels(predicted, labels, 4), "abcd")
    other = MulticlassJaccardIndex(4, ignore_index=IGNORE_INDEX)(predicted, labels.long())
    assert figures["miou"] == pytest.approx(float(other), rel=1e-6)
    counted = labels != IGNORE_INDEX
    truth, guess = labels[counted].numpy(), predicted[counted].numpy()
    assert figures["miou"] == pytest.approx(jaccard_score(truth, guess, average="macro"), rel=1e-9)
    assert figures["macc"] == pytest.approx(balanced_accuracy_score(truth, guess), rel=1e-9)


def test_segmentation_metrics__ignored_pixels_never_count() -> None:
    predicted, labels = draw_maps(3, 4)
    other = count_pixels(torch.where(labels == IGNORE_INDEX, 3 - predicted, predicted), labels, 4)
    assert torch.equal(count_pixels(predicted, labels, 4), other)
    empty = count_pixels(predicted, torch.full_like(labels, IGNORE_INDEX), 4)
    with pytest.raises(ValueError, match="No test pixel has a label"):
        summarise_pixels(empty, "abcd")


def loop_over_depth(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    pairs = [(p, d) for p, d in zip(prediction.ravel(), target.ravel(), strict=True) if 0.001 < d < 10.0]
    pairs = [(min(max(float(p), 0.001), 10.0), float(d)) for p, d in pairs]
    logs = [math.log(p) - math.log(d) for p, d in pairs]
    count = len(pairs)
    mean = sum(logs) / count
    figures = {
        "rmse": math.sqrt(sum((p - d) ** 2 for p, d in pairs) / count),
        "abs_rel": sum(abs(p - d) / d for p, d in pairs) / count,
        "sq_rel": sum((p - d) ** 2 / d for p, d in pairs) / count,
        "log10": sum(abs(math.log10(p) - math.log10(d)) for p, d in pairs) / count,
        "silog": 100 * math.sqrt(sum((value - mean) ** 2 for value in logs) / count),
    }
    for power in (1, 2, 3):
        figures[f"d{power}"] = sum(max(p / d, d / p) < 1.25**power for p, d in pairs) / count
    return figures


def test_depth_metrics__equal_a_loop_per_image_and_pooled() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = [torch.rand(5, 6, generator=generator) * 11.0, torch.rand(5, 6, generator=generator) * 3.0]
    predictions = [target + torch.randn(5, 6, generator=generator) for target in targets]
    targets[0][0, :3] = 0.0
    metrics = DepthMetrics()
    for prediction, target in zip(predictions, targets, strict=True):
        metrics.update(prediction, target)
    metrics.update(predictions[0], torch.zeros(5, 6))
    figures = metrics.compute()
    single = [loop_over_depth(p.numpy(), d.numpy()) for p, d in zip(predictions, targets, strict=True)]
    for name in single[0]:
        assert figures[name] == pytest.approx((single[0][name] + single[1][name]) / 2, rel=1e-6), name
    together = loop_over_depth(torch.cat(predictions).numpy(), torch.cat(targets).numpy())
    for name, value in together.items():
        assert figures["pooled"][name] == pytest.approx(value, rel=1e-6), name
    assert figures["num_images"] == 2
    with pytest.raises(ValueError, match="No test pixel has depth"):
        DepthMetrics().compute()


def test_create_window__eigen_and_garg_as_published() -> None:
    eigen = create_window("eigen", 480, 640)
    expected = torch.zeros(480, 640, dtype=torch.bool)
    expected[45:471, 41:601] = True
    assert torch.equal(eigen, expected)
    garg = create_window("garg", 352, 1216)
    rows, columns = garg.any(1).nonzero()[:, 0], garg.any(0).nonzero()[:, 0]
    assert (int(rows[0]), int(rows[-1]) + 1) == (int(0.40810811 * 352), int(0.99189189 * 352))
    assert (int(columns[0]), int(columns[-1]) + 1) == (int(0.03594771 * 1216), int(0.96405229 * 1216))
    assert bool(create_window("none", 4, 5).all())


def test_depth_metrics__only_the_window_counts() -> None:
    target = torch.full((480, 640), 2.0)
    prediction = target.clone()
    prediction[:45], prediction[:, :41] = 9.0, 9.0
    metrics = DepthMetrics(window="eigen")
    metrics.update(prediction, target)
    assert metrics.compute()["rmse"] == 0.0
