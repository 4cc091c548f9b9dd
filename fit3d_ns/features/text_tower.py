"""`load_text_tower`: which tokens fit a phrase, where a backbone learned beside a text encoder (CLIP, SigLIP).

CLIP compares a text with the projected class token, SigLIP with what one query reads from all tokens; here each patch
token goes through these layers alone, which it never learned. So finds are rough: where words fit best, not whether.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.features.backbones import BackboneDescription
from fit3d_ns.utils.errors import first_line

TextTower = Callable[[Float[Tensor, "n embed"], str], Float[Tensor, " n"]]
"""Gives the cosine of each token to a phrase."""


def load_text_tower(name: str, description: BackboneDescription, device: torch.device | str = "cpu") -> TextTower:
    """Loads a folder or a name on the hub; ValueError, in a sentence, for what has no text tower or another one's."""
    # What went on to learn ImageNet's classes (`_ft_`), as the paper's `clip_base`, has lost the text.
    if not re.search("_(sig|c)lip_", description.architecture) or "_ft_" in description.architecture:
        raise ValueError(f"{description.label} has no text tower; lift with a CLIP or SigLIP of timm that has its own.")
    try:
        from transformers import AutoModel, AutoTokenizer

        model, tokenizer = AutoModel.from_pretrained(name).to(device), AutoTokenizer.from_pretrained(name)
        images, texts = model.config.vision_config, model.config.text_config
    except (AttributeError, ImportError, KeyError, OSError, ValueError) as error:
        raise ValueError(f"--text-model {name} opens as no model of transformers: {first_line(error)}") from error
    if (images.hidden_size, images.patch_size) != (description.embed_dim, description.patch_size):
        problem = f"--text-model {name} reads images by width {images.hidden_size} and patch {images.patch_size}"
        raise ValueError(f"{problem}, not {description.embed_dim} and {description.patch_size} as {description.label}.")
    filled: Any = {"padding": "max_length", "max_length": texts.max_position_embeddings, "truncation": True}

    @torch.no_grad()
    def compare(tokens: Tensor, phrase: str) -> Tensor:
        # SigLIP has only seen texts that were filled up, and no mask; for CLIP nothing depends on either.
        words = tokenizer([phrase], return_tensors="pt", **filled)
        found = model.get_text_features(input_ids=words["input_ids"].to(tokens.device))
        text = found if isinstance(found, Tensor) else found.pooler_output
        is_clip = hasattr(model, "visual_projection")
        seen = model.visual_projection(tokens) if is_clip else model.vision_model.head(tokens[:, None])
        return F.cosine_similarity(seen, text.expand_as(seen), dim=1)

    return compare
