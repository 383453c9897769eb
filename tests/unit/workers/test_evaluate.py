"""Perplexity by windows: what groups of them change (nothing), and what they bound."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayprune.workers.passes import evaluate
from rayprune.workers.passes.evaluate import window_losses
from tests.conftest import MakeModel

WINDOWS_NT = torch.randint(3, 259, (8, 16), generator=torch.Generator().manual_seed(0))
STRIDE = 8


def losses(
    model: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> tuple[list[tuple[float, int]], int]:
    """The losses, and the most hidden states that were there at the same time."""
    alive, most = weakref.WeakSet[Tensor](), [0]

    def store(hidden_BTD: Tensor) -> Tensor:
        alive.add(kept := hidden_BTD.clone())
        most[0] = max(most[0], len(alive))
        return kept

    monkeypatch.setattr(evaluate, "EVALUATED_AT_ONCE", at_once)
    cpu = torch.device("cpu")
    return window_losses(model, WINDOWS_NT, 2, STRIDE, torch.float32, cpu, store), most[0]


def test_groups_of_windows_bound_what_is_held_and_change_no_bit(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(num_hidden_layers=2)
    together, held_together = losses(model, monkeypatch, at_once=64)
    by_three, held = losses(model, monkeypatch, at_once=3)
    assert by_three == together
    assert len(together) == len(WINDOWS_NT)
    assert held <= 3 + 1 < held_together  # and the one that a layer makes of one


def test_losses_are_those_of_the_whole_model(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(num_hidden_layers=2)
    with torch.inference_mode():
        logits_NTV = AutoModelForCausalLM.from_pretrained(folder)(WINDOWS_NT).logits
    expected = [
        float(
            torch.nn.functional.cross_entropy(
                logits_TV[-STRIDE - 1 : -1], tokens_T[-STRIDE:], reduction="sum"
            )
        )
        for logits_TV, tokens_T in zip(logits_NTV, WINDOWS_NT, strict=True)
    ]
    found, _ = losses(folder, monkeypatch, at_once=3)
    assert [count for _, count in found] == [STRIDE] * len(WINDOWS_NT)
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-5)
