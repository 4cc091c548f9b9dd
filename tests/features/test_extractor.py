"""`create_extractor` against plain timm calls."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from fit3d_ns.features import create_extractor, create_token_model, describe_backbone


def _plain_timm_tokens(extractor, images, norm=True):
    """What timm's documented call gives for images that are already normalised and fit the grid."""
    mean, std = torch.tensor(extractor.mean)[:, None, None], torch.tensor(extractor.std)[:, None, None]
    model = timm.create_model(extractor.backbone.removeprefix("random:"), num_classes=0, dynamic_img_size=True)
    model.load_state_dict(extractor.model.state_dict())
    model.eval()
    with torch.no_grad():
        if norm:
            return model.forward_features((images - mean) / std)
        captured = []
        model.norm.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
        model.forward_features((images - mean) / std)
        return captured[0]


@pytest.mark.parametrize("norm", [True, False])
def test_extractor__equals_plain_timm_call(tiny_backbone, norm):
    extractor = create_extractor(tiny_backbone, norm=norm)
    rows, columns = 3, 5
    images = torch.rand(2, 3, rows * extractor.patch_size, columns * extractor.patch_size)
    tokens = extractor(images)
    expected = _plain_timm_tokens(extractor, images, norm)
    num_prefix = extractor.description.num_prefix_tokens
    assert tokens.patch_grid == (rows, columns)
    torch.testing.assert_close(tokens.prefix_tokens, expected[:, :num_prefix])
    torch.testing.assert_close(tokens.patch_tokens, expected[:, num_prefix:])
    torch.testing.assert_close(tokens.maps[1, 2, 4], expected[1, num_prefix + 2 * columns + 4])
    assert tokens.patch_tokens.dtype == torch.float32 and not tokens.patch_tokens.requires_grad
    assert extractor.embed_dim == tokens.patch_tokens.shape[-1] == 16
    assert not extractor.model.training


def test_extractor__resizes_and_normalises_by_itself(tiny_backbone):
    extractor = create_extractor(tiny_backbone)
    images = torch.rand(1, 3, 61, 45)
    patch_size = extractor.patch_size
    fitted = F.interpolate(images, size=(61 // patch_size * patch_size, 45 // patch_size * patch_size), mode="bilinear")
    expected = _plain_timm_tokens(extractor, fitted)[:, extractor.description.num_prefix_tokens :]
    tokens = extractor(images)
    assert tokens.patch_grid == (61 // patch_size, 45 // patch_size)
    torch.testing.assert_close(tokens.patch_tokens, expected)


def test_extractor__imagenet_normalization_is_an_option():
    images = torch.rand(1, 3, 28, 28)
    own, imagenet = (create_extractor("random:tiny_dinov2", normalization=name) for name in ("timm", "imagenet"))
    assert own.mean == (0.4, 0.5, 0.6) and imagenet.std == (0.229, 0.224, 0.225)
    # The same normalised image, made from two images, gives the same tokens.
    shifted = (images - torch.tensor(own.mean)[:, None, None]) / torch.tensor(own.std)[:, None, None]
    shifted = shifted * torch.tensor(imagenet.std)[:, None, None] + torch.tensor(imagenet.mean)[:, None, None]
    torch.testing.assert_close(own(images).patch_tokens, imagenet(shifted).patch_tokens)


def test_extractor__layers_are_those_of_timm(tiny_backbone):
    extractor = create_extractor(tiny_backbone, norm=False)
    captured = []
    for block in extractor.model.blocks:
        block.register_forward_hook(lambda module, inputs, output: captured.append(output))
    first, last = extractor.extract_layers(torch.rand(2, 3, 42, 48), [0, 1])
    num_prefix = extractor.description.num_prefix_tokens
    assert len(captured) == 2
    assert torch.equal(first.patch_tokens, captured[0][:, num_prefix:])
    assert torch.equal(last.prefix_tokens, captured[1][:, :num_prefix])


def test_random_backbones__are_the_same_whatever_the_global_seed(tiny_backbone):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = create_extractor(tiny_backbone)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = create_extractor(tiny_backbone)
    images = torch.rand(1, 3, 48, 42)
    assert torch.equal(first(images).patch_tokens, second(images).patch_tokens)
    assert first.weights_hash == second.weights_hash and first.is_random
    assert first(images).patch_tokens.std() > 0


def test_extractor__lower_precision_returns_float32():
    images = torch.rand(1, 3, 28, 42)
    exact = create_extractor("random:tiny_dinov2", dtype=torch.float64)(images)
    rough = create_extractor("random:tiny_dinov2", dtype=torch.bfloat16)(images)
    assert exact.patch_tokens.dtype == torch.float64 and rough.patch_tokens.dtype == torch.float32
    assert rough.prefix_tokens.dtype == torch.float32
    # bfloat16 keeps 8 bits, over two blocks.
    torch.testing.assert_close(rough.patch_tokens, exact.patch_tokens.float(), rtol=0.1, atol=0.1)


def test_extractor__refuses_8_bit_and_tiny_images():
    extractor = create_extractor("random:tiny_dinov2")
    with pytest.raises(ValueError, match="smaller than one patch of 14x14"):
        extractor(torch.rand(1, 3, 10, 28))
    # Called below the shape check of the tests, as a user would meet it.
    with pytest.raises(ValueError, match="divide 8-bit ones by 255"):
        extract = type(extractor).extract_layers
        getattr(extract, "__wrapped__", extract)(extractor, torch.zeros(1, 3, 28, 28, dtype=torch.uint8), [1])


def test_create_extractor__from_description_notices_changed_weights(tmp_path):
    model = timm.create_model("tiny_dinov2", num_classes=0, dynamic_img_size=True)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    description = describe_backbone("tiny_dinov2", tmp_path / "w.pth", "imagenet", norm=False)
    assert create_extractor(description).description.identity == description.identity
    torch.save({key: value + 1 for key, value in model.state_dict().items()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="weights of tiny_dinov2 changed while in use"):
        create_extractor(description)


def test_create_extractor__offline_machine_gets_one_sentence(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(
        ValueError, match="--backbone-weights FILE, or take .* toy_rooms_vit, .* or random:tiny_dinov2"
    ) as error:
        create_extractor("tiny_dinov2")
    assert "\n" not in str(error.value)


def test_create_extractor__takes_timms_earlier_download_without_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    model = timm.create_model("tiny_dinov2")
    folder = tmp_path / "models--nobody--tiny_dinov2"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(model.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    extractor = create_extractor("tiny_dinov2")
    state = extractor.model.state_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert "head.weight" in model.state_dict() and "head.weight" not in state
    (folder / "snapshots" / "abc" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="model.safetensors cannot be used .*; give --backbone-weights FILE"):
        create_extractor("tiny_dinov2")


def test_token_model__gradients_reach_every_trainable_parameter(tiny_backbone):
    for norm in (True, False):
        token_model = create_token_model(tiny_backbone, norm=norm)
        tokens = token_model(torch.rand(2, 3, 42, 48))
        # A random direction: the sum over channels of a layer norm's output has no gradient.
        (tokens.patch_tokens * torch.randn_like(tokens.patch_tokens)).sum().backward()
        trainable = {name for name, parameter in token_model.named_parameters() if parameter.requires_grad}
        reached = {name for name, parameter in token_model.named_parameters() if parameter.grad is not None}
        assert trainable == reached and len(trainable) > 20
        assert ("model.norm.weight" in trainable) == norm
        assert not any("head" in name for name in token_model.state_dict())


def test_token_model__freezes_what_pools_tokens_for_classifiers():
    token_model = create_token_model("random:test_vit3")
    frozen = {name for name, parameter in token_model.named_parameters() if not parameter.requires_grad}
    assert frozen and all(name.startswith(("model.attn_pool.", "model.fc_norm.")) for name in frozen)
    tokens = token_model(torch.rand(1, 3, 64, 64))
    (tokens.patch_tokens * torch.randn_like(tokens.patch_tokens)).sum().backward()
    missed = [name for name, parameter in token_model.named_parameters() if parameter.grad is None]
    assert set(missed) == frozen


def test_token_model__state_dict_is_timms_own(tiny_backbone):
    token_model = create_token_model(tiny_backbone)
    model = timm.create_model(tiny_backbone.removeprefix("random:"), num_classes=0)
    assert {name.removeprefix("model.") for name in token_model.state_dict()} == set(model.state_dict())
