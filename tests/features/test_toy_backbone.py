"""The backbone in the package: what it is, and that its features mean something."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from fit3d_ns.features import BackboneDescription, create_extractor, describe_backbone
from fit3d_ns.features.sources import TOY_BACKBONE, TOY_FOLDER, list_backbones
from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.synthetic.rooms import build_room, render_room, walk_through


def test_toy_backbone__is_found_without_network_and_is_small(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    description = describe_backbone(TOY_BACKBONE)
    assert (description.patch_size, description.embed_dim, description.num_blocks) == (8, 192, 6)
    assert not description.is_random and description.label == description.architecture == TOY_BACKBONE
    assert TOY_BACKBONE in list_backbones()
    # Files that name it hold on other machines, too.
    assert description.place is None
    assert BackboneDescription.from_metadata(description.to_metadata()).with_weights(None) == description
    assert (TOY_FOLDER / "model.safetensors").stat().st_size <= 4_000_000
    random = describe_backbone(f"random:{TOY_BACKBONE}")
    assert random.is_random and random.identity != description.identity
    assert random.find_differences(description) == [
        f"weights_hash {random.weights_hash} against {description.weights_hash}"
    ]


def test_toy_backbone__timm_loads_the_folder_to_the_same_tokens():
    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    model = timm.create_model(f"local-dir:{TOY_FOLDER}", pretrained=True).eval()
    with torch.no_grad():
        expected = model.forward_features((image - 0.5) / 0.5)[:, 1:]
    found = create_extractor(TOY_BACKBONE)(image)
    torch.testing.assert_close(found.patch_tokens, expected, rtol=1e-4, atol=1e-4)
    # A folder of the toy's shape, as fine-tuning writes it, is a backbone of the same architecture.
    by_folder, by_name = describe_backbone(f"local-dir:{TOY_FOLDER}"), describe_backbone(TOY_BACKBONE)
    assert by_folder.identity == by_name.identity and by_folder.model_args == by_name.model_args == ()


@pytest.fixture(scope="module")
def views():
    """Four views of two rooms, with the class of each patch; 255 on borders between classes."""
    images, labels = [], []
    lens = Lens(110.0, 110.0, 80.0, 60.0, 160, 120, "pinhole", ())
    for seed in (1, 2):
        room = build_room(np.random.default_rng(seed))
        for pose in walk_through(room.size, 4):
            view = render_room(room, pose, lens)
            patches = view.labels.unfold(0, 8, 8).unfold(1, 8, 8).flatten(2)
            is_whole = (patches == patches[..., :1]).all(dim=-1)
            images.append(view.image.permute(2, 0, 1) / 255.0)
            labels.append(torch.where(is_whole, patches[..., 0], 255).flatten())
    return torch.stack(images), torch.stack(labels).long()


def test_toy_backbone__separates_classes_across_rooms_better_than_random_weights(views):
    images, labels = views
    accuracies = {}
    for name in (TOY_BACKBONE, f"random:{TOY_BACKBONE}"):
        tokens = create_extractor(name)(images).patch_tokens
        tokens = F.normalize(tokens - tokens[:4].flatten(0, 1).mean(dim=0), dim=-1)
        known = [index for index in labels[:4].unique().tolist() if index != 255 and (labels[4:] == index).any()]
        means = F.normalize(torch.stack([tokens[:4][labels[:4] == index].mean(dim=0) for index in known]), dim=-1)
        found = torch.tensor(known)[(tokens[4:] @ means.T).argmax(dim=-1)]
        # Every class counts the same, so that walls and floors do not decide.
        hits = [(found == index)[labels[4:] == index].float().mean() for index in known]
        accuracies[name] = float(torch.stack(hits).mean())
    assert accuracies[TOY_BACKBONE] > accuracies[f"random:{TOY_BACKBONE}"] + 0.2
