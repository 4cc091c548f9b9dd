"""What can be known of a vision transformer without loading it, and how timm builds it, also with published weights.

Names are in `sources.py`, weights from files in `weights.py`.
"""

import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fit3d_ns.features import sources
from fit3d_ns.features.sources import WEIGHTS_NAME, ModelArgs, find_backbone_folder
from fit3d_ns.utils.errors import first_line
from fit3d_ns.utils.files import hash_bytes

Normalization = Literal["timm", "imagenet", "half"]
"""`timm`: each model's own mean and deviation; `imagenet`: ImageNet's for all, as the paper's code does; `half`: .5."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Channel means and deviations of ImageNet's images in [0, 1]."""
_DECISIVE = ("patch_size", "embed_dim", "mean", "std", "resize_rule", "norm", "weights_hash")
"""What decides the tokens of an image; names may differ for the same weights."""


@dataclass(frozen=True)
class BackboneDescription:
    """Everything about a backbone that decides which tokens an image becomes; files keep what `to_metadata` gives."""

    backbone: str
    """The name as the user gave it."""
    architecture: str
    """timm's model name, with the checkpoint's tag where there is one; `toy_rooms_vit` for the package's own."""
    patch_size: int
    """Side of a patch in pixels."""
    embed_dim: int
    """Length E of a token."""
    mean: tuple[float, float, float]
    """Subtracted from images in [0, 1]."""
    std: tuple[float, float, float]
    """Divides images after that."""
    weights_hash: str
    """Hash, 16 hexadecimal digits, of a file's bytes, of the name under which timm publishes a checkpoint (it does not
    reuse names), or of the architecture and seed of random weights."""
    num_prefix_tokens: int = 1
    """Class token plus registers."""
    normalization: Normalization = "timm"
    """Where `mean` and `std` come from."""
    resize_rule: str = "bilinear"
    """How images are resized to the patch grid; there is one rule."""
    norm: bool = True
    """True if the final norm is applied to the last block's tokens."""
    is_random: bool = False
    """True for untrained weights; features then say nothing about quality."""
    identity: str = ""
    """A name fit for folders, equal only for descriptions that give the same tokens for the same image."""
    num_blocks: int = field(default=0, compare=False)
    """Number of transformer blocks; 0 where the description was read from a file."""
    weights: Path | None = field(default=None, compare=False)
    """The file the weights come from; None for timm's download, for random ones, and where a file does not say."""
    model_args: ModelArgs = field(default=(), compare=False)
    """Arguments of timm's constructor that a fine-tuned folder recorded; empty where read from a file."""

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], place: str | None = None) -> "BackboneDescription":
        """Makes a description of what `to_metadata` and `place` gave; keys of newer versions are ignored."""
        known = {field.name: metadata[field.name] for field in fields(cls) if field.compare and field.name in metadata}
        for name in ("mean", "std"):
            known[name] = tuple(float(value) for value in known[name])
        if place is not None and Path(place).name == known["backbone"]:
            return cls(**{**known, "backbone": place}, weights=Path(place) / WEIGHTS_NAME)
        return cls(**known, weights=None if place is None else Path(place))

    @property
    def place(self) -> str | None:
        """The fine-tuned folder or the weights file on this machine, absolute; None where there is none, and for the
        package's own, which every installation has."""
        folder = find_backbone_folder(self.backbone)
        found = self.weights if folder is None else folder
        is_everywhere = self.weights in (None, sources.TOY_FOLDER / WEIGHTS_NAME)
        return None if found is None or is_everywhere else str(found.absolute())

    def with_weights(
        self, weights: Path | None, backbone: str | None = None, normalization: Normalization | None = None
    ) -> "BackboneDescription":
        """A backbone that can be built and sees images as this one does: its own or, by name, another.

        ValueError as in `describe_backbone`, and where the recorded weights are gone and no others are given.
        """
        if weights is None and self.weights is not None and backbone in (None, self.backbone):
            weights = self.weights
            if not weights.is_file():
                problem = f"The features are of {self.backbone} with weights from {weights}, which is gone"
                raise ValueError(f"{problem}; say with --backbone or --backbone-weights where they are now.")
        backbone, normalization = backbone or self.backbone, normalization or self.normalization
        return describe_backbone(backbone, weights, normalization, norm=self.norm)

    def find_differences(self, other: "BackboneDescription") -> list[str]:
        """What would give other tokens for the same image, as "patch_size 14 against 16"; empty if nothing."""
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in _DECISIVE]
        return [f"{name} {own} against {others}" for name, own, others in pairs if own != others]

    @property
    def label(self) -> str:
        """For titles and log lines; untrained weights are called random."""
        return f"{self.architecture} (random weights)" if self.is_random else self.backbone

    def to_metadata(self) -> dict[str, Any]:
        """Plain values for JSON: what a scene file or a result record stores; no path of this machine."""
        name = Path(self.backbone).name if find_backbone_folder(self.backbone) is not None else self.backbone
        kept = {field.name: getattr(self, field.name) for field in fields(self) if field.compare}
        return {**kept, "backbone": name, "mean": list(self.mean), "std": list(self.std)}


def describe_backbone(
    backbone: str, weights: Path | str | None = None, normalization: Normalization = "timm", *, norm: bool = True
) -> BackboneDescription:
    """Says what a backbone is without building it (timm makes it on torch's meta device) and without its weights.

    `sources.py` lists the names, `weights.py` the kinds of files with weights; None: timm's download, or the folder's
    own. ValueError: unknown name (nearest ones are given), missing file, no vision transformer, no weights available.
    """
    source = sources.resolve_source(backbone, Path(weights) if weights is not None else None)
    model = _create_meta_model(source.architecture, source.model_args)
    mean: Any
    std: Any
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if normalization != "half" else ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    if normalization == "timm":
        mean = tuple(map(float, source.mean or model.pretrained_cfg.get("mean", mean)))
        std = tuple(map(float, source.std or model.pretrained_cfg.get("std", std)))
    rule = BackboneDescription.resize_rule
    parts = (source.architecture, source.model_args, source.weights_hash, mean, std, rule, norm)
    digest = hash_bytes(*(repr(part).encode() for part in parts))
    return BackboneDescription(
        **{**vars(source), "mean": mean, "std": std},
        backbone=backbone,
        patch_size=int(model.patch_embed.patch_size[0]),
        embed_dim=int(model.embed_dim),
        num_prefix_tokens=int(model.num_prefix_tokens),
        normalization=normalization,
        norm=norm,
        identity=f"{'random-' if source.is_random else ''}{source.architecture}-{digest}",
        num_blocks=len(model.blocks),
    )


def create_timm_model(architecture: str, model_args: ModelArgs = (), **kwargs: Any) -> nn.Module:
    """Builds the timm model without head, for images of any size.

    ValueError where it is no `VisionTransformer` or `Eva`.
    """
    import timm
    from timm.layers import PatchEmbed
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    name, shape = sources.expand_architecture(architecture, model_args)
    arguments = {"num_classes": 0, "dynamic_img_size": True, **shape, **kwargs}
    try:
        model = timm.create_model(name, **arguments)
    except Exception as error:
        if "pretrained" in kwargs and not isinstance(error, TypeError):
            # About the download.
            raise
        # timm asserts, divides and looks up what it is given; what a folder recorded may be damaged.
        raise ValueError(
            f"Backbone {architecture} cannot be built as a vision transformer for images of any size "
            f"({first_line(error)}); "
            "choose a `VisionTransformer` or `Eva` id of timm."
        ) from error
    if not isinstance(model, (VisionTransformer, Eva)) or not isinstance(model.patch_embed, PatchEmbed):
        problem = f"Backbone {architecture} is a {type(model).__name__}, not a plain vision transformer"
        raise ValueError(f"{problem}; choose a `VisionTransformer` or `Eva` id of timm, for example dinov2_small.")
    return model


def download_timm_model(description: BackboneDescription) -> nn.Module:
    """Builds a backbone with the weights that timm publishes for it.

    ValueError where they are not on this machine and cannot be downloaded.
    """
    cached = _find_cached_weights(description)
    cause: Exception | None = None
    problem = "" if cached else _find_network_problem()
    if not problem:
        try:
            return create_timm_model(
                description.architecture,
                description.model_args,
                pretrained=True,
                # A custom loader reads the format of the original download, not what the hub keeps.
                pretrained_cfg_overlay={"file": cached, "custom_load": False} if cached else {},
            )
        except ValueError:
            raise
        except Exception as error:  # The hub's client has errors of several libraries, by version.
            problem, cause = f"{type(error).__name__}: {first_line(error).rstrip('.')}", error
    place = f"in {cached} cannot be used" if cached else "are not on this machine and cannot be downloaded"
    raise ValueError(
        f"The weights of {description.architecture} {place} ({problem}); "
        "give --backbone-weights FILE, or take the backbone toy_rooms_vit, which comes with this package, or "
        f"{sources.RANDOM_PREFIX}{description.backbone} with random weights."
    ) from cause


@lru_cache(maxsize=64)
def _create_meta_model(architecture: str, model_args: ModelArgs) -> Any:
    """The model without storage for its weights, to read its shape and its settings from."""
    with torch.device("meta"):
        model: Any = create_timm_model(architecture, model_args)
    patch_height, patch_width = model.patch_embed.patch_size
    if patch_height != patch_width:
        problem = f"Backbone {architecture} has patches of {patch_width}x{patch_height} pixels"
        raise ValueError(f"{problem}; choose one with square ones.")
    return model


def _find_cached_weights(description: BackboneDescription) -> str | None:
    """Where an earlier download of a timm backbone lies, or None.

    Found files are used as they are: asking the hub first costs most of a minute where there is no network.
    """
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    config: Any = get_pretrained_cfg(description.architecture)
    if config is None or not config.hf_hub_id or config.custom_load == "hf":
        return None
    cached = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
    return cached if isinstance(cached, str) else None


def _find_network_problem() -> str:
    """Empty if the hub answers, whatever it says; the hub's own client retries for most of a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, HTTPException) as error:
        return f"no connection to {constants.ENDPOINT}: {first_line(error)}"
    return ""
