"""The measured profile: plausible, and of this machine."""

import pytest
import torch

from rayprune.specs.machine import MachineProfile
from rayprune.workers.tools import profile


def test_a_measured_profile_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "SECONDS", 0.05)
    monkeypatch.setattr(profile, "DISK_BYTES", 4 * 2**20)
    measured = profile.measure()
    assert isinstance(measured, MachineProfile)
    assert measured.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert measured.fp32_flops > 1e8
    assert measured.memory_bytes > 2**20
