"""`BoundedMemory` keeps values up to a budget; `TensorStore` keeps tensors in memory up to a budget and then on disk.

What has a place in memory stays there: epochs go round, where dropping the least recently used would often drop what is
needed next.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.tensor_files import open_tensors, save_tensors

Value = TypeVar("Value")


class BoundedMemory(Generic[Value]):
    """Values by key; the first ones that fit the budget stay for good."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
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
        self.folder = folder
        self.keep_on_disk = keep_on_disk
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
