"""Rendering of scenes against the literal computation of the paper: blend, convolve, resize."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fit3d_ns.geometry.cameras import viewmats_from_camera_to_worlds
from fit3d_ns.rasterization import rasterization
from fit3d_ns.scene import FeatureDecoder, Gaussians

SIZE = (3, 4)


def blend_literally(scene, colours, view):
    """A rasterization of plain channels by the public contract, with everything activated by hand."""
    gaussians = scene.gaussians
    images, alphas, _ = rasterization(
        gaussians.means.float(),
        gaussians.quats.float(),
        gaussians.log_scales.float().exp(),
        1 / (1 + (-gaussians.opacity_logits.float()).exp()),
        colours,
        viewmats_from_camera_to_worlds(view.camera_to_world)[None],
        view.K[None],
        view.width,
        view.height,
        rasterize_mode=scene.rasterize_mode,
        eps2d=scene.eps2d,
    )
    return images[0], alphas[0, ..., 0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_render_features__equals_full_resolution_decoding_then_bilinear(make_scene, bias, mode):
    scene = make_scene(bias=bias, rasterize_mode=mode)
    view = scene.posed_capture.views[0]
    low, alphas = blend_literally(scene, scene.gaussians.features.float(), view)
    assert 0.05 < alphas.mean() < 0.95, "the scene must have covered and empty pixels"
    high = F.conv2d(low.permute(2, 0, 1)[None], scene.decoder.weight, padding=1)
    if bias:
        high = high + scene.decoder.bias[:, None, None] * alphas
    expected = F.interpolate(high, size=SIZE, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    features, found = scene.render_features_with_alpha(view.camera, SIZE)
    torch.testing.assert_close(features, expected.detach(), rtol=1e-4, atol=1e-4)
    expected_alphas = F.interpolate(alphas[None, None], size=SIZE, mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(found, expected_alphas, rtol=1e-4, atol=1e-5)
    assert torch.equal(scene.render_features(*view.camera, SIZE), features)


def test_render_features__reads_tokens_as_the_lift_did(make_scene):
    scene = make_scene(token_reading="area")
    view = scene.posed_capture.views[0]
    low, alphas = blend_literally(scene, scene.gaussians.features.float(), view)
    high = scene.decoder(low, alphas).detach()
    # 40 x 30 pixels at 4 x 3 tokens: every token averages 10 x 10 pixels.
    expected = high.reshape(3, 10, 4, 10, -1).mean(dim=(1, 3))
    torch.testing.assert_close(scene.render_features(*view.camera, SIZE), expected, rtol=1e-4, atol=1e-4)
    bilinear = scene.render_features(*view.camera, SIZE, token_reading="bilinear")
    assert not torch.allclose(bilinear, expected, atol=1e-2)


def test_render_features__is_zero_where_nothing_is(make_scene):
    scene = make_scene()
    view = scene.posed_capture.views[0]
    turned = view.camera_to_world.clone()
    turned[:, :3] = turned[:, :3] @ torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    features, alphas = scene.render_features_with_alpha(view.camera._replace(camera_to_world=turned), SIZE)
    assert torch.equal(features, torch.zeros(*SIZE, 7))
    assert torch.equal(alphas, torch.zeros(*SIZE))


def test_render_rgb__constant_colour_is_half_plus_the_coefficient(make_scene):
    scene = make_scene()
    view = scene.posed_capture.views[1]
    colours = (0.5 + scene.gaussians.sh_dc.float() / (2 * math.sqrt(math.pi))).clamp_min(0.0)
    expected, _ = blend_literally(scene, colours, view)
    torch.testing.assert_close(scene.render_rgb(*view.camera), expected.clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_render_rgb__harmonics_change_the_picture(make_scene):
    with_harmonics = make_scene(sh_degree=2)
    view = with_harmonics.posed_capture.views[0]
    constant = replace(with_harmonics, gaussians=replace(with_harmonics.gaussians, sh_rest=None))
    difference = with_harmonics.render_rgb(*view.camera) - constant.render_rgb(*view.camera)
    assert difference.abs().max() > 0.01


def test_render_depth__of_one_opaque_gaussian_is_its_distance(make_scene):
    scene = make_scene()
    one = Gaussians.from_raw(
        means=torch.tensor([[0.0, 0.05, -1.0]]),
        quats=torch.tensor([[2.0, 0.0, 0.0, 0.0]]),
        log_scales=torch.full((1, 3), -0.5),
        opacity_logits=torch.tensor([10.0]),
        sh_dc=torch.zeros(1, 3),
        features=torch.zeros(1, 5),
    )
    view = scene.posed_capture.views[0]
    depth, alphas = replace(scene, gaussians=one).render_depth(view.camera)
    # The camera stands at z = 2 and looks along -z.
    torch.testing.assert_close(depth[alphas > 0], torch.full_like(depth[alphas > 0], 3.0), rtol=1e-4, atol=1e-5)
    assert (depth[alphas == 0] == 0).all() and (alphas > 0.9).any()


def test_render_features_low__equals_blending(make_scene):
    scene = make_scene()
    view = scene.posed_capture.views[2]
    low, alphas = scene.render_features_low(view.camera)
    expected, expected_alphas = blend_literally(scene, scene.gaussians.features.float(), view)
    torch.testing.assert_close(low, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alphas, expected_alphas, rtol=1e-4, atol=1e-5)


def test_capture__says_where_it_looked_and_follows_moved_photographs(make_scene, tmp_path):
    scene = make_scene()
    assert scene.capture() == scene.posed_capture
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"not in .*room.*--data-root"):
        scene.capture()
    capture = scene.capture(tmp_path / "moved" / "room")
    assert capture.load_image(capture.views[0]).shape == (30, 40, 3)
    with pytest.raises(ValueError, match="--data-root"):
        scene.capture(tmp_path / "elsewhere")


def test_capture__one_missing_photograph_is_left_to_the_caller(make_scene):
    scene = make_scene()
    scene.posed_capture.views[0].frame.image_path.unlink()
    assert len(scene.capture().views) == 3


def test_errors__dimensions_that_do_not_fit(make_scene):
    scene = make_scene()
    with pytest.raises(ValueError, match="takes 4 channels, the Gaussians carry 5"):
        replace(scene, decoder=FeatureDecoder(4, 7))
    with pytest.raises(ValueError, match="gives 8 channels, random:vit_tiny has 7"):
        replace(scene, decoder=FeatureDecoder(5, 8))


def test_activated__is_made_once_and_to_keeps_the_values(make_scene):
    scene = make_scene()
    assert scene.activated is scene.activated
    moved = scene.to("cpu")
    view = scene.posed_capture.views[0]
    assert torch.equal(moved.render_rgb(*view.camera), scene.render_rgb(*view.camera))
