"""`ComparedBackbones`: an original and what was fine-tuned from it, read from the entries of `--models`.

An entry is a name of `features/sources.py` (its weights come from timm, or from `NAME=FILE`), a folder that
fit3d-finetune wrote, or a weights file alone (FiT3D's and Splat-and-Distill's published ones), which takes the
architecture of the nearest name before it. Folders, files alone and a second `NAME=FILE` of one name are fine-tuned
versions of the nearest original before them that has their architecture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fit3d_ns.features import BackboneDescription, describe_backbone
from fit3d_ns.features.backbones import Normalization
from fit3d_ns.features.sources import RANDOM_PREFIX, find_backbone_folder
from fit3d_ns.utils.progress import notice


@dataclass(frozen=True)
class NamedBackbone:
    """A backbone of which nothing is loaded yet, and the short name, folder or file that figures call it by."""

    label: str
    description: BackboneDescription


@dataclass(frozen=True)
class ComparedBackbones:
    """Backbones of one architecture: their tokens have one width and may share a basis."""

    original: NamedBackbone | None
    """None where only fine-tuned ones were named."""
    finetuned: tuple[NamedBackbone, ...] = ()
    """In the order they were named."""

    @property
    def members(self) -> list[NamedBackbone]:
        """The original first."""
        return ([] if self.original is None else [self.original]) + list(self.finetuned)

    @property
    def description(self) -> BackboneDescription:
        """The first member's; all agree in architecture, patch size and width."""
        return self.members[0].description

    @property
    def is_random(self) -> bool:
        """True if one of them has random weights."""
        return any(member.description.is_random for member in self.members)

    @property
    def label(self) -> str:
        """Architecture, which fine-tuned one is which, and a warning where weights are random."""
        several = self.finetuned if len(self.finetuned) > 1 else ()
        notes = [f"{number}: {member.label}" for number, member in enumerate(several, 1)]
        notes += ["random weights"] if self.is_random else []
        return _bare(self.description) + (f" ({', '.join(notes)})" if notes else "")


def read_models(
    models: Sequence[str], backbone_weights: Sequence[Path] = (), normalization: Normalization = "timm"
) -> list[ComparedBackbones]:
    """Describes the backbones and sorts them into originals and fine-tuned ones; nothing is loaded.

    `backbone_weights` are of the names that come without a file, in their order. ValueError without entries, and for
    an unknown name, a missing file, or a weights file alone before any name.
    """
    if not models:
        raise ValueError("No backbones to compare; name some with --models.")
    remaining = list(backbone_weights)
    groups: list[ComparedBackbones] = []
    originals: set[tuple[str, bool]] = set()
    last_name: str | None = None
    for entry in models:
        name, weights = _split(entry)
        if name is not None:
            last_name = name.removeprefix(RANDOM_PREFIX)
            weights = remaining.pop(0) if weights is None and remaining and name == last_name else weights
        elif weights is not None and last_name is None:
            raise ValueError(f"{entry} is a weights file alone; put the name of its backbone before it.")
        is_folder = name is None and weights is None
        description = describe_backbone(entry if is_folder else name or last_name or "", weights, normalization)
        original = description.architecture, description.is_random
        if name is not None and original not in originals:
            originals.add(original)
            groups.append(ComparedBackbones(NamedBackbone(name, description)))
        else:
            label = name if weights is None else weights.name
            folder = Path(entry.removeprefix("local-dir:")).absolute()
            _add_finetuned(groups, NamedBackbone(label or folder.name, description))
    if remaining:
        raise ValueError(f"--backbone-weights {remaining[0]} belongs to none of --models; use NAME=FILE instead.")
    return groups


def _split(entry: str) -> tuple[str | None, Path | None]:
    """Name and weights file of an entry; neither for a folder, no name for a file alone."""
    path = Path(entry).expanduser()
    if path.is_file():
        return None, path
    folder = find_backbone_folder(entry)
    if folder is not None and folder.is_dir():
        return None, None
    name, separator, file = entry.partition("=")
    if separator and Path(file).is_dir():
        raise ValueError(f"{entry} gives a folder as the weights of {name}; name the folder {file} alone.")
    if separator:
        return name, Path(file).expanduser()
    # A path that leads nowhere stays a folder, so that the error names it as one.
    return (None, None) if folder is not None else (entry, None)


def _add_finetuned(groups: list[ComparedBackbones], named: NamedBackbone) -> None:
    for index in reversed(range(len(groups))):
        if _shape(groups[index].description) == _shape(named.description):
            groups[index] = ComparedBackbones(groups[index].original, (*groups[index].finetuned, named))
            return
    notice(f"None of --models before {named.label} is a {_bare(named.description)}; its original stays empty.")
    groups.append(ComparedBackbones(None, (named,)))


def _bare(description: BackboneDescription) -> str:
    return description.architecture.split(".")[0]


def _shape(description: BackboneDescription) -> tuple[str, int, int]:
    return _bare(description), description.patch_size, description.embed_dim
