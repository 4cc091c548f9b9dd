"""The model card of a fine-tuned backbone: what it is, how it was made, what it measured, whose licence holds."""

from typing import Any

from fit3d_ns.features import BackboneDescription
from fit3d_ns.finetuning.validation import format_consistency


def write_card(
    description: BackboneDescription, report: dict[str, Any], licence: str | None, scenes: list[str], share: float = 1.0
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        description: Of the original backbone.
        report: As in `report.json`.
        licence: Of the original weights, as timm knows it.
        scenes: Names of the training scenes.
        share: Of the fine-tuned weights, below 1 for mixtures with the original ones.
    """
    name = description.architecture
    lines = ["---", "library_name: timm", f"base_model: {name}", "tags:", "- image-feature-extraction", "- fit3d"]
    lines += [f"license: {licence}"] if licence else []
    lines += ["---", "", f"# {name}, fine-tuned with 3D-aware features", ""]
    if description.is_random:
        lines += ["**The original weights are random: this backbone is for tests and its features mean nothing.**", ""]
    lines += [
        f"A vision transformer (`{name}`, patch {description.patch_size}, {description.embed_dim} channels) fine-tuned "
        "on features lifted into 3D (FiT3D, ECCV 2024) with fit3d-ns.",
        "",
    ]
    if share < 1.0:
        lines += [f"Weights: {share:g} of the fine-tuned and {1.0 - share:g} of the original ones (WiSE-FT).", ""]
    elif report["settings"]["anchors"]["wise_ft"]:
        folders = ", ".join(f"`wise-ft-{mixed:g}`" for mixed in report["settings"]["anchors"]["wise_ft"])
        lines += [f"Mixtures with the original weights (WiSE-FT), by the share of these: {folders}.", ""]
    usage = [
        "import timm",
        'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()',
        "tokens = model.forward_features(images)  # images normalised as below, sides a multiple of the patch",
    ]
    if report["settings"]["trainable"]["train"] == "adapter":
        lines += ["The backbone is the original; what was trained stands behind it, where timm does not see it.", ""]
        usage = [
            "from fit3d_ns.features import create_extractor",
            'tokens = create_extractor("local-dir:THIS_FOLDER")(images).maps  # images in [0, 1]',
        ]
    lines += [
        "```python",
        *usage,
        "```",
        "",
        f"Images are RGB in [0, 1], minus mean {list(description.mean)}, divided by {list(description.std)}.",
        "",
        "## Licence",
        "",
        f"Original weights: {licence or 'not known here (your own file, or not stated); find out before sharing'}. "
        "These weights are derived from them, and from the captures named below.",
        "",
        "## Data",
        "",
        f"{report['num_images']} images of {len(scenes)} scenes: {_shorten(scenes)}.",
        "",
        "## Training",
        "",
        f"{report['steps']} steps of {report['images_per_step']} images in {report['seconds']:.0f} s; feature loss "
        f"{_number(report['loss_first'])} at the start, {_number(report['loss_last'])} at the end. Original "
        f"weights: hash `{description.weights_hash}`.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _flatten(report["settings"])),
        "",
    ]
    if report.get("consistency"):
        lines += [
            "## Figures",
            "",
            f"Original → fine-tuned{'' if share == 1.0 else ' (share 1)'}, on {report['consistency']['views']}:",
            "",
            format_consistency(report["consistency"]["original"], report["consistency"]["finetuned"]),
            "",
            "Cosine also rises when all tokens become alike; the centred one does not. Effective rank of the tokens: "
            f"{report['consistency']['original']['effective_rank']:.1f} → "
            f"{report['consistency']['finetuned']['effective_rank']:.1f}.",
            "",
        ]
    lines += ["## Versions", "", ", ".join(f"{key} {value}" for key, value in report["versions"].items()), ""]
    return "\n".join(lines)


def _flatten(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in settings.items():
        rows += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _shorten(names: list[str], at_most: int = 20) -> str:
    rest = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + rest
