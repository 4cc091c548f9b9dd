"""Which parameters are trained: all (paper), the last blocks, LoRA matrices, or an adapter on a frozen backbone."""

from dataclasses import dataclass
from typing import Literal

from fit3d_ns.features import TokenModel

TrainedPart = Literal["all", "last-blocks", "lora", "adapter"]


@dataclass(frozen=True)
class TrainableConfig:
    """What is trained."""

    train: TrainedPart = "all"
    """What is trained: `all` (paper), `last-blocks`, `lora` (matrices beside the attention's projections, merged when
    saved; needs the extra `lora`), or `adapter` (one Swin block behind the frozen backbone; paper, Table 6)."""
    num_blocks: int = 4
    """With `--train last-blocks`: number of last blocks that are trained, and the final norm with them; 1 to the
    backbone's number of blocks."""
    lora_rank: int = 8
    """With `--train lora`: rank of the matrices, 1 and above."""
    lora_alpha: float = 8.0
    """With `--train lora`: the matrices' product is multiplied by this over the rank; above 0."""
    adapter_window: int = 7
    """With `--train adapter`: side of the Swin block's windows in tokens, 1 and above."""

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.lora_rank < 1 or self.adapter_window < 1 or not self.lora_alpha > 0:
            raise ValueError("num_blocks, lora_rank, adapter_window must be at least 1 and lora_alpha above 0.")


def select_trainable(token_model: TokenModel, config: TrainableConfig) -> TokenModel:
    """The model with everything else frozen; LoRA and the adapter are put in.

    Parameters that were frozen before stay so.

    Raises:
        ValueError: More blocks than there are, or peft is not installed.
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
        from fit3d_ns.features.adapters import add_lora

        return add_lora(token_model, config.lora_rank, config.lora_alpha)
    from fit3d_ns.features.adapters import add_adapter

    return add_adapter(token_model, config.adapter_window)


def merge_trained(token_model: TokenModel, config: TrainableConfig) -> TokenModel:
    """The model as it is saved: LoRA's matrices are merged into the weights; otherwise the model itself."""
    if config.train != "lora":
        return token_model
    from fit3d_ns.features.adapters import merge_lora

    return merge_lora(token_model)
