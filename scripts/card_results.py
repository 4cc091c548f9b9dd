"""Adds what fit3d-probe measured of a fine-tuned folder to its card, as the `model-index` that model hubs show.

    python scripts/card_results.py my_vit results/*.json

Each record becomes figures of its task and data: of the original, the fine-tuned backbone alone, or both concatenated;
means over seeds, with their number and the standard deviation. A record of other fine-tuned weights is refused.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, metadata_load
from huggingface_hub.repocard import metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index

from fit3d_ns.features import describe_backbone
from fit3d_ns.report.result_files import ProbeResult, read_results
from fit3d_ns.report.result_tables import ASSEMBLY_NAMES
from fit3d_ns.report.table import TASK_COLUMNS, expand_columns
from fit3d_ns.utils.errors import explain


def add_results(folder: Path, results: Sequence[str]) -> int:
    """Writes the card anew, with the figures of these records alone, and returns their number.

    ValueError for a record of random or of other weights, or where there is no record of this folder at all.
    """
    description = describe_backbone(f"local-dir:{folder}")
    found: list[EvalResult] = []
    num_own = 0
    for probe in read_results(results)[0]:
        finetuned = (probe.record.settings.get("backbones") or {}).get("finetuned")
        if probe.record.is_random:
            raise ValueError(f"{probe.path} is about random weights, which say nothing; leave it out.")
        if finetuned is not None and finetuned.get("weights_hash") != description.weights_hash:
            raise ValueError(f"{probe.path} is about other fine-tuned weights than those of {folder}; leave it out.")
        num_own += finetuned is not None
        found += list_figures(probe)
    if not num_own:
        raise ValueError(f"No record is about {folder}; run fit3d-probe with --finetuned {folder} first.")
    card = folder / "README.md"
    metadata_save(card, {**(metadata_load(card) or {}), "model-index": eval_results_to_model_index(folder.name, found)})
    return len(found)


def list_figures(probe: ProbeResult) -> list[EvalResult]:
    """The metrics of one record, in its units."""
    settings, metrics = probe.record.settings, probe.record.metrics
    data, assembly = settings.get("test") or {}, str(settings.get("assembly"))
    name = str(data.get("name") or "+".join(map(str, data.get("scenes", ()))))
    columns = [column for column, _, _ in expand_columns(TASK_COLUMNS[probe.task], [metrics])]
    values = [(column, column.find(metrics)) for column in columns]
    return [
        EvalResult(
            task_type="image-feature-extraction",
            task_name=f"{probe.task}, {ASSEMBLY_NAMES.get(assembly, assembly)}",
            dataset_type=name,
            dataset_name=name,
            dataset_config=assembly,
            metric_type=column.name,
            metric_name=column.title.removesuffix(" (%)"),
            metric_value=value,
            metric_args={
                "seeds": len(metrics.get("per_seed") or {}) or 1,
                "standard_deviation": column.find(metrics.get("spread") or {}),
            },
        )
        for column, value in values
        if value is not None
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what fit3d-finetune wrote")
    parser.add_argument("results", nargs="+", help="records of fit3d-probe: files, folders, globs")
    given = parser.parse_args()
    try:
        number = add_results(given.folder, given.results)
    except (ValueError, OSError) as error:
        parser.exit(1, f"card_results.py: error: {explain(error)}\n")
    print(f"{number} figures added to {given.folder / 'README.md'}")
