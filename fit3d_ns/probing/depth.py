"""The monocular depth probe (paper section 3.3, Table 12): one head per seed on pre-norm features of whole images.

Losses: g = log(prediction + eps) - log(target + eps) over pixels with valid depth. The scale-invariant loss is
sqrt(var(g) + 0.15 mean(g)^2), var with n - 1 in the denominator; during its warm-up only the mean's term is used. The
public gradient loss slices the batch instead of the image and is zero for two images a device; the one here has the
same formula along the image's axes: on every first, second, fourth and sixth pixel, |g(x) - g(x + 2)| summed over both
axes, over the number of valid pixels; scales added. Both are taken over groups of images (two, as the public code has
two per device), so that their values do not depend on how many devices share a batch, and come as the sum over groups
with the number of groups that had valid pixels.

Metrics, p prediction, d target, in metres, over pixels with min < d < max: rmse = sqrt(mean (p - d)^2),
abs_rel = mean |p - d| / d, sq_rel = mean (p - d)^2 / d, log10 = mean |log10 p - log10 d|,
silog = 100 sqrt(var(log p - log d)) with n in the denominator, d1 d2 d3 = share of pixels with max(p / d, d / p) below
1.25, 1.25^2, 1.25^3; as means of per-image values (published) and over all pixels together.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fit3d_ns.data.images import save_depth
from fit3d_ns.probing.datasets.frames import EvaluationWindow, LabelledFrame, LabelledSet, warn_about_depth_unit
from fit3d_ns.probing.frozen_features import Assembler, ClassTokenSource
from fit3d_ns.probing.head_probe import MapProbe, PublishedTraining, resolve_cache, resolve_learning_rate
from fit3d_ns.probing.head_trainer import LossSum, OptimizationConfig, Schedule, TrainedHead, sum_over_processes
from fit3d_ns.probing.heads import UPSAMPLING, DepthBins, DPTHead, LinearDepthHead
from fit3d_ns.probing.inputs import DEPTHS_PER_TOKEN, EVALUATION, DepthInputs, choose_crop_size
from fit3d_ns.probing.pictures import PictureKey, resize_map
from fit3d_ns.probing.samples import estimate_memory
from fit3d_ns.utils.progress import notice

DepthMaps = Float[Tensor, "batch height width"]
Masks = Bool[Tensor, "batch height width"]
PUBLISHED = PublishedTraining(num_iterations=38_400, learning_rate=1e-4, width=1152)
ClassTokenChoice = Literal["auto", "original", "finetuned", "none", "validated"]
"""Whose class token is put next to the patch tokens, see `ClassTokenSource`; or `validated`: a head with (`auto`) and
one without (`none`) are trained, and the one that is better on the validation part of the training data is kept."""
LARGEST_DPT_RATE = 5e-4
"""probe3d's rate for its DPT heads, whose convolutions do not bear a linear layer's rates."""
EPSILON = 1e-3
"""Metres; keeps the logarithm finite."""
MEAN_WEIGHT = 0.15
METRIC_NAMES = ("rmse", "abs_rel", "sq_rel", "log10", "silog", "d1", "d2", "d3")
"""Names of the depth metrics."""
GRADIENT_STRIDES, GRADIENT_STEP = (1, 2, 4, 6), 2
"""For each of these n the gradient loss reads every n-th pixel; it compares those that lie the step apart."""


@dataclass(frozen=True)
class DepthConfig:
    """Values of the depth probe; those of the public code are `PAPER_DEPTH`."""

    head: Literal["linear", "dpt"] = "linear"
    """`dpt` is Table 12's head; it reads four layers."""
    short_side: int | None = None
    """Images are resized to this shorter side, pixels; None keeps their own size (published)."""
    crop_size: tuple[int, int] | None = None
    """Height and width of random crops; None: 352x704 for KITTI, 416x544 elsewhere, cut down to smaller images."""
    num_iterations: int | None = None
    """Training iterations; None: 38,400 as published, or 60 epochs (at least 800 iterations) if that is less."""
    batch_size: int = 16
    """Images per iteration over all devices (published: 8 GPUs of 2)."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; None: `resolve_learning_rate` of 1e-4 at a width of 1152; at most 5e-4 for `dpt`."""
    weight_decay: float = 0.01
    warmup_share: float = 1 / 3
    """Share of the iterations with a linear warm-up (12,800 of 38,400)."""
    loss_warmup_iterations: int = 100
    """Iterations in which the loss is that of the mean alone."""
    gradient_loss_weight: float = 0.0
    """Weight of the loss of neighbouring pixels. The public code has 0.5, which an indexing slip keeps at zero."""
    images_per_group: int = 2
    """Images that share one value of the scale-invariant loss (2 per device in the public code)."""
    class_token: ClassTokenChoice = "auto"
    """Published: the original's, which `auto` takes."""
    num_bins: int = 256
    """Paper section 3.3."""
    is_flip_averaged: bool = True
    """Predictions of an image and its mirror image are averaged."""
    is_published: bool = False
    """The public code's two habits: its head begins with torch's own weights, uniform within 1/sqrt(inputs), instead of
    small ones, and its loss counts every depth above 0 instead of those up to the largest."""
    is_normed: bool = False
    """Whether tokens are read behind the backbone's final norm, and batch-normalised before the linear layer."""


PAPER_DEPTH = DepthConfig(
    num_iterations=PUBLISHED.num_iterations, learning_rate=PUBLISHED.learning_rate, is_published=True
)
"""The public code's values. Its gradient term is zero at two images per device, so it is left out."""


DINOV3_DEPTH = DepthConfig(
    num_iterations=PUBLISHED.num_iterations, learning_rate=3e-4, weight_decay=1e-4, class_token="none", is_normed=True
)
"""DINOv3's values."""


class DepthProbe(MapProbe[DepthConfig]):
    """Depth of each pixel."""

    task = labels = "depth"
    has_norm = False
    published_iterations = PUBLISHED.num_iterations

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config, train = self.config, self.sets.train
        crop_size = config.crop_size or choose_crop_size(train, config.short_side)
        self.inputs: DepthInputs = DepthInputs(self.backbones, train.depth, config.short_side, crop_size)
        self.learning_rates = self._choose_learning_rates()
        needed_gb = estimate_memory(self.backbones, *self.inputs.compute_size(train.frames[0]), 2 * len(train.frames))
        self.is_cached = resolve_cache(self.run, needed_gb, "whole images and their mirror images")
        for labelled_set in (train, self.sets.test):
            warn_about_depth_unit(labelled_set)

    def describe(self) -> dict[str, Any]:
        rates = self.learning_rates
        rate = next(iter(rates.values())) if len(rates) == 1 else dict(rates)
        return {**super().describe(), "learning_rate": rate, "crop_size": list(self.inputs.crop_size)}

    def run_seed(self, seed: int) -> TrainedHead:
        candidates: dict[ClassTokenSource, TrainedHead] = {}
        for source in self.learning_rates:
            # Each candidate starts as it would alone, so that `validated` keeps exactly what that setting gives.
            self.seed_head(seed)
            note = f", {source}" if len(self.learning_rates) > 1 else ""
            candidates[source] = self.train(seed, self.create_head(source), self.create_optimization(source), note)
        chosen, trained = next(iter(candidates.items()))
        if self.config.class_token == "validated":
            scores = {source: max(candidate.scores.values()) for source, candidate in candidates.items()}
            chosen = max(scores, key=lambda source: scores[source])
            trained = candidates[chosen]
            trained.choices = {"class_token": chosen, "class_token_scores": dict(scores)}
            errors = ", ".join(f"{source} {-score:.4f}" for source, score in scores.items())
            notice(f"Class token of seed {seed}: {chosen} is kept, by AbsRel on the validation part: {errors}.")
        trained.metrics = self.evaluate(trained.head, self.sets.test)
        return trained

    def create_head(self, source: ClassTokenSource) -> nn.Module:
        """A new head that reads a class token, from torch's global generator."""
        config, convention = self.config, self.sets.train.depth
        assembler = Assembler(self.assembly, self.backbones.embed_dim, source)
        bins = DepthBins(convention.min_depth, convention.max_depth, config.num_bins)
        if config.head == "dpt":
            return DPTHead(assembler, bins)
        # Where features are kept, so are the targets, at fewer places: the same map is read there and nowhere else.
        upsampling = DEPTHS_PER_TOKEN if self.is_cached else UPSAMPLING
        head = LinearDepthHead(assembler, bins, upsampling, config.is_normed)
        if config.is_published:
            head.initialise_as_published()
        return head

    def create_optimization(self, source: ClassTokenSource) -> OptimizationConfig:
        warmup = round(self.config.warmup_share * self.num_iterations)
        schedule = Schedule("cosine", self.num_iterations, warmup, warmup_ratio=1e-3, min_ratio=1e-8)
        values = self.config.batch_size, self.learning_rates[source], self.config.weight_decay
        rest: dict[str, Any] = {"max_gradient_norm": 35.0, "images_per_group": self.config.images_per_group}
        return OptimizationConfig(schedule, *values, has_one_cycle_momentum=True, **rest)

    def compute_loss(self, predictions: Tensor, targets: Float[Tensor, "batch h w"], iteration: int) -> LossSum:
        """Scale-invariant loss, with that of neighbouring pixels if it has a weight."""
        convention, group = self.sets.train.depth, self.config.images_per_group
        restored = resize_map(predictions[:, None], (targets.shape[1], targets.shape[2]))[:, 0].float()
        valid = (targets > convention.min_depth) & (targets < convention.max_depth)
        if self.config.is_published:
            valid = targets > 0.0
        is_warming_up = iteration < self.config.loss_warmup_iterations
        loss = compute_sig_loss(restored, targets, valid, images_per_group=group, is_warming_up=is_warming_up)
        if self.config.gradient_loss_weight == 0.0:
            return loss
        gradient = compute_gradient_loss(restored, targets, valid, images_per_group=group)
        return LossSum(loss.total + self.config.gradient_loss_weight * gradient.total, loss.count)

    def compute_score(self, head: nn.Module, labelled_set: LabelledSet) -> float:
        return -self.evaluate(head, labelled_set)["abs_rel"]

    @torch.no_grad()
    def evaluate(self, head: nn.Module, labelled_set: LabelledSet) -> dict[str, Any]:
        convention = labelled_set.depth
        metrics = DepthMetrics(convention.min_depth, convention.max_depth, convention.evaluation_window)
        for frame in self.share(labelled_set):
            depth = self.inputs.load_depth(frame)
            metrics.update(self.predict(head, frame, (depth.shape[0], depth.shape[1])).cpu(), depth)
        metrics.sums = sum_over_processes(metrics.sums, self.accelerator)
        metrics.per_image = sum_over_processes(metrics.per_image, self.accelerator)
        return metrics.compute()

    @torch.no_grad()
    def predict(self, head: nn.Module, frame: LabelledFrame, size: tuple[int, int]) -> Float[Tensor, "height width"]:
        """Depth of each pixel of a frame at a size (height, width), in metres."""
        flips = (False, True) if self.config.is_flip_averaged else (False,)
        keys = [PictureKey(frame.key, is_flipped, EVALUATION) for is_flipped in flips]
        kept = self.memory.fetch(keys, [frame] * len(keys), self.inputs)
        convention = self.sets.train.depth
        fit = self.backbones.create_fit(*self.inputs.compute_size(frame))
        maps = []
        for key, (features, _) in zip(keys, kept, strict=True):
            depth = head(features.to(self.accelerator.device)).float()
            restored = fit.restore(depth[:, None])[0, 0].clamp(convention.min_depth, convention.max_depth)
            maps.append(restored.flip(-1) if key.is_flipped else restored)
        return resize_map(torch.stack(maps).mean(dim=0)[None, None], size)[0, 0]

    def save_prediction(self, head: nn.Module, frame: LabelledFrame, prefix: Path, units: float) -> Tensor:
        depth = self.inputs.load_depth(frame)
        predicted = self.predict(head, frame, (depth.shape[0], depth.shape[1]))
        save_depth(depth, Path(f"{prefix}_truth.png"), units)
        save_depth(predicted.cpu(), Path(f"{prefix}_prediction.png"), units)
        return torch.from_numpy(self.inputs.load_image(frame).copy())

    def _choose_learning_rates(self) -> dict[ClassTokenSource, float]:
        """By the class tokens with which heads are trained."""
        choice = self.config.class_token
        if choice == "validated" and self.run.selection != "validation":
            raise ValueError(
                "Whether the class token helps is validated on a part of the training data, never on the test data; "
                f"with --selection {self.run.selection} name it with --class-token, or use --selection validation."
            )
        sources: tuple[ClassTokenSource, ...] = ("auto", "none") if choice == "validated" else (choice,)
        rates: dict[ClassTokenSource, float] = {}
        for source in sources if self.backbones.has_class_token else ("none",):
            assembler = Assembler(self.assembly, self.backbones.embed_dim, source)
            rate = resolve_learning_rate(PUBLISHED, self.num_iterations, assembler.width + assembler.class_dim)
            rate = min(rate, LARGEST_DPT_RATE) if self.config.head == "dpt" else rate
            rates[source] = self.config.learning_rate or rate
        return rates


def compute_sig_loss(
    predictions: DepthMaps, targets: DepthMaps, valid: Masks, *, images_per_group: int, is_warming_up: bool
) -> LossSum:
    """Scale-invariant loss in log depth, summed over groups of images."""
    total, count = predictions.sum() * 0.0, 0
    groups = (values.split(images_per_group) for values in (predictions, targets, valid))
    for predicted, target, mask in zip(*groups, strict=True):
        if int(mask.sum()) < 2:
            continue
        logs = torch.log(predicted[mask] + EPSILON) - torch.log(target[mask] + EPSILON)
        squared_mean = MEAN_WEIGHT * logs.mean().square()
        inside = squared_mean if is_warming_up else logs.var() + squared_mean
        # At a perfect fit the root has no gradient; the floor keeps it finite.
        total = total + inside.clamp_min(1e-12).sqrt()
        count += 1
    return LossSum(total, predictions.new_tensor(float(count)))


def compute_gradient_loss(
    predictions: DepthMaps, targets: DepthMaps, valid: Masks, *, images_per_group: int
) -> LossSum:
    """Absolute differences of g between pixels two steps apart, along both image axes, summed over scales."""
    total, count = predictions.sum() * 0.0, 0
    logs = torch.where(valid, torch.log(predictions + EPSILON) - torch.log(targets.clamp_min(0.0) + EPSILON), 0.0)
    for group, is_valid in zip(logs.split(images_per_group), valid.split(images_per_group), strict=True):
        if not is_valid.any():
            continue
        for stride in GRADIENT_STRIDES:
            coarse, mask = group[:, ::stride, ::stride], is_valid[:, ::stride, ::stride]
            differences = predictions.new_zeros(())
            for values, known in ((coarse, mask), (coarse.mT, mask.mT)):
                both = known[:, GRADIENT_STEP:] & known[:, :-GRADIENT_STEP]
                steps = values[:, GRADIENT_STEP:] - values[:, :-GRADIENT_STEP]
                differences = differences + torch.where(both, steps.abs(), 0.0).sum()
            total = total + differences / mask.sum().clamp_min(1)
        count += 1
    return LossSum(total, predictions.new_tensor(float(count)))


class DepthMetrics:
    """Adds up images: `sums` over all pixels, the pixel count last, and `per_image` values, the image count last.

    Targets outside the range (metres) or the window do not count; predictions are clamped to the range.
    """

    def __init__(self, min_depth: float = 0.001, max_depth: float = 10.0, window: EvaluationWindow = "none") -> None:
        self.min_depth, self.max_depth, self.window = min_depth, max_depth, window
        self.sums = torch.zeros(10, dtype=torch.float64)
        self.per_image = torch.zeros(len(METRIC_NAMES) + 1, dtype=torch.float64)

    def update(self, prediction: Float[Tensor, "height width"], target: Float[Tensor, "height width"]) -> None:
        """Adds one image; one without valid pixels does not count (nanmean)."""
        valid = (target > self.min_depth) & (target < self.max_depth) & create_window(self.window, *target.shape)
        if not valid.any():
            return
        sums = _sum_errors(prediction[valid].double().clamp(self.min_depth, self.max_depth), target[valid].double())
        self.sums += sums
        self.per_image += torch.cat([_finish(sums), torch.ones(1, dtype=torch.float64)])

    def compute(self) -> dict[str, Any]:
        """Means of per-image values under their names, over all pixels below `pooled`; ValueError without any."""
        if self.per_image[-1] == 0:
            problem = f"No test pixel has depth between {self.min_depth} and {self.max_depth} m"
            raise ValueError(f"{problem}; check unit and --max-depth.")
        means = dict(zip(METRIC_NAMES, (self.per_image[:-1] / self.per_image[-1]).tolist(), strict=True))
        pooled = dict(zip(METRIC_NAMES, _finish(self.sums).tolist(), strict=True))
        return {**means, "pooled": pooled, "num_images": int(self.per_image[-1])}


def create_window(window: EvaluationWindow, height: int, width: int) -> Bool[Tensor, "height width"]:
    """True inside the part that counts; Eigen's window is given for 480x640 and scales with the size, as Garg's."""
    if window == "none":
        return torch.ones(height, width, dtype=torch.bool)
    inside = torch.zeros(height, width, dtype=torch.bool)
    eigen, garg = (45 / 480, 471 / 480, 41 / 640, 601 / 640), (0.40810811, 0.99189189, 0.03594771, 0.96405229)
    top, bottom, left, right = eigen if window == "eigen" else garg
    # The tolerance keeps 45 / 480 * 480 from becoming 44.
    rows = slice(int(top * height + 1e-6), int(bottom * height + 1e-6))
    inside[rows, int(left * width + 1e-6) : int(right * width + 1e-6)] = True
    return inside


def _sum_errors(prediction: Float[Tensor, " pixels"], target: Float[Tensor, " pixels"]) -> Float[Tensor, " sums"]:
    difference = prediction - target
    logs = prediction.log() - target.log()
    ratio = torch.maximum(prediction / target, target / prediction)
    return torch.stack(
        [
            difference.square().sum(),
            (difference.abs() / target).sum(),
            (difference.square() / target).sum(),
            (prediction.log10() - target.log10()).abs().sum(),
            logs.sum(),
            logs.square().sum(),
            *((ratio < 1.25**power).double().sum() for power in (1, 2, 3)),
            torch.tensor(float(len(target)), dtype=torch.float64, device=target.device),
        ]
    ).cpu()


def _finish(sums: Float[Tensor, " sums"]) -> Float[Tensor, " metrics"]:
    """From sums over pixels to the metrics, in the order of `METRIC_NAMES`."""
    squared, abs_rel, sq_rel, log10, log, log_squared, d1, d2, d3 = (sums[:-1] / sums[-1]).unbind()
    silog = 100.0 * (log_squared - log.square()).clamp_min(0.0).sqrt()
    return torch.stack([squared.sqrt(), abs_rel, sq_rel, log10, silog, d1, d2, d3])
