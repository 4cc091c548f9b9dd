"""What the rows of the paper's tables are, and of our own ablations; the data comes from `ablations.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

MAIN = ""
"""Stands for the main backbone of a run (the paper's is dinov2_small)."""


@dataclass(frozen=True)
class Variant:
    """One row: how stages I and II ran, and how features are assembled."""

    assembly: str = "concat"
    """Of fit3d-probe; `original` and `duplicate` need neither stage."""
    feature_dim: int = 64
    """Numbers per Gaussian."""
    epochs: int = 1
    """Of stage II; where a number of steps is given, multiples of it."""
    label: str = ""
    """Names the flags below in file names."""
    lift_flags: tuple[str, ...] = ()
    """Further flags of fit3d-lift; without meaning with `--paper`, where features are trained and not lifted."""
    finetune_flags: tuple[str, ...] = ()
    """Further flags of fit3d-finetune."""
    wise_ft: float | None = None
    """Probe the mixture of original and fine-tuned weights with this share of the fine-tuned ones, 0 to 1."""

    @property
    def needs_finetuning(self) -> bool:
        """False where the original backbone is all."""
        return self.assembly not in ("original", "duplicate")


@dataclass(frozen=True)
class AblationTable:
    """One table."""

    title: str
    """What it shows."""
    data: tuple[str, ...]
    """`task:data set` of the paper's rows; on other data every task that the data allows is probed."""
    variants: tuple[Variant, ...]
    """Its rows, for each backbone."""
    backbones: tuple[str, ...] = (MAIN,)
    """The paper's names."""
    only_task: str | None = None
    """Set where the table makes sense for this task alone."""
    probe_flags: tuple[str, ...] = ()
    """Further flags of fit3d-probe."""
    needs_lift: bool = False
    """Features that were trained beside the colours (`--paper`) do not allow it."""


_ORIGINAL = Variant("original")
_OURS = Variant()
_PAIR = (_ORIGINAL, _OURS)
_ALONE = Variant("finetuned")
_INDOORS = ("segmentation:nyu", "depth:nyu-depth", "consistency:scannetpp")


def _alone(label: str, *flags: str) -> Variant:
    """Fine-tuned features without the original's beside them."""
    return replace(_ALONE, label=label, finetune_flags=flags)


TABLES: dict[str, AblationTable] = {
    "1": AblationTable(
        "Segmentation indoors", ("segmentation:scannetpp", "segmentation:nyu", "segmentation:scannet"), _PAIR
    ),
    "2": AblationTable("Depth indoors", ("depth:scannetpp", "depth:nyu-depth", "depth:scannet"), _PAIR),
    "3": AblationTable("Out of domain", ("segmentation:ade20k", "segmentation:voc", "depth:kitti"), _PAIR),
    "4": AblationTable(
        "Other vision models",
        ("segmentation:scannetpp", "depth:scannetpp"),
        _PAIR,
        ("dinov2_reg_small", "clip_base", "mae_base", "deit3_base"),
    ),
    "5": AblationTable(
        "Features per Gaussian", ("segmentation:nyu",), tuple(Variant(feature_dim=dim) for dim in (32, 64, 128))
    ),
    "6": AblationTable(
        "Fine-tuning, adapter, LoRA",
        ("segmentation:voc",),
        (_OURS, *(Variant(label=part, finetune_flags=("--train", part)) for part in ("adapter", "lora"))),
    ),
    "7": AblationTable(
        "Feature assembly", ("segmentation:nyu",), tuple(Variant(name) for name in ("add", "linear", "concat"))
    ),
    "8": AblationTable("Fine-tuning epochs", ("segmentation:nyu",), tuple(Variant(epochs=n) for n in (1, 2, 3))),
    "9": AblationTable(
        "ViT variants, segmentation",
        ("segmentation:scannetpp", "segmentation:nyu", "segmentation:ade20k"),
        _PAIR,
        (MAIN, "dinov2_base"),
    ),
    "10": AblationTable(
        "ViT variants, depth", ("depth:scannetpp", "depth:nyu-depth", "depth:kitti"), _PAIR, (MAIN, "dinov2_base")
    ),
    "11": AblationTable("Image classification", ("classification:imagenet",), _PAIR, only_task="classification"),
    "12": AblationTable("DPT head", ("depth:scannetpp",), _PAIR, only_task="depth", probe_flags=("--head", "dpt")),
    "13": AblationTable(
        "Duplicated features",
        ("segmentation:scannetpp", "depth:scannetpp"),
        (_ORIGINAL, Variant("duplicate"), _OURS),
    ),
    "correspondence": AblationTable(
        "Matches between views, random points and probe3d's 1000 most distinct (ours)",
        ("correspondence:scannetpp",),
        (_ORIGINAL, Variant("duplicate"), _ALONE, _OURS),
        only_task="correspondence",
        probe_flags=("--ratio-matches", "1000"),
    ),
    "concatenation": AblationTable(
        "Fine-tuned features alone or beside the original (ours)", _INDOORS, (_ORIGINAL, _ALONE, _OURS)
    ),
    "anchors": AblationTable(
        "Anchors to the original in stage II, off and on (ours)",
        _INDOORS,
        tuple(
            Variant(assembly, label=label, finetune_flags=flags)
            for label, flags in (("", ()), ("anchors", ("--feature-anchor", "0.5", "--prefix-anchor", "0.5")))
            for assembly in ("finetuned", "concat")
        ),
    ),
    "keeping": AblationTable(
        "What is trained, how fast, and what holds it near the original; fine-tuned features alone (ours)",
        _INDOORS,
        (
            _ORIGINAL,
            _ALONE,
            _alone("lr3e-5", "--learning-rate", "3e-5"),
            _alone("last-blocks", "--train", "last-blocks"),
            _alone("lora-lr3e-4", "--train", "lora", "--learning-rate", "3e-4"),
            _alone("prefix-anchor", "--prefix-anchor", "0.5"),
            replace(_alone("wise-ft", "--wise-ft", "0.5"), wise_ft=0.5),
        ),
    ),
    "targets": AblationTable(
        "Area-aware targets, bilinear in stage II, bilinear in both stages (ours)",
        _INDOORS,
        (
            _OURS,
            Variant(label="bilinear-targets", finetune_flags=("--token-reading", "bilinear")),
            Variant(label="bilinear-lift", lift_flags=("--token-to-pixel", "bilinear", "--token-reading", "bilinear")),
        ),
    ),
    "leave-one-out": AblationTable(
        "Targets with and without the image's own part in the lift (ours)",
        _INDOORS,
        (_OURS, Variant(label="leave-one-out", finetune_flags=("--leave-one-out",))),
        needs_lift=True,
    ),
}
"""By the paper's numbers, ours by name."""


def choose_tables(names: Sequence[str]) -> dict[str, AblationTable]:
    """The tables of these names, all of them without names.

    Raises:
        ValueError: An unknown name.
    """
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        raise ValueError(f"No such table: {', '.join(unknown)}; there are {' '.join(TABLES)}.")
    return {name: TABLES[name] for name in names or TABLES}
