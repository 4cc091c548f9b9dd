"""Tables from records whose figures are typed here, parsed back out of what was written."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
from matplotlib.figure import Figure

from fit3d_ns.report.result_files import read_results
from fit3d_ns.report.result_tables import write_report
from fit3d_ns.report.table import Column, Table, mark_best, save_bars
from tests.report.report_records import describe_backbone, describe_finetuning, write_finetune_report, write_probe


class Report(NamedTuple):
    tables: list[Table]
    files: list[Path]

    @property
    def markdown(self) -> str:
        return self.files[0].read_text(encoding="utf-8")


def make(folder: Path) -> Report:
    return Report(*write_report(*read_results([folder]), folder / "out", "Results"))


def parse_markdown(text: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of every table."""
    tables = []
    for part in text.split("\n## ")[1:]:
        lines = part.splitlines()
        rows = [
            [cell.strip().replace("\\", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in lines
            if line[:1] == "|"
        ]
        tables.append((lines[0].replace("\\", ""), rows[0], rows[2:]))
    return tables


class TableParser(HTMLParser):
    """Captions and cells of a page; bold ones between asterisks."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in ("caption", "td", "th"):
            self.text = ""
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag == "table":
            self.tables.append(("", []))
        elif tag == "strong":
            self.text += "**"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append(self.text)
        elif tag == "caption":
            self.tables[-1] = (self.text, self.tables[-1][1])
        elif tag == "strong":
            self.text += "**"

    def handle_data(self, data: str) -> None:
        self.text += data


def parse_latex(text: str) -> list[list[str]]:
    """Rows of the first table; bold cells between asterisks."""
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0].replace(r"\midrule", "")
    rows = [line[: -len(r" \\")] for line in body.splitlines() if line.endswith(r"\\")]
    plain = []
    for row in rows:
        for command, character in ((r"$\pm$", "±"), (r"$\uparrow$", "↑"), (r"$\downarrow$", "↓"), (r"\%", "%")):
            row = row.replace(command, character)
        plain.append([re.sub(r"\\textbf\{(.*)\}", r"**\1**", cell).replace("\\_", "_") for cell in row.split(" & ")])
    return plain


@pytest.fixture
def two_rows(tmp_path: Path) -> Report:
    """Original: mIoU 0.60 and 0.62, mean 0.61, deviation 0.02 / sqrt(2); fine-tuned: 0.7."""
    write_probe(tmp_path / "a.json", {0: {"miou": 0.60, "aacc": 0.9}, 1: {"miou": 0.62, "aacc": 0.9}})
    write_probe(
        tmp_path / "b.json",
        {0: {"miou": 0.70, "aacc": 0.8}},
        assembly="concat",
        finetuning=describe_finetuning(),
    )
    return make(tmp_path)


def test_report__mean_spread_seeds_best_and_arrows(two_rows: Report) -> None:
    [(title, header, rows)] = parse_markdown(two_rows.markdown)
    assert title == "Segmentation on nyu13"
    original, concat = (dict(zip(header, row, strict=True)) for row in rows)
    assert original["Backbone"] == "DINOv2-S" and original["Features"] == "original"
    assert original["mIoU (%) ↑"] == "61.00 ± 1.41" and original["Seeds"] == "2"
    assert concat["mIoU (%) ↑"] == "**70.00**" and concat["Seeds"] == "1"
    assert original["aAcc (%) ↑"] == "**90.00 ± 0.00**" and concat["aAcc (%) ↑"] == "80.00"
    assert "mAcc (%) ↑" not in header or original["mAcc (%) ↑"] == "-"


def test_report__paper_and_costs_stand_beside_ours(two_rows: Report) -> None:
    [(_, header, rows)] = parse_markdown(two_rows.markdown)
    original, concat = (dict(zip(header, row, strict=True)) for row in rows)
    assert original["mIoU (%), paper"] == "65.55" and original["Paper's tables"] == "1, 9"
    assert concat["mIoU (%), paper"] == "67.50" and concat["Paper's tables"] == "1, 5, 7, 8, 9"
    assert concat["Scene (MB)"] == "170.2" and concat["Scene (MB), paper"] == "495.0"
    assert concat["Stage I (h/scene)"] == "0.50" and concat["Stage II (h)"] == "2.25"
    assert original["Stage II (h)"] == "-"
    assert concat["Stage II (h), paper"] == "8.50"


def test_summary__a_column_for_each_measure_and_bars_of_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = describe_backbone(is_random=True)
    write_probe(tmp_path / "a.json", {0: {"miou": 0.60}, 1: {"miou": 0.62}})
    write_probe(tmp_path / "b.json", {0: {"miou": 0.70}}, assembly="concat")
    write_probe(tmp_path / "c.json", {0: {"miou": 0.10}}, backbone=random)
    write_probe(tmp_path / "d.json", {0: {"miou": 0.40, "rmse": 0.5}}, task="retrieval")
    write_probe(tmp_path / "e.json", {0: {"mean": 30.0, "rmse": 35.0}}, task="normals", assembly="concat")
    tables, _ = write_report(*read_results([tmp_path]), tmp_path / "out", "Results", summed=True)
    summary = tables[0]
    metrics = ["Segmentation on nyu13: mIoU (%) ↑", "Retrieval on nyu13: mIoU (%) ↑", "Retrieval on nyu13: RMSE (m) ↓"]
    assert summary.header == ["Backbone", "Features", *metrics, "Normals on nyu13: Mean (deg) ↓"]
    rows = {(row[0].text, row[1].text): [cell.text for cell in row[2:]] for row in summary.rows}
    assert rows["DINOv2-S", "original"] == ["61.00 ± 1.41", "40.00", "0.5000", "-"]
    assert rows["DINOv2-S", "original + fine-tuned, concatenated"] == ["70.00", "-", "-", "30.00"]
    assert rows["DINOv2-S (random)", "original"] == ["10.00", "-", "-", "-"]
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (drawn.append(figure), Path(path).touch()))
    save_bars(summary, tmp_path / "bars.png")
    bars = {panel.get_title(): [bar.get_width() for bar in panel.patches] for panel in drawn[0].axes}
    assert bars["Segmentation on nyu13\nmIoU (%) ↑"] == pytest.approx([61.0, 70.0, 10.0])
    assert bars["Normals on nyu13\nMean (deg) ↓"] == pytest.approx([0.0, 30.0, 0.0]) and len(bars) == 4


def test_report__html_latex_and_json_say_what_markdown_says(two_rows: Report) -> None:
    [(title, header, rows)] = parse_markdown(two_rows.markdown)
    files = {path.suffix: path.read_text(encoding="utf-8") for path in two_rows.files}
    parser = TableParser()
    parser.feed(files[".html"])
    assert parser.tables == [(title, [header, *rows])]
    assert parse_latex(files[".tex"]) == [header, *rows]
    assert files[".tex"].isascii() and files[".tex"].count("\\begin{tabular}") == 1
    content = json.loads(files[".json"])
    figure = content["tables"][0]["rows"][0][content["tables"][0]["header"].index("mIoU (%) ↑")]
    assert figure["value"] == pytest.approx(0.61) and figure["spread"] == pytest.approx(0.02 / 2**0.5)


def test_report__a_second_report_does_not_read_the_first(two_rows: Report) -> None:
    folder = two_rows.files[0].parents[1]
    assert make(folder).markdown == two_rows.markdown


@pytest.mark.parametrize(
    "changes",
    [
        {"data": ("nyu40", 40, 795, 654)},
        {"data": ("nyu13", 13, 795, 100)},
        {"backbone": describe_backbone("vit_tiny_patch16_224.augreg_in21k")},
        {"assembly": "finetuned"},
        {"assembly": "concat", "finetuning": describe_finetuning(train="lora")},
        {"assembly": "concat", "finetuning": describe_finetuning(l2_sp=0.1)},
        {"assembly": "concat", "finetuning": describe_finetuning(leave_one_out=True)},
        {"assembly": "concat", "finetuning": describe_finetuning(epochs=4.0)},
        {"backbone": describe_backbone(is_random=True)},
        {"task": "depth", "data": ("scannetpp", 0, 4, 2), "config": {"head": "dpt"}},
    ],
)
def test_report__no_paper_value_for_other_data_backbones_or_methods(tmp_path: Path, changes: dict) -> None:
    write_probe(tmp_path / "a.json", {0: {"miou": 0.5, "rmse": 0.5}}, **changes)
    assert "paper" not in make(tmp_path).markdown


def test_report__rows_of_the_ablations_have_their_own_paper_values(tmp_path: Path) -> None:
    expected = {"d32": ("67.15", "5"), "e2": ("67.25", "8"), "add": ("66.00", "7")}
    write_probe(tmp_path / "d32.json", {0: {"miou": 0.1}}, assembly="concat",
                finetuning=describe_finetuning(feature_dim=32))  # fmt: skip
    write_probe(tmp_path / "e2.json", {0: {"miou": 0.2}}, assembly="concat",
                finetuning=describe_finetuning(epochs=1.9998))  # fmt: skip
    write_probe(tmp_path / "add.json", {0: {"miou": 0.3}}, assembly="add", finetuning=describe_finetuning())
    [(_, header, rows)] = parse_markdown(make(tmp_path).markdown)
    columns = header.index("mIoU (%), paper"), header.index("Paper's tables")
    assert [(row[columns[0]], row[columns[1]]) for row in rows] == [expected["d32"], expected["e2"], expected["add"]]


def test_report__random_weights_never_share_a_table(tmp_path: Path) -> None:
    write_probe(tmp_path / "a.json", {0: {"miou": 0.5}}, backbone=describe_backbone(is_random=True))
    write_probe(tmp_path / "b.json", {0: {"miou": 0.4}})
    write_probe(tmp_path / "c.json", {0: {"miou": 0.3}}, assembly="duplicate")
    report = make(tmp_path)
    tables = parse_markdown(report.markdown)
    assert [title.startswith("RANDOM WEIGHTS") for title, _, _ in tables] == [False, True]
    assert [len(rows) for _, _, rows in tables] == [2, 1]
    # The random row's higher figure takes nothing away from the real ones.
    assert "**40.00**" in tables[0][2][0]


def test_report__the_best_of_each_backbone_is_bold(tmp_path: Path) -> None:
    base = describe_backbone("vit_base_patch14_dinov2.lvd142m")
    write_probe(tmp_path / "a.json", {0: {"miou": 0.4}})
    write_probe(tmp_path / "b.json", {0: {"miou": 0.5}}, assembly="duplicate")
    write_probe(tmp_path / "c.json", {0: {"miou": 0.7}}, backbone=base)
    write_probe(tmp_path / "d.json", {0: {"miou": 0.6}}, backbone=base, assembly="duplicate")
    report = make(tmp_path)
    [(_, header, rows)] = parse_markdown(report.markdown)
    figures = [(row[0], row[header.index("mIoU (%) ↑")]) for row in rows]
    assert figures == [
        ("DINOv2-B", "**70.00**"),
        ("DINOv2-B", "60.00"),
        ("DINOv2-S", "40.00"),
        ("DINOv2-S", "**50.00**"),
    ]
    assert "Bold: the best of each backbone." in report.tables[0].notes


def test_report__settings_that_differ_stand_in_the_row_others_below(tmp_path: Path) -> None:
    for index, iterations in enumerate((40, 80)):
        write_probe(tmp_path / f"{index}.json", {0: {"rmse": 0.5 - 0.1 * index}}, task="depth",
                    data=("room", 0, 4, 2), config={"num_iterations": iterations, "batch_size": 16})  # fmt: skip
    report = make(tmp_path)
    [(title, header, rows)] = parse_markdown(report.markdown)
    assert title == "Depth on room"
    assert [row[header.index("Probe")] for row in rows] == ["num_iterations=40", "num_iterations=80"]
    assert [row[header.index("RMSE (m) ↓")] for row in rows] == ["0.5000", "**0.4000**"]
    notes = " ".join(report.tables[0].notes)
    assert "batch_size=16" in notes and "num_iterations" not in notes and "torch" in notes


def test_report__heads_and_tasks_have_tables_of_their_own(tmp_path: Path) -> None:
    room = ("room", 0, 4, 2)
    write_probe(tmp_path / "a.json", {0: {"rmse": 0.5}}, task="depth", data=room, config={"head": "linear"})
    write_probe(tmp_path / "b.json", {0: {"rmse": 0.4}}, task="depth", data=room, config={"head": "dpt"})
    write_probe(tmp_path / "c.json", {0: {"recall_10px": 0.4}}, task="correspondence", data=room)
    titles = [title for title, _, _ in parse_markdown(make(tmp_path).markdown)]
    assert titles == ["Depth with a DPT head on room", "Depth on room", "Correspondence on room"]


def test_report__errors_against_viewing_angle_are_columns_and_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def metrics(near: float, far: float | None) -> dict:
        return {"recall_10px": near, "by_angle": {"0-20": {"recall_10px": near}, "20-90": {"recall_10px": far}}}

    room = ("room", 0, 4, 2)
    write_probe(tmp_path / "a.json", {0: metrics(0.5, 0.2), 1: metrics(0.7, 0.4)}, task="correspondence", data=room)
    own = metrics(0.8, None)
    write_probe(tmp_path / "b.json", {0: own}, task="correspondence", data=room, assembly="concat")
    write_probe(tmp_path / "c.json", {0: {"miou": 0.6}})
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (drawn.append(figure), Path(path).touch()))
    report = make(tmp_path)
    _, header, rows = next(table for table in parse_markdown(report.markdown) if table[0].startswith("Corr"))
    assert header[3:5] == ["Recall 10 px, 0-20 deg (%) ↑", "Recall 10 px, 20-90 deg (%) ↑"]
    assert [row[3:5] for row in rows] == [["60.00 ± 14.14", "30.00 ± 14.14"], ["**80.00**", "-"]]
    (panel,) = drawn[0].axes
    assert panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > 84
    assert panel.get_ylabel() == "Error: 100 - Recall 10 px (%)" and panel.get_title() == "Correspondence on room"
    first, second = panel.containers
    assert [list(values) for values in first[0].get_data()] == [[10.0, 55.0], pytest.approx([40.0, 70.0])]
    assert list(second[0].get_ydata()) == [pytest.approx(20.0), pytest.approx(float("nan"), nan_ok=True)]
    ends = [segment[:, 1].tolist() for segment in first[2][0].get_segments()]
    assert ends[0] == pytest.approx([40 - 200**0.5, 40 + 200**0.5])
    assert report.files[-1] == tmp_path / "out" / "angles.png" and "](angles.png)" in report.markdown
    assert '<img src="angles.png"' in report.files[2].read_text(encoding="utf-8")
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").unlink()
    assert "angles.png" not in make(tmp_path).markdown and not report.files[-1].exists()


def test_report__reports_of_stage_two(tmp_path: Path) -> None:
    write_finetune_report(tmp_path / "all", 0.5)
    write_finetune_report(tmp_path / "adapter", 0.4, settings={"trainable": {"train": "adapter"}})
    write_finetune_report(tmp_path / "toy", 0.9, is_random=True)
    tables = parse_markdown(make(tmp_path).markdown)
    assert [title for title, _, _ in tables] == [
        "Fine-tuning (stage II) of DINOv2-S",
        "RANDOM WEIGHTS, no measure of quality: Fine-tuning (stage II) of DINOv2-S (random)",
    ]
    _, header, rows = tables[0]
    adapter, whole = (dict(zip(header, row, strict=True)) for row in rows)
    assert adapter["Run"] == "adapter" and adapter["Settings"] == "train=adapter"
    assert adapter["Centred cosine, original ↑"] == "0.2500"
    assert (adapter["Centred cosine, fine-tuned ↑"], whole["Centred cosine, fine-tuned ↑"]) == ("0.4000", "**0.5000**")
    assert whole["Stage II (h)"] == "0.50" and whole["Stage I (h/scene)"] == "0.25" and whole["Epochs"] == "2.00"


@pytest.mark.parametrize(
    ("direction", "expected"), [("up", [False, True, True]), ("down", [True, False, False]), ("none", [False] * 3)]
)
def test_mark_best__ties_as_shown(direction: str, expected: list[bool]) -> None:
    # 0.50001 and 0.50002 are both 0.5000.
    column = Column("x", "x", direction, digits=4)  # type: ignore[arg-type]
    assert mark_best(column, [0.4, 0.50001, 0.50002], ["a"] * 3) == expected
    assert mark_best(Column("x", "x", "up"), [None, 0.5], ["a", "a"]) == [False, False]


def test_column__small_figures_do_not_become_zero() -> None:
    hours = Column("hours", "Hours", digits=2)
    assert [hours.show(value) for value in (0.0, 0.0004, 0.25, 8.5)] == ["0.00", "0.0004", "0.25", "8.50"]
