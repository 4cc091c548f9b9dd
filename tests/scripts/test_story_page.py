"""The page of the quickstart: figures of the records, verdicts in words, pictures beside it."""

from pathlib import Path

import pytest
from story_page import Comparison, Story, describe_comparisons, summarise, write_story

from fit3d_ns.report.compared_backbones import read_models
from fit3d_ns.utils.results import ResultRecord, save_result
from tests.report.figure_scenes import BACKBONE, write_finetuned, write_photographs, write_scene


def write_comparison(folder: Path, measure: str, name: str, before: float, after: float) -> Comparison:
    paths = []
    for part, value in (("original", before), ("finetuned", after)):
        paths.append(folder / f"{measure}-{part}.json")
        save_result(ResultRecord("probe/x", {name: value}), paths[-1])
    return Comparison(measure, *paths, where="in another room")


def test_comparison__says_better_and_worse_by_the_direction_of_the_measure(tmp_path: Path) -> None:
    recall = write_comparison(tmp_path, "recall", "recall_10px", 0.10, 0.125)
    depth = write_comparison(tmp_path, "depth", "rmse", 0.50, 0.55)
    same = write_comparison(tmp_path, "consistency", "centred_cosine", 0.600, 0.605)
    assert [item.verdict for item in (recall, depth, same)] == [
        "25.0% better",
        "10.0% worse",
        "about the same, 0.8% better",
    ]
    assert describe_comparisons([recall])[0].endswith("within 10 pixels: 10.0 → 12.5 % (25.0% better)")
    assert summarise([recall, depth]) == "Fine-tuning helped in 1 of 2 measures and cost something in 1."
    assert summarise([recall, same]) == (
        "Fine-tuning helped in 1 of 2 measures; the others are within 2%, which one run cannot tell apart."
    )
    assert "did not help" in summarise([depth])


def test_write_story__is_one_page_with_its_pictures_beside_it(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "room.safetensors", write_photographs(tmp_path / "photos", 3))
    recall = write_comparison(tmp_path, "recall", "recall_10px", 0.10, 0.125)
    story = Story(
        "A <room>", scene, [recall], [], [("Lifting", 12.4, "fit3d-lift --scene a")], [("Next:", "ns-train 'my scene'")]
    )
    [backbones] = read_models([BACKBONE, str(write_finetuned(tmp_path / "tuned"))])
    page = write_story(story, backbones, tmp_path / "out")
    text = page.read_text()
    assert "A &lt;room&gt;" in text and "25.0% better" in text and "12 s" in text and "$" not in text
    assert "ns-train &#x27;my scene&#x27;" in text and "depth.png" not in text
    assert all((page.parent / name).is_file() and name in text for name in ("room.png", "features.png"))


def test_comparison__names_the_record_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json"):
        _ = Comparison("depth", tmp_path / "absent.json", tmp_path / "absent.json", "").values
