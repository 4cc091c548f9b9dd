import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.pca import PcaBasis, apply_pca, fit_pca, map_to_colours
from fit3d_ns.analysis.similarity import compute_similarity
from fit3d_ns.data.frames import Frame
from fit3d_ns.features import FeatureExtractor
from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.report.scene_viewer import create_flight
from fit3d_ns.report.splat_colours import ColouredSplats, find_heaviest
from fit3d_ns.scene import FeatureScene, Gaussians, View, load_scene
from tests.report.figure_scenes import write_photographs, write_scene

ANY = torch.zeros(40)
"""Cosines where they are not shown."""


@pytest.fixture
def scene(tmp_path: Path) -> FeatureScene:
    """Forty Gaussians with random features, as a file, and a PCA of what they decode to."""
    loaded = load_scene(write_scene(tmp_path / "scene.safetensors", write_photographs(tmp_path / "photographs")))
    return replace(loaded, pca=fit_pca(decode(loaded) + 0.1, 3))


def decode(scene: FeatureScene) -> Tensor:
    """Features of each splat: the decoder's convolution on a map of 3x3 pixels that shows nothing else."""
    maps = scene.gaussians.features.float()[:, :, None, None].expand(-1, -1, 3, 3)
    return F.conv2d(maps, scene.decoder.weight, scene.decoder.bias)[:, :, 0, 0].detach()


def replace_gaussians(scene: FeatureScene, **tensors: Tensor) -> FeatureScene:
    return replace(scene, gaussians=replace(scene.gaussians, **tensors), file=None)


def put_in_a_row(scene: FeatureScene, opacities: list[float], scales: Tensor | None = None) -> ColouredSplats:
    """Splats one behind another along -z, at depths 1, 2, ..., of 0.1 unless `scales` says otherwise."""
    count = len(opacities)
    means = torch.zeros(count, 3)
    means[:, 2] = -1.0 - torch.arange(count)
    gaussians = Gaussians.from_raw(
        means=means,
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(count, 4),
        log_scales=torch.full((count, 3), 0.1).log() if scales is None else scales.log(),
        opacity_logits=torch.tensor(opacities).logit(),
        sh_dc=torch.zeros(count, 3),
        features=torch.zeros(count, scene.gaussians.feature_dim),
    )
    return ColouredSplats(replace(scene, gaussians=gaussians, file=None))


def test_find_heaviest__keeps_those_that_make_up_most(scene: FeatureScene) -> None:
    weight = torch.arange(40.0).roll(7)
    kept, share = find_heaviest(replace(scene.gaussians, blend_weight=weight), 10)
    assert sorted(weight[kept].tolist()) == list(range(30, 40))
    assert share == pytest.approx(sum(range(30, 40)) / sum(range(40)))
    kept, share = find_heaviest(replace(scene.gaussians, blend_weight=weight), 50)
    assert bool(kept.all()) and share == 1.0
    # Without weights, opacity decides.
    logits = torch.arange(40.0).half() / 10
    kept, _ = find_heaviest(replace(scene.gaussians, blend_weight=torch.zeros(40), opacity_logits=logits), 5)
    torch.testing.assert_close(logits[kept], logits[35:])


def test_colours__are_those_of_the_decoded_features(scene: FeatureScene) -> None:
    splats, decoded = ColouredSplats(scene), decode(scene)
    assert scene.pca is not None
    torch.testing.assert_close(
        splats.colour("features", 8, ANY),
        map_to_colours(apply_pca(decoded, scene.pca), scene.pca),
        rtol=1e-3,
        atol=1e-3,
    )
    centred = decoded - scene.pca.mean
    cosines = F.cosine_similarity(centred, centred[11:12].expand_as(centred))
    # Red falls below 1 where the cosine is negative, blue where it is positive.
    red, _, blue = splats.colour("similarity", 8, compute_similarity(splats.features, splats.features[11])).T
    torch.testing.assert_close(red - blue, cosines, rtol=1e-3, atol=1e-3)
    distances = [torch.cdist(rows.double(), rows.double()) for rows in (splats.features, centred)]
    torch.testing.assert_close(*distances, rtol=1e-3, atol=1e-3)


def test_similarity__to_a_token_is_the_cosine_of_decoded_features(scene: FeatureScene) -> None:
    """Also to a token that no splat can have."""
    splats, centred = ColouredSplats(scene), decode(scene) - scene.pca.mean
    token = torch.randn(scene.decoder.embed_dim, generator=torch.Generator().manual_seed(3))
    expected = F.cosine_similarity(centred, (token - scene.pca.mean).expand_as(centred))
    torch.testing.assert_close(splats.compare_with_token(token), expected, rtol=1e-3, atol=1e-3)


def test_colours__by_photographs_are_those_of_the_one_that_shows_most(tmp_path: Path) -> None:
    """One photograph is red and one is green, tokens are their mean colours, and each splat is seen by one camera."""
    for index, colour in enumerate(((255, 0, 0), (0, 255, 0))):
        (tmp_path / "photographs").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), colour).save(tmp_path / "photographs" / f"{index}.png")
    paths = sorted((tmp_path / "photographs").iterdir())
    loaded = load_scene(write_scene(tmp_path / "scene.safetensors", paths))
    means = torch.tensor([[0.0, 0.0, -1.0], [10.0, 0.0, -3.0], [0.0, 0.0, 5.0]])
    capture = loaded.capture()
    # The second camera looks at the second splat alone.
    moved = torch.eye(4)[:3] + torch.tensor([[0.0, 0, 0, 10.0], [0] * 4, [0] * 4])
    object.__setattr__(capture.views[1], "camera_to_world", moved)
    gaussians = loaded.gaussians.select(torch.arange(40) < 3)
    basis = PcaBasis(torch.zeros(3), torch.eye(3), torch.ones(3), 3.0, torch.zeros(3), torch.ones(3))
    scene = replace(loaded, gaussians=replace(gaussians, means=means), file=None, pca=fit_pca(decode(loaded), 3))
    splats = ColouredSplats(scene)
    splats.pca = basis

    def extract(images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(maps=images.mean(dim=(2, 3))[:, None, None].expand(1, 3, 4, 3))

    colours = splats.colour_by_photographs(MagicMock(spec=FeatureExtractor, side_effect=extract), capture)
    torch.testing.assert_close(colours, torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.8, 0.8, 0.8]]), atol=1e-5, rtol=0)


def test_colours__of_clusters_photograph_and_variance(scene: FeatureScene) -> None:
    sides = torch.where(torch.arange(40)[:, None] < 15, 1.0, -1.0) * torch.tensor([3.0, 0.0, 0.0, 0.0])
    noise = 0.1 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    grouped = replace_gaussians(scene, features=(sides + noise).half())
    colours = ColouredSplats(replace(grouped, pca=fit_pca(decode(grouped), 3))).colour("clusters", 2, ANY)
    assert len(colours[:15].unique(dim=0)) == len(colours[15:].unique(dim=0)) == 1
    assert not torch.equal(colours[0], colours[39])
    coloured = replace_gaussians(
        scene,
        sh_dc=torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).half(),
        feature_variance=torch.arange(40.0).half(),
    )
    splats = ColouredSplats(coloured)
    expected = 0.5 + coloured.gaussians.sh_dc.float() / (2.0 * torch.pi**0.5)
    torch.testing.assert_close(splats.colour("photograph", 8, ANY), expected.clamp(0.0, 1.0))
    variance = splats.colour("variance", 8, ANY)
    assert bool((variance[:, 0] == 1.0).all()) and bool((torch.diff(variance[:39, 1]) < 0).all())
    # White where a lift did not measure it.
    assert bool((ColouredSplats(scene).colour("variance", 8, ANY) == 1.0).all())


def test_covariances__are_rotated_squares_and_can_be_factored_where_splats_are_flat(scene: FeatureScene) -> None:
    generator = torch.Generator().manual_seed(0)
    quats = F.normalize(torch.randn(40, 4, generator=generator), dim=1).half()
    scales = 0.5 * torch.rand(40, 3, generator=generator) + 0.1
    log_scales = scales.log().half()
    covariances = ColouredSplats(replace_gaussians(scene, quats=quats, log_scales=log_scales)).covariances
    w, x, y, z = F.normalize(quats[3].double(), dim=0).tolist()
    rotation = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )
    expected = rotation @ torch.diag(log_scales[3].double().exp() ** 2) @ rotation.T
    torch.testing.assert_close(covariances[3], expected, rtol=1e-3, atol=1e-6)
    log_scales[:, 2] = -40.0
    flat = ColouredSplats(replace_gaussians(scene, quats=quats, log_scales=log_scales)).covariances
    # What viser does with them.
    torch.linalg.cholesky(flat.float().double() + 1e-7)


def test_pick__takes_the_splat_that_stops_half_of_the_light(scene: FeatureScene) -> None:
    origin, forward = torch.zeros(3), torch.tensor([0.0, 0.0, -1.0])
    nothing = (math.inf, 0)
    assert put_in_a_row(scene, [0.9, 0.9]).pick(origin, forward) == (pytest.approx(1.0), 0)
    assert put_in_a_row(scene, [0.2, 0.9]).pick(origin, forward)[1] == 1
    # .8 * .7 = .56 of the light is left behind two, .28 behind three.
    assert put_in_a_row(scene, [0.2, 0.3, 0.5]).pick(origin, 5.0 * forward)[1] == 2
    assert put_in_a_row(scene, [0.2, 0.2]).pick(origin, forward) == nothing
    assert put_in_a_row(scene, [0.9]).pick(origin, -forward) == nothing
    assert put_in_a_row(scene, [0.9, 0.9]).pick(torch.tensor([0.0, 0.0, -1.5]), forward)[1] == 1
    # 0.3 beside its centre a round splat of 0.1 is gone, one that is wide in x is not.
    aside = torch.tensor([0.3, 0.0, 0.0])
    wide = torch.tensor([[0.1, 0.1, 0.1], [1.0, 0.1, 0.1]])
    assert put_in_a_row(scene, [0.9, 0.9], wide).pick(aside, forward)[1] == 1
    assert put_in_a_row(scene, [0.9, 0.9], wide).pick(aside[[1, 0, 2]], forward) == nothing


def create_views(poses: Tensor) -> list[View]:
    lens = Lens(fx=50.0, fy=50.0, cx=32.0, cy=24.0, width=64, height=48)
    return [
        View(f"{index}.png", pose, lens.K, 64, 48, "train", Frame(Path(f"{index}.png"), lens, pose))
        for index, pose in enumerate(poses)
    ]


def test_create_flight__leads_along_the_views_without_their_shake() -> None:
    turns = torch.linspace(0.0, 6.0, 60)
    offsets = torch.stack([2.0 * turns.cos(), 2.0 * turns.sin(), torch.ones(60)], dim=1)
    backwards = F.normalize(offsets, dim=1)
    right = F.normalize(torch.linalg.cross(torch.tensor([[0.0, 0.0, 1.0]]).expand(60, 3), backwards), dim=1)
    centre = torch.tensor([3.0, -1.0, 0.5])
    poses = torch.stack([right, torch.linalg.cross(backwards, right), backwards, centre + offsets], dim=-1)
    shaken = poses.clone()
    shaken[1:-1:2, 2, 3] += 0.2
    cameras = torch.stack(create_flight(create_views(shaken), 119))
    axes = cameras[:, :, :3]
    torch.testing.assert_close(axes @ axes.transpose(1, 2), torch.eye(3).expand(119, 3, 3), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(torch.linalg.det(axes), torch.ones(119))
    # Every second camera is one of the views', up to the shake, which becomes 0.1 everywhere.
    assert float((cameras[::2, :, :3] - poses[:, :, :3]).abs().max()) < 0.1
    assert float((cameras[::2, :, 3] - poses[:, :, 3]).abs().max()) < 0.15
    assert float(torch.diff(cameras[10:-10, 2, 3]).abs().max()) < 0.02
    torch.testing.assert_close(torch.stack(create_flight(create_views(poses[:1]), 4)), poses[:1].expand(4, 3, 4))
