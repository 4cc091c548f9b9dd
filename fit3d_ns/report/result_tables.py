"""`write_report`: results as tables, records of fit3d-probe one way, reports of fit3d-finetune the other."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from typing import Any

from fit3d_ns.report import table
from fit3d_ns.report.paper_values import CHOICES, PaperRow, find_paper_data, find_paper_row, name_backbone
from fit3d_ns.report.result_files import FinetuneResult, ProbeResult
from fit3d_ns.report.table import TASK_COLUMNS, Cell, Column, Table
from fit3d_ns.utils.errors import reading
from fit3d_ns.utils.files import write_atomically, write_json
from fit3d_ns.utils.package_files import read_table
from fit3d_ns.utils.progress import SECONDS_PER_HOUR
from fit3d_ns.utils.results import ResultRecord, average_scene_costs, flatten

STEM = "tables"
"""Name of the report's files without suffix."""
CURVES = "angles.png"
"""Name of the picture of errors against viewing angles, where there are any."""
ASSEMBLY_NAMES = {row["assembly"]: row["name"] for row in read_table(Path(__file__).with_name("assemblies.csv"))}
"""Assemblies in the order of rows."""
_PARTS = {"original": "original", "finetuned": "fine-tuned"}
_MAX_NAMES = 4
"""Scenes of a row are named up to this number, then counted."""


def write_report(
    probes: Sequence[ProbeResult], finetunings: Sequence[FinetuneResult], folder: Path, title: str, summed: bool = False
) -> tuple[list[Table], list[Path]]:
    """Writes the tables of all results, those of random weights last, and returns them with the names of all files.

    A summary of all probes comes first if asked for. ValueError where two results must not stand in one table.
    """
    results: list[ProbeResult | FinetuneResult] = [*probes, *finetunings]
    for result in results:
        with reading(result.path):
            create_probe_tables([result]) if isinstance(result, ProbeResult) else create_finetune_tables([result])
    tables = create_probe_tables(probes) + create_finetune_tables(finetunings)
    tables.sort(key=lambda one: one.is_random)
    tables = [create_summary(probes), *tables] if summed else tables
    files, curved = [folder / f"{STEM}{suffix}" for suffix in table.SUFFIXES], [one for one in tables if one.curves]
    for path in files:
        with write_atomically(path) as temporary:
            page = table.write_tables(tables, title, path.suffix, CURVES if curved else "")
            temporary.write_text(page, encoding="utf-8")
    files.append(folder / f"{STEM}.json")
    sources = [*(str(probe.path) for probe in probes), *(str(finetuning.path) for finetuning in finetunings)]
    write_json(files[-1], {"title": title, "tables": [asdict(one) for one in tables], "sources": sources})
    if curved:
        files.append(folder / CURVES)
        table.save_curves(curved, files[-1])
    else:
        (folder / CURVES).unlink(missing_ok=True)
    return tables, files


def create_summary(probes: Sequence[ProbeResult]) -> Table:
    """A row for each backbone and assembly, random ones beside the others; a column for each measure and test set."""
    groups: dict[tuple[int, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for probe in probes:
        key = [*TASK_COLUMNS].index(probe.task), _write_title(probe.task, probe.record.settings)
        groups.setdefault(key, {})[_name_row(probe.record)] = probe.record.metrics
    ordered = sorted(probes, key=lambda probe: (_name_row(probe.record)[0], _order(probe)[1:]))
    rows = list(dict.fromkeys(_name_row(probe.record) for probe in ordered))
    names = [name for name, _ in rows]
    columns = {"Backbone": [Cell(name) for name in names], "Features": [Cell(features) for _, features in rows]}
    for (place, title), found in sorted(groups.items()):
        for column in [*TASK_COLUMNS.values()][place]:
            values = [column.find(found.get(row, {})) for row in rows]
            if column.is_main and any(value is not None for value in values):
                spreads = [column.find(found.get(row, {}).get("spread") or {}) for row in rows]
                columns[f"{title}: {column.header}"] = _create_cells(column, values, names, spreads)
    return _create_table("All measures", columns, ["Bold: the best of each backbone; ±: deviation over seeds."], False)


def create_probe_tables(probes: Sequence[ProbeResult]) -> list[Table]:
    """Tables of all tasks, results of random weights last; ValueError where one is about two versions of its data."""
    groups: dict[tuple[Any, ...], list[ProbeResult]] = {}
    for probe in probes:
        settings = probe.record.settings
        names = [_name_data(settings.get(part)) for part in ("train", "test")]
        place, choices = [*TASK_COLUMNS].index(probe.task), _describe_choices(settings)
        key = (probe.record.is_random, place, names[1], names[0], not choices, choices)
        groups.setdefault(key, []).append(probe)
    for group in groups.values():
        _check_versions_of_data(group)
    return [_create_probe_table(groups[key]) for key in sorted(groups)]


def create_finetune_tables(results: Sequence[FinetuneResult]) -> list[Table]:
    """One table for each backbone and set of validation views, runs of random weights last."""
    groups: dict[tuple[Any, ...], list[FinetuneResult]] = {}
    for result in results:
        report = result.report
        views = str(report["consistency"].get("views", ""))
        paths = report.get("validation_scenes") or report.get("scenes") or ()
        scenes = tuple(PurePath(str(path)).stem for path in paths)
        key = (bool(report.get("is_random")), name_backbone(report.get("backbone") or {}), views, scenes)
        groups.setdefault(key, []).append(result)
    return [_create_finetune_table(groups[key], *key[:3]) for key in sorted(groups)]


def read_finetuning(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Costs and choices of stage II of a record, by the names of the columns and of `find_paper_row`."""
    known = settings.get("finetuning") or {}
    found = {name: known[name] for name in ("feature_dim", "scene_file_mb", "stage1_hours", "epochs") if name in known}
    if "hours" in known:
        found["finetune_hours"] = known["hours"]
    trainable = known.get("settings", {}).get("trainable", {})
    return {**found, "train": trainable["train"]} if "train" in trainable else found


def _create_probe_table(group: list[ProbeResult]) -> Table:
    records = [probe.record for probe in sorted(group, key=_order)]
    first = records[0]
    task = group[0].task
    backbones = [name_backbone(_get_backbone(record.settings)) for record in records]
    assemblies = [str(record.settings.get("assembly")) for record in records]
    columns = {
        "Backbone": [Cell(name) for name in backbones],
        "Features": [Cell(ASSEMBLY_NAMES.get(name, name)) for name in assemblies],
    }
    protocols = [_list_protocol(record.settings) for record in records]
    variants = [_list_finetuning(record.settings) for record in records]
    differing = table.find_differences(protocols)
    varied = table.find_differences([item for item in variants if item])
    for title, names, items in (("Stage II", varied, variants), ("Probe", differing, protocols)):
        if names:
            columns[title] = [Cell(table.describe_settings(item, names) or table.NOTHING) for item in items]
    papers = [_find_paper(task, record.settings, record.is_random) for record in records]
    costs = [read_finetuning(record.settings) for record in records]
    spreads = [record.metrics.get("spread") or {} for record in records]
    curves: dict[str, dict[str, str]] = {}
    for column, measure, angles in table.expand_columns(
        (*TASK_COLUMNS[task], *table.COST_COLUMNS), [record.metrics for record in records]
    ):
        sources = costs if column in table.COST_COLUMNS else [record.metrics for record in records]
        values = [column.find(source) for source in sources]
        known = [{} if row is None or column.name in CHOICES else row for row in papers]
        published = [float(row[column.name]) if row.get(column.name) else None for row in known]
        if any(value is not None for value in (*values, *published)):
            columns[column.header] = _create_cells(column, values, backbones, [column.find(item) for item in spreads])
            if angles:
                curves.setdefault(measure, {})[angles] = column.header
        if any(value is not None for value in published):
            columns[f"{column.title}, paper"] = _create_cells(column, published)
    counts = [len(record.metrics.get("per_seed") or {}) or 1 for record in records]
    columns["Seeds"] = [Cell(str(count), value=count) for count in counts]
    if any(papers):
        columns["Paper's tables"] = [Cell(", ".join(row["tables"].split()) if row else table.NOTHING) for row in papers]
    shared = {name: value for name, value in protocols[0].items() if name not in differing}
    notes = _write_verdicts(TASK_COLUMNS[task][0], records, backbones, assemblies)
    notes += ["Bold: the best of each backbone."] if len(set(backbones)) > 1 else []
    notes += _write_notes(group, shared, any(papers), max(counts) > 1)
    return replace(_create_table(_write_title(task, first.settings), columns, notes, first.is_random), curves=curves)


def _write_verdicts(
    column: Column, records: Sequence[ResultRecord], backbones: Sequence[str], assemblies: Sequence[str]
) -> list[str]:
    """A sentence for each backbone of which there is one original and one fine-tuned row, on the table's metric."""
    notes = []
    rows = list(zip(backbones, assemblies, records, strict=True))
    for backbone in dict.fromkeys(backbones):
        own = [(assembly, record.metrics) for name, assembly, record in rows if name == backbone]
        pair = [[metrics for assembly, metrics in own if assembly == part] for part in ("original", "finetuned")]
        if any(len(found) != 1 for found in pair):
            continue
        before, after = (column.find(metrics) for (metrics,) in pair)
        if not before or after is None:
            continue
        spread = sum(column.find(metrics.get("spread") or {}) or 0.0 for (metrics,) in pair)
        gain = (after - before) / abs(before) * (-1 if column.direction == "down" else 1)
        verdict = f"{abs(gain):.0%} {'better' if gain > 0 else 'worse'}"
        if abs(after - before) <= spread:
            verdict += ", no more than the seeds differ"
        change = f"{column.show(before)} → {column.show(after)}"
        notes.append(f"{backbone}, {column.title}: {change} by fine-tuning ({verdict}).")
    return notes


def _create_table(title: str, columns: Mapping[str, Sequence[Cell]], notes: list[str], is_random: bool) -> Table:
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return Table((table.RANDOM_TITLE if is_random else "") + title, list(columns), rows, notes, is_random)


_Values = Sequence[float | None]


def _create_cells(column: Column, values: _Values, groups: Sequence[str] = (), spreads: _Values = ()) -> list[Cell]:
    """A metric of all rows, the best of each group in bold; without groups nothing competes."""
    best = table.mark_best(column, values, groups) if groups else [False] * len(values)
    cells = []
    for value, spread, is_best in zip(values, spreads or [None] * len(values), best, strict=True):
        text = "" if value is None else column.show(value) + ("" if spread is None else f" ± {column.show(spread)}")
        cells.append(Cell(text, is_best, value, spread) if text else Cell())
    return cells


def _find_paper(task: str, settings: Mapping[str, Any], is_random: bool) -> PaperRow | None:
    chosen = (settings.get("finetuning") or {}).get("settings", {})
    is_ours = any(chosen.get("anchors", {}).values()) or chosen.get("targets", {}).get("leave_one_out")
    if is_random or is_ours:
        return None
    train, test = settings.get("train") or {}, settings.get("test") or {}
    architecture = str(_get_backbone(settings).get("architecture"))
    data = find_paper_data(task, train, test)
    assembly, head = str(settings.get("assembly")), str((settings.get("config") or {}).get("head", "linear"))
    return find_paper_row(task, data, architecture, assembly, head, read_finetuning(settings))


def _name_row(record: ResultRecord) -> tuple[str, str]:
    """The backbone, and what is read of it, with the name of what was fine-tuned."""
    name, assembly = name_backbone(_get_backbone(record.settings)), str(record.settings.get("assembly"))
    name += " (random)" if record.is_random and not name.endswith("(random)") else ""
    finetuned = (record.settings.get("backbones") or {}).get("finetuned")
    return name, ASSEMBLY_NAMES.get(assembly, assembly) + (f" ({finetuned['backbone']})" if finetuned else "")


def _describe_choices(settings: Mapping[str, Any]) -> str:
    """What keeps results of the same data apart, for titles."""
    config = settings.get("config") or {}
    memory = f" from {config['memory_views']} views of each scene" if config.get("memory_views") else ""
    return (" with a DPT head" if config.get("head") == "dpt" else "") + memory


def _get_backbone(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of the original or, where only the fine-tuned one runs, of that."""
    backbones = settings.get("backbones") or {}
    return backbones.get("original") or backbones.get("finetuned") or {}


def _name_data(data: Mapping[str, Any] | None) -> str:
    known = data or {}
    return str(known["name"]) if "name" in known else "+".join(sorted(map(str, known.get("scenes", ()))))


def _order(probe: ProbeResult) -> tuple[Any, ...]:
    """Backbone, then the assemblies in their order, then the file's name."""
    settings = probe.record.settings
    assembly = str(settings.get("assembly"))
    place = [*ASSEMBLY_NAMES, assembly].index(assembly)
    return (name_backbone(_get_backbone(settings)), place, str(probe.path))


def _write_title(task: str, settings: Mapping[str, Any]) -> str:
    train, test = settings.get("train"), settings.get("test")
    title = f"{task.capitalize()}{_describe_choices(settings)} on {_name_data(test)}"
    if isinstance(train, Mapping) and _name_data(train) != _name_data(test):
        title += f", trained on {_name_data(train)}"
    return title


def _list_protocol(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Choices of a probe, apart from its data and backbones."""
    parts = ("config", "run", "patch_fit", "precision")
    flat = flatten({name: settings[name] for name in parts if name in settings})
    backbone = _get_backbone(settings)
    return flat | ({"normalization": backbone["normalization"]} if "normalization" in backbone else {})


def _list_finetuning(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Choices of stage II that may differ between the rows of a table; empty without a fine-tuned backbone."""
    finetuning = settings.get("finetuning") or {}
    chosen = flatten(finetuning.get("settings") or {})
    known = {"steps": finetuning["steps"]} if "steps" in finetuning else {}
    scenes = [str(scene) for scene in finetuning.get("scenes", ())]
    names = "+".join(scenes) if len(scenes) <= _MAX_NAMES else f"{len(scenes)} scenes"
    return {**chosen, **known, "scenes": names} if finetuning else {}


def _write_notes(group: list[ProbeResult], shared: Mapping[str, Any], has_paper: bool, has_spread: bool) -> list[str]:
    records = [probe.record for probe in group]
    train, test = records[0].settings.get("train"), records[0].settings.get("test")
    notes = []
    if isinstance(train, Mapping) and isinstance(test, Mapping) and "num_frames" in test:
        notes.append(f"Data: {train.get('num_frames')} frames to train on, {test['num_frames']} to test on.")
    if has_spread:
        notes.append("± is the standard deviation over seeds (n - 1).")
    if has_paper:
        notes.append(
            "Paper: Yue et al., ECCV 2024; one seed, shown where data set, backbone and method are the same; its "
            "settings are those of --paper."
        )
    settings = table.describe_settings(shared, [name for name, value in shared.items() if value is not None])
    notes += [f"Settings: {settings}."] if settings else []
    notes.append(f"Versions: {table.describe_versions([record.versions for record in records])}.")
    return notes


def _check_versions_of_data(group: Sequence[ProbeResult]) -> None:
    for part in ("train", "test"):
        seen: dict[str, ProbeResult] = {}
        for probe in group:
            data = probe.record.settings.get(part)
            version = repr(data.get("data_hash", data.get("sizes"))) if isinstance(data, Mapping) else ""
            seen.setdefault(version, probe)
        if len(seen) > 1:
            (one, first), (other, second) = list(seen.items())[:2]
            raise ValueError(
                f"{first.path} and {second.path} are about different versions of the {part} data "
                f"{_name_data(first.record.settings[part])} ({one} and {other}); report them apart, or probe again."
            )


def _create_finetune_table(group: Sequence[FinetuneResult], is_random: bool, backbone: str, views: str) -> Table:
    reports = [result.report for result in group]
    settings = [flatten(report["settings"]) for report in reports]
    differing = table.find_differences(settings)
    columns = {
        "Run": [Cell(result.path.absolute().parent.name) for result in group],
        "Scenes": [Cell(str(count := len(report.get("scenes", ()))), value=count) for report in reports],
        "Steps": [Cell(str(report["steps"]), value=report["steps"]) for report in reports],
    }
    if differing:
        columns["Settings"] = [Cell(table.describe_settings(item, differing) or table.NOTHING) for item in settings]
    costs = [average_scene_costs(report.get("scene_costs") or []) for report in reports]
    for item, report in zip(costs, reports, strict=True):
        item["epochs"] = report.get("epochs")
        if isinstance(report.get("seconds"), (int, float)):
            item["finetune_hours"] = report["seconds"] / SECONDS_PER_HOUR
    metrics = [
        (replace(column, name=column.name.format(part=part), title=f"{column.title}, {word}"), reports, part)
        for column in table.FINETUNE_COLUMNS
        for part, word in _PARTS.items()
    ]
    for column, sources, part in [*((column, costs, "cost") for column in table.COST_COLUMNS), *metrics]:
        values = [column.find(source) for source in sources]
        if any(value is not None for value in values):
            # The original is the same in every row; only fine-tuned ones compete.
            columns[column.header] = _create_cells(column, values, [part] * len(values) if part == "finetuned" else ())
    shared = {name: value for name, value in settings[0].items() if name not in differing and value not in (None, [])}
    notes = [
        f"Measured on {views or 'unknown views'}: target cosine against the rendered scene, centred cosine and recall "
        "between views.",
        f"Settings: {table.describe_settings(shared, list(shared))}.",
        f"Versions: {table.describe_versions([report.get('versions', {}) for report in reports])}.",
    ]
    return _create_table(f"Fine-tuning (stage II) of {backbone}", columns, notes, is_random)
