"""Weights as people publish them, and the sentences for those that do not fit."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file

from fit3d_ns.features import create_extractor
from fit3d_ns.features.weights import load_weights


def _create(name, seed=1, **kwargs):
    """A tiny model whose every number is random: fresh norms and biases would hide what was not loaded."""
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def _assert_same(loaded, expected, **tolerances):
    for (name, actual), target in zip(loaded.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, target, **tolerances, msg=lambda text, name=name: f"{name}: {text}")


WRAPPERS = {
    "bare": lambda state: state,
    "FiT3D": lambda state: {"model": state, "args": argparse.Namespace(lr=1e-5), "epoch": 0},
    "timm": lambda state: {"state_dict": state, "arch": "vit", "version": 2},
    "timm with EMA": lambda state: {
        "state_dict": {key: value * 0 for key, value in state.items()},
        "state_dict_ema": state,
    },
    "DeepSpeed": lambda state: {"module": state},
    "DDP": lambda state: {"module." + key: value for key, value in state.items()},
    "compiled DDP": lambda state: {"_orig_mod.module." + key: value for key, value in state.items()},
    "teacher": lambda state: {"teacher": {"backbone." + key: value for key, value in state.items()}},
    "with a head": lambda state: {**state, "head.weight": torch.zeros(5, 16), "head.bias": torch.zeros(5)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["tiny_dinov2_reg", "tiny_dinov3"])
def test_load_weights__understands_each_wrapper(tmp_path, name, wrapper):
    source, model = _create(name, seed=1), _create(name, seed=2)
    torch.save(WRAPPERS[wrapper](source.state_dict()), tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    _assert_same(model, source, rtol=0, atol=0)


def test_load_weights__widens_half_precision(tmp_path, tiny_backbone):
    name = tiny_backbone.removeprefix("random:")
    source, model = _create(name, seed=1), _create(name, seed=2)
    save_file({key: value.half() for key, value in source.state_dict().items()}, tmp_path / "weights.safetensors")
    load_weights(model, tmp_path / "weights.safetensors")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    # Half precision keeps 11 bits.
    _assert_same(model, source, rtol=2**-11, atol=1e-7)


def test_load_weights__dinov2_names_with_mask_token(tmp_path):
    """DINOv2's hub and Splat-and-Distill keep a mask token beside names that timm shares."""
    source, model = _create("tiny_dinov2", seed=1), _create("tiny_dinov2", seed=2)
    torch.save({**source.state_dict(), "mask_token": torch.zeros(1, 16)}, tmp_path / "snd.pth")
    load_weights(model, tmp_path / "snd.pth")
    _assert_same(model, source, rtol=0, atol=0)


@pytest.mark.parametrize("with_mask_token", [True, False])
def test_load_weights__dinov2_register_names(tmp_path, with_mask_token):
    """DINOv2 adds a position to the class token, none to registers; timm keeps the sum as class token."""
    source, model = _create("tiny_dinov2_reg", seed=1), _create("tiny_dinov2_reg", seed=2)
    hub = dict(source.state_dict())
    position = torch.randn(1, 1, 16)
    hub["register_tokens"] = hub.pop("reg_token")
    hub["pos_embed"] = torch.cat([position, hub["pos_embed"]], dim=1)
    hub["cls_token"] = hub["cls_token"] - position
    if with_mask_token:
        hub["mask_token"] = torch.zeros(1, 16)
    torch.save(hub, tmp_path / "hub.pth")
    load_weights(model, tmp_path / "hub.pth")
    _assert_same(model, source)


def test_load_weights__dinov3_names(tmp_path):
    source, model = _create("tiny_dinov3", seed=1), _create("tiny_dinov3", seed=2)
    renames = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    hub = {}
    for key, value in source.state_dict().items():
        for ours, theirs in renames.items():
            key = key.replace(ours, theirs)
        hub[key] = value
    assert "blocks.0.ls1.gamma" in hub and "storage_tokens" in hub
    hub |= {"mask_token": torch.zeros(1, 16), "rope_embed.periods": torch.ones(2)}
    torch.save(hub, tmp_path / "dinov3.pth")
    load_weights(model, tmp_path / "dinov3.pth")
    _assert_same(model, source, rtol=0, atol=0)


def test_load_weights__mae_pretraining_file_without_its_decoder(tmp_path):
    source, model = _create("tiny_plain16", seed=1), _create("tiny_plain16", seed=2)
    extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    torch.save({"model": {**source.state_dict(), **extra}}, tmp_path / "mae.pth")
    load_weights(model, tmp_path / "mae.pth")
    _assert_same(model, source, rtol=0, atol=0)


def test_load_weights__resamples_position_embedding_to_the_models_grid(tmp_path):
    source, model = _create("tiny_plain16", seed=1), _create("tiny_plain16", seed=2, img_size=96)
    state = source.state_dict()
    # A ramp over rows: its samples at the new grid are known up to the border, where bicubic has no neighbours.
    rows = (torch.arange(4) + 0.5) / 4
    state["pos_embed"][:, 1:] = rows.repeat_interleave(4)[None, :, None]
    torch.save(state, tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    assert torch.equal(model.pos_embed[:, :1], state["pos_embed"][:, :1])
    grid = model.pos_embed[0, 1:, 0].detach().reshape(6, 6)
    torch.testing.assert_close(grid[:, 0], grid[:, 5])
    expected = (torch.arange(6) + 0.5) / 6
    # timm resamples with bicubic, which overshoots a clamped ramp near the border.
    torch.testing.assert_close(grid[2:4, 0], expected[2:4], rtol=0, atol=0.01)
    torch.testing.assert_close(grid[:, 0], expected, rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({"embed_dim": 24}, {}, r"`cls_token` is \[1, 1, 24\] in the file, \[1, 1, 16\] in the model"),
        ({"patch_size": 8}, {}, r"`patch_embed.proj.weight` is \[16, 3, 8, 8\] in the file, \[16, 3, 16, 16\] in the"),
        ({"depth": 1}, {}, r"`blocks.1.norm1.weight` is missing in the file, \[16\] in the model; .* and \d+ more"),
        ({}, {"depth": 1}, r"`blocks.1.norm1.weight` is \[16\] in the file, absent from the model"),
        ({}, {"reg_tokens": 4}, r"`reg_token` is missing in the file, \[1, 4, 16\] in the model"),
    ],
)
def test_load_weights__names_first_mismatches_of_another_architecture(tmp_path, source, target, message):
    torch.save(_create("tiny_plain16", **source).state_dict(), tmp_path / "other.pth")
    model = _create("tiny_plain16", seed=2, **target)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"other.pth does not fit backbone tiny_plain16.*{message}"):
        load_weights(model, tmp_path / "other.pth")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_load_weights__other_family(tmp_path):
    torch.save(_create("tiny_dinov3").state_dict(), tmp_path / "eva.pth")
    with pytest.raises(ValueError, match="does not fit backbone tiny_dinov2"):
        load_weights(_create("tiny_dinov2"), tmp_path / "eva.pth")


class _Code:
    def __reduce__(self):
        return (print, ("this must never run",))


def _write_truncated(path):
    torch.save(_create("tiny_plain16").state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _write_truncated_safetensors(path):
    save_file(_create("tiny_plain16").state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _write_nan(path):
    state = _create("tiny_plain16").state_dict()
    state["blocks.1.mlp.fc1.bias"][3] = torch.nan
    torch.save(state, path)


def _write_lora(path):
    state = _create("tiny_plain16").state_dict()
    torch.save({**state, "blocks.0.attn.qkv.lora_A.default.weight": torch.zeros(4, 16)}, path)


def _write_two(path):
    state = _create("tiny_plain16").state_dict()
    torch.save({f"{side}.{key}": value for side in ("student", "teacher_") for key, value in state.items()}, path)


BROKEN = {
    "truncated.pth": (_write_truncated, "cannot be read .*; get the file again"),
    "truncated.safetensors": (_write_truncated_safetensors, "cannot be read .*; get the file again"),
    "text.pth": (lambda path: path.write_text("not weights"), "text.pth .*(cannot be read|not a plain checkpoint)"),
    "empty.pth": (lambda path: path.write_bytes(b""), "empty.pth cannot be read"),
    "code.pth": (lambda path: torch.save({"model": _Code()}, path), "not a plain checkpoint"),
    "list.pth": (lambda path: torch.save([1, 2], path), "holds no tensors by name"),
    "nan.pth": (_write_nan, "holds NaN or infinite values in `blocks.1.mlp.fc1.bias`"),
    "lora.pth": (_write_lora, "unmerged LoRA matrices; merge them"),
    "two.pth": (_write_two, "several backbones"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_load_weights__one_sentence_for_broken_files(tmp_path, capsys, name):
    write, message = BROKEN[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(_create("tiny_plain16"), tmp_path / name)
    assert "\n" not in str(error.value)
    assert "this must never run" not in capsys.readouterr().out


def test_create_extractor__uses_the_weights_it_is_given(tmp_path):
    source = _create("tiny_dinov2")
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    extractor = create_extractor("tiny_dinov2", tmp_path / "weights.pth")
    _assert_same(extractor.model, source, rtol=0, atol=0)
    assert not extractor.is_random


# transformers' names of each family, written from its documentation, and what they are in the original files.
VIT_NAMES = [
    ("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."), ("blocks.", "encoder.layer."),
    (".attn.qkv.", ".attention.attention.{}."), (".attn.proj.", ".attention.output.dense."),
]  # fmt: skip
PLAIN_NAMES = [
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".mlp.fc1.", ".intermediate.dense."),
]
PLAIN_NAMES += [(".mlp.fc2.", ".output.dense."), ("norm.", "layernorm.")]
DINOV2_NAMES = [
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    ("norm.", "layernorm."),
]
DINOV3_NAMES = [
    ("cls_token", "embeddings.cls_token"), ("reg_token", "embeddings.register_tokens"),
    ("patch_embed.proj.", "embeddings.patch_embeddings."), ("blocks.", "layer."),
    (".attn.qkv.", ".attention.{}."), (".attn.proj.", ".attention.o_proj."), (".mlp.fc1.", ".mlp.up_proj."),
    (".mlp.fc2.", ".mlp.down_proj."), (".gamma_1", ".layer_scale1.lambda1"), (".gamma_2", ".layer_scale2.lambda1"),
]  # fmt: skip


def _rename_as_transformers(state, names, parts, prefix):
    renamed = {}
    for key, value in state.items():
        for ours, theirs in names:
            # `norm.` is the last norm only.
            key = theirs + key.removeprefix(ours) if ours == "norm." and key.startswith(ours) else key
            key = key.replace(ours, theirs) if ours != "norm." else key
        if "{}" in key:
            renamed |= {prefix + key.format(part): rows for part, rows in zip(parts, value.chunk(3), strict=True)}
        else:
            renamed[prefix + key] = value
    return renamed


@pytest.mark.parametrize(
    ("name", "names", "prefix"),
    [
        ("tiny_plain16", VIT_NAMES + PLAIN_NAMES, "vit."),
        ("tiny_plain16", VIT_NAMES + PLAIN_NAMES, ""),
        ("tiny_dinov2", VIT_NAMES + DINOV2_NAMES, ""),
        ("tiny_dinov2", VIT_NAMES + DINOV2_NAMES, "dinov2."),
        ("tiny_dinov3", DINOV3_NAMES, ""),
        ("tiny_dinov3", DINOV3_NAMES, "model."),
    ],
)
def test_load_weights__names_of_transformers(tmp_path, name, names, prefix):
    source, model = _create(name, seed=1), _create(name, seed=2)
    parts = ("q_proj", "k_proj", "v_proj") if name == "tiny_dinov3" else ("query", "key", "value")
    state = _rename_as_transformers(source.state_dict(), names, parts, prefix)
    assert not any("attn." in key or "blocks." in key for key in state)
    extra = {"embeddings.mask_token": torch.zeros(1, 16)} if name != "tiny_plain16" else {}
    extra |= {"pooler.dense.weight": torch.ones(16, 16), "pooler.dense.bias": torch.ones(16)}
    if name == "tiny_dinov3":
        # Its queries and values have biases, which are 0 in the published files.
        extra |= {f"layer.0.attention.{part}.bias": torch.zeros(16) for part in ("q_proj", "v_proj", "o_proj")[:2]}
    state |= {prefix + key: value for key, value in extra.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    load_weights(model, tmp_path / "model.safetensors")
    _assert_same(model, source, rtol=0, atol=0)


def test_load_weights__transformers_dinov2_with_registers(tmp_path):
    source, model = _create("tiny_dinov2_reg", seed=1), _create("tiny_dinov2_reg", seed=2)
    hub = dict(source.state_dict())
    position = torch.randn(1, 1, 16)
    tokens = {
        "embeddings.register_tokens": hub.pop("reg_token"),
        "embeddings.position_embeddings": torch.cat([position, hub.pop("pos_embed")], dim=1),
        "embeddings.cls_token": hub.pop("cls_token") - position,
        "embeddings.mask_token": torch.zeros(1, 16),
    }
    state = _rename_as_transformers(hub, VIT_NAMES + DINOV2_NAMES, ("query", "key", "value"), "") | tokens
    torch.save(state, tmp_path / "pytorch_model.bin")
    load_weights(model, tmp_path / "pytorch_model.bin")
    _assert_same(model, source)


def test_load_weights__refuses_attention_biases_that_would_be_lost(tmp_path):
    source = _create("tiny_dinov3", seed=1)
    state = _rename_as_transformers(source.state_dict(), DINOV3_NAMES, ("q_proj", "k_proj", "v_proj"), "")
    state["layer.1.attention.v_proj.bias"] = torch.ones(16)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="a bias `blocks.1.attn.qkv.bias` that the backbone lacks; .*qkvb"):
        load_weights(_create("tiny_dinov3", seed=2), tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_load_weights__names_git_lfs_pointers(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer.*git lfs pull"):
        load_weights(_create("tiny_plain16"), tmp_path / name)
