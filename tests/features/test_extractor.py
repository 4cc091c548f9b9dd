"""`create_extractor` against plain timm calls."""

import pytest
import timm
import torch

from fit3d_ns.features import create_extractor


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
