"""Averaged features are computed once, kept within a budget, and are the same to the bit wherever they come from."""

import pytest
import torch

from fit3d_ns.analysis.correspondence import DepthView
from fit3d_ns.data.images import save_image
from fit3d_ns.finetuning import lifted_views, validation
from fit3d_ns.finetuning.draws import Draw
from fit3d_ns.finetuning.lifted_views import SceneAverages, average_lifted_views
from fit3d_ns.finetuning.scene_bank import SceneBank
from fit3d_ns.finetuning.targets import TargetConfig, TargetRenderer, create_averages
from fit3d_ns.finetuning.training_views import TrainingViews
from fit3d_ns.finetuning.validation import NO_AUGMENTATION, Validation
from fit3d_ns.scene import save_scene
from fit3d_ns.utils.tensor_store import TensorStore
from tests.finetuning.finetuning_scene import PATCH, create_scene, save_new_scene

VISITS = (0, 0, 1, 2, 0, 1, 2, 1)
"""With room for one scene and a half, every change of scene loads one."""


def open_bank(paths, store, num_ready=1.5):
    bank = SceneBank(paths)
    bank = SceneBank(paths, memory_gb=num_ready * bank.on_disk[0].num_bytes / 1e9)
    bank.averages = SceneAverages(bank.on_disk, store)
    return bank


def save_rooms(folder):
    return [save_new_scene(folder, f"room{index}", seed=index) for index in range(3)]


@pytest.mark.parametrize("kept_in", ["memory", "disk", "both", "nothing"])
def test_averages__a_second_load_finds_what_the_first_one_computed(tmp_path, kept_in):
    paths = save_rooms(tmp_path)
    expected = [average_lifted_views(scene).gaussians.features for scene in SceneBank(paths).on_disk]
    size = expected[0].numel() * expected[0].element_size()
    # Room for all, none, one and a half, none.
    memory_gb = {"memory": 1.0, "disk": 0.0, "both": 1.5 * size / 1e9, "nothing": 0.0}[kept_in]
    store = TensorStore(memory_gb, tmp_path / "kept" if kept_in in ("disk", "both") else None)
    bank = open_bank(paths, store)
    for index in VISITS:
        scene = bank[index]
        assert scene.scene_id == f"room{index}" and scene.gaussians.features.dtype == torch.float16
        assert torch.equal(scene.gaussians.features, expected[index])
        # What rendering activates are the averaged ones.
        assert torch.equal(scene.features_and_one[:, :-1], expected[index].float())
        assert bank.num_bytes <= bank.max_bytes and store.memory.num_bytes <= store.memory.max_bytes
    assert bank.num_loads == 7
    assert bank.averages.num_averaged == (7 if kept_in == "nothing" else 3)
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == {"disk": 3, "both": 2}.get(kept_in, 0)
    original = SceneBank(paths).on_disk[0].gaussians.features
    assert torch.equal(bank.on_disk[0].gaussians.features, original) and not torch.equal(original, expected[0])


def test_averages__another_run_reads_them_and_makes_damaged_ones_anew(tmp_path, capsys):
    paths, config = save_rooms(tmp_path), TargetConfig(cache_folder=tmp_path / "shared")

    def average():
        bank = SceneBank(paths)
        bank.averages = create_averages(config, bank, tmp_path / "out")
        return [bank[index].gaussians.features.clone() for index in range(3)], bank.averages.num_averaged

    first, number = average()
    assert number == 3
    files = sorted((tmp_path / "shared" / "averages").rglob("*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:50])
    again, number = average()
    assert number == 1 and "damaged" in capsys.readouterr().err
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_averages__go_where_targets_go(tmp_path):
    bank = SceneBank(save_rooms(tmp_path))

    def find_store(**settings):
        averages = create_averages(TargetConfig(**settings), bank, tmp_path / "out")
        return None if averages is None else averages.store

    assert find_store(average_views=False) is None
    # On a CPU, in the output folder once memory is full; gone with the targets when training has ended.
    assert find_store().folder == tmp_path / "out" / "targets" / "averages" and not find_store().keep_on_disk
    assert find_store().memory.max_bytes == 4_000_000_000 and find_store(average_gb=0.5).memory.max_bytes == 500_000_000
    assert find_store(cache="none").folder is None and find_store(cache="memory").folder is None
    shared = find_store(cache_folder=tmp_path / "shared")
    assert shared.folder == tmp_path / "shared" / "averages" and shared.keep_on_disk
    bank.device = torch.device("cuda")
    assert find_store().folder is None and find_store(cache="disk").folder is not None
    with pytest.raises(ValueError, match=r"average_gb -1"):
        TargetConfig(average_gb=-1.0)


def test_averages__another_mask_is_another_average_and_another_target(tmp_path):
    """Nothing that was kept under the old mask is taken for the new one."""
    scene = create_scene(tmp_path)
    save_scene(scene, tmp_path / "scene.safetensors")

    def render():
        bank = SceneBank([tmp_path / "scene.safetensors"])
        bank.averages = SceneAverages(bank.on_disk, TensorStore(0.0, tmp_path / "kept"))
        views = TrainingViews(bank.on_disk, [("train",)])
        targets = TargetRenderer(bank, views, TargetConfig(), TensorStore(0.0, tmp_path / "targets"))
        sample = views.load_sample(Draw(0, 0, 0), NO_AUGMENTATION, PATCH, 0, targets.rules[0])
        return targets.render(sample).features, targets.num_rendered, bank.averages.num_averaged

    first, *numbers = render()
    assert numbers == [1, 1]
    again, *numbers = render()
    assert numbers == [0, 0] and torch.equal(first, again)
    # Another view's mask: this one's own target changes through the average alone.
    mask = torch.zeros(32, 40, 3, dtype=torch.uint8)
    mask[:, :20] = 255
    save_image(mask, scene.posed_capture.views[3].frame.mask_path)
    changed, *numbers = render()
    assert numbers == [1, 1] and not torch.equal(first, changed)


def test_validation__depth_alone_averages_nothing(tmp_path, monkeypatch):
    """Where all targets are kept, a validation renders depth only; and depth is the same before and after averaging."""
    paths = save_rooms(tmp_path)
    depths: list[DepthView] = []
    create = validation.create_depth_view
    monkeypatch.setattr(validation, "create_depth_view", lambda *args: depths.append(create(*args)) or depths[-1])

    def compute_tokens(images):
        return images.new_ones(1, (images.shape[2] // PATCH) * (images.shape[3] // PATCH), 16)

    def validate(bank):
        views = TrainingViews(bank.on_disk, [("train",)] * 3)
        cache = TensorStore(0.0, tmp_path / "targets")
        targets = TargetRenderer(bank, views, TargetConfig(), cache)
        figures = Validation(targets, PATCH, 2).evaluate(compute_tokens)
        return figures, [depth.depth for depth in depths[-6:]]

    bank = open_bank(paths, TensorStore(1.0, None))
    first, before = validate(bank)
    assert bank.averages.num_averaged == 3
    bank = open_bank(paths, TensorStore(0.0, None))
    monkeypatch.setattr(lifted_views, "average_lifted_views", None)
    again, after = validate(bank)
    assert bank.num_loads == 3 and bank.averages.num_averaged == 0
    assert first.feature_l1 == again.feature_l1
    assert all(torch.equal(one, other) and float(one.max()) > 0 for one, other in zip(before, after, strict=True))


def test_bank__averages_a_scene_that_was_loaded_for_its_depth_without_loading_it_again(tmp_path):
    paths = save_rooms(tmp_path)
    bank = open_bank(paths, TensorStore(0.0, None), num_ready=2.5)
    original = bank.on_disk[0].gaussians.features
    assert torch.equal(bank.get_geometry(0).gaussians.features, original)
    assert bank.get_geometry(0).activated is not None and bank.averages.num_averaged == 0
    averaged = bank[0]
    assert not torch.equal(averaged.gaussians.features, original) and bank.get_geometry(0) is averaged
    assert bank[0] is averaged and (bank.num_loads, bank.averages.num_averaged) == (1, 1)
    # A scene that left is as it was on disk when it returns.
    assert bank[1] is not None and bank[2] is not None
    assert list(bank._ready) == [1, 2] and torch.equal(bank.get_geometry(0).gaussians.features, original)
    assert torch.equal(bank[0].gaussians.features, averaged.gaussians.features) and bank.averages.num_averaged == 4


def test_averages__leave_one_out_averages_over_all_lifted_views_and_else_over_64(tmp_path):
    paths = [save_new_scene(tmp_path, f"room{number}", num_frames=number + 1) for number in (64, 66)]
    bank = SceneBank(paths)
    some, every = (
        create_averages(TargetConfig(leave_one_out=leave_one_out), bank, tmp_path) for leave_one_out in (False, True)
    )
    assert some.compute_hash(0) == every.compute_hash(0) and some.compute_hash(1) != every.compute_hash(1)
