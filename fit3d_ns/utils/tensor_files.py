"""`TensorFile`: a `.safetensors` file with a checksum of each tensor, so that damaged numbers are found, not used.

Checksums are CRC-32 of type, shape and content, in the metadata under `checksums`; they are no protection against
people. Files without them, which others wrote, open as they are.

`BoundedMemory` keeps values up to a budget; `TensorStore` keeps tensors in memory up to a budget and then in files.
What has a place in memory stays there: epochs go round, where dropping the least recently used would often drop what is
needed next.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.utils.errors import first_line
from fit3d_ns.utils.files import parse_json, refuse_lfs_pointer, write_atomically
from fit3d_ns.utils.progress import notice

Value = TypeVar("Value")

_KEY = "checksums"
_METADATA = "__metadata__"
"""Stands among the tensors' names for the rest of the metadata; no tensor can have this name."""


@dataclass
class TensorFile:
    """An open file; its tensors are mapped, and read when they are used."""

    path: Path
    tensors: dict[str, Tensor]
    """By name, not to be written to."""
    metadata: dict[str, str]
    """Without the checksums."""
    checksums: Mapping[str, str] | None
    """By tensor; None where the file has none."""
    is_checked: bool = False
    """Whether `check` has found everything right."""

    def check(self, *, finite: bool = True) -> None:
        """Reads all tensors, once: 0.1 s for a scene of a million Gaussians (170 MB).

        ValueError where a tensor is not what was written or, with `finite`, has NaN or infinities.
        """
        if self.is_checked:
            return
        for name, tensor in self.tensors.items():
            if self.checksums is not None and self.checksums[name] != compute_checksum(tensor):
                raise ValueError(f"{self.path} is damaged: the checksum of `{name}` is wrong; copy or make it again.")
            if finite and tensor.is_floating_point() and tensor.numel():
                # Faster than `isfinite` by a factor of ten or more; NaN comes through.
                if not all(bool(value.isfinite()) for value in torch.aminmax(tensor)):
                    raise ValueError(f"{self.path} holds NaN or infinite values in `{name}`; copy or make it again.")
        self.is_checked = True


def open_tensors(path: Path, known: Collection[str] | None = None) -> TensorFile:
    """Maps a file; of its content only the header is read. ValueError where it is missing, cut short or damaged.

    `known` is metadata that a file without checksums may have; other names are checksums that were damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"No such file: {path}.")
    refuse_lfs_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, RuntimeError) as error:
        # What safetensors says of a file whose length is not that of its tensors.
        is_short = "not fully covered" in str(error) or _ends_in_header(path)
        how = f"cut short ({os.path.getsize(path)} bytes)" if is_short else f"damaged ({first_line(error)})"
        raise ValueError(f"{path} is {how}; copy or make it again.") from error
    if _KEY not in metadata:
        unknown = sorted(set(metadata) - set(metadata if known is None else known))
        unknown += [name for name, value in metadata.items() if _METADATA in value]
        if unknown:
            raise ValueError(f"{path} is damaged: it has metadata `{unknown[0][:20]}`; copy or make it again.")
        return TensorFile(path, tensors, metadata, None)
    text = metadata.pop(_KEY)
    checksums = parse_json(text, f"The list of checksums in {path}")
    is_whole = isinstance(checksums, dict) and checksums.keys() == {*tensors, _METADATA}
    if not is_whole or checksums.pop(_METADATA) != _compute_metadata_checksum(metadata):
        raise ValueError(f"{path} is damaged: the checksum of its header is wrong; copy or make it again.")
    return TensorFile(path, tensors, metadata, checksums)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors of any device atomically, with their checksums; equal tensors and metadata make equal bytes.

    ValueError where the file cannot be written; nothing remains of it then.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: compute_checksum(tensor) for name, tensor in on_cpu.items()}
    checksums[_METADATA] = _compute_metadata_checksum(metadata or {})
    with write_atomically(path) as temporary:
        save_file(on_cpu, temporary, metadata={**(metadata or {}), _KEY: json.dumps(checksums)})
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in an order of chance; the header keeps its length."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        packed = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(packed) <= length:
            file.seek(8)
            file.write(packed.ljust(length))


def load_torch_file(path: Path, mmap: bool = False) -> Any:
    """Reads what `torch.save` wrote, without running code from it; with `mmap` tensors stay on disk until used.

    ValueError where a part is not what was written: torch itself ignores the checksums in its files. Those that torch
    wrote before 1.6 have none. What torch's reader raises is of any type.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} in it is wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))


def save_torch_file(content: Any, path: Path) -> None:
    """Writes what `load_torch_file` reads; Python's file says why it cannot be written, torch's own does not."""
    with open(path, "wb") as file:
        torch.save(content, file)


def compute_checksum(tensor: Tensor) -> str:
    """Of a CPU tensor's type, shape and content, eight hexadecimal digits."""
    start = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{zlib.crc32(content, start):08x}"


class BoundedMemory(Generic[Value]):
    """Values by key; the first ones that fit the budget stay for good."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._kept: dict[Hashable, Value] = {}

    def get(self, key: Hashable) -> Value | None:
        return self._kept.get(key)

    def fits(self, num_bytes: int) -> bool:
        return self.num_bytes + num_bytes <= self.max_bytes

    def keep(self, key: Hashable, value: Value, num_bytes: int) -> bool:
        """Keeps a new value if there is room for it, and says whether there was."""
        if not self.fits(num_bytes):
            return False
        self.num_bytes += num_bytes
        self._kept[key] = value
        return True


class TensorStore:
    """Dictionaries of CPU tensors by hash.

    A hash covers everything that its tensors were computed from, so a file is right or damaged, never out of date, and
    a folder serves other runs. At most `memory_gb` times 1e9 bytes stay in memory. The others go to the folder (None
    forgets them), with `keep_on_disk` all of them do.
    """

    def __init__(self, memory_gb: float, folder: Path | None, *, keep_on_disk: bool = False):
        self.folder, self.keep_on_disk = folder, keep_on_disk
        self.memory: BoundedMemory[dict[str, Tensor]] = BoundedMemory(int(memory_gb * 1e9))

    def load(self, content_hash: str, *names: str) -> dict[str, Tensor] | None:
        """The tensors of these names, not to be written to, or None if they have to be computed."""
        kept = self.memory.get(content_hash)
        path = self._get_path(content_hash)
        if kept is not None or path is None or not path.is_file():
            return kept
        try:
            file = open_tensors(path, known=())
            file.check()
            if set(names) != set(file.tensors):
                raise ValueError(f"{path} holds {', '.join(file.tensors) or 'nothing'}, not {', '.join(names)}.")
        except ValueError as error:
            notice(f"What was kept earlier is made again: {error}")
            return None
        tensors = file.tensors
        # Mapped pages are the system's to drop; what fits the budget is copied and stays.
        num_bytes = count_bytes(*tensors.values())
        if self.memory.fits(num_bytes):
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}
            self.memory.keep(content_hash, tensors, num_bytes)
        return tensors

    def save(self, content_hash: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors that were just computed, as far as there is room; ValueError where the disk is full."""
        is_kept = self.memory.keep(content_hash, tensors, count_bytes(*tensors.values()))
        path = self._get_path(content_hash)
        if path is not None and (self.keep_on_disk or not is_kept):
            save_tensors(path, tensors)

    def _get_path(self, content_hash: str) -> Path | None:
        return None if self.folder is None else self.folder / content_hash[:2] / f"{content_hash}.safetensors"


def count_bytes(*tensors: Tensor) -> int:
    """Memory that tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _compute_metadata_checksum(metadata: Mapping[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(sorted(metadata.items())).encode()):08x}"


def _ends_in_header(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(8)
    return len(start) < 8 or os.path.getsize(path) < 8 + int.from_bytes(start, "little")
