"""Every exception that a user can mend becomes one sentence; a bug keeps its traceback."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fit3d_ns.utils.errors import check_writable, explain


def chained(first: BaseException, second: BaseException, cause: bool = False) -> BaseException:
    try:
        try:
            raise first
        except BaseException as error:
            if cause:
                raise second from error
            raise second  # noqa: B904 - the context is the case.
    except BaseException as error:
        return error


FULL = OSError(errno.ENOSPC, "No space left on device", "/x/step.ckpt")
TORCH_FULL = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 14144 vs 14080")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, ("/x/step.ckpt", "disk is full", "free some space")),
        (TORCH_FULL, ("disk is full",)),
        (chained(FULL, RuntimeError("unexpected pos")), ("/x/step.ckpt", "disk is full")),
        (chained(FULL, KeyError("step")), ("disk is full",)),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), ("quota",)),
        (SafetensorError('I/O error: Permission denied (os error 13) at path "/x/.tmpQ"'), ("/x/.tmpQ", "permission")),
        (SafetensorError("Error while deserializing header: invalid JSON"), ("invalid JSON", "make it again")),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/x"), ("/x", "circle")),
        (OSError(errno.EMFILE, "Too many open files"), ("ulimit -n",)),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x/y"), ("/x/y", "file stands where a folder")),
        (OSError(errno.EROFS, "Read-only file system", "/x"), ("read-only",)),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), ("memory",)),
        (MemoryError(), ("memory",)),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ("memory", "2 GiB")),
        (RecursionError("maximum recursion depth exceeded"), ("nested too deeply",)),
        (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"), ("not valid UTF-8", "rename")),
        (RuntimeError("can't start new thread"), ("OMP_NUM_THREADS=1",)),
        (ValueError("Image height 7 is\n not a multiple"), ("Image height 7 is not a multiple.",)),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/a"), ("/x/a", "no such file")),
    ],
)  # fmt: skip
def test_explain__says_what_and_where(error: BaseException, words: tuple[str, ...]) -> None:
    sentence = explain(error)
    assert sentence is not None and "\n" not in sentence and sentence.endswith(".")
    for word in words:
        assert word in sentence, sentence


def test_explain__leaves_bugs_alone() -> None:
    assert explain(KeyError("step")) is None
    assert explain(TypeError("main() takes 0 positional arguments")) is None
    # A missing file that was looked for and handled is not why the later step failed.
    handled = chained(FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), KeyError("step"))
    assert explain(handled) is None
    assert explain(chained(OSError(errno.EACCES, "Permission denied"), TypeError("x"), cause=True)) is not None


def test_explain__a_sentence_of_ours_is_kept_whatever_it_came_from() -> None:
    ours = chained(FULL, ValueError("No space left for a.ckpt; free some."), cause=True)
    assert explain(ours) == "No space left for a.ckpt; free some."


def test_check_writable__finds_out_before_the_work_and_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep" / "scene.safetensors")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    os.symlink("loop", tmp_path / "loop")
    for name in ("file", "loop"):
        with pytest.raises(OSError) as info:
            check_writable(tmp_path / name / "scene.safetensors")
        assert str(tmp_path / name) in (explain(info.value) or "")
