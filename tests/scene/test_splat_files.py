"""Splats in the files and folders of other tools, written here as those tools write them, and what is refused."""

import gzip
import struct

import numpy as np
import pytest
import torch

from fit3d_ns.scene.ply import write_ply
from fit3d_ns.scene.splat_files import read_splats


def test_read_splats__checkpoints_of_gsplats_trainer(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "means": (5, 3),
        "quats": (5, 4),
        "scales": (5, 3),
        "opacities": (5,),
        "sh0": (5, 1, 3),
        "shN": (5, 15, 3),
    }
    splats = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    splats["opacities"][2] = float("inf")
    torch.save({"step": 6999, "splats": splats}, tmp_path / "ckpt_6999_rank0.pt")
    gaussians, num_dropped = read_splats(tmp_path / "ckpt_6999_rank0.pt")
    assert num_dropped == 0 and gaussians.sh_degree == 3
    assert torch.equal(gaussians.means, splats["means"])
    torch.testing.assert_close(gaussians.sh_dc.float(), splats["sh0"][:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gaussians.sh_rest.float(), splats["shN"], rtol=1e-3, atol=1e-3)
    del splats["scales"]
    torch.save({"splats": splats}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt is no checkpoint of gsplat: its `splats` lack scales"):
        read_splats(tmp_path / "other.pt")
    (tmp_path / "code.pt").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ValueError, match="code.pt is not a readable checkpoint"):
        read_splats(tmp_path / "code.pt")
    with pytest.raises(ValueError, match="gone.pt is missing"):
        read_splats(tmp_path / "gone.pt")


def make_rank(seed, num=4, coefficients=15):
    """The part of a scene that one GPU trained."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "sh0": (1, 3), "shN": (coefficients, 3)}
    return {name: torch.randn(num, *shape, generator=generator) for name, shape in shapes.items()}


def write_ranks(folder, step, ranks):
    folder.mkdir(parents=True, exist_ok=True)
    for rank in ranks:
        torch.save({"step": step, "splats": make_rank(10 * step + rank)}, folder / f"ckpt_{step}_rank{rank}.pt")


def test_read_splats__all_gpus_of_the_newest_step(tmp_path, capsys):
    write_ranks(tmp_path / "run" / "ckpts", 6999, range(3))
    write_ranks(tmp_path / "run" / "ckpts", 29999, range(3))
    (tmp_path / "run" / "ckpts" / "._ckpt_39999_rank0.pt").write_bytes(b"of macOS")
    expected = torch.cat([make_rank(299990 + rank)["means"] for rank in range(3)])
    for place in (".", "ckpts", "ckpts/ckpt_29999_rank1.pt"):
        gaussians, num_dropped = read_splats(tmp_path / "run" / place)
        assert num_dropped == 0 and torch.equal(gaussians.means, expected), place
    assert "ckpt_29999_rank0.pt, ckpt_29999_rank1.pt, ckpt_29999_rank2.pt are taken" in capsys.readouterr().err
    # The step that was asked for.
    assert torch.equal(
        read_splats(tmp_path / "run/ckpts/ckpt_6999_rank0.pt")[0].means,
        torch.cat([make_rank(69990 + rank)["means"] for rank in range(3)]),
    )


@pytest.mark.parametrize("ranks", [[0, 1, 3], [1, 2, 3], [0, 1, 2]])
def test_read_splats__says_which_gpus_are_missing(tmp_path, ranks):
    # The last one is known to be missing from another step.
    write_ranks(tmp_path, 6999, range(4))
    write_ranks(tmp_path, 29999, ranks)
    missing = ({0, 1, 2, 3} - set(ranks)).pop()
    for place in (tmp_path, tmp_path / f"ckpt_29999_rank{ranks[0]}.pt"):
        with pytest.raises(ValueError, match=f"Of step 29999 in .*, rank {missing} of 4 GPUs is missing"):
            read_splats(place)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("quats", torch.zeros(4, 3), r"`quats` of torch.float32 \[4, 3\]; expected floating-point \[4, 4\]"),
        ("scales", torch.zeros(5, 3), r"`scales` of torch.float32 \[5, 3\]; expected"),
        ("means", torch.zeros(4, 3).int(), "`means` of torch.int32"),
        ("means", torch.tensor(0.0), "`means` of torch.float32"),
        ("sh0", torch.zeros(4, 3), "`sh0` of torch.float32"),
        ("shN", torch.zeros(4, 7, 3), r"`shN` of torch.float32 \[4, 7, 3\]"),
        ("opacities", torch.full((4,), float("nan")), "no usable Gaussian .4 in the file"),
        ("shN", torch.zeros(4, 3, 3), "harmonics of different degrees"),
    ],
)
def test_read_splats__refuses_checkpoints_of_other_shapes(tmp_path, name, value, sentence):
    good = make_rank(0) if "degrees" in sentence else make_rank(0, num=0)
    torch.save({"splats": make_rank(1) | {name: value}}, tmp_path / "ckpt_9_rank0.pt")
    torch.save({"splats": good}, tmp_path / "ckpt_9_rank1.pt")
    with pytest.raises(ValueError, match=sentence):
        read_splats(tmp_path)


def test_read_splats__the_last_iteration_of_inrias_code(tmp_path, make_scene):
    gaussians = make_scene().gaussians
    for iteration in (7000, 30000):
        kept = gaussians.select(torch.arange(30) < iteration // 1000)
        write_ply(kept, tmp_path / f"point_cloud/iteration_{iteration}/point_cloud.ply")
    assert read_splats(tmp_path)[0].num_gaussians == 30
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no Gaussians: no ckpts/"):
        read_splats(tmp_path / "empty")


@pytest.mark.parametrize("name", ["a.splat", "a.KSPLAT", "a.sog", "meta.json"])
def test_read_splats__names_a_converter_for_other_formats(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0")
    with pytest.raises(ValueError, match=f"splat-transform {name} splat.ply"):
        read_splats(tmp_path / name)


def test_read_splats__says_that_a_file_is_empty(tmp_path):
    torch.save({"splats": make_rank(0, num=0)}, tmp_path / "ckpt_9_rank0.pt")
    with pytest.raises(ValueError, match="holds no usable Gaussian .0 in the file"):
        read_splats(tmp_path / "ckpt_9_rank0.pt")
    (tmp_path / "a.spz").write_bytes(gzip.compress(struct.pack("<4s2I4B", b"NGSP", 3, 0, 2, 12, 0, 0)))
    with pytest.raises(ValueError, match="a.spz holds no Gaussians"):
        read_splats(tmp_path / "a.spz")


def test_read_splats__arrays_of_scenesplat(tmp_path, make_scene):
    raw = make_scene().gaussians
    colours = (raw.sh_dc.float() * 0.28209479177387814 + 0.5).clamp(0, 1)
    arrays = {
        "coord": raw.means,
        "quat": raw.quats,
        "scale": raw.log_scales.float().exp(),
        "opacity": raw.opacity_logits.float().sigmoid()[:, None],
        "color": (colours * 255).to(torch.uint8),
    }
    for name, values in arrays.items():
        np.save(tmp_path / f"{name}.npy", values.numpy())
    read, num_dropped = read_splats(tmp_path)
    assert num_dropped == 0
    for name in ("means", "quats", "log_scales", "opacity_logits"):
        torch.testing.assert_close(getattr(read, name), getattr(raw, name), rtol=1e-3, atol=1e-3)
    shown = read.sh_dc.float() * 0.28209479177387814 + 0.5
    torch.testing.assert_close(shown, colours, rtol=0, atol=1 / 255)
    opacities = np.zeros(len(raw.means), np.float32)
    np.save(tmp_path / "opacity.npy", opacities)
    assert read_splats(tmp_path)[1] == 0
    for wrong, sentence in ((opacities + 1.5, "opacities outside of 0 to 1"), (np.float32(0.5), "`opacity` of")):
        np.save(tmp_path / "opacity.npy", wrong)
        with pytest.raises(ValueError, match=sentence):
            read_splats(tmp_path)
    np.save(tmp_path / "opacity.npy", np.array(["text"]))
    with pytest.raises(ValueError, match=r"opacity\.npy cannot be read"):
        read_splats(tmp_path)
    np.save(tmp_path / "opacity.npy", opacities)
    np.save(tmp_path / "scale.npy", opacities)
    with pytest.raises(ValueError, match=r"`scale` of torch.float32 .*expected floating-point \[.*, 3\]"):
        read_splats(tmp_path)
    (tmp_path / "color.npy").unlink()
    with pytest.raises(ValueError, match="color.npy cannot be read"):
        read_splats(tmp_path)
