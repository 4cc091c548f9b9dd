"""What fit3d-report says about files it cannot use, and which files it finds."""

from pathlib import Path

import pytest

from fit3d_ns.cli import report as module
from fit3d_ns.report.result_files import read_results
from fit3d_ns.report.result_tables import write_report
from fit3d_ns.utils.files import read_json, write_json
from fit3d_ns.utils.results import ResultRecord, save_result
from tests.report.report_records import write_finetune_report, write_probe


def test_read_results__files_folders_and_globs_count_each_file_once(tmp_path: Path) -> None:
    first = write_probe(tmp_path / "deep" / "a.json", {0: {"miou": 0.5}})
    second = write_probe(tmp_path / "b[0].json", {0: {"miou": 0.5}}, assembly="duplicate")
    probes, finetunings = read_results([tmp_path, str(first), second, f"{tmp_path}/**/*.json"])
    assert {probe.path for probe in probes} == {first, second} and not finetunings


def test_read_results__folders_hold_other_json_too(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"architecture": "vit"})
    write_json(tmp_path / "list.json", {"kind": 3})
    save_result(ResultRecord("lift", {"seconds": 1.0}), tmp_path / "scene.json")
    write_finetune_report(tmp_path / "vit", 0.5)
    # Training states come and go while they are read.
    (tmp_path / "vit" / "checkpoints").mkdir()
    (tmp_path / "vit" / "checkpoints" / "state.json").write_text("{")
    probes, finetunings = read_results([tmp_path])
    assert [run.path.parent.name for run in finetunings] == ["vit"] and not probes


def test_read_results__records_put_aside_are_passed_over_unless_named(tmp_path: Path) -> None:
    path = write_probe(tmp_path / "a.json", {0: {"miou": 0.5}})
    key = read_json(path)["settings"]["key"]
    aside = path.rename(tmp_path / f"a.{key}.json")
    write_probe(path, {0: {"miou": 0.6}}, assembly="duplicate")
    assert [probe.path for probe in read_results([tmp_path])[0]] == [path]
    assert [probe.path for probe in read_results([aside])[0]] == [aside]


def check_error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence the command ends with."""
    with pytest.raises(SystemExit) as exit_:
        module.main([str(argument) for argument in arguments])
    assert exit_.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fit3d-report: error:")]
    assert len(lines) == 1
    return lines[0]


def test_report__empty_and_missing_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No result of fit3d-probe or fit3d-finetune in" in check_error(capsys, tmp_path)
    assert "matches no file or folder" in check_error(capsys, tmp_path / "nowhere")
    assert "matches no file or folder" in check_error(capsys, tmp_path / "*.json")
    assert "No result" in check_error(capsys)


def test_report__broken_and_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_probe(tmp_path / "a.json", {0: {"miou": 0.5}})
    path.write_text(path.read_text()[:-40])
    for place in (path, tmp_path):
        assert "a.json is not valid JSON" in check_error(capsys, place)
    save_result(ResultRecord("lift", {"seconds": 1.0}), path)
    assert "is a record of 'lift'" in check_error(capsys, path)
    path.write_text("[]")
    assert "a.json is no record" in check_error(capsys, path)
    write_json(path, {"kind": "probe/depth", "metrics": {}})
    assert "holds no metrics" in check_error(capsys, path)
    write_json(path, {"kind": "finetune", "steps": 1})
    assert "has no settings, consistency" in check_error(capsys, path)
    write_json(path, {"kind": "probe/depth", "metrics": {"rmse": 1.0}, "schema_version": 99})
    assert "above 1" in check_error(capsys, path)


def test_report__same_settings_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.json", "b.json"):
        write_probe(tmp_path / name, {0: {"miou": 0.5}})
    sentence = check_error(capsys, tmp_path)
    assert "a.json" in sentence and "b.json" in sentence and "the same settings" in sentence


def test_report__memories_of_several_sizes_stand_apart(tmp_path: Path) -> None:
    for views in (3, 5):
        settings = {"num_neighbours": 30, "memory_views": views}
        path = write_probe(tmp_path / f"{views}.json", {0: {"miou": 0.5}}, task="retrieval", config=settings)
        record = read_json(path)
        # The memory is what is trained on.
        record["settings"]["train"]["data_hash"] = str(views)
        write_json(path, record)
    tables, _ = write_report(*read_results([tmp_path]), tmp_path / "out", "Results")
    assert [table.title for table in tables] == [f"Retrieval from {n} views of each scene on nyu13" for n in (3, 5)]


def test_report__different_versions_of_the_data(tmp_path: Path) -> None:
    write_probe(tmp_path / "a.json", {0: {"miou": 0.5}}, data_hash="old")
    write_probe(tmp_path / "b.json", {0: {"miou": 0.5}}, assembly="duplicate", data_hash="new")
    with pytest.raises(ValueError, match=r"different versions of the test data nyu13 \('old' and 'new'\)"):
        write_report(*read_results([tmp_path]), tmp_path / "out", "Results")
