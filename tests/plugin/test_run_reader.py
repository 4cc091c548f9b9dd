"""From a run to a scene file: the scene renders what the run renders, and foreign runs can be read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fit3d_ns.cli import export
from fit3d_ns.data.ply import read_ply_elements
from fit3d_ns.features import create_extractor
from fit3d_ns.plugin import run_reader
from fit3d_ns.plugin.run_config import find_config
from fit3d_ns.plugin.run_reader import load_run_scene, read_backbone, read_run
from fit3d_ns.scene import FeatureScene, View, load_scene, save_scene


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that trains; one run serves the module."""
    return {}


@pytest.fixture
def trained(run: dict[str, Any], make_config: Callable[..., Any], train: Callable[..., Any]) -> dict[str, Any]:
    if not run:
        config = make_config("export", 40)
        config.pipeline.datamanager.backbone = "toy_rooms_vit"
        run.update(trainer=train(config), config_path=config.get_base_dir() / "config.yml")
    return run


def test_scene__renders_the_features_that_ns_eval_measured(trained: dict[str, Any], tmp_path: Path) -> None:
    """Held-out cosine from the scene file and the extractor alone, against the run's own figure."""
    save_scene(load_run_scene(trained["config_path"]), tmp_path / "scene.safetensors")
    scene = load_scene(tmp_path / "scene.safetensors")
    figures = trained["trainer"].pipeline.get_average_eval_image_metrics()
    cosine, l1, mean_token_cosine = measure_scene(scene)
    # fp16 storage of features, scales and opacities.
    assert cosine == pytest.approx(figures["feature_cosine"], abs=2e-3)
    assert l1 == pytest.approx(figures["feature_l1"], rel=1e-2)
    assert cosine > mean_token_cosine + 0.1, "places have features of their own"


def test_read_backbone__is_what_the_run_was_told(trained: dict[str, Any]) -> None:
    datamanager = trained["trainer"].config.pipeline.datamanager
    expected = (datamanager.backbone, datamanager.backbone_weights, datamanager.normalization)
    assert read_backbone(trained["config_path"]) == read_backbone(trained["config_path"].parent) == expected


def test_scene__of_a_run_that_recorded_less_as_older_versions_did(trained: dict[str, Any], monkeypatch: Any) -> None:
    expected = load_run_scene(trained["config_path"])
    load = run_reader.load_latest_checkpoint

    def load_older(*args: Any) -> Any:
        checkpoint, *others = load(*args)
        checkpoint["fit3d"]["run"].pop("backbone")
        return checkpoint, *others

    monkeypatch.setattr(run_reader, "load_latest_checkpoint", load_older)
    assert load_run_scene(trained["config_path"]).backbone == expected.backbone
    pipeline = trained["trainer"].pipeline
    state, views = pipeline.capture_run_state(), pipeline.lifted_views
    pipeline.restore_run_state(
        {n: value for n, value in state.items() if n not in ("early_cost_spent", "lifted_views")}
    )
    assert (pipeline.early_cost_spent, pipeline.lifted_views) == (0.0, [])
    pipeline.restore_run_state(state)
    assert pipeline.lifted_views == views


def measure_scene(scene: FeatureScene) -> tuple[float, float, float]:
    """Means over frames of cosine and L1 on tokens with alpha > 0.5, by the definition in `ns-eval`'s contract.

    Last the cosine that the mean of all training tokens has everywhere.
    """
    extractor = create_extractor(scene.backbone.backbone)
    capture, cosines, distances, of_mean = scene.capture(), [], [], []

    def extract(view: View) -> torch.Tensor:
        return extractor(capture.load_image(view).float().permute(2, 0, 1)[None] / 255).maps[0]

    mean_token = torch.stack([extract(view) for view in capture.select("train")]).mean((0, 1, 2))
    for view in capture.select("test"):
        tokens = extract(view)
        features, alphas = scene.render_features_with_alpha(view.camera, size=(tokens.shape[0], tokens.shape[1]))
        covered = alphas > 0.5
        predicted, truth = features[covered].numpy(), tokens[covered].numpy()
        norms = np.linalg.norm(predicted, axis=1) * np.linalg.norm(truth, axis=1)
        cosines.append(np.mean((predicted * truth).sum(axis=1) / norms))
        distances.append(np.abs(predicted - truth).mean())
        of_mean.append(torch.nn.functional.cosine_similarity(tokens[covered], mean_token[None], dim=1).mean())
    return float(np.mean(cosines)), float(np.mean(distances)), float(np.mean(of_mean))


def test_scene__carries_by_products_and_frames(trained: dict[str, Any]) -> None:
    scene = load_run_scene(trained["config_path"])
    assert scene.backbone.backbone == "toy_rooms_vit" and not scene.backbone.is_random
    assert scene.gaussians.blend_weight.max() > 0
    assert int(scene.gaussians.num_views.int().max()) <= 6
    assert [view.split for view in scene.posed_capture.views].count("test") == 2
    views = scene.posed_capture.views
    assert list(scene.lifted_views or ()) == [view.name for view in views if view.split == "train"]
    assert scene.pca is not None and scene.metrics["num_gaussians"] == scene.gaussians.num_gaussians


def test_scene__without_unseen_gaussians_renders_captured_views_alike(trained: dict[str, Any]) -> None:
    whole, pruned = load_run_scene(trained["config_path"]), load_run_scene(trained["config_path"], drop_unseen=True)
    assert bool((pruned.gaussians.blend_weight > 0).all())
    view = whole.posed_capture.select("train")[0]
    camera = (view.camera_to_world, view.K, view.width, view.height)
    assert torch.allclose(whole.render_rgb(*camera), pruned.render_rgb(*camera), atol=1e-6)


def test_export__writes_a_ply_as_it_was_trained(trained: dict[str, Any], tmp_path: Path) -> None:
    export.main(["--load-config", str(trained["config_path"]), "--format", "ply", "--output-path", f"{tmp_path}/a.ply"])
    vertices, raw = read_ply_elements(tmp_path / "a.ply")["vertex"], read_run(trained["config_path"]).gauss_params
    for name, column in (
        ("opacities", "opacity"),
        ("features_dc", "f_dc_0"),
        ("scales", "scale_0"),
        ("features", "sem_0"),
    ):
        assert np.array_equal(vertices[column], raw[name][:, 0].numpy()), name
    assert not np.array_equal(vertices["sem_0"], vertices["sem_0"].astype(np.float16))


def test_read_run__of_a_moved_dataset_says_where_it_looked(trained: dict[str, Any], tmp_path: Path) -> None:
    config = yaml.load(trained["config_path"].read_text(), Loader=yaml.Loader)  # our own file, a moment old
    config.pipeline.datamanager.data = config.pipeline.datamanager.dataparser.data = Path("moved/away")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yml").write_text(yaml.dump(config))
    with pytest.raises(ValueError, match="not at moved/away; give its place with --data"):
        read_run(folder)


def test_read_run__reads_nerfstudios_own_checkpoints_with_numpy_numbers_in_them(
    trained: dict[str, Any], mini_capture: Path, tmp_path: Path
) -> None:
    """A splatfacto run as nerfstudio writes it: its config class, np.float64 learning rates, no features."""
    from nerfstudio.configs.method_configs import method_configs
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    config = method_configs["splatfacto"]
    config.pipeline.datamanager.dataparser = NerfstudioDataParserConfig(load_3D_points=False)
    config.pipeline.datamanager.data = config.data = mini_capture
    state = trained["trainer"].pipeline.state_dict()
    own = {
        key: value
        for key, value in state.items()
        if "feature_branch" not in key and not key.endswith("gauss_params.features")
    }
    folder = tmp_path / "splatfacto"
    (folder / "nerfstudio_models").mkdir(parents=True)
    (folder / "config.yml").write_text(yaml.dump(config))
    content = {"step": 29, "pipeline": own, "optimizers": {"means": {"lr": np.float64(1e-4)}}, "schedulers": {}}
    torch.save(content, folder / "nerfstudio_models" / "step-000000029.ckpt")
    run = read_run(folder)
    assert torch.equal(run.gauss_params["means"], state["_model.gauss_params.means"].cpu())
    assert "features" not in run.gauss_params and len(run.capture.select("train")) == 6
    with pytest.raises(ValueError, match="fit3d-lift --load-config"):
        load_run_scene(folder)


def test_viewing__works_without_the_weights_file_and_says_what_is_missing(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ns-viewer`, `ns-render` and `ns-export` set the pipeline up like this; a run may have been copied."""
    config = yaml.load(trained["config_path"].read_text(), Loader=yaml.Loader)
    config.pipeline.datamanager.backbone = "vit_tiny_patch16_224"
    config.pipeline.datamanager.backbone_weights = tmp_path / "gone.safetensors"
    pipeline = config.pipeline.setup(device="cpu", test_mode="inference")
    assert "gone.safetensors" in capsys.readouterr().err
    state = trained["trainer"].pipeline.state_dict()
    pipeline.load_pipeline(state, 39)
    pipeline.eval()
    outputs = pipeline.model.get_outputs_for_camera(pipeline.datamanager.train_dataset.cameras[0:1])
    assert outputs["features_pca"].std() > 0 and outputs["features_pca_original"].abs().sum() == 0


def test_find_config__names_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such run"):
        find_config(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no run"):
        find_config(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name / "nerfstudio_models").mkdir(parents=True)
        (tmp_path / name / "config.yml").write_text("")
    with pytest.raises(ValueError, match="holds 2 runs"):
        find_config(tmp_path)
