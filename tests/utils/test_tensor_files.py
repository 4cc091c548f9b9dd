import io
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fit3d_ns.utils.tensor_files import load_torch_file, open_tensors, save_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.uint8), "empty": torch.ones(0)}
METADATA = {"format": "pt", "note": 'ä\n"quoted"', "fit3d": "1"}


def test_save__equal_contents_are_equal_bytes_and_come_back(tmp_path: Path) -> None:
    # safetensors keeps metadata in a hash map with a seed of its own: without care, the order differs by chance.
    contents = set()
    for number in range(12):
        save_tensors(tmp_path / str(number), TENSORS, METADATA)
        contents.add((tmp_path / str(number)).read_bytes())
    assert len(contents) == 1
    file = open_tensors(tmp_path / "0")
    file.check()
    assert file.metadata == METADATA and all(torch.equal(file.tensors[name], TENSORS[name]) for name in TENSORS)


def test_check__every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, TENSORS, METADATA)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    unnoticed = []
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            file = open_tensors(path)
            file.check()
        except ValueError as error:
            assert str(path) in str(error)
            continue
        # A blank of the padding may become another blank; what is read is the same.
        assert file.metadata == METADATA and all(torch.equal(file.tensors[name], TENSORS[name]) for name in TENSORS)
        unnoticed.append(bit // 8)
    assert all(whole[position : position + 1].isspace() and position < 8 + header for position in unnoticed)


def test_check__files_of_others_open_and_nan_does_not_pass(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "plain")
    file = open_tensors(tmp_path / "plain")
    file.check()
    assert file.checksums is None
    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "nan")
    with pytest.raises(ValueError, match="NaN or infinite values in `a`"):
        open_tensors(tmp_path / "nan").check()


def test_load_torch_file__a_flipped_bit_changes_no_number(tmp_path: Path) -> None:
    """torch.load itself returns what the bit made of it."""
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer)
    path, whole, num_found = tmp_path / "a.pth", buffer.getvalue(), 0
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        loaded = None
        with suppress(Exception):
            loaded = load_torch_file(path)
        num_found += loaded is None
        # Names of tensors stand in the part that is checked too.
        assert loaded is None or all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    assert num_found > 100
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_torch_file(path)["a"], TENSORS["a"])
