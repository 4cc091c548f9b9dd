"""What comes out must load in timm with no other argument, in our own tools, and as FiT3D's state dicts do."""

import json
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import hubconf
from fit3d_ns.features import TokenModel, create_extractor, create_token_model, describe_backbone
from fit3d_ns.features.adapters import add_adapter
from fit3d_ns.finetuning.backbone_folder import (
    UNKNOWN,
    find_licence,
    find_strictest,
    list_licences,
    load_finetuned,
    save_finetuned,
    write_card,
)
from tests.finetuning.finetuning_scene import BACKBONE


@pytest.fixture
def trained():
    """A backbone whose weights differ from every fresh one's."""
    token_model = create_token_model(BACKBONE)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in token_model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return token_model.eval()


def save(folder, trained, **settings):
    save_finetuned(folder, trained, trained.model.state_dict(), "# card", find_licence(trained) or UNKNOWN, **settings)


def test_folder__timm_loads_it_to_the_bit_for_another_non_square_size(tmp_path, trained):
    save(tmp_path / "out", trained)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.rand(2, 3, 24, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), trained.model.forward_features(images))
        assert torch.equal(model(images), trained.model(images))
    assert model.pretrained_cfg["mean"] == [0.4, 0.5, 0.6] and model.num_classes == 0
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["mean"]) == (0.4, 0.5, 0.6) and tuple(data["std"]) == (0.2, 0.25, 0.3)


def test_folder__timm_builds_it_with_the_positions_that_it_has(tmp_path):
    """timm's checkpoint of this size has 10x10 positions, its constructor alone would make 14x14 of them."""
    token_model = create_token_model("random:test_vit").eval()
    save(tmp_path / "out", token_model)
    images = torch.rand(1, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    opened = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(opened.forward_features(images), token_model.model.forward_features(images))
    assert opened.pos_embed.shape[1] == token_model.description.num_prefix_tokens + 100


def test_folder__keeps_nothing_of_an_earlier_run(tmp_path, trained):
    save(tmp_path / "out", trained, add_fit3d=True)
    save(tmp_path / "out", add_adapter(create_token_model(BACKBONE), window_size=2))
    save(tmp_path / "out", trained)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    create_extractor(str(tmp_path / "out"))


def test_folder__timm_puts_a_new_classifier_on_it(tmp_path, trained):
    save(tmp_path / "out", trained)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=10)
    assert model(torch.rand(1, 3, 24, 24)).shape == (1, 10)
    kept = trained.model.state_dict()
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    assert own.keys() == kept.keys() and all(torch.equal(value, kept[name]) for name, value in own.items())


def test_folder__transformers_loads_it_with_its_preprocessing(tmp_path, trained):
    transformers = pytest.importorskip("transformers")
    save(tmp_path / "out", trained)
    images = torch.rand(1, 3, 24, 56, generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(model(images).last_hidden_state, trained.model.forward_features(images))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    grey = Image.new("RGB", (80, 60), (128, 128, 128))
    (pixels,) = processor(grey, return_tensors="pt")["pixel_values"]
    expected = (128 / 255 - torch.tensor(trained.description.mean)) / torch.tensor(trained.description.std)
    torch.testing.assert_close(pixels.mean(dim=(1, 2)), expected, atol=1e-4, rtol=0)
    extract = transformers.pipeline("image-feature-extraction", model=str(tmp_path / "out"), image_processor=processor)
    tokens = torch.tensor(extract(grey))
    with torch.no_grad():
        torch.testing.assert_close(tokens, trained.model.forward_features(pixels[None]), atol=1e-4, rtol=0)


def test_folder__can_be_exported(tmp_path, trained):
    save(tmp_path / "out", trained)
    model = load_finetuned(tmp_path / "out")
    images = torch.rand(1, 3, 24, 56, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(model, (images,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images), atol=1e-4, rtol=0)


def test_folder__is_a_backbone_of_ours(tmp_path, trained):
    save(tmp_path / "out", trained)
    description = describe_backbone(str(tmp_path / "out"))
    assert (description.mean, description.std) == (trained.description.mean, trained.description.std)
    assert not description.is_random and description.weights_hash != trained.description.weights_hash
    images = torch.rand(1, 3, 40, 24)
    with torch.no_grad():
        expected = trained(images)
    tokens = create_extractor(str(tmp_path / "out"))(images)
    assert torch.equal(tokens.patch_tokens, expected.patch_tokens)
    model = load_finetuned(tmp_path / "out")
    assert not model.training and model.pretrained_cfg["std"] == (0.2, 0.25, 0.3)
    assert all(torch.equal(value, trained.model.state_dict()[name]) for name, value in model.state_dict().items())


def test_folder__other_means_are_kept(tmp_path):
    imagenet = create_token_model(BACKBONE, normalization="imagenet")
    save(tmp_path / "out", imagenet)
    assert load_finetuned(tmp_path / "out").pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_folder__fit3d_state_dict_is_bare_and_loads(tmp_path, trained):
    save(tmp_path / "out", trained, add_fit3d=True)
    state_dict = torch.load(tmp_path / "out" / "fit3d.pth", weights_only=True)
    plain = timm.create_model("finetuning_vit", num_classes=0, dynamic_img_size=True)
    plain.load_state_dict(state_dict, strict=True)
    extractor = create_extractor("finetuning_vit", tmp_path / "out" / "fit3d.pth")
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(extractor(images).patch_tokens, trained(images).patch_tokens)


def test_folder__weights_are_safetensors_alone_and_nothing_points_elsewhere(tmp_path, trained):
    save(tmp_path / "out", trained)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == trained.model.state_dict().keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "finetuning_vit" and config["num_classes"] == 0
    assert config["model_args"] == {"img_size": [32, 32], "dynamic_img_size": True}
    assert "nobody" not in json.dumps(config) and "hf_hub_id" not in json.dumps(config)


def test_folder__states_the_licence_of_weights_whose_licence_is_known(tmp_path, trained):
    """timm's own download has timm's; a file of the user's may hold anything, whatever timm says of its name."""
    kinds = {
        "published": (replace(trained.description, is_random=False, backbone="finetuning_vit"), "apache-2.0"),
        "own file": (replace(trained.description, is_random=False, weights=tmp_path / "own.pth"), None),
        "random": (trained.description, None),
    }
    for name, (description, licence) in kinds.items():
        model = TokenModel(trained.model, description)
        save(tmp_path / name, model)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["pretrained_cfg"].get("license") == licence == find_licence(model)
    # Fine-tuned once more, it is still derived from the first original.
    for name, licence in (("published", "apache-2.0"), ("own file", None)):
        assert find_licence(create_token_model(str(tmp_path / name))) == licence
    again = create_token_model(str(tmp_path / "published"), tmp_path / "own file" / "model.safetensors")
    assert find_licence(again) is None


def write_front(trained, layouts, stated):
    """The front matter that hubs read, as its YAML says it, and the whole card."""
    report = {"num_images": 1, "steps": 1, "images_per_step": 1, "seconds": 1.0, "loss_first": 1.0, "loss_last": 1.0}
    settings = {"trainable": {"train": "all"}, "anchors": {"wise_ft": []}}
    licences = list_licences(trained, layouts, stated)
    card = write_card(trained.description, {**report, "settings": settings, "versions": {}}, licences, ["a"])
    return yaml.safe_load(card.split("---\n")[1]), card


@pytest.mark.parametrize(
    ("base", "layouts", "stated", "expected"),
    [
        ("apache-2.0", {"colmap"}, None, {"license": "unknown"}),
        ("apache-2.0", {"colmap"}, "cc0-1.0", {"license": "apache-2.0"}),
        ("mit", {"nerfstudio"}, "cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
        ("apache-2.0", {"nerfstudio"}, "my-terms", {"license": "other", "license_name": "my-terms"}),
        ("apache-2.0", {"scannetpp"}, None, {"license": "other", "license_name": "scannetpp-terms-of-use"}),
        ("dinov3-license", {"scannetpp"}, None, {"license": "other", "license_name": "scannetpp-terms-of-use"}),
        ("dinov3-license", {"colmap"}, "cc-by-4.0", {"license": "other", "license_name": "dinov3-license"}),
        ("apache-2.0", {"scannetpp", "colmap"}, None, {"license": "unknown"}),
        (None, {"colmap"}, "cc0-1.0", {"license": "unknown"}),
    ],
)
def test_card__names_the_strictest_licence_and_never_the_originals_alone(trained, base, layouts, stated, expected):
    trained.model.pretrained_cfg = {**trained.model.pretrained_cfg, "license": base}
    trained.description = replace(trained.description, is_random=False, backbone="finetuning_vit")
    front, card = write_front(trained, layouts, stated)
    assert expected.items() <= front.items() and ("license_link" in front) == ("license_name" in front)
    assert front.get("datasets") == (["scannetpp"] if "scannetpp" in layouts else None)
    assert (front["library_name"], front["pipeline_tag"]) == ("timm", "image-feature-extraction")
    if base == "dinov3-license":
        # What was agreed to travels along in any case.
        assert "[dinov3-license](https://ai.meta.com/" in card


def test_card__names_the_original_only_where_the_hub_has_it(trained, tmp_path):
    published = replace(trained.description, is_random=False, architecture="vit_small_patch14_dinov2.lvd142m")
    front, _ = write_front(TokenModel(trained.model, published), {"colmap"}, None)
    assert front["base_model"] == "timm/vit_small_patch14_dinov2.lvd142m" and front["base_model_relation"] == "finetune"
    front, _ = write_front(TokenModel(trained.model, replace(published, weights=tmp_path / "a.pth")), {"colmap"}, None)
    assert "base_model" not in front and front["license"] == "unknown"


def test_folder__fine_tuned_again_keeps_what_its_first_data_asked_for(tmp_path, trained):
    licence = find_strictest(["apache-2.0", "cc-by-nc-4.0"])
    save_finetuned(tmp_path / "out", trained, trained.model.state_dict(), "# card", licence)
    again = create_token_model(str(tmp_path / "out"))
    assert find_strictest(list_licences(again, {"colmap"}, "cc0-1.0")) == "cc-by-nc-4.0"


def test_load_finetuned__says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_finetuned(tmp_path)


def test_folder__with_an_adapter_opens_in_our_tools_and_never_as_the_original(tmp_path):
    adapted = add_adapter(create_token_model(BACKBONE), window_size=2).eval()
    torch.nn.init.normal_(adapted.adapter.block.mlp.fc2.weight)
    save(tmp_path / "out", adapted)
    images = torch.rand(1, 3, 24, 40)
    extractor = create_extractor(f"local-dir:{tmp_path / 'out'}")
    with torch.no_grad():
        assert torch.equal(extractor(images).patch_tokens, adapted(images).patch_tokens)
    assert not torch.equal(create_extractor(BACKBONE)(images).patch_tokens, extractor(images).patch_tokens)
    before = describe_backbone(str(tmp_path / "out")).identity
    torch.nn.init.normal_(adapted.adapter.block.mlp.fc2.weight)
    save(tmp_path / "out", adapted)
    assert describe_backbone(str(tmp_path / "out")).identity != before
    for load in (load_finetuned, hubconf.fit3d):
        with pytest.raises(ValueError, match="create_extractor"):
            load(str(tmp_path / "out"))
    (tmp_path / "out" / "adapter.safetensors").unlink()
    with pytest.raises(ValueError, match="has no adapter.safetensors"):
        describe_backbone(str(tmp_path / "out"))


def test_folder__of_the_packages_own_backbone_loads_in_timm_and_is_of_its_architecture(tmp_path):
    toy = create_token_model("toy_rooms_vit").eval()
    save(tmp_path / "out", toy)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), toy.model.forward_features(images))
    found = describe_backbone(str(tmp_path / "out"))
    assert (found.architecture, found.model_args) == (toy.description.architecture, ())
    assert find_licence(toy) == find_licence(create_token_model(str(tmp_path / "out"))) == "apache-2.0"
