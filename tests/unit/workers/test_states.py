"""Saved states of trainings: whole or none, on any number of ranks, and no pickles."""

from pathlib import Path

import pytest
import torch
from torch import nn

from rayprune.workers.passes.sealed import read_sealed, write_sealed
from rayprune.workers.training.states import open_state, save_state, saved_steps, take_over
from tests.conftest import flip_bit

FILE = "step-0000004/rank-0000-of-0001.safetensors"


def trained(value: float) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    parameters = {
        "matrix": nn.Parameter(torch.full((5, 2), value)),
        "gate": nn.Parameter(torch.tensor(value)),
        "unused": nn.Parameter(torch.full((3,), value)),
    }
    return parameters, torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a training with a state after a step."""
    (tmp_path / "started").write_text("this one")
    parameters, optimizer = trained(1.0)
    (parameters["matrix"].square().sum() * parameters["gate"]).backward()
    optimizer.step()
    save_state(tmp_path, 4, 0, 1, parameters, optimizer)
    return tmp_path


def loaded(folder: Path) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    parameters, optimizer = trained(0.0)
    state = open_state(folder, 4, parameters)
    assert state is not None
    take_over(state, parameters, optimizer)
    return parameters, optimizer


def test_a_training_goes_on_with_the_same_bits(saved: Path) -> None:
    assert saved_steps(saved) == [4]
    parameters, optimizer = loaded(saved)
    again, fresh = loaded(saved)
    assert (parameters["matrix"] != 1).all()
    assert (parameters["unused"] == 1).all()
    assert optimizer.state[parameters["matrix"]]["step"] == 1
    assert optimizer.state[parameters["unused"]]["step"] == 0
    for some, other in ((parameters, optimizer), (again, fresh)):
        for parameter in some.values():
            parameter.grad = torch.ones_like(parameter)
        other.step()
    assert all(torch.equal(parameters[name], again[name]) for name in again)


def test_a_state_of_several_ranks_is_put_together(saved: Path) -> None:
    """As FSDP2 spreads rows: chunks of equal size, the last ones smaller, or empty."""
    expected, _ = loaded(saved)
    whole = read_sealed(saved / FILE, "this one")
    assert whole is not None
    (saved / FILE).unlink()
    for rank in range(4):
        rows = slice(2 * rank, 2 * rank + 2)
        part = {
            name: tensor[rows].clone() if "matrix" in name and tensor.dim() else tensor
            for name, tensor in whole.items()
            if rank == 0 or ("matrix" in name and tensor.dim())
        }
        assert saved_steps(saved) == []
        write_sealed(saved / f"step-0000004/rank-{rank:04d}-of-0004.safetensors", part, "this one")
    assert saved_steps(saved) == [4]
    found, _ = loaded(saved)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_damaged_state_or_that_of_another_training_is_none(saved: Path) -> None:
    parameters, _ = trained(0.0)
    assert open_state(saved, 4, parameters) is not None
    larger = {**parameters, "matrix": nn.Parameter(torch.zeros(6, 2))}
    assert open_state(saved, 4, larger) is None
    assert open_state(saved, 4, {**parameters, "more": nn.Parameter(torch.zeros(1))}) is None
    (saved / "started").write_text("another")
    assert open_state(saved, 4, parameters) is None
    (saved / "started").write_text("this one")
    flip_bit(saved / FILE)
    assert open_state(saved, 4, parameters) is None


def test_odd_names_are_no_states(saved: Path) -> None:
    for name in ("step-x", "step-12", "step-0000005", "step-00000061"):
        (saved / name).mkdir()
        (saved / name / ".metadata").write_bytes(b"\x80\x04.")  # a pickle
        (saved / name / "rank-0000-of-x.safetensors").touch()
        (saved / name / "rank-0000-of-9999.safetensors").touch()
    (saved / "step-0000009").touch()
    assert saved_steps(saved) == [4]
