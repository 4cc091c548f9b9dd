"""The image classification probe (Table 11): linear layers on class tokens and the mean patch token.

As in DINOv2's evaluation, linear layers that read the class token of the last block, or of the last four, with or
without its mean patch token, each at a range of learning rates, are trained by SGD on the features; the best counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet
from fit3d_ns.probing.frozen_features import Assembler, ClassTokenSource, FrozenBackbones, FrozenFeatures
from fit3d_ns.probing.head_probe import HeadProbe, resolve_cache
from fit3d_ns.probing.head_trainer import LossSum, OptimizationConfig, Schedule, TrainedHead, sum_over_processes
from fit3d_ns.probing.heads import initialise
from fit3d_ns.probing.pictures import Picture, PictureKey, Window, compute_size, draw_window, to_image
from fit3d_ns.probing.samples import BYTES_PER_GB, FeatureMemory, Inputs, stack_features

PUBLISHED_ITERATIONS = 12_500
REFERENCE_BATCH = 256
AREA_RANGE, RATIO_RANGE = (0.08, 1.0), (3 / 4, 4 / 3)
"""Share of the picture's area that a random crop has, and its width over its height."""

Candidate = tuple[int, bool, float]
"""Number of last blocks whose class tokens are read, whether the mean patch token is, and the learning rate."""


@dataclass(frozen=True)
class ClassificationConfig:
    """Values of the classification probe; those of the paper are `PAPER_CLASSIFICATION`."""

    num_iterations: int | None = None
    """Training iterations; None: 12,500 as published, or 60 epochs (at least 800 iterations) if that is less."""
    batch_size: int = 128
    """Images per iteration over all devices (the paper: one GPU)."""
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
    """DINOv2's range. Each trains layers of its own; rates are for batches of 256 and scale with the batch."""
    class_token_blocks: tuple[int, ...] = (1, 4)
    """Numbers of last blocks whose class tokens are read, each with and without the mean patch token (DINOv2's); of
    backbones without class token the mean patch token is read."""
    resize_side: int = 256
    """Shorter side of test images before the crop, pixels."""
    crop_side: int = 224
    """Side of the square that is seen, pixels."""
    weight_decay: float = 0.0


PAPER_CLASSIFICATION = ClassificationConfig(num_iterations=PUBLISHED_ITERATIONS)
"""The paper's iterations with DINOv2's values."""


class PooledBackbones(FrozenBackbones):
    """The same backbones, whose maps are averaged to one token: a hundredth of the memory."""

    def __call__(self, images: Float[Tensor, "batch 3 height width"]) -> FrozenFeatures:
        features = super().__call__(images)
        return FrozenFeatures(features.maps.mean(dim=(3, 4), keepdim=True), features.class_tokens)


class ClassificationHeads(nn.Module):
    """One linear layer per candidate."""

    def __init__(self, assembler: Assembler, num_classes: int, candidates: Sequence[Candidate]) -> None:
        super().__init__()
        self.assembler, self.candidates = assembler, candidates
        dims = [assembler.out_dim * (blocks + has_mean) for blocks, has_mean, _ in candidates]
        self.layers = nn.ModuleList(nn.Linear(dim, num_classes) for dim in dims)
        for layer in self.layers:
            initialise(layer)

    def list_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters with the rate of each; the fusion layer takes the middle one."""
        every = [rate for *_, rate in self.candidates]
        rates = [(list(layer.parameters()), rate) for layer, rate in zip(self.layers, every, strict=True)]
        fusion = list(self.assembler.parameters())
        middle = sorted(every)[len(every) // 2]
        return [*rates, (fusion, middle)] if fusion else rates

    def forward(self, features: FrozenFeatures) -> Float[Tensor, "batch candidates classes"]:
        deepest = max(number for number, *_ in self.candidates)
        tokens = [self.assembler.assemble(features.class_tokens[:, :, block]) for block in range(-deepest, 0)]
        # (b, c, 1, 1) -> (b, c)
        tokens.append(self.assembler(features)[:, :, 0, 0])
        slices = [slice(deepest - number, deepest + has_mean) for number, has_mean, _ in self.candidates]
        pairs = zip(self.layers, slices, strict=True)
        return torch.stack([layer(torch.cat(tokens[part], dim=1)) for layer, part in pairs], dim=1)


@dataclass(frozen=True)
class ClassificationInputs(Inputs):
    """Makes square pictures of `crop_side`; fixed ones are central crops of images resized to a short `resize_side`."""

    resize_side: int
    crop_side: int

    def choose_key(self, frame: LabelledFrame, generator: np.random.Generator) -> PictureKey:
        return PictureKey(frame.key, bool(generator.integers(2)))

    def load(self, frame: LabelledFrame, key: PictureKey) -> Picture:
        """The central crop of the resized image."""
        image = frame.load_image().numpy()
        height, width = compute_size(image.shape[0], image.shape[1], self.resize_side)
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        side = min(self.crop_side, height, width)
        window = Window((height - side) // 2, (width - side) // 2, side, side)
        return _create_picture(resized[window.slices], key.is_flipped, frame)

    def augment(self, frame: LabelledFrame, generator: np.random.Generator) -> Picture:
        """A random part of the picture at the size that is seen, every other one mirrored."""
        image = frame.load_image().numpy()
        window = draw_resized_window(image.shape[0], image.shape[1], generator)
        interpolation = cv2.INTER_AREA if window.height > self.crop_side else cv2.INTER_CUBIC
        crop = cv2.resize(image[window.slices], (self.crop_side, self.crop_side), interpolation=interpolation)
        return _create_picture(crop, bool(generator.integers(2)), frame)


class ClassificationProbe(HeadProbe[ClassificationConfig]):
    """Class of each picture."""

    task = labels = "classification"
    published_iterations = PUBLISHED_ITERATIONS

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        backbones, num_frames = self.backbones, len(self.sets.train.frames)
        layers = list(range(backbones.description.num_blocks))[-max(self.config.class_token_blocks) :]
        numbers = {min(number, len(layers)) for number in self.config.class_token_blocks}
        settings = [*product(sorted(numbers), (False, True))] if backbones.has_class_token else [(0, True)]
        self.candidates = [(*setting, rate) for setting in settings for rate in self.config.learning_rates]
        self.backbones = PooledBackbones(backbones.extractors, layers, backbones.patch_fit)
        self.memory = FeatureMemory(self.backbones, self.run.cache_gb)
        self.inputs: ClassificationInputs = ClassificationInputs(self.config.resize_side, self.config.crop_side)
        tokens = 2 * len(layers) * len(backbones.extractors)
        needed_gb = 2 * 2 * num_frames * tokens * backbones.embed_dim / BYTES_PER_GB
        self.is_cached = resolve_cache(self.run, needed_gb, "central crops and their mirror images")

    def run_seed(self, seed: int) -> TrainedHead:
        self.seed_head(seed)
        source: ClassTokenSource = "auto" if self.backbones.has_class_token else "none"
        assembler = Assembler(self.assembly, self.backbones.embed_dim, source)
        heads = ClassificationHeads(assembler, self.sets.train.num_classes, self.candidates)
        trained = self.train(seed, heads, self.create_optimization())
        # Without selection data the layer is chosen by what was learned.
        top1, _, losses = self.evaluate(heads, self.sets.selection or self.sets.train)
        # Of equals, which small sets have many, that with the lowest loss.
        chosen = max(range(len(top1)), key=lambda index: (top1[index], -losses[index]))
        accuracy, accuracy_top5, _ = self.evaluate(heads, self.sets.test)
        trained.metrics = {"accuracy": accuracy[chosen], "accuracy_top5": accuracy_top5[chosen]}
        blocks, has_mean, rate = self.candidates[chosen]
        trained.metrics |= {"learning_rate": rate, "num_images": len(self.sets.test.frames)}
        trained.choices = {"class_token_blocks": blocks, "has_mean_token": has_mean, "learning_rate": rate}
        return trained

    def create_optimization(self) -> OptimizationConfig:
        config, schedule = self.config, Schedule("cosine", self.num_iterations)
        rate = config.batch_size / REFERENCE_BATCH
        return OptimizationConfig(schedule, config.batch_size, rate, config.weight_decay, optimizer="sgd")

    def compute_loss(self, predictions: Tensor, targets: Tensor, iteration: int) -> LossSum:
        """Sum over layers, which share nothing, so that each is trained as if alone."""
        classes = targets.repeat_interleave(predictions.shape[1])
        total = F.cross_entropy(predictions.flatten(0, 1), classes, reduction="sum")
        return LossSum(total, total.new_tensor(float(len(targets))))

    def compute_score(self, head: nn.Module, labelled_set: LabelledSet) -> float:
        return max(self.evaluate(head, labelled_set)[0])

    @torch.no_grad()
    def evaluate(self, heads: nn.Module, labelled_set: LabelledSet) -> list[list[float]]:
        """Three rows with a value per candidate: share of images whose class is the first guess, share where it is
        among the first five, mean loss; every process takes its share of the images."""
        counts = torch.zeros(3, len(self.candidates), dtype=torch.float64)
        share = self.share(labelled_set)
        for start in range(0, len(share), self.config.batch_size):
            frames = share[start : start + self.config.batch_size]
            keys = [PictureKey(frame.key) for frame in frames]
            features, classes = stack_features(self.memory.fetch(keys, frames, self.inputs))
            logits = heads(features.to(self.accelerator.device)).float().cpu()
            ranks = logits.argsort(dim=-1, descending=True)[..., :5] == classes[:, None, None]
            counts[0] += ranks[..., 0].double().sum(dim=0)
            counts[1] += ranks.any(dim=-1).double().sum(dim=0)
            chances = logits.double().log_softmax(dim=-1)
            counts[2] -= chances.gather(-1, classes[:, None, None].expand(-1, logits.shape[1], 1))[..., 0].sum(dim=0)
        return (sum_over_processes(counts, self.accelerator) / len(labelled_set.frames)).tolist()


def draw_resized_window(height: int, width: int, generator: np.random.Generator, num_tries: int = 10) -> Window:
    """A random window as torchvision's `RandomResizedCrop` draws it; DINOv2's evaluation takes its ranges as they are.

    The area is drawn evenly, the ratio evenly in its logarithm. Windows larger than the picture are drawn again
    `num_tries` times; after that it is the largest window in the middle whose ratio is allowed, whatever its area.
    """
    for _ in range(num_tries):
        area = height * width * generator.uniform(*AREA_RANGE)
        ratio = float(np.exp(generator.uniform(*np.log(RATIO_RANGE))))
        rows, columns = round(float(np.sqrt(area / ratio))), round(float(np.sqrt(area * ratio)))
        if 0 < rows <= height and 0 < columns <= width:
            return draw_window(height, width, (rows, columns), generator)
    rows = min(height, round(width / RATIO_RANGE[0]))
    columns = min(width, round(height * RATIO_RANGE[1]))
    return Window((height - rows) // 2, (width - columns) // 2, rows, columns)


def _create_picture(image: np.ndarray, is_flipped: bool, frame: LabelledFrame) -> Picture:
    return Picture(to_image(image[:, ::-1] if is_flipped else image), torch.tensor(frame.class_index))
