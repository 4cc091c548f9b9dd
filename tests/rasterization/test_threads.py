"""The CPU backend under threads and forks: same bits always, no lock-ups."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fit3d_ns.rasterization.cpu import runtime
from tests.rasterization.rasterization_scenes import make_scene, render_everything


def _render_with(num_threads, scene):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return render_everything(scene, "cpu")
    finally:
        torch.set_num_threads(before)


def _assert_same_bits(first, second):
    for name in first.keys() - {"info"}:
        assert torch.equal(first[name], second[name]), name


def test_cpu__repeats_to_the_bit_with_any_number_of_threads():
    scene = make_scene(num_gaussians=3000, num_cameras=2, width=80, height=70, scale=(0.01, 0.2), num_features=24)
    first = _render_with(2, scene)
    for num_threads in (2, 1, 3, 5):
        _assert_same_bits(_render_with(num_threads, scene), first)


def test_cpu__two_threads_can_render_at_once():
    scenes = [make_scene(num_gaussians=500, seed=seed) for seed in range(2)]
    expected = [render_everything(scene, "cpu") for scene in scenes]
    failures = []

    def render_often(index):
        try:
            for _ in range(5):
                _assert_same_bits(render_everything(scenes[index], "cpu"), expected[index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=render_often, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


_FORK = """
import os, sys, types, torch
sys.path.insert(0, {folder!r})
from rasterization_scenes import make_scene, render_everything
torch.set_num_threads(2)
scene = make_scene(num_gaussians=500, num_cameras=2)
def render():
    with torch.no_grad():
        from fit3d_ns.rasterization import rasterization, rasterize_features
        image, _, info = rasterization(**scene.arguments(), colors=scene.features[:, :3].contiguous(), backend="cpu")
        return image, rasterize_features(scene.features, info)
render_everything(scene, "cpu")
expected = render()
child = os.fork()
if child == 0:
    # Threads of torch's own hang in a forked child, which is why loaders' workers have one; these are the kernels'.
    torch.set_num_threads(1)
    from fit3d_ns.rasterization.cpu import runtime
    runtime.torch = types.SimpleNamespace(get_num_threads=lambda: 2)
    same = all(torch.equal(a, b) for a, b in zip(render(), expected))
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_cpu__a_child_forked_after_a_render_renders_the_same():
    # In a fresh process, so that the child does not inherit the test runner.
    code = _FORK.format(folder=os.path.dirname(__file__))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "0", (result.stdout, result.stderr[-2000:])


_LOAD = """
import sys, torch
sys.path.insert(0, {folder!r})
from rasterization_scenes import make_scene, render_everything

class Renders(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return render_everything(scene, "cpu")["images"]

scene = make_scene(num_gaussians=200)
expected = render_everything(scene, "cpu")["images"]
context = dict(num_workers=2, multiprocessing_context="fork", timeout=240)
loader = torch.utils.data.DataLoader(Renders(), batch_size=None, **context)
print([torch.equal(image, expected) for image in loader])
"""


def test_cpu__loader_workers_can_render_after_the_parent_did():
    # In a fresh process: torch refuses gradients in forks once its engine has threads (torch.compile starts some).
    code = _LOAD.format(folder=os.path.dirname(__file__))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == str([True] * 4), (result.stdout, result.stderr[-2000:])


READ_ONLY = """
import errno, sys
from pathlib import Path
import numba.core.caching as caching

make = caching._CacheLocator.ensure_cache_path
def refuse(self):
    if not self.get_cache_path().startswith(sys.argv[1]):
        raise OSError(errno.EROFS, "Read-only file system")
    make(self)
caching._CacheLocator.ensure_cache_path = refuse
from fit3d_ns.rasterization.cpu import runtime

@runtime.compiled
def double(number):
    return 2 * number

print(double(21))
"""


def test_kernels__are_kept_elsewhere_where_code_and_home_are_read_only(tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(READ_ONLY)
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        command = [sys.executable, str(script), str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)

    folder = tmp_path / f"fit3d_ns-kernels-{os.getuid()}"
    said = run()
    assert said.stdout == "42\n" and f"kept in {folder}" in said.stderr
    assert any(folder.rglob("*.nbc")) and folder.stat().st_mode & 0o777 == 0o700
    # What others may write to is never run.
    folder.chmod(0o777)
    for kept in [*folder.rglob("*.nb?")]:
        kept.write_bytes(b"strange")
    said = run()
    assert said.stdout == "42\n" and "not kept" in said.stderr


def test_kernels__a_full_disk_costs_only_the_cache(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fill_up(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    runtime._save_if_possible(fill_up)("signature", "code")
    assert "not kept: the disk is full" in capsys.readouterr().err
