"""gsplat's CUDA kernels before their first use: whether they are compiled, can be, or why not, each in one sentence.

gsplat comes as source: its kernels are compiled once per machine, when something first asks for them, and what goes
wrong then is a traceback far from its cause. `prepare_kernels` finds it out before photographs are loaded.
"""

import contextlib
import importlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fit3d_ns.utils.files import write_atomically
from fit3d_ns.utils.progress import notice

SUPPORTED = ">=1.4.0,<1.7"
"""Versions of gsplat; the plugin's requirement says the same."""
_EXTENSION = "gsplat_cuda"
_GB_PER_JOB = 3.0
"""Memory that one compiler takes at most."""
_ADVICE = "see 'On a CUDA machine' in the README, or work on the CPU (--device cpu, --machine.device-type cpu)"


@dataclass(frozen=True)
class KernelState:
    """What a first call of the kernels would meet."""

    is_compiled: bool
    problem: str
    """Why they can be neither loaded nor compiled; empty if they can."""
    compiler: str = ""
    """The nvcc that would compile them."""

    def describe(self) -> str:
        """For people: compiled, will be compiled with what, or cannot be, because of what."""
        if self.problem:
            return f"cannot be used: {self.problem}"
        return "compiled" if self.is_compiled else f"will be compiled at first use, with {self.compiler}"


def find_kernels() -> KernelState:
    """Looks, without compiling anything."""
    found = find_version("gsplat")
    if found is None:
        return KernelState(False, f"gsplat is not installed (needed is gsplat{SUPPORTED})")
    if found not in SpecifierSet(SUPPORTED, prereleases=True):
        return KernelState(False, f"gsplat {found} is installed, needed is gsplat{SUPPORTED}")
    is_loaded = getattr(sys.modules.get("gsplat.cuda._backend"), "_C", None) is not None
    comes_compiled = "gsplat.csrc" in sys.modules or util.find_spec("gsplat.csrc") is not None
    if is_loaded or comes_compiled or (_find_build_folder() / f"{_EXTENSION}.so").is_file():
        return KernelState(True, "")
    return _find_compilers()


def find_version(package: str) -> Version | None:
    """The installed version of a package, or None."""
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def prepare_kernels() -> None:
    """Loads the kernels, and compiles them first where that has not been done.

    ValueError, in one sentence, where that is not possible; a failed compilation leaves its output in a log file.
    """
    state = find_kernels()
    if state.problem:
        raise ValueError(f"gsplat's CUDA kernels cannot be used: {state.problem}; {_ADVICE}.")
    start = time.perf_counter()
    if not state.is_compiled:
        # As many compilers at once as memory allows.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        jobs = os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, int(memory / _GB_PER_JOB)))))
        said = f"Compiling gsplat's CUDA kernels with {state.compiler}, {jobs} at a time"
        notice(f"{said}: once per machine and version, three minutes on 16 cores.")
    try:
        # gsplat shows a spinner meanwhile; standard output stays free for results.
        with contextlib.redirect_stdout(sys.stderr):
            backend = importlib.import_module("gsplat.cuda._backend")
    except Exception as error:  # Whatever it is, it is about this machine, and gsplat is asked for no more than this.
        log = _find_build_folder().with_name(f"{_EXTENSION}.log")
        with write_atomically(log) as temporary:
            temporary.write_text(str(error), "utf8")
        reasons = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
        problem = f"gsplat's CUDA kernels could not be compiled with {state.compiler or 'what is there'}"
        raise ValueError(f"{problem}: {reasons[-1].strip()[:300]} (all of it in {log}); {_ADVICE}.") from error
    if backend._C is None:
        raise ValueError(f"gsplat {metadata.version('gsplat')} found no way to compile its CUDA kernels; {_ADVICE}.")
    if not state.is_compiled:
        notice(f"Compiled gsplat's CUDA kernels in {time.perf_counter() - start:.0f} s; from now on they are there.")


def _find_build_folder() -> Path:
    """Where torch puts what gsplat compiles."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        python = f"py{sys.version_info.major}{sys.version_info.minor}_cu{(torch.version.cuda or '').replace('.', '')}"
        root = os.path.join(_import_cpp_extension().get_default_build_root(), python)
    return Path(root) / _EXTENSION


def _find_compilers() -> KernelState:
    """Whether the kernels can be compiled; puts the toolkit's programs where gsplat 1.4 looks for them."""
    built_for = torch.version.cuda
    if built_for is None:
        return KernelState(False, "this torch was built without CUDA")
    major = built_for.split(".")[0]
    cpp_extension = _import_cpp_extension()
    home = cpp_extension.CUDA_HOME
    nvcc = None if home is None else shutil.which("nvcc", path=os.path.join(home, "bin"))
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        return KernelState(False, f"no nvcc to compile them; install the CUDA toolkit {major} and set CUDA_HOME to it")
    said = re.search(r"release (\d+)\.(\d+)", _run(nvcc, "--version"))
    if said is None:
        return KernelState(False, f"{nvcc} does not say its version, so it is no working CUDA compiler")
    version = ".".join(said.groups())
    if said[1] != major:
        return KernelState(
            False,
            f"{nvcc} is of CUDA {version} and torch was built for {built_for}; install the CUDA toolkit {major} and set"
            f" CUDA_HOME to it, or a torch built for CUDA {said[1]}",
        )
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        return KernelState(False, "nvcc needs a C++ compiler and none was found (Debian, Ubuntu: build-essential)")
    # Which one torch compiles extensions with depends on its version, and only its source tells.
    standard = "c++20" if "-std=c++20" in Path(cpp_extension.__file__).read_text("utf8") else "c++17"
    if _run(compiler, f"-std={standard}", "-fsyntax-only", "-x", "c++", os.devnull, failed="failed"):
        return KernelState(False, f"{compiler} does not know {standard.upper()}, which torch's headers need")
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(nvcc)])
    return KernelState(False, "", f"nvcc {version} ({nvcc})")


def _import_cpp_extension() -> Any:
    """torch's module that compiles, without its complaint where there is nvcc and no card."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):  # Where torch 2.6 prints it.
        from torch.utils import cpp_extension
    return cpp_extension


def _run(*command: str, failed: str = "") -> str:
    """What a program prints, or `failed`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return failed
    return done.stdout if done.returncode == 0 else failed
