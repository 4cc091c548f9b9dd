import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from fit3d_ns.analysis.pca import map_to_colours
from fit3d_ns.features import create_extractor
from fit3d_ns.report.compared_backbones import read_models
from fit3d_ns.report.feature_figure import (
    FeatureFigureConfig,
    is_clip,
    load_clip,
    save_feature_figure,
    save_feature_video,
    write_video,
)
from fit3d_ns.report.token_colours import fit_cluster_colours, fit_pca_colours
from fit3d_ns.report.token_columns import (
    FrameTokens,
    TokenColumn,
    extract_columns,
    list_column_labels,
    load_figure_images,
    open_scenes,
    resize,
)
from fit3d_ns.scene import load_scene
from tests.report.figure_scenes import BACKBONE, HEIGHT, WIDTH, write_finetuned, write_photographs, write_scene


def draw_map(seed: int, h: int = 5, w: int = 6, embed: int = 9) -> torch.Tensor:
    return torch.randn(h, w, embed, generator=torch.Generator().manual_seed(seed))


def create_column(label: str, *maps: torch.Tensor) -> TokenColumn:
    return TokenColumn(label, [FrameTokens(tokens, torch.ones(tokens.shape[:2])) for tokens in maps])


def test_fit_cluster_colours__rotated_tokens_get_equal_colours() -> None:
    # A rotation keeps all cosines: the clusters are the same, whatever numbers k-means gives them.
    centres = torch.eye(4, 9) * 10
    numbers = torch.arange(30).reshape(5, 6) % 4
    tokens = centres[numbers] + 0.1 * draw_map(0)
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(1))).Q
    columns = [create_column("original", tokens), create_column("fine-tuned", tokens @ rotation)]
    colours = fit_cluster_colours(columns, 4)
    first, second = (colours.paint(index, column.frames[0], (10, 12)) for index, column in enumerate(columns))
    assert torch.equal(first, second)
    assert colours.agreement == [1.0, 1.0]
    assert len(first.reshape(-1, 3).unique(dim=0)) == 4


def test_fit_cluster_colours__uncovered_tokens_are_black_and_do_not_count() -> None:
    tokens = draw_map(2)
    alphas = torch.ones(5, 6)
    alphas[:, 3:] = 0.2
    rendered = TokenColumn("lifted", [FrameTokens(tokens, alphas)], is_rendered=True)
    colours = fit_cluster_colours([create_column("original", tokens), rendered], 3)
    picture = colours.paint(1, rendered.frames[0], (5, 6))
    assert bool((picture[:, 3:] == 0).all()) and bool((picture[:, :3].sum(dim=-1) > 0).all())


def test_fit_pca_colours__one_basis_for_original_and_finetuned_and_none_of_the_rendered() -> None:
    original, finetuned = draw_map(3), draw_map(4)
    columns = [create_column("original", original), create_column("fine-tuned", finetuned)]
    rendered = TokenColumn("lifted", [FrameTokens(100 * draw_map(5), torch.ones(5, 6))], is_rendered=True)
    basis = fit_pca_colours([*columns, rendered]).basis
    rows = torch.cat([original.flatten(0, 1), finetuned.flatten(0, 1)]).double()
    centred = rows - rows.mean(dim=0)
    expected = torch.linalg.svd(centred, full_matrices=False).Vh[:3].float()
    assert torch.allclose((basis.components * expected).sum(dim=1).abs(), torch.ones(3), atol=1e-4)


def test_read_models__sorts_folders_files_and_names(tmp_path: Path) -> None:
    folder = write_finetuned(tmp_path / "tuned")
    weights = folder / "model.safetensors"
    groups = read_models([BACKBONE, str(folder), str(weights), "random:vit_tiny_patch16_224", f"test_vit={weights}"])
    assert [group.description.embed_dim for group in groups] == [64, 192, 64]
    assert [member.label for member in groups[0].finetuned] == ["tuned", "model.safetensors"]
    assert "random weights" in groups[0].label and "1: tuned, 2: model.safetensors" in groups[0].label
    # Trained weights are no fine-tuned version of random ones.
    assert groups[2].original is not None and groups[2].finetuned == ()


def test_read_models__second_file_of_a_name_is_finetuned_and_backbone_weights_fill_names(tmp_path: Path) -> None:
    weights = write_finetuned(tmp_path / "a") / "model.safetensors"
    other = write_finetuned(tmp_path / "b", change=0.03) / "model.safetensors"
    groups = read_models(["test_vit", f"test_vit={other}"], [weights])
    assert len(groups) == 1 and groups[0].original is not None
    assert groups[0].original.description.weights == weights
    assert groups[0].finetuned[0].description.weights == other


def test_read_models__says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_finetuned(tmp_path / "tuned")
    with pytest.raises(ValueError, match="put the name of its backbone before it"):
        read_models([str(folder / "model.safetensors")])
    with pytest.raises(ValueError, match="name the folder .* alone"):
        read_models([f"test_vit={folder}"])
    with pytest.raises(ValueError, match="belongs to none of --models"):
        read_models([BACKBONE], [folder / "model.safetensors"])
    with pytest.raises(ValueError, match="has no config.json"):
        read_models([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="--models"):
        read_models([])
    groups = read_models(["random:vit_tiny_patch16_224", str(folder)])
    assert groups[1].original is None and "its original stays empty" in capsys.readouterr().err


def test_extract_columns__are_the_extractors_tokens_and_the_scenes(tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photos", 3)
    scene = write_scene(tmp_path / "room.safetensors", photographs[:2])
    scene_index = open_scenes([scene])
    images = load_figure_images(photographs, scene_index)
    groups = read_models([BACKBONE, str(write_finetuned(tmp_path / "tuned"))])
    labels = list_column_labels(groups, has_scenes=True)
    assert labels == ["original", "fine-tuned", "lifted"]
    columns = extract_columns(groups[0], images, labels)
    expected = create_extractor(BACKBONE)(images[0].image.permute(2, 0, 1)[None]).maps[0]
    assert torch.equal(columns[0].frames[0].tokens, expected)
    assert not torch.allclose(columns[1].frames[0].tokens, expected, atol=1e-2)
    view = load_scene(scene).posed_capture.views[1]
    rendered = load_scene(scene).render_features(view.camera_to_world, view.K, WIDTH, HEIGHT, (3, 4))
    assert torch.allclose(columns[2].frames[1].tokens, rendered)
    # The Gaussians stand on the left, and the scene does not hold the third photograph.
    assert columns[2].frames[0].is_covered[:, 0].any() and not columns[2].frames[0].is_covered[:, 3].any()
    assert columns[2].frames[2] is None
    # A scene is drawn by pixels: decoding them all and then projecting gives the same colours.
    colours = fit_pca_colours(columns)
    scene, basis = images[1].scene_views[0].get_averaged(), colours.basis
    low, alphas = scene.render_features_low(view.camera._replace(width=WIDTH, height=HEIGHT))
    decoded = scene.decoder(low, alphas).detach() - alphas[..., None] * basis.mean
    sharp = map_to_colours(decoded @ basis.components.T, basis) * alphas[..., None].clamp(0.0, 1.0)
    picture = colours.paint(2, columns[2].frames[1], (HEIGHT, WIDTH))
    assert torch.allclose(picture, sharp, atol=1e-4)
    assert not torch.equal(picture[0::2, 0::2], picture[1::2, 1::2]), "pixels of a token differ"


def test_extract_columns__scene_of_other_weights_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = write_photographs(tmp_path / "photos")
    scene = write_scene(tmp_path / "room.safetensors", photographs)
    images = load_figure_images(photographs, open_scenes([scene]))
    folder = write_finetuned(tmp_path / "tuned")
    groups = read_models([f"test_vit={folder / 'model.safetensors'}"])
    columns = extract_columns(groups[0], images, list_column_labels(groups, has_scenes=True))
    assert columns[-1].is_empty
    assert "features of another random:test_vit" in capsys.readouterr().err


def test_feature_figure__rows_of_images_and_backbones_say_what_they_are(tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photos")
    scene_index = open_scenes([write_scene(tmp_path / "room.safetensors", photographs)])
    images = load_figure_images(photographs, scene_index)
    groups = read_models([BACKBONE, str(write_finetuned(tmp_path / "tuned")), "random:vit_tiny_patch16_224"])
    path = tmp_path / "figure.png"
    config = FeatureFigureConfig(kind="both", num_clusters=3)
    content = save_feature_figure(images, groups, path, config, has_scenes=True)
    assert json.loads(path.with_suffix(".json").read_text())["rows"] == content["rows"]
    assert len(content["rows"]) == 2 * 2 * 2 and content["is_random"]
    assert content["rows"][0]["columns"] == ["original", "fine-tuned", "lifted"]
    assert content["rows"][2]["columns"] == ["original"]
    # Input, original, fine-tuned and Gaussians, each as wide as the photograph, with gaps of 6.
    assert Image.open(path).width == 4 * WIDTH + 5 * 6
    assert str(tmp_path) not in path.with_suffix(".json").read_text()


def test_feature_figure__shared_colours_are_equal_for_equal_pictures_only_with_sharing(tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photos", 2, shift=0) + write_photographs(tmp_path / "other", 2, shift=9)
    images = load_figure_images([photographs[0], photographs[3]], open_scenes([]))
    twice = [images[0], images[1], images[0]]
    groups = read_models([BACKBONE])
    save_feature_figure(twice, groups, tmp_path / "figure.png", FeatureFigureConfig(sharing="backbone"))
    pixels = np.asarray(Image.open(tmp_path / "figure.png"))
    row = HEIGHT + 6 + 18
    top = 6 + 18 + 18
    assert np.array_equal(pixels[top : top + HEIGHT], pixels[top + 2 * row : top + 2 * row + HEIGHT])


def test_feature_figure__says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photographs = write_photographs(tmp_path / "photos", 1)
    images = load_figure_images(photographs, open_scenes([]))
    groups = read_models([BACKBONE])
    with pytest.raises(ValueError, match="13 clusters of 12 features"):
        save_feature_figure(images, groups, tmp_path / "a.png", FeatureFigureConfig(kind="kmeans", num_clusters=13))
    elsewhere = write_photographs(tmp_path / "elsewhere", 1)
    load_figure_images(photographs, open_scenes([write_scene(tmp_path / "room.safetensors", elsewhere)]))
    assert "None of the pictures is a photograph of" in capsys.readouterr().err


def test_resize__keeps_small_pictures_and_the_aspect() -> None:
    small = torch.zeros(48, 64, 3, dtype=torch.uint8)
    assert resize(small, None) is small
    assert resize(small, 128).shape == (96, 128, 3)
    assert resize(torch.zeros(600, 1280, 3, dtype=torch.uint8), None).shape == (300, 640, 3)


def test_write_video__is_read_back(tmp_path: Path) -> None:
    frames = [np.full((47, 63, 3), value, dtype=np.uint8) for value in (20, 120, 220)]
    path = tmp_path / "clip.mp4"
    assert write_video(iter(frames), path, 5.0) in ("vp09", "mp4v")
    images, fps = load_clip(path, open_scenes([]), 10)
    assert fps == pytest.approx(5.0) and len(images) == 3
    # Odd sides are padded by one, and video compression is lossy.
    assert [image.pixels.shape for image in images] == [(48, 64, 3)] * 3
    means = [float(image.pixels[:40, :56].float().mean()) for image in images]
    assert means == pytest.approx([20, 120, 220], abs=6)
    assert list(tmp_path.iterdir()) == [path]
    assert len(load_clip(path, open_scenes([]), 10, frame_stride=2)[0]) == 2


def test_write_video__without_codecs_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fit3d_ns.report.feature_figure.CODECS", ("none",))
    with pytest.raises(ValueError, match="can write neither VP9 nor MPEG-4"):
        write_video([np.zeros((16, 16, 3), dtype=np.uint8)], tmp_path / "clip.mp4", 5.0)
    assert list(tmp_path.iterdir()) == []


def test_load_clip__says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    assert is_clip(tmp_path) and is_clip(tmp_path / "broken.mp4") and not is_clip(tmp_path / "a.png")
    with pytest.raises(ValueError, match="broken.mp4 cannot be read"):
        load_clip(tmp_path / "broken.mp4", open_scenes([]), 10)
    with pytest.raises(ValueError, match="No such video"):
        load_clip(tmp_path / "absent.mp4", open_scenes([]), 10)
    with pytest.raises(ValueError, match="has 0 frames"):
        load_clip(tmp_path, open_scenes([]), 10)
    write_photographs(tmp_path / "photos", 3)
    assert len(load_clip(tmp_path / "photos", open_scenes([]), 2)[0]) == 2
    assert "longer than 2 frames" in capsys.readouterr().err


def test_save_feature_video__folder_of_frames_gives_video_and_consistency(tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photos", 3)
    scene_index = open_scenes([write_scene(tmp_path / "room.safetensors", photographs)])
    images, _ = load_clip(tmp_path / "photos", scene_index, 10)
    groups = read_models([BACKBONE, str(write_finetuned(tmp_path / "tuned"))])
    path = tmp_path / "clip.mp4"
    config = FeatureFigureConfig(kind="both", num_clusters=3)
    content = save_feature_video("photos", images, groups, path, config, fps=4.0, has_scenes=True)
    written = json.loads(path.with_suffix(".json").read_text())
    assert written["num_frames"] == 3 and written["codec"] == content["codec"]
    figures = written["backbones"][0]["temporal_consistency"]
    # Rendered features are no backbone's.
    assert set(figures) == {"original", "fine-tuned"}
    assert all(-1.0 <= value["centred_cosine"] <= 1.0 and value["num_pairs"] == 2 for value in figures.values())
    capture = cv2.VideoCapture(str(path))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 3


def test_load_clip__frames_of_two_sizes_are_refused(tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", 2)
    Image.new("RGB", (32, 32)).save(tmp_path / "photos/zzz.png")
    with pytest.raises(ValueError, match="zzz.png is 32x32, the first frame 64x48"):
        load_clip(tmp_path / "photos", open_scenes([]), 10)
