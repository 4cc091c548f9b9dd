"""`TensorStore`: tensors kept by name, in memory up to a budget and then on disk.

What has a place in memory stays there: epochs go round, where dropping the least recently used would often drop what is
needed next. A name hashes everything that its tensors were computed from, so a file is right or damaged, never out of
date, and a folder serves other runs.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.utils.files import write_atomically
from fit3d_ns.utils.progress import notice


class TensorStore:
    """Dictionaries of CPU tensors by name."""

    def __init__(self, memory_gb: float, folder: Path | None, *, keep_on_disk: bool = False):
        """Args:
        memory_gb: At most this many 1e9 bytes stay in memory.
        folder: Where the others go; None forgets them.
        keep_on_disk: Write everything to the folder, for other runs to use.
        """
        self.folder = folder
        self.keep_on_disk = keep_on_disk and folder is not None
        self.max_bytes = int(memory_gb * 1e9)
        self.num_bytes = 0
        self._kept: dict[str, dict[str, Tensor]] = {}

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors, not to be written to, or None if they have to be computed."""
        if name in self._kept:
            return self._kept[name]
        path = self._get_path(name)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            notice(f"{path}, which was kept earlier, is damaged ({str(error).splitlines()[0]}); making it anew.")
            return None
        # Mapped pages are the system's to drop; what fits the budget is copied and stays.
        if self._fits(tensors):
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}
            self._keep(name, tensors)
        return tensors

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors that were just computed, as far as there is room.

        Raises:
            ValueError: The disk is full.
        """
        fits = self._fits(tensors)
        if fits:
            self._keep(name, tensors)
        path = self._get_path(name)
        if path is not None and (self.keep_on_disk or not fits):
            with write_atomically(path) as temporary:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)

    def _fits(self, tensors: dict[str, Tensor]) -> bool:
        return self.num_bytes + _count_bytes(tensors) <= self.max_bytes

    def _keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.num_bytes += _count_bytes(tensors)
        self._kept[name] = tensors

    def _get_path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name[:2] / f"{name}.safetensors"


def _count_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
