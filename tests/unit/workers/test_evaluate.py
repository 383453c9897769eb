"""Evaluation layer by layer: the bits of whole models; what groups of windows bound."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes import comparison, evaluate
from rayprune.workers.passes.comparison import Texts, compared
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


@torch.inference_mode()
def scores(folder: Path) -> list[Tensor]:
    """Logits (T, V) of every window, for the tokens that are scored, of the whole model."""
    network = AutoModelForCausalLM.from_pretrained(folder)
    return [network(window_1T).logits[0, -STRIDE - 1 : -1] for window_1T in WINDOWS_NT.split(1)]


def test_losses_are_those_of_the_whole_model_to_the_bit(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(num_hidden_layers=2)
    expected = [
        (float(torch.nn.functional.cross_entropy(each_TV, tokens_T, reduction="sum")), STRIDE)
        for each_TV, tokens_T in zip(scores(folder), WINDOWS_NT[:, -STRIDE:], strict=True)
    ]
    found, _ = losses(folder, monkeypatch, at_once=3)
    assert found == expected


def test_a_comparison_is_that_of_whole_models_to_the_bit(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "EVALUATED_AT_ONCE", 3)
    folders = make_model(num_hidden_layers=2), make_model(name="other", intermediate_size=40)
    first, second = (
        StreamedModel(open_checkpoint(folder), torch.float32, torch.device("cpu"))
        for folder in folders
    )
    texts = Texts(WINDOWS_NT, starts=(0,), stride=STRIDE)
    found = compared(first, second, texts, range(1, len(WINDOWS_NT)))
    for window, each, *logits in zip(
        WINDOWS_NT[1:], found, *(scores(folder)[1:] for folder in folders), strict=True
    ):
        log_p_TV, log_q_TV = (torch.log_softmax(each_TV, -1) for each_TV in logits)
        places = torch.arange(STRIDE), window[-STRIDE:]
        apart_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1, dtype=torch.float64)
        assert each.original_loss == float(-log_p_TV[places].sum(dtype=torch.float64))
        assert each.loss == float(-log_q_TV[places].sum(dtype=torch.float64))
        assert each.divergence == float(apart_T.sum())
        assert each.agreed == int((log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).sum())
