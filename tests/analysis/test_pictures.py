"""Pictures, looked at pixel by pixel."""

import numpy as np
import torch
from PIL import Image

from fit3d_ns.analysis.pca import apply_pca, fit_pca, map_to_colours
from fit3d_ns.analysis.pictures import compose_panel, draw_pca, save_picture, upscale


def fill(height, width, *rgb):
    return torch.tensor(rgb).expand(height, width, 3).contiguous()


def test_upscale__shows_each_token_where_its_patch_is():
    tokens = torch.arange(6.0).reshape(2, 3, 1)
    expected = np.kron(tokens[..., 0].numpy(), np.ones((4, 4)))
    np.testing.assert_array_equal(upscale(tokens, (8, 12))[..., 0], expected)


def test_compose_panel__puts_every_image_where_it_belongs(tmp_path):
    red, green, blue = fill(5, 7, 1.0, 0.0, 0.0), fill(3, 4, 0.0, 1.0, 0.0), fill(6, 7, 0.0, 0.0, 1.0)
    panel = np.array(compose_panel([[red, green], [blue, None]], ["i", "l"], ["", ""]))
    # Gaps are 6 pixels wide, strips for labels 18 high.
    assert panel.shape == (6 + 18 + 18 + 5 + 6 + 18 + 6 + 6, 6 + 7 + 6 + 4 + 6, 3)
    top = 6 + 18 + 18
    assert (panel[top : top + 5, 6:13] == [255, 0, 0]).all()
    assert (panel[top : top + 3, 19:23] == [0, 255, 0]).all()
    assert (panel[top + 5 + 6 + 18 : top + 5 + 6 + 18 + 6, 6:13] == [0, 0, 255]).all()
    assert (panel[top + 3 : top + 5, 19:23] == 255).all()
    assert (panel[6:24, 6:13] < 128).any(), "the label must have left ink"
    save_picture(compose_panel([[red]]), tmp_path / "new" / "panel.png")
    assert Image.open(tmp_path / "new" / "panel.png").size == (19, 17)


def test_save_picture__rounds_and_keeps_values(tmp_path):
    image = torch.tensor([[[0.0, 0.5, 1.0], [float("nan"), -1.0, 2.0]]])
    save_picture(image, tmp_path / "image.png")
    assert np.array(Image.open(tmp_path / "image.png")).tolist() == [[[0, 128, 255], [0, 0, 255]]]


def test_draw_pca__colours_are_those_of_the_basis():
    tokens = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    basis = fit_pca(tokens, 5)
    picture = draw_pca(tokens, basis, (6, 8))
    expected = map_to_colours(apply_pca(tokens, basis), basis)
    torch.testing.assert_close(picture[::2, ::2], expected)
    torch.testing.assert_close(picture[1::2, 1::2], expected)
