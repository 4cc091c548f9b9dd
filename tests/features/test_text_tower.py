"""Words in scenes of CLIP and SigLIP: tiny untrained models of transformers, made here and read as folders."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fit3d_ns.features import describe_backbone
from fit3d_ns.features.text_tower import load_text_tower

transformers = pytest.importorskip("transformers")
CLIP, WIDTH, PATCH = "random:vit_xsmall_patch16_clip_224", 256, 16
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def write_model(folder: Path, kind: str = "clip", width: int = WIDTH, side: int = 32) -> Path:
    """A CLIP or SigLIP whose tokenizer knows letters, and the words `chair` and `lamp` as one token each."""
    letters = [chr(code) for code in range(97, 123)]
    merges = ["c h", "ch a", "cha i", "chai r</w>", "l a", "la m", "lam p</w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    text = {"vocab_size": len(vocabulary), "hidden_size": 32, "max_position_embeddings": 8, **SIZES}
    text |= {"bos_token_id": len(words), "eos_token_id": len(words) + 1, "pad_token_id": len(words) + 1}
    vision = {"hidden_size": width, "image_size": side, "patch_size": PATCH, **SIZES}
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = transformers.CLIPModel(config)
    else:
        text |= {"projection_size": width}
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip__the_class_tokens_own_vector_fits_as_the_model_says(tmp_path: Path) -> None:
    """With images' class tokens for patch tokens, the cosines are those of the model's own vectors."""
    folder = write_model(tmp_path / "clip")
    tower = load_text_tower(str(folder), describe_backbone(CLIP))
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)(["a chair"], return_tensors="pt")
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(**words, pixel_values=pixels)
        class_tokens = model.vision_model(pixels).pooler_output
    expected = found.image_embeds @ found.text_embeds[0]
    torch.testing.assert_close(tower(class_tokens, "a chair"), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tower(class_tokens, "a lamp"), expected, atol=1e-3)


def test_siglip__an_image_of_one_patch_fits_as_the_model_says(tmp_path: Path) -> None:
    """Its one token is all that the query can read."""
    folder = write_model(tmp_path / "siglip", "siglip", 768, PATCH)
    tower = load_text_tower(str(folder), describe_backbone("random:vit_base_patch16_siglip_224"))
    model = transformers.SiglipModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = tokenizer(["lamp"], padding="max_length", max_length=8, return_tensors="pt")
    pixels = torch.rand(3, 3, PATCH, PATCH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(input_ids=words["input_ids"], pixel_values=pixels)
        tokens = model.vision_model(pixels).last_hidden_state
    assert tokens.shape == (3, 1, 768)
    expected = found.image_embeds @ found.text_embeds[0]
    torch.testing.assert_close(tower(tokens[:, 0], "lamp"), expected, rtol=1e-4, atol=1e-5)


def test_load__says_in_a_sentence_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("toy_rooms_vit", "random:clip_base"):
        with pytest.raises(ValueError, match="has no text tower"):
            load_text_tower("model", describe_backbone(name))
    with pytest.raises(ValueError, match="opens as no model of transformers"):
        load_text_tower(str(tmp_path), describe_backbone(CLIP))
    other = write_model(tmp_path / "other", width=64)
    with pytest.raises(ValueError, match="width 64 and patch 16, not 256 and 16 as vit_xsmall"):
        load_text_tower(str(other), describe_backbone(CLIP))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="opens as no model of transformers: .*transformers"):
        load_text_tower(str(other), describe_backbone(CLIP))
