"""`SceneBackbone`: which ViT a scene's features are features of, and how images were brought to it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fit3d_ns.features.backbones import BackboneDescription, describe_backbone

# What decides the tokens of an image; names alone may differ for the same weights.
_DECISIVE = ("patch_size", "embed_dim", "mean", "std", "resize_rule", "norm", "weights_hash")


@dataclass(frozen=True)
class SceneBackbone:
    """The part of a `BackboneDescription` that a scene file keeps; plain values only."""

    backbone: str
    """The name as the user gave it."""
    architecture: str
    """timm's model name."""
    patch_size: int
    """Side of a patch in pixels."""
    embed_dim: int
    """Length E of a token."""
    mean: tuple[float, ...]
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, ...]
    """RGB is divided by this afterwards."""
    weights_hash: str
    """Identity of the weights, as the feature cache uses it."""
    num_prefix_tokens: int = 1
    """Class token plus registers."""
    normalization: str = "timm"
    """Where `mean` and `std` come from: `timm` or `imagenet`."""
    resize_rule: str = "bilinear"
    """How images are resized to the patch grid."""
    norm: bool = True
    """Whether the final norm was applied to the tokens."""
    is_random: bool = False
    """True for untrained weights, whose features mean nothing."""
    identity: str = ""
    """The description's own digest."""

    @classmethod
    def from_description(cls, description: BackboneDescription) -> "SceneBackbone":
        """What the scene keeps of a description."""
        return cls.from_metadata(description.to_metadata())

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "SceneBackbone":
        """From `BackboneDescription.to_metadata()` or `to_metadata()`; keys of newer versions are ignored."""
        known = {field.name: metadata[field.name] for field in fields(cls) if field.name in metadata}
        for name in ("mean", "std"):
            known[name] = tuple(float(value) for value in known[name])
        return cls(**known)

    def describe(self, weights: Path | None = None, backbone: str | None = None) -> BackboneDescription:
        """A backbone that sees images as this one does: its own, or another of the same preprocessing.

        Args:
            weights: Weights file; timm's download if None.
            backbone: Another one's name.

        Raises:
            ValueError: What `describe_backbone` refuses.
        """
        return describe_backbone(
            backbone or self.backbone,
            weights,
            self.normalization,  # type: ignore[arg-type]
            norm=self.norm,
            resize_rule=self.resize_rule,  # type: ignore[arg-type]
        )

    def to_metadata(self) -> dict[str, Any]:
        """Plain values for JSON."""
        content = asdict(self)
        return {**content, "mean": list(self.mean), "std": list(self.std)}

    def find_differences(self, other: "SceneBackbone") -> list[str]:
        """What would give other tokens for the same image, as "patch_size 14 against 16"; empty if nothing."""
        return [
            f"{name} {getattr(self, name)} against {getattr(other, name)}"
            for name in _DECISIVE
            if getattr(self, name) != getattr(other, name)
        ]
