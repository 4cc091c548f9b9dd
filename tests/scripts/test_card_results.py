"""`model-index` of a card: what was measured of these weights, and nothing else."""

import shutil
from pathlib import Path

import pytest
from card_results import add_results
from huggingface_hub import ModelCard

from fit3d_ns.features import describe_backbone
from fit3d_ns.features.sources import TOY_FOLDER
from fit3d_ns.utils.results import ResultRecord, save_result


def write_record(path: Path, assembly: str, miou: float, weights_hash: str | None, **changes: bool) -> Path:
    backbones = {"original": {"weights_hash": "0"}}
    if weights_hash is not None:
        backbones["finetuned"] = {"weights_hash": weights_hash}
    metrics = {"miou": miou, "spread": {"miou": 0.01}, "per_seed": {"0": {"miou": miou}, "1": {"miou": miou}}}
    settings = {"assembly": assembly, "backbones": backbones, "test": {"name": "rooms"}}
    save_result(ResultRecord("probe/segmentation", metrics, settings, **changes), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TOY_FOLDER, tmp_path / "vit"))


def test_card__has_alone_and_concatenated_beside_the_original(folder: Path, tmp_path: Path) -> None:
    own = describe_backbone(str(folder)).weights_hash
    kinds = {"original": (0.25, None), "finetuned": (0.5, own), "concat": (0.75, own)}
    paths = [str(write_record(tmp_path / f"{kind}.json", kind, *known)) for kind, known in kinds.items()]
    before = ModelCard.load(folder / "README.md")
    for _ in range(2):
        assert add_results(folder, paths) == 3
    after = ModelCard.load(folder / "README.md")
    assert after.text == before.text and after.data.license == before.data.license
    assert after.data.eval_results is not None
    found = {result.dataset_config: result for result in after.data.eval_results}
    assert {kind: result.metric_value for kind, result in found.items()} == {kind: kinds[kind][0] for kind in kinds}
    assert found["concat"].task_name == "segmentation, original + fine-tuned, concatenated"
    assert found["finetuned"].metric_args == {"seeds": 2, "standard_deviation": 0.01}


def test_card__refuses_records_of_other_or_random_weights(folder: Path, tmp_path: Path) -> None:
    card = (folder / "README.md").read_bytes()
    original = str(write_record(tmp_path / "original.json", "original", 0.2, None))
    for path, reason in (
        (write_record(tmp_path / "other.json", "concat", 0.9, "other"), "other fine-tuned weights"),
        (write_record(tmp_path / "random.json", "original", 0.9, None, is_random=True), "random weights"),
    ):
        with pytest.raises(ValueError, match=reason):
            add_results(folder, [original, str(path)])
    with pytest.raises(ValueError, match="No record is about"):
        add_results(folder, [original])
    assert (folder / "README.md").read_bytes() == card
