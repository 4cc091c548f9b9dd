"""A tiny lifted scene, shared by the tests of this room."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fit3d_ns.analysis.pca import fit_pca
from fit3d_ns.data.frames import CaptureFiles, Frame, PointCloud
from fit3d_ns.features import BackboneDescription
from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.scene import FeatureDecoder, FeatureScene, Gaussians, create_posed_capture

WIDTH, HEIGHT = 40, 30
DIM, EMBED = 5, 7


@pytest.fixture
def backbone():
    return BackboneDescription(
        backbone="random:vit_tiny",
        architecture="vit_tiny",
        patch_size=10,
        embed_dim=EMBED,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        weights_hash="0123456789abcdef",
        is_random=True,
    )


@pytest.fixture
def make_files(tmp_path):
    """Writes photographs and masks and returns them as a read scene folder."""

    def make(lens=None, num_frames=3, root=None, is_metric=True):
        root = Path(root or tmp_path / "data" / "room")
        (root / "images").mkdir(parents=True)
        (root / "masks").mkdir()
        lens = lens or Lens(fx=35.0, fy=36.0, cx=19.3, cy=15.8, width=WIDTH, height=HEIGHT)
        generator = torch.Generator().manual_seed(0)
        frames = []
        for index in range(num_frames):
            pixels = torch.randint(0, 256, (lens.height, lens.width, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / "images" / f"{index}.png")
            mask = torch.full((lens.height, lens.width), 255, dtype=torch.uint8)
            mask[: 4 + index] = 0
            Image.fromarray(mask.numpy()).save(root / "masks" / f"{index}.png")
            camera_to_world = torch.eye(4)[:3]
            camera_to_world[:, 3] = torch.tensor([0.1 * index, 0.05, 2.0])
            frames.append(
                Frame(
                    image_path=root / "images" / f"{index}.png",
                    lens=lens,
                    camera_to_world=camera_to_world,
                    split="test" if index == 1 else "train",
                    mask_path=root / "masks" / f"{index}.png",
                )
            )
        points = PointCloud(torch.randn(4, 3, generator=generator), torch.zeros(4, 3, dtype=torch.uint8))
        return CaptureFiles(root, "nerfstudio", "made by a test", frames, points, is_metric, "room")

    return make


@pytest.fixture
def make_scene(make_files, backbone):
    """Builds a scene of random Gaussians before the cameras of `make_files`."""

    def make(num_gaussians=30, bias=True, sh_degree=0, **settings):
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        gaussians = Gaussians.from_raw(
            means=draw(num_gaussians, 3) * 0.5,
            quats=draw(num_gaussians, 4),
            log_scales=draw(num_gaussians, 3) * 0.3 - 2.0,
            opacity_logits=draw(num_gaussians, 1),
            sh_dc=draw(num_gaussians, 3),
            features=draw(num_gaussians, DIM),
            sh_rest=draw(num_gaussians, (sh_degree + 1) ** 2 - 1, 3) * 0.1,
            blend_weight=torch.rand(num_gaussians, generator=generator),
            num_views=torch.arange(num_gaussians),
            feature_variance=torch.rand(num_gaussians, generator=generator),
        )
        decoder = FeatureDecoder.from_weights(draw(EMBED, DIM, 3, 3), draw(EMBED) if bias else None)
        return FeatureScene(
            gaussians=gaussians,
            decoder=decoder,
            posed_capture=settings.pop("capture", None) or create_posed_capture(make_files()),
            backbone=backbone,
            pca=fit_pca(draw(50, EMBED), 3),
            metrics={"psnr": 20.5},
            **settings,
        )

    return make
