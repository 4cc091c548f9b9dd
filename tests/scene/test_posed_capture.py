"""Captures: the training frame, the pixels every stage sees, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fit3d_ns.data.images import load_image
from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.geometry.undistortion import compute_undistortion
from fit3d_ns.scene import create_posed_capture

BENT = Lens(30.0, 31.0, 19.0, 16.0, 40, 30, model="opencv", distortion=(-0.1, 0.02, 0.001, 0.0))


def test_views__stand_in_the_training_frame(make_files):
    files = make_files()
    # A quarter turn about x, then a shift, then the scale.
    transform = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, -1.0, 2.0], [0.0, 1.0, 0.0, 3.0]])
    capture = create_posed_capture(files, transform, 0.5)
    position = np.array([0.1, 0.05, 2.0])
    moved = 0.5 * (transform[:, :3].numpy() @ position + transform[:, 3].numpy())
    np.testing.assert_allclose(capture.views[1].camera_to_world[:, 3], moved, rtol=1e-6)
    np.testing.assert_allclose(capture.views[1].camera_to_world[:, :3], transform[:, :3], rtol=1e-6)
    points = 0.5 * (files.points.xyz @ transform[:, :3].T + transform[:, 3])
    torch.testing.assert_close(capture.points.xyz, points)
    assert capture.metric_scale == 0.5
    assert create_posed_capture(replace(files, is_metric=False), transform, 0.5).metric_scale is None
    assert [view.split for view in capture.views] == ["train", "test", "train"]
    assert [view.name for view in capture.select("test")] == ["images/1.png"]


def test_root__is_the_folder_where_data_named_the_camera_file(make_files):
    files = make_files()
    (files.root / "transforms.json").write_text("{}")
    capture = create_posed_capture(replace(files, root=files.root / "transforms.json", scene_id=""))
    assert capture.root == files.root and capture.scene_id == "room"
    assert capture.views[0].name == "images/0.png"


def test_load_image__is_the_photograph_where_nothing_bends(make_files):
    capture = create_posed_capture(make_files())
    view = capture.views[0]
    assert torch.equal(capture.load_image(view), load_image(view.frame.image_path))
    assert torch.equal(view.K, view.frame.lens.K)
    mask = capture.load_valid_mask(view)
    assert not mask[:4].any() and mask[4:].all()


def test_load_image__is_undistorted_by_the_one_implementation(make_files):
    capture = create_posed_capture(make_files(lens=BENT))
    view = capture.views[0]
    undistortion = compute_undistortion(BENT)
    assert torch.equal(capture.load_image(view), undistortion.apply_to_image(load_image(view.frame.image_path)))
    assert torch.equal(view.K, undistortion.lens.K)
    assert not torch.equal(view.K, BENT.K)


def test_downscaling__averages_pixels_and_keeps_the_rays(make_files):
    capture = create_posed_capture(make_files(), downscale_factor=2)
    view = capture.views[0]
    assert (view.width, view.height) == (20, 15)
    full = load_image(view.frame.image_path).double()
    expected = full.reshape(15, 2, 20, 2, 3).mean(dim=(1, 3))
    assert (capture.load_image(view).double() - expected).abs().max() <= 0.5 + 1e-6
    torch.testing.assert_close(view.K[:2], view.frame.lens.K[:2] / 2)
    mask = capture.load_valid_mask(view)
    assert not mask[:2].any() and mask[2:].all()


def test_load_depth__is_metric_and_optional(make_files):
    files = make_files()
    assert create_posed_capture(files).load_depth(create_posed_capture(files).views[0]) is None
    depth_path = files.root / "depth.png"
    Image.fromarray(np.full((30, 40), 1500, dtype=np.uint16)).save(depth_path)
    frames = [replace(frame, depth_path=depth_path) for frame in files.frames]
    capture = create_posed_capture(replace(files, frames=frames), dataparser_scale=0.1)
    depth = capture.load_depth(capture.views[0])
    torch.testing.assert_close(depth, torch.full((30, 40), 1.5))


def test_bad_frames__stay_out_and_are_counted(make_files):
    files = make_files()
    frames = [replace(files.frames[0], is_bad=True), *files.frames[1:]]
    capture = create_posed_capture(replace(files, frames=frames))
    assert capture.num_bad == 1 and len(capture.views) == 2
    with pytest.raises(ValueError, match="no usable frame: all 3 are marked as bad"):
        create_posed_capture(replace(files, frames=[replace(frame, is_bad=True) for frame in files.frames]))


def test_errors__name_the_file(make_files, tmp_path):
    files = make_files()
    outside = replace(files.frames[0], image_path=tmp_path / "elsewhere.png")
    with pytest.raises(ValueError, match="elsewhere.png lies outside"):
        create_posed_capture(replace(files, frames=[outside]))
    with pytest.raises(ValueError, match="lists a photograph twice"):
        create_posed_capture(replace(files, frames=[files.frames[0], files.frames[0]]))
    capture = create_posed_capture(files)
    Image.fromarray(np.zeros((10, 12, 3), dtype=np.uint8)).save(files.root / "images" / "0.png")
    with pytest.raises(ValueError, match=r"0.png is 12x10, its camera says 40x30"):
        capture.load_image(capture.views[0])
    with pytest.raises(ValueError, match="must be positive"):
        create_posed_capture(files, dataparser_scale=0.0)
