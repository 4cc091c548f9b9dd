"""Reading a run's config builds configs of nerfstudio's and ours, and runs nothing."""

import copy
from pathlib import Path

import pytest
import yaml
from nerfstudio.configs.method_configs import method_configs
from nerfstudio.utils.writer import EventName

from fit3d_ns.data.layouts import find_runs
from fit3d_ns.finetuning.scene_bank import find_scenes
from fit3d_ns.plugin.method import fit3d_features, fit3d_features_paper
from fit3d_ns.plugin.run_config import load_config

SPLATFACTOS = ("splatfacto", "splatfacto-big")
ATTACKS = {
    "system": "!!python/object/apply:os.system ['touch {canary}']",
    "subprocess": "!!python/object/apply:subprocess.check_output [[touch, {canary}]]",
    "new": "!!python/object/new:subprocess.Popen [[touch, {canary}]]",
    "eval": '!!python/object/apply:builtins.eval [\'open("{canary}", "w")\']',
    "module": "!!python/module:antigravity ''",
    "function of nerfstudio": "!!python/object/apply:nerfstudio.utils.scripts.run_command ['touch {canary}']",
    "class of nerfstudio": "!!python/object/apply:nerfstudio.utils.comms.LOCAL_PROCESS_GROUP []",
    "imported name": "!!python/object/apply:nerfstudio.utils.scripts.subprocess.run [[touch, {canary}]]",
    "name": "!!python/name:os.system ''",
    "attribute": "!!python/object/apply:builtins.getattr [!!python/name:nerfstudio.utils.writer.EventName '', mro]",
    "attribute of no enumeration": "!!python/object/apply:builtins.getattr [!!python/name:torch.optim.Adam '', step]",
    "state": "!!python/object:nerfstudio.utils.scripts.subprocess.Popen {{args: x}}",
    "nested": "a: [{{b: !!python/object/apply:os.system ['touch {canary}']}}]",
    "key": "? !!python/object/apply:os.system ['touch {canary}']\n: 1",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_load_config__runs_nothing(attack: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "config.yml"
    path.write_text(ATTACKS[attack].format(canary=canary))
    with pytest.raises(ValueError, match="config.yml") as info:
        load_config(path)
    assert not canary.exists()
    assert "--trust-config" in str(info.value) or "cannot be read" in str(info.value)


def test_load_config__targets_are_what_their_names_say(tmp_path: Path) -> None:
    """A class that is allowed elsewhere does not stand where reading a run would call it."""
    config = copy.deepcopy(fit3d_features.config)
    config.pipeline.datamanager.dataparser._target = type(config)
    (tmp_path / "config.yml").write_text(yaml.dump(config))
    with pytest.raises(ValueError, match="DataParser"):
        load_config(tmp_path / "config.yml")


@pytest.mark.parametrize("name", ["ours", "paper", *SPLATFACTOS])
def test_load_config__equals_what_nerfstudios_loader_reads(name: str, tmp_path: Path) -> None:
    own = {"ours": fit3d_features.config, "paper": fit3d_features_paper.config}
    config = own[name] if name in own else method_configs[name]
    path = tmp_path / "config.yml"
    path.write_text(yaml.dump(config))
    assert load_config(path) == yaml.load(path.read_text(), Loader=yaml.Loader) == config


def test_load_config__reads_enumerations_as_python_3_11_2_writes_them(tmp_path: Path) -> None:
    """Debian 12's Python: by `getattr` of the class and the member's name."""
    path, text = tmp_path / "config.yml", yaml.dump(fit3d_features.config)
    call = (
        "!!python/object/apply:builtins.getattr\n      - !!python/name:nerfstudio.utils.writer.EventName ''\n      - "
    )
    usual = "!!python/object/apply:nerfstudio.utils.writer.EventName\n      - "
    for event in EventName:
        text = text.replace(f"{usual}{event.value}\n", f"{call}{event.name}\n")
    assert "builtins.getattr" in text and "EventName\n" not in text
    path.write_text(text)
    assert load_config(path) == fit3d_features.config


def test_load_config__foreign_classes_need_trust_which_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yml"
    text = yaml.dump(fit3d_features.config).replace(
        "method_name: fit3d-features", "method_name: !!python/name:json.JSONDecoder ''"
    )
    path.write_text(text)
    with pytest.raises(ValueError, match="json.JSONDecoder.*--trust-config"):
        load_config(path)
    load_config(path, trust=True)
    assert f"Running what {path} says" in capsys.readouterr().err


def test_find_scenes__scene_files_win_over_a_config_that_lies_among_them(tmp_path: Path) -> None:
    scene = tmp_path / "room.safetensors"
    scene.write_bytes(b"")
    hidden = tmp_path / ".x" / "y" / "config.yml"
    hidden.parent.mkdir(parents=True)
    hidden.write_text(ATTACKS["system"].format(canary=tmp_path / "canary"))
    (tmp_path / "config.yml").write_text(ATTACKS["system"].format(canary=tmp_path / "canary"))
    assert find_scenes([tmp_path]) == [scene]
    scene.unlink()
    with pytest.raises(ValueError, match="no scene file and no nerfstudio run"):
        find_scenes([tmp_path])
    assert not (tmp_path / "canary").exists()


def test_find_runs__knows_nerfstudios_layout_at_every_level(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "room" / "splatfacto" / "2026-01-01"
    (run / "nerfstudio_models").mkdir(parents=True)
    (run / "config.yml").write_text("")
    deeper = run / "nerfstudio_models" / "other"
    (deeper / "nerfstudio_models").mkdir(parents=True)
    (deeper / "config.yml").write_text("")
    for folder in (run.parents[2], run.parents[1], run.parents[0]):
        assert find_runs(folder) == [run / "config.yml"], folder
    assert find_runs(tmp_path) == []


def test_resolve__keeps_the_name_by_which_weights_are_linked(tmp_path: Path) -> None:
    """Hubs keep files under their hashes, and links to them, whose suffix says what they are."""
    (tmp_path / "0a1b2c").touch()
    (tmp_path / "model.safetensors").symlink_to("0a1b2c")
    config = copy.deepcopy(fit3d_features.config)
    config.pipeline.datamanager.data, config.machine.device_type = tmp_path, "cpu"
    config.pipeline.datamanager.backbone_weights = tmp_path / "model.safetensors"
    config.resolve()
    assert config.pipeline.datamanager.backbone_weights == tmp_path / "model.safetensors"
