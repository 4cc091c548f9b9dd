"""Whole probes against what they say they compute, written out from the backbones' own tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fit3d_ns.features import create_extractor
from fit3d_ns.probing.classification import ClassificationConfig, ClassificationHeads, ClassificationProbe
from fit3d_ns.probing.datasets import read_labelled_set
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet
from fit3d_ns.probing.depth import DepthConfig, DepthProbe
from fit3d_ns.probing.frozen_features import Assembler, BackboneConfig, FrozenFeatures, create_frozen_backbones
from fit3d_ns.probing.head_probe import ProbeSets, RunConfig
from fit3d_ns.probing.heads import LinearDepthHead, SegmentationHead
from fit3d_ns.probing.pictures import PatchFitRule, PictureKey
from fit3d_ns.probing.segmentation import SegmentationConfig, SegmentationProbe
from fit3d_ns.training.processes import create_accelerator
from tests.probing.probe_backbones import MeanColourBackbones
from tests.probing.probe_scenes import BACKBONE, create_finetuned, create_scene

torch.set_num_threads(1)


def predict_depth_by_hand(head: LinearDepthHead, image: torch.Tensor, finetuned: Path) -> torch.Tensor:
    """tokens || tokens || class token of the original, upsampled four times, one linear layer onto 256 bins."""
    original = create_extractor(BACKBONE, norm=False)(image)
    other = create_extractor(f"local-dir:{finetuned}", norm=False)(image)
    class_map = original.prefix_tokens[:, :1, None].expand(-1, *original.patch_grid, -1)
    together = torch.cat([original.maps, other.maps, class_map], dim=-1).permute(0, 3, 1, 2)
    upsampled = F.interpolate(together, scale_factor=4, mode="bilinear", align_corners=False)
    assert head.class_layer is not None
    weight = torch.cat([head.token_layer.weight, head.class_layer.weight], dim=1)
    logits = torch.einsum("bchw,kc->bkhw", upsampled, weight) + head.token_layer.bias[:, None, None]
    shares = logits.relu() + 0.1
    centers = torch.linspace(0.001, 20.0, 256)[:, None, None]
    depth = (shares * centers).sum(dim=1) / shares.sum(dim=1)
    return F.interpolate(depth[:, None], size=image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]


def test_depth_probe__prediction_is_the_mean_of_an_image_and_its_mirror_image(tmp_path: Path) -> None:
    scene = create_scene(tmp_path / "room", seed=4)
    finetuned = create_finetuned(tmp_path / "finetuned")
    backbones = create_frozen_backbones(BackboneConfig("concat", BACKBONE, finetuned=finetuned), norm=False)
    labelled_set = read_labelled_set(scene, None, "depth")
    predictions = []
    for is_averaged in (True, False):
        config = DepthConfig(num_iterations=1, is_flip_averaged=is_averaged)
        sets = ProbeSets(labelled_set, labelled_set, None)
        probe = DepthProbe(config, RunConfig(), sets, backbones, "concat", create_accelerator("cpu"))
        torch.manual_seed(0)
        head = probe.create_head("auto").eval()
        assert isinstance(head, LinearDepthHead)
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.5)
        predictions.append(probe.predict(head, labelled_set.frames[2], (32, 48)))
    image = labelled_set.frames[2].load_image().permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        plain = predict_depth_by_hand(head, image, finetuned)
        mirrored = predict_depth_by_hand(head, image.flip(-1), finetuned).flip(-1)
    # Kept features have half precision.
    torch.testing.assert_close(predictions[1], plain, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(predictions[0], (plain + mirrored) / 2, rtol=5e-3, atol=5e-3)
    assert (plain - mirrored).abs().max() > 0.1, "the mirror image has to matter"


def create_coloured_frame(height: int, width: int, name: str = "a") -> LabelledFrame:
    """Red says the column, green the row; the depth of a pixel is one metre and a hundredth of its column."""
    rows, columns = np.mgrid[0:height, 0:width]
    image = torch.from_numpy(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))
    labels = torch.from_numpy((columns >= width / 2).astype(np.uint8))
    depth = torch.from_numpy(1.0 + columns.astype(np.float32) / 100)
    return LabelledFrame(name, lambda: image, lambda: labels, lambda: depth)


class Positions(nn.Module):
    """A head that says the mean colour of a patch, which is the position it came from."""

    def forward(self, features: FrozenFeatures) -> torch.Tensor:
        return features.maps[:, 0, 0].permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("size", "rule"),
    [((16, 40), "pad"), ((16, 16), "pad"), ((18, 43), "pad"), ((13, 22), "resize"), ((9, 30), "resize")],
)
def test_segmentation_probe__slide_inference_puts_every_window_back(size: tuple[int, int], rule: PatchFitRule) -> None:
    """Windows of 16 every 10 pixels over images that are smaller, or no multiple of window, stride or patch."""
    height, width = size
    frame = create_coloured_frame(height, width)
    labelled_set = LabelledSet("toy", [frame], ("left", "right"))
    config = SegmentationConfig(short_side=min(size), crop_side=16, stride=10, num_iterations=1, batch_size=1)
    probe = SegmentationProbe(
        config,
        RunConfig(selection="last"),
        ProbeSets(labelled_set, labelled_set, None),
        MeanColourBackbones(rule),
        "original",
        create_accelerator("cpu"),
    )
    logits = probe.predict_logits(Positions(), frame, size) * 255
    assert logits.shape == (3, height, width)
    expected = frame.load_image().permute(2, 0, 1).float()
    # A window's outermost half patch repeats its outermost token, which is off by one and a half pixels at most.
    assert float((logits[:2] - expected[:2]).abs().max()) < 2.0


@pytest.mark.parametrize("cache", ["always", "never"])
def test_depth_probe__trains_on_images_of_several_sizes(cache: str) -> None:
    frames = [create_coloured_frame(*size, name=str(size)) for size in ((16, 24), (20, 32), (24, 24))] * 2
    labelled_set = LabelledSet("toy", [*frames], ())
    config = DepthConfig(num_iterations=30, batch_size=6, learning_rate=0.3)
    probe = DepthProbe(
        config,
        RunConfig(cache=cache, selection="last"),  # type: ignore[arg-type]
        ProbeSets(labelled_set, labelled_set, None),
        MeanColourBackbones(),
        "original",
        create_accelerator("cpu"),
    )
    assert probe.inputs.crop_size == (16, 24), "no larger than the smallest image"
    outcome = probe.run_seed(0)
    loss_first, loss_last = outcome.summarise_losses()
    assert loss_last < 0.5 * loss_first and outcome.metrics["num_images"] == 6


def create_classification_probe(frames: list[LabelledFrame], crop_side: int) -> ClassificationProbe:
    labelled_set = LabelledSet("toy", frames, ("red", "green", "blue"))
    config = ClassificationConfig(num_iterations=60, batch_size=6, resize_side=2 * crop_side, crop_side=crop_side)
    backbones = create_frozen_backbones(BackboneConfig("original", BACKBONE), norm=True)
    sets = ProbeSets(labelled_set, labelled_set, None)
    return ClassificationProbe(
        config, RunConfig(selection="last"), sets, backbones, "original", create_accelerator("cpu")
    )


def test_classification_probe__central_crop_of_a_resized_picture() -> None:
    picture = torch.zeros(32, 64, 3, dtype=torch.uint8)
    picture[:, 24:40] = 200
    frame = LabelledFrame("a", lambda: picture, class_index=1)
    probe = create_classification_probe([frame] * 6, crop_side=8)
    # 32x64 becomes 16x32; its middle eight columns are the sixteen bright ones of the original.
    for is_flipped in (False, True):
        shown = probe.inputs.load(frame, PictureKey("a", is_flipped))
        assert shown.image.shape == (3, 8, 8) and int(shown.target) == 1
        torch.testing.assert_close(shown.image, torch.full((3, 8, 8), 200 / 255))


def test_classification_heads__read_what_dinov2s_evaluation_reads() -> None:
    """Class tokens of the last block or the last four, behind the norm, with or without the last mean patch token."""
    image = torch.zeros(16, 16, 3, dtype=torch.uint8)
    frames = [LabelledFrame(str(index), lambda: image, class_index=index) for index in range(3)]
    probe = create_classification_probe(frames, crop_side=16)
    images = torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    features = probe.backbones(images)
    heads = ClassificationHeads(Assembler("original", 64), 3, probe.candidates)
    logits = heads(features)
    model = probe.backbones.extractors[0].token_model.model
    with torch.no_grad():
        blocks = model.get_intermediate_layers(2 * images - 1, n=4, return_prefix_tokens=True, norm=True)
    mean, number = blocks[-1][0].mean(dim=1), 0
    for last in (1, 4):
        for extra in ([], [mean]):
            joined = torch.cat([*(prefix[:, 0] for _, prefix in blocks[-last:]), *extra], dim=1)
            for rate in probe.config.learning_rates:
                assert probe.candidates[number] == (last, bool(extra), rate)
                layer = heads.layers[number]
                torch.testing.assert_close(logits[:, number], joined @ layer.weight.T + layer.bias)  # type: ignore
                number += 1
    assert number == logits.shape[1] == 52
    # Without class token there is one way to read.
    alone = ClassificationHeads(Assembler("original", 64, "none"), 3, [(0, True, 0.1)])
    torch.testing.assert_close(alone(features)[:, 0], alone.layers[0](mean))


def test_classification_probe__the_best_of_all_learning_rates_counts() -> None:
    frames = []
    for index in range(6):
        image = torch.zeros(32, 32, 3, dtype=torch.uint8)
        image[..., index % 3] = 150 + index
        frames.append(LabelledFrame(str(index), lambda image=image: image, class_index=index % 3))
    probe = create_classification_probe(frames, crop_side=16)
    outcome = probe.run_seed(0)
    metrics = probe.evaluate(outcome.head, probe.sets.test)  # type: ignore[arg-type]
    assert outcome.metrics["accuracy"] == max(metrics[0]) == 1.0
    # Of those that are always right, the surest.
    best = min((loss, index) for index, loss in enumerate(metrics[2]) if metrics[0][index] == 1.0)[1]
    names = ("class_token_blocks", "has_mean_token", "learning_rate")
    assert outcome.choices == dict(zip(names, probe.candidates[best], strict=True))
    assert outcome.metrics["learning_rate"] == probe.candidates[best][2]
    assert min(metrics[0]) < 1.0, "the smallest rates learn nothing in sixty iterations"


def test_segmentation_probe__checkpoints_are_chosen_on_the_validation_part() -> None:
    """The score of each checkpoint is the mIoU on the selection data, and the best one's weights are measured."""
    frames = [create_coloured_frame(16, 24, name=str(index)) for index in range(3)]
    sets = [LabelledSet("toy", [frame], ("left", "right")) for frame in frames]
    probe = SegmentationProbe(
        SegmentationConfig(short_side=16, num_iterations=9, batch_size=1, learning_rate=0.1),
        RunConfig(num_evaluations=3),
        ProbeSets(*sets),
        MeanColourBackbones(),
        "original",
        create_accelerator("cpu"),
    )
    outcome = probe.run_seed(0)
    assert isinstance(outcome.head, SegmentationHead) and list(outcome.scores) == [3, 6, 9]
    assert outcome.scores[outcome.iteration] == max(outcome.scores.values())
    assert probe.evaluate(outcome.head, sets[2])["miou"] == outcome.scores[outcome.iteration]
