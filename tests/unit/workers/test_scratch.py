"""Scratch in memory and in files; the codec that carries tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rayprune.specs.errors import ResourceError
from rayprune.workers.machine import scratch
from rayprune.workers.machine.memory import give_back_free_memory
from rayprune.workers.machine.scratch import Scratch
from rayprune.workers.numerics.codec import from_array, to_array
from rayprune.workers.numerics.statistics.rows import RowsStatistic

CPU = torch.device("cpu")


def private_bytes() -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("in_files", [False, True])
def test_tensors_have_their_shape_and_type_and_leave_no_file(
    in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "MAPPED_FROM_BYTES", 1)
    place = Scratch(CPU, tmp_path / "new" / "folder" if in_files else None)
    zeros, some = place.zeros(3, 5, dtype=torch.float64), place.empty(2, 7, dtype=torch.bfloat16)
    assert torch.equal(zeros, torch.zeros(3, 5, dtype=torch.float64))
    assert (some.shape, some.dtype) == ((2, 7), torch.bfloat16)
    zeros += 1
    assert float(zeros.sum()) == 15
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert place.empty(0, 4, dtype=torch.float64).shape == (0, 4)


def test_mapped_tensors_are_no_private_memory(tmp_path: Path) -> None:
    place, before = Scratch(CPU, tmp_path), private_bytes()
    large = place.zeros(4096, 4096, dtype=torch.float64)
    large += 1
    assert private_bytes() - before < large.nbytes / 4


def test_r_factors_of_rows_are_no_private_memory(tmp_path: Path) -> None:
    place, before = Scratch(CPU, tmp_path), private_bytes()
    statistics = [RowsStatistic.empty(768, place) for _ in range(6)]
    for statistic in statistics:
        statistic.update(torch.randn(1024, 768))
        assert len(statistic.parts[0]) == 768
    give_back_free_memory()
    assert private_bytes() - before < 6 * 8 * 768**2 / 2


def test_small_tensors_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "from_file", None)
    assert Scratch(CPU, tmp_path).zeros(100, 100, dtype=torch.float64).shape == (100, 100)


def test_a_full_disk_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"GiB for scratch .*free some space there"):
        Scratch(CPU, tmp_path).empty(2**29, 2**29, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_travel_without_copy_or_loss(dtype: torch.dtype) -> None:
    tensor = torch.randn(4, 3, dtype=torch.float64).to(dtype)
    array = to_array(tensor)
    back = from_array(array, dtype)
    assert torch.equal(back, tensor)
    assert array.ctypes.data == tensor.data_ptr() == back.data_ptr()


def test_read_only_arrays_are_taken_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    array = np.arange(6.0)
    array.flags.writeable = False
    assert from_array(array, torch.float64).tolist() == array.tolist()
    assert not recwarn.list
