import torch

from fit3d_ns.data.frames import CaptureFiles, Frame
from fit3d_ns.data.images import save_image
from fit3d_ns.geometry.cameras import Lens, project_points, viewmats_from_camera_to_worlds
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.solver import solve_features
from fit3d_ns.lifting.views import create_lift_views
from fit3d_ns.scene import create_posed_capture
from tests.lifting.lifting_scene import create_gaussians


def test_create_lift_views__cameras_masks_and_tokens_of_the_capture(tmp_path):
    """OpenGL poses become OpenCV cameras that see the Gaussians where a hand-written projection puts them."""
    lens = Lens(fx=30.0, fy=29.0, cx=11.0, cy=8.5, width=24, height=16)
    # A camera at the origin that looks along +z with y down, as an OpenGL pose: x, -y, -z.
    pose = torch.tensor([[1.0, 0.0, 0.0, 0.2], [0.0, -1.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]])
    save_image(torch.zeros(16, 24, 3, dtype=torch.uint8), tmp_path / "a.png")
    mask = torch.full((16, 24, 3), 255, dtype=torch.uint8)
    mask[:, :10] = 0
    save_image(mask, tmp_path / "mask.png")
    frame = Frame(tmp_path / "a.png", lens, pose, mask_path=tmp_path / "mask.png")
    capture = create_posed_capture(CaptureFiles(tmp_path, "nerfstudio", "a test", [frame]))
    tokens = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))

    (view,) = create_lift_views(capture, capture.select("train"), lambda view: tokens)
    assert view.name == "a.png" and (view.camera.width, view.camera.height) == (24, 16)
    assert torch.equal(view.load_mask(), mask[..., 0] == 255)
    assert view.load_tokens() is tokens
    pixels, depths = project_points(
        torch.tensor([[0.2, 0.1, 2.0]]), viewmats_from_camera_to_worlds(view.camera.camera_to_world), view.camera.K
    )
    torch.testing.assert_close(pixels, torch.tensor([[11.0, 8.5 + 29.0 * 0.05]]))
    torch.testing.assert_close(depths, torch.tensor([2.0]))

    result = solve_features(create_gaussians(), [view], LiftConfig(feature_dim=2, max_passes=1))
    assert bool((result.num_views == 1).any())
