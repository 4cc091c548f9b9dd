import pytest
import torch

from fit3d_ns.features import create_token_model
from fit3d_ns.features.adapters import SwinAdapter, add_adapter, add_lora, merge_lora


def test_adapter__starts_as_the_identity_on_any_map(tiny_backbone):
    plain = create_token_model(tiny_backbone)
    adapted = add_adapter(create_token_model(tiny_backbone), window_size=2)
    size = plain.description.patch_size
    images = torch.rand(2, 3, 3 * size, 5 * size)
    with torch.no_grad():
        expected, found = plain(images), adapted(images)
    assert torch.equal(found.patch_tokens, expected.patch_tokens)
    assert torch.equal(found.prefix_tokens, expected.prefix_tokens) and found.patch_grid == (3, 5)


def test_adapter__mixes_tokens_of_a_window_and_no_others():
    adapter = SwinAdapter(16, window_size=2)
    torch.nn.init.normal_(adapter.block.attn.proj.weight)
    torch.nn.init.normal_(adapter.block.mlp.fc2.weight)
    maps = torch.randn(1, 4, 6, 16)
    moved = maps.clone()
    moved[0, 1, 2] += torch.randn(16)
    with torch.no_grad():
        changed = (adapter(moved) - adapter(maps)).abs().amax(dim=-1)[0] > 1e-6
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[0:2, 2:4] = True
    assert torch.equal(changed, expected)


def test_adapter__alone_is_trained():
    adapted = add_adapter(create_token_model("random:tiny_plain16"))
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert trained and all(name.startswith("adapter.") for name in trained)
    with pytest.raises(ValueError, match="final norm"):
        add_adapter(create_token_model("random:tiny_plain16", norm=False))


def test_lora__without_peft_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"run `pip install '\.\[lora\]'` in the clone"):
        add_lora(create_token_model("random:tiny_plain16"))


def test_lora__trains_its_matrices_alone_and_merges_into_timms_own_modules():
    pytest.importorskip("peft")
    plain = create_token_model("random:tiny_plain16")
    token_model = add_lora(create_token_model("random:tiny_plain16"), rank=2, alpha=4.0)
    trained = {name: value for name, value in token_model.named_parameters() if value.requires_grad}
    # Two blocks, qkv and proj in each, two matrices for each; the patch embedding's `proj` is none of them.
    assert len(trained) == 8 and all(".attn." in name and ".lora_" in name for name in trained)
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(token_model(images).patch_tokens, plain(images).patch_tokens)
        for value in trained.values():
            value.normal_(0.0, 0.3)
        expected = token_model(images).patch_tokens
        merged = merge_lora(token_model)
        torch.testing.assert_close(merged(images).patch_tokens, expected, rtol=1e-4, atol=1e-4)
    assert merged.model.state_dict().keys() == plain.model.state_dict().keys()
