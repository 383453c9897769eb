"""Files of tensors that no manifest records: what is read is what was written there."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rayprune.workers.passes.sealed import read_sealed, write_sealed

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "step": torch.tensor(4.0),
    "empty": torch.empty(0, 3),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sealed file."""
    path = tmp_path / "shard-0000" / "layer-0001.safetensors"
    write_sealed(path, TENSORS, "one")
    return path


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in TENSORS.items()
    )


def test_what_was_written_is_read(file: Path) -> None:
    found = read_sealed(file, "one")
    assert found is not None
    assert same(found)


def test_a_bit_anywhere_changes_nothing_that_is_read(file: Path) -> None:
    """Of the length of the header, the header, its digest and the values."""
    whole, noticed = file.read_bytes(), 0
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1
        file.write_bytes(data)
        found = read_sealed(file, "one")
        noticed += found is None
        assert found is None or same(found), place
    assert noticed > len(whole) / 2  # the rest is words and spaces in the header


def test_a_file_that_is_cut_anywhere_is_none(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert read_sealed(file, "one") is None


def test_a_file_of_another_place_is_none(file: Path) -> None:
    """Of another layer, another shard, another training; or sealed by nobody."""
    assert read_sealed(file, "another") is None
    layer = file.with_name("layer-0002.safetensors")
    shard = file.parents[1] / "shard-0001" / file.name
    shard.parent.mkdir()
    for other in (layer, shard):
        other.write_bytes(file.read_bytes())
        assert read_sealed(other, "one") is None
    assert read_sealed(file.with_name("absent.safetensors")) is None
    assert read_sealed(file.parent) is None
