"""Names, descriptions and identities of backbones."""

import json
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fit3d_ns.features import backbones as backbones_module
from fit3d_ns.features import create_extractor, describe_backbone
from fit3d_ns.features.sources import PAPER_BACKBONES, list_backbones


@pytest.mark.parametrize(
    ("backbone", "patch_size", "embed_dim", "num_prefix_tokens", "mean"),
    [
        # As published: S has 384 channels, B has 768; CLIP has a mean of its own; registers come after the class token.
        ("dinov2_small", 14, 384, 1, (0.485, 0.456, 0.406)),
        ("dinov2_base", 14, 768, 1, (0.485, 0.456, 0.406)),
        ("dinov2_reg_small", 14, 384, 5, (0.485, 0.456, 0.406)),
        ("clip_base", 16, 768, 1, (0.48145466, 0.4578275, 0.40821073)),
        ("mae_base", 16, 768, 1, (0.485, 0.456, 0.406)),
        ("deit3_base", 16, 768, 1, (0.485, 0.456, 0.406)),
        ("vit_small_patch16_dinov3.lvd1689m", 16, 384, 5, (0.485, 0.456, 0.406)),
        ("vit_base_patch8_224", 8, 768, 1, (0.5, 0.5, 0.5)),
    ],
)
def test_describe_backbone__published_models(backbone, patch_size, embed_dim, num_prefix_tokens, mean):
    description = describe_backbone(backbone)
    assert description.patch_size == patch_size
    assert description.embed_dim == embed_dim
    assert description.num_prefix_tokens == num_prefix_tokens
    assert description.mean == pytest.approx(mean)
    assert not description.is_random and "random" not in description.identity
    assert describe_backbone(backbone, normalization="imagenet").mean == (0.485, 0.456, 0.406)


def test_describe_backbone__builds_no_real_tensor_and_asks_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("describe_backbone used the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    backbones_module._create_meta_model.cache_clear()
    devices = []
    original = timm.create_model

    def spy(*args, **kwargs):
        model = original(*args, **kwargs)
        devices.extend({parameter.device.type for parameter in model.parameters()})
        return model

    monkeypatch.setattr(timm, "create_model", spy)
    start = time.perf_counter()
    random_state = torch.get_rng_state()
    description = describe_backbone("vit_giant_patch14_dinov2")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert devices == ["meta"]
    assert description.embed_dim == 1536
    # A billion parameters would take longer to draw; the bound leaves room for a busy machine.
    assert time.perf_counter() - start < 10


def test_describe_backbone__paper_names_stand_for_timm_ids():
    assert PAPER_BACKBONES["clip_base"] == "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k"
    by_name, by_id = describe_backbone("clip_base"), describe_backbone(PAPER_BACKBONES["clip_base"])
    assert by_name.identity == by_id.identity
    assert set(PAPER_BACKBONES) <= set(list_backbones()) and "vit_small_patch16_dinov3.lvd1689m" in list_backbones()


def test_identity__differs_with_everything_that_changes_tokens(tmp_path):
    weights = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for value, path in enumerate(weights):
        save_file({"x": torch.full((1,), float(value))}, path)
    descriptions = [
        describe_backbone("tiny_plain16"),
        describe_backbone("random:tiny_plain16"),
        describe_backbone("tiny_plain16", weights[0]),
        describe_backbone("tiny_plain16", weights[1]),
        describe_backbone("tiny_plain16", normalization="imagenet"),
        describe_backbone("tiny_plain16", norm=False),
        describe_backbone("tiny_dinov2"),
    ]
    assert len({description.identity for description in descriptions}) == len(descriptions)
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(weights[0].read_bytes())
    assert describe_backbone("tiny_plain16", copy).identity == descriptions[2].identity
    save_file({"x": torch.full((1,), 7.0)}, weights[0])
    assert describe_backbone("tiny_plain16", weights[0]).identity != descriptions[2].identity


def test_identity__ignores_a_normalization_that_changes_nothing():
    timm_style, imagenet = (describe_backbone("dinov2_small", normalization=name) for name in ("timm", "imagenet"))
    assert timm_style.identity == imagenet.identity


def test_random_backbones__say_so_everywhere():
    description = describe_backbone("random:tiny_dinov2")
    assert description.is_random and description.to_metadata()["is_random"]
    for text in (description.identity, description.label, description.backbone):
        assert "random" in text
    json.dumps(description.to_metadata())


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("dinov2_smal", "Unknown backbone 'dinov2_smal'; did you mean dinov2_small"),
        ("vti", r"Unknown backbone 'vti'; .*\? There is no folder vti with a config.json either"),
        ("random:vit_tiny_patch16_225", r"did you mean vit_tiny_patch16_224.*\?$"),
        ("vit_small_patch14_dinov2.nonsense", "did you mean vit_small_patch14_dinov2"),
        ("resnet50", "choose a `VisionTransformer` or `Eva` id"),
        # Its patches are of a ResNet's map, 16 pixels each.
        ("random:vit_tiny_r_s16_p8_224", "not a plain vision transformer"),
        ("./nowhere", "has no config.json"),
        ("local-dir:nowhere", "has no config.json"),
    ],
)
def test_describe_backbone__refuses_what_it_does_not_know(backbone, message):
    with pytest.raises(ValueError, match=message):
        describe_backbone(backbone)


def test_describe_backbone__refuses_missing_and_contradicting_weights(tmp_path):
    with pytest.raises(ValueError, match="No such weights file: .*gone.pth"):
        describe_backbone("tiny_plain16", tmp_path / "gone.pth")
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="asks for random weights, but a weights file is given"):
        describe_backbone("random:tiny_plain16", path)
    with pytest.raises(ValueError, match="publishes no weights for .*--backbone-weights FILE, or random:"):
        describe_backbone("tiny_unpublished")
    assert describe_backbone("random:tiny_unpublished").is_random


def _write_finetuned_folder(folder, architecture, **model_args):
    model = timm.create_model(architecture, num_classes=0, dynamic_img_size=True, **model_args)
    folder.mkdir()
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "model_args": {"num_classes": 0, "dynamic_img_size": True, **model_args},
        "pretrained_cfg": {
            "mean": [0.1, 0.2, 0.3],
            "std": [0.9, 0.8, 0.7],
            "num_classes": 0,
            "input_size": [3, 64, 64],
            "classifier": "head",
            "first_conv": "patch_embed.proj",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


@pytest.mark.parametrize("spell", ["local-dir:{}", "{}"])
def test_finetuned_folder__gives_the_tokens_of_timms_local_dir(tmp_path, spell):
    folder = tmp_path / "tuned"
    _write_finetuned_folder(folder, "tiny_plain16", img_size=96)
    extractor = create_extractor(spell.format(folder))
    assert extractor.mean == (0.1, 0.2, 0.3) and not extractor.is_random
    assert extractor.description.to_metadata()["backbone"] == "tuned"
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(1, 3, 48, 80)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.9, 0.8, 0.7])
    with torch.no_grad():
        expected = loaded.forward_features((images - mean[:, None, None]) / std[:, None, None])
    assert torch.equal(extractor(images).patch_tokens, expected[:, 1:])


def test_finetuned_folder__never_shadows_a_known_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write_finetuned_folder(tmp_path / "dinov2_small", "tiny_plain16")
    _write_finetuned_folder(tmp_path / "tuned", "tiny_plain16")
    assert describe_backbone("dinov2_small").embed_dim == 384
    assert describe_backbone("./dinov2_small").embed_dim == 16
    assert describe_backbone("tuned").embed_dim == 16


def test_describe_backbone__takes_timms_hub_names():
    assert describe_backbone("hf-hub:timm/vit_small_patch14_dinov2.lvd142m").identity == (
        describe_backbone("dinov2_small").identity
    )
    with pytest.raises(ValueError, match="Unknown backbone 'hf-hub:someone/"):
        describe_backbone("hf-hub:someone/else")


def test_finetuned_folder__names_what_is_missing(tmp_path):
    folder = tmp_path / "tuned"
    _write_finetuned_folder(folder, "tiny_plain16")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        describe_backbone(str(folder))
    (folder / "config.json").write_text('{"model_args": {}}')
    with pytest.raises(ValueError, match="names no `architecture`"):
        describe_backbone(str(folder), folder / "config.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_args": {"checkpoint_path": "extra.pth"}}, "model_args.checkpoint_path"),
        ({"model_args": {"pretrained": True}}, "model_args.pretrained"),
        ({"model_args": {"cache_dir": "elsewhere"}}, "model_args.cache_dir"),
        ({"model_args": {"block_fn": "anything"}}, "model_args.block_fn"),
        ({"model_args": {"depth": 1_000_000}}, "beyond any vision transformer"),
        ({"model_args": {"depth": 200, "embed_dim": 9600}}, "more than its weights file"),
        ({"model_args": {"patch_size": {"x": 1}}}, "expected a plain value"),
        ({"model_args": {"num_heads": 0}}, "cannot be built"),
        ({"model_args": {"patch_size": "large"}}, "cannot be built"),
        ({"model_args": ["depth"]}, "expected names with values"),
        ({"architecture": ["vit_tiny_patch16_224"]}, "names no `architecture`"),
        ({"pretrained_cfg": {"mean": [1e30, 0, 0]}}, "cannot normalise images"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "cannot normalise images"),
    ],
)
def test_describe_backbone__a_folder_from_a_stranger_gets_a_sentence_and_nothing_loaded(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "vit"
    _write_finetuned_folder(folder, "vit_tiny_patch16_224")
    # What timm's `checkpoint_path` would unpickle.
    (folder / "extra.pth").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=words):
        describe_backbone(str(folder))
    assert not Path("canary").exists()
