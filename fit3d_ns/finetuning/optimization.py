"""What is trained (paper: all), and how it moves: AdamW, learning rate, moving average, and the anchors' strengths."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.features import TokenModel
from fit3d_ns.features.adapters import add_adapter, add_lora
from fit3d_ns.finetuning.targets import NUM_CHANNELS
from fit3d_ns.training.processes import Precision
from fit3d_ns.utils.limits import Limited, Limits


@dataclass(frozen=True)
class TrainableConfig(Limited):
    """What is trained."""

    train: Literal["all", "last-blocks", "lora", "adapter"] = "all"
    """What is trained: `all` (paper), `last-blocks`, `lora` (matrices next to the attention's projections, merged when
    saved; needs the extra `lora`), or `adapter` (one Swin block behind the frozen backbone; paper, Table 6)."""
    num_blocks: Annotated[int, Limits(at_least=1)] = 4
    """With `--train last-blocks`: number of last blocks that are trained, and the final norm with them; 1 to the
    backbone's number of blocks."""
    lora_rank: Annotated[int, Limits(at_least=1)] = 8
    """With `--train lora`: rank of the matrices, 1 and above."""
    lora_alpha: Annotated[float, Limits(above=0)] = 8.0
    """With `--train lora`: the matrices' product is multiplied by this over the rank; above 0."""
    adapter_window: Annotated[int, Limits(at_least=1)] = 7
    """With `--train adapter`: side of the Swin block's windows in tokens, 1 and above."""


HEAD_RATE = 20.0
"""Times the backbone's learning rate: the geometry head begins at zero and has few steps to follow."""
AFTER_FIRST_EPOCH = 0.1
"""What the public code multiplies the learning rate by: `MultiStepLR(optimizer, [1])`, stepped once an epoch."""


@dataclass(frozen=True)
class OptimizationConfig(Limited):
    """How long and how fast to train."""

    learning_rate: Annotated[float, Limits(above=0)] = 1e-5
    """Step size of AdamW, above 0 (public code: 1e-5)."""
    weight_decay: Annotated[float, Limits(at_least=0)] = 1e-4
    """Decoupled weight decay on all trained parameters, 0 and above (public code: 1e-4)."""
    clip_norm: Annotated[float, Limits(above=0)] = 0.1
    """Gradients are scaled down to this norm, above 0 (public code: 0.1)."""
    batch_size: Annotated[int, Limits(at_least=1)] = 2
    """Images per process and batch, 1 and above (public code: 2)."""
    accumulation_steps: Annotated[int, Limits(at_least=1)] = 1
    """Batches per optimizer step, 1 and above."""
    epochs: Annotated[float | None, Limits(above=0)] = None
    """Passes over all images, above 0 (public code: 1); by default one, or as many as make `min_steps`."""
    min_steps: Annotated[int, Limits(at_least=1)] = 400
    """Without `epochs` and `max_steps`, few images are shown repeatedly for at least this many optimizer steps."""
    max_steps: Annotated[int | None, Limits(at_least=1)] = None
    """Exact number of optimizer steps, 1 and above; wins over `epochs`."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Learning rate after the warm-up: constant, falling to 0 like half a cosine, or (`step`) a tenth after the first
    epoch, as in the public code, where only more than one epoch shows it (Table 8)."""
    warmup_fraction: Annotated[float, Limits(at_least=0, below=1)] = 0.0
    """Share of all steps in which the learning rate rises linearly from 0; 0 to below 1."""
    ema_decay: Annotated[float, Limits(at_least=0, below=1)] = 0.0
    """Above 0, the result is the moving average of weights with this decay per step; below 1."""
    precision: Precision = "fp32"
    """Arithmetic of the backbone; targets, loss and weights are always float32. fp16 needs CUDA."""
    tf32: bool = True
    """On CUDA, float32 products take TF32 (10 bits of mantissa): several times as fast; the public code does not."""
    compile: bool = False
    """Compile the backbone with torch.compile."""

    def count_steps(self, num_images: int, num_processes: int) -> int:
        """Optimizer steps of a whole run; the last images that fill no step are left out (public code: drop_last).

        Epochs that have fewer images than one step raise ValueError.
        """
        if self.max_steps is not None:
            return self.max_steps
        per_step = self.batch_size * self.accumulation_steps * num_processes
        if self.epochs is None:
            return max(num_images // per_step, self.min_steps)
        steps = int(self.epochs * num_images) // per_step
        if steps < 1:
            problem = f"{self.epochs:g} epochs of {num_images} images make no step of {per_step} images"
            raise ValueError(f"{problem}; raise --epochs, or lower --batch-size or --accumulation-steps.")
        return steps

    def compute_learning_rate(self, step: int, num_steps: int, steps_per_epoch: int | None = None) -> float:
        """Learning rate of step `step`, counted from 0."""
        warmup = math.ceil(self.warmup_fraction * num_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "step":
            is_first = steps_per_epoch is None or step < steps_per_epoch
            return self.learning_rate if is_first else AFTER_FIRST_EPOCH * self.learning_rate
        progress = (step - warmup) / max(num_steps - warmup, 1)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class AnchorConfig(Limited):
    """Strengths relative to the feature loss; 0 switches a term off."""

    l2_sp: Annotated[float, Limits(at_least=0)] = 0.0
    """L2-SP: adds half this times the squared distance of the trained weights from their start; 0 (off) and above."""
    feature_anchor: Annotated[float, Limits(at_least=0)] = 0.0
    """Feature anchor: weight of the L1 between patch tokens and the original's of the same image; 0 (off) and above."""
    prefix_anchor: Annotated[float, Limits(at_least=0)] = 0.0
    """Prefix anchor: weight of the L1 between class token and registers and the original's; 0 (off) and above."""
    pre_norm: Annotated[float, Limits(at_least=0)] = 0.0
    """Weight of the L1 of patch tokens to the target before the final norm, where depth is read; 0 (off) and above."""
    photographs: tuple[Path, ...] = ()
    """Folders of photographs of anything else, such as streets beside rooms, whose original tokens are to be kept."""
    photograph_share: Annotated[float, Limits(above=0, below=1)] = 0.1
    """With `--photographs`: their share of the images of all steps, above 0 and below 1."""
    wise_ft: Annotated[tuple[float, ...], Limits(at_least=0, at_most=1)] = ()
    """WiSE-FT: also saves mixtures of original and fine-tuned weights, in a folder `wise-ft-SHARE` for each of these
    shares of the fine-tuned ones; each 0 to 1, none by default."""

    @property
    def needs_original(self) -> bool:
        """True if the original backbone has to run next to the trained one."""
        return self.holds_tokens or bool(self.photographs)

    @property
    def holds_tokens(self) -> bool:
        """True if it has to on the scenes' images."""
        return max(self.feature_anchor, self.prefix_anchor, self.pre_norm) > 0


class TokenOutputs(NamedTuple):
    """Tokens of images of one size; a plain tuple, so that wrappers can convert it.

    The first of each kind are after the final norm if the backbone's description says so, as scenes were lifted.
    """

    patch_tokens: Float[Tensor, "batch patches embed"]
    unnormed_patch_tokens: Float[Tensor, "batch patches embed"]
    prefix_tokens: Float[Tensor, "batch prefix embed"]
    unnormed_prefix_tokens: Float[Tensor, "batch prefix embed"]
    geometry: Float[Tensor, "batch patches 4"] | None = None
    """What the geometry head reads from the patch tokens, if there is one."""


class TokenModule(nn.Module):
    """What accelerate wraps: a backbone with its preprocessing, and maybe a geometry head, for images of several sizes.

    Everything the losses need comes out of the one `forward`, because calling another method of a wrapped module skips
    the synchronisation of gradients in silence.
    """

    def __init__(self, token_model: TokenModel, has_geometry_head: bool = False) -> None:
        super().__init__()
        self.token_model = token_model
        self.geometry_head: nn.Linear | None = None
        if has_geometry_head:
            device = next(token_model.parameters()).device
            # As everywhere, without a draw from the global generator.
            sizes = token_model.description.embed_dim, NUM_CHANNELS
            self.geometry_head = nn.utils.skip_init(nn.Linear, *sizes, device=device)
            nn.init.zeros_(self.geometry_head.weight)
            nn.init.zeros_(self.geometry_head.bias)

    def forward(self, groups: Sequence[Float[Tensor, "_ 3 _ _"]]) -> list[TokenOutputs]:
        """Tokens of each group of images; images of one group have one size, in [0, 1]."""
        outputs = [compute_outputs(self.token_model, images) for images in groups]
        head = self.geometry_head
        return outputs if head is None else [one._replace(geometry=head(one.patch_tokens)) for one in outputs]


def compute_outputs(token_model: TokenModel, images: Float[Tensor, "batch 3 height width"]) -> TokenOutputs:
    """All tokens of the last block that any loss reads."""
    description = token_model.description
    (unnormed,) = token_model.forward_unnormed(images, [description.num_blocks - 1])
    tokens = token_model.apply_norm(unnormed) if description.norm else unnormed
    return TokenOutputs(tokens.patch_tokens, unnormed.patch_tokens, tokens.prefix_tokens, unnormed.prefix_tokens)


def copy_original(token_model: TokenModel) -> TokenModel:
    """A frozen copy of a backbone, taken before it is trained."""
    return copy.deepcopy(token_model).eval().requires_grad_(False)


def select_trainable(token_model: TokenModel, config: TrainableConfig) -> TokenModel:
    """The model with everything else frozen; LoRA and the adapter are put in.

    Parameters that were frozen before stay so. ValueError where there are fewer blocks, or peft is not installed.
    """
    if config.train == "all":
        return token_model
    if config.train == "last-blocks":
        blocks = token_model.model.blocks
        if config.num_blocks > len(blocks):
            raise ValueError(f"--num-blocks {config.num_blocks}: {token_model.description.label} has {len(blocks)}.")
        kept = {id(parameter) for block in blocks[-config.num_blocks :] for parameter in block.parameters()}
        if token_model.description.norm:
            kept |= {id(parameter) for parameter in token_model.model.norm.parameters()}
        for parameter in token_model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)
        return token_model
    if config.train == "lora":
        return add_lora(token_model, config.lora_rank, config.lora_alpha)
    return add_adapter(token_model, config.adapter_window)


def freeze_unreachable(module: TokenModule, anchors: AnchorConfig) -> list[str]:
    """Freezes the parameters that the loss cannot reach, by one backward pass on a small image; returns their names."""
    parameter = next(module.parameters())
    side = 2 * module.token_model.description.patch_size
    image = torch.linspace(0.0, 1.0, 3 * side * side, device=parameter.device).reshape(1, 3, side, side)
    with torch.enable_grad():
        (outputs,) = module([image])
        total = outputs.patch_tokens.sum()
        if outputs.geometry is not None:
            total = total + outputs.geometry.sum()
        if anchors.prefix_anchor > 0:
            total = total + outputs.prefix_tokens.sum() + outputs.unnormed_prefix_tokens.sum()
        if anchors.pre_norm > 0:
            total = total + outputs.unnormed_patch_tokens.sum()
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    frozen = [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]
    for name in frozen:
        named[name].requires_grad_(False)
    return frozen


class TrainedBackbone:
    """A backbone that is being trained: its parameters, their moving averages, optimizer, and what it was before.

    `bare` holds the parameters; `module` is the same as accelerate wrapped it, whose `forward` is the only way through
    the backbone in training. `averages` are float32, by name; empty where none are kept.
    """

    def __init__(
        self,
        token_model: TokenModel,
        original: TokenModel | None,
        trainable: TrainableConfig,
        anchors: AnchorConfig,
        optimization: OptimizationConfig,
        has_geometry_head: bool = False,
    ):
        """Freezes what is not trained of the backbone, which is trained in place; ValueError if settings do not fit it.

        `original` is a frozen copy, if an anchor needs it.
        """
        description = token_model.description
        if anchors.pre_norm > 0 and not description.norm:
            raise ValueError("--pre-norm: these scenes hold tokens before the final norm already; leave it out.")
        if anchors.prefix_anchor > 0 and description.num_prefix_tokens == 0:
            raise ValueError(f"--prefix-anchor: {description.label} has no class token or registers; leave it out.")
        self.original = original
        self.bare = TokenModule(select_trainable(token_model, trainable), has_geometry_head)
        self.module: nn.Module = self.bare
        self.frozen = freeze_unreachable(self.bare, anchors)
        self._trained = {name: value for name, value in self.bare.named_parameters() if value.requires_grad}
        if not self._trained:
            raise ValueError(f"Nothing of {description.label} is trained; choose another --train.")
        self.parameters = list(self._trained.values())
        own = {name: value for name, value in self._trained.items() if name.startswith("token_model.")}
        heads = [value for name, value in self._trained.items() if name not in own]
        pulled = own if anchors.l2_sp else {}
        self.original_weights = {name: value.detach().clone() for name, value in pulled.items()}
        self._decay = optimization.ema_decay
        averaged = self._trained if self._decay > 0 else {}
        self.averages: dict[str, Tensor] = {name: value.detach().float().clone() for name, value in averaged.items()}
        if optimization.compile:
            model = self.bare.token_model
            model.forward_unnormed = torch.compile(model.forward_unnormed)  # type: ignore[method-assign]
        # All parameters decay alike, norms, biases and embeddings too (public code).
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            [{"params": list(own.values())}, *([{"params": heads}] if heads else [])],
            lr=optimization.learning_rate,
            weight_decay=optimization.weight_decay,
            fused=True,
        )

    def set_learning_rate(self, rate: float) -> None:
        """Of the backbone; the geometry head's is a multiple."""
        for group, factor in zip(self.optimizer.param_groups, (1.0, HEAD_RATE), strict=False):
            group["lr"] = factor * rate

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes."""
        return {
            "module": self.bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages or None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sets what `state_dict` gave, before accelerate wraps anything."""
        self.bare.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, average in self.averages.items():
            average.copy_(state["averages"][name])

    @torch.no_grad()
    def update_averages(self) -> None:
        for name, average in self.averages.items():
            average.lerp_(self._trained[name].detach().float(), 1.0 - self._decay)

    @torch.no_grad()
    def swap_averages(self) -> None:
        """Exchanges weights and their moving averages, if these are kept; a second call undoes it."""
        for name, average in self.averages.items():
            weights = self._trained[name].detach().clone()
            self._trained[name].copy_(average)
            average.copy_(weights)


def interpolate_weights(original: dict[str, Tensor], finetuned: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) original + share finetuned, for floating-point tensors of the same names; exact at 0 and 1."""
    mixed = {
        name: torch.lerp(original[name].double(), value.double(), share).to(value.dtype)
        for name, value in finetuned.items()
        if value.is_floating_point()
    }
    return {**finetuned, **mixed}
