"""What a machine with a CUDA card is told before gsplat's kernels are first used; no card is needed for that."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fit3d_ns.rasterization import interface, kernels

NVCC = "Cuda compilation tools, release {}, V1\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with torch for CUDA 13.0 and a folder of programs of its own; `put` adds one that prints, or fails."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    for module in ("gsplat.csrc", "gsplat.cuda._backend"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    kernels.prepare_kernels.cache_clear()

    def put(name: str, output: str = "", code: int = 0) -> Path:
        path = programs / name
        path.write_text(f"#!/bin/sh\nprintf '{output}'\nexit {code}\n")
        path.chmod(0o755)
        return path

    yield put
    kernels.prepare_kernels.cache_clear()


def test_find_kernels__says_with_what_they_will_be_compiled(machine):
    machine("nvcc", NVCC.format("13.1"))
    machine("c++")
    state = kernels.find_kernels()
    assert not state.problem and not state.is_compiled
    assert state.describe().startswith("will be compiled at first use, with nvcc 13.1")


def test_find_kernels__nvcc_of_cuda_home_comes_first_and_gsplat_finds_it(machine, tmp_path, monkeypatch):
    machine("nvcc", NVCC.format("12.4"))
    machine("c++")
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text("#!/bin/sh\necho 'release 13.0, V1'\n")
    (home / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(home))
    assert f"nvcc 13.0 ({home}/bin/nvcc)" in kernels.find_kernels().describe()


def test_find_kernels__compiled_ones_need_no_compiler(machine, tmp_path):
    folder = tmp_path / "extensions" / "gsplat_cuda"
    folder.mkdir(parents=True)
    (folder / "gsplat_cuda.so").write_bytes(b"")
    assert kernels.find_kernels().describe() == "compiled"


@pytest.mark.parametrize(
    "programs, said",
    [
        ({}, r"no nvcc to compile them; install the CUDA toolkit 13 and set CUDA_HOME"),
        ({"nvcc": (NVCC.format("12.4"), 0)}, r"nvcc is of CUDA 12\.4 and torch was built for 13\.0; install the CUDA"),
        ({"nvcc": ("broken", 0)}, r"does not say its version"),
        ({"nvcc": (NVCC.format("13.0"), 0)}, r"nvcc needs a C\+\+ compiler and none was found"),
        (
            {"nvcc": (NVCC.format("13.0"), 0), "c++": ("", 1)},
            r"c\+\+ does not know C\+\+\d\d, which torch's headers need",
        ),
    ],
)
def test_prepare_kernels__what_is_missing_is_one_sentence(machine, programs, said):
    for name, (output, code) in programs.items():
        machine(name, output, code)
    with pytest.raises(ValueError, match=said) as caught:
        kernels.prepare_kernels()
    assert str(caught.value).count("\n") == 0 and "On a CUDA machine" in str(caught.value)
    # The same sentence at the first rendering, and no `gsplat` among the backends that can run.
    with pytest.raises(ValueError, match=said):
        interface.prepare_rasterizer("cuda")


@pytest.mark.parametrize(
    "version, said",
    [
        ("1.3.0", "gsplat 1.3.0 is installed, needed is gsplat>=1.4.0"),
        ("2.0", "gsplat 2.0 is installed"),
        (None, "gsplat is not installed"),
    ],
)
def test_find_kernels__version_of_gsplat(machine, monkeypatch, version, said):
    found = None if version is None else kernels.Version(version)
    monkeypatch.setattr(kernels, "find_version", lambda package: found)
    assert said in kernels.find_kernels().problem
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert interface.available_backends() == ["cpu", "reference"]


def test_prepare_kernels__a_failed_compilation_leaves_a_log(machine, tmp_path, monkeypatch, capsys):
    machine("nvcc", NVCC.format("13.0"))
    machine("c++")
    output = "Error building extension 'gsplat_cuda':\n[1/2] nvcc ...\nx.cu(3): error: no such thing\nninja: stopped"
    (tmp_path / "extensions").mkdir()

    def fail(name):
        raise RuntimeError(output)

    monkeypatch.setattr(kernels.importlib, "import_module", fail)
    with pytest.raises(
        ValueError, match=r"could not be compiled with nvcc 13\.0 .*: x\.cu\(3\): error: no such"
    ) as caught:
        kernels.prepare_kernels()
    log = tmp_path / "extensions" / "gsplat_cuda.log"
    assert log.read_text() == output and str(log) in str(caught.value)
    assert "Compiling gsplat's CUDA kernels with nvcc 13.0" in capsys.readouterr().err


def test_prepare_kernels__compiles_once_with_as_many_jobs_as_memory_allows(machine, monkeypatch, capsys):
    machine("nvcc", NVCC.format("13.0"))
    machine("c++")
    monkeypatch.delenv("MAX_JOBS", raising=False)
    asked = []

    def compile_kernels(name):
        asked.append(name)
        module = ModuleType(name)
        module._C = object()
        return module

    monkeypatch.setattr(kernels.importlib, "import_module", compile_kernels)
    kernels.prepare_kernels()
    kernels.prepare_kernels()
    assert asked == ["gsplat.cuda._backend"]
    said = capsys.readouterr().err
    assert "at a time" in said and "Compiled gsplat's CUDA kernels in" in said
    assert int(kernels.os.environ["MAX_JOBS"]) >= 1


def test_find_kernels__torch_says_nothing_of_a_toolkit_without_a_card(machine, tmp_path, monkeypatch, capfd, caplog):
    machine("nvcc", NVCC.format("13.1"))
    machine("c++")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # It says so while it is imported, as `fit3d-info` does first.
    monkeypatch.delattr(torch.utils, "cpp_extension")
    monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension")
    assert kernels.find_kernels().describe().startswith("will be compiled at first use")
    assert "No CUDA runtime" not in capfd.readouterr().err + caplog.text
