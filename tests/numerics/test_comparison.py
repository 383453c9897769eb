"""Two models compared layer by layer, against their whole selves in transformers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.comparison import RARE, Texts, compared
from tests.models import build_model

CPU = torch.device("cpu")


def log_probabilities(folder: Path, windows_NT: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    with torch.inference_mode():
        return torch.log_softmax(model(windows_NT).logits[:, :-1], -1)


def test_loss_divergence_and_agreement(tmp_path: Path) -> None:
    folders = [build_model(tmp_path / "original"), tmp_path / "other"]
    other = AutoModelForCausalLM.from_pretrained(folders[0])
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight *= 0.5
    other.save_pretrained(folders[1])
    windows_NT = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(0))
    models = [StreamedModel(open_checkpoint(folder), torch.float32, CPU) for folder in folders]
    log_p, log_q = (log_probabilities(folder, windows_NT) for folder in folders)
    found = compared(models[0], models[1], Texts(windows_NT, stride=999), range(3))
    targets = windows_NT[:, 1:, None]
    divergence = (log_p.exp() * (log_p - log_q)).sum((1, 2))
    agreed = (log_p.argmax(-1) == log_q.argmax(-1)).sum(1)
    for number, one in enumerate(found):
        assert one.tokens == 19
        assert one.original_loss == pytest.approx(-float(log_p.gather(2, targets)[number].sum()))
        assert one.loss == pytest.approx(-float(log_q.gather(2, targets)[number].sum()))
        assert one.divergence == pytest.approx(float(divergence[number]), rel=1e-4)
        assert one.agreed == int(agreed[number])
    assert 0 < sum(one.agreed for one in found) < 3 * 19


def test_a_model_is_the_same_as_itself(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "model")
    model = StreamedModel(open_checkpoint(folder), torch.float32, CPU)
    windows_NT = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))
    for one in compared(model, model, Texts(windows_NT, stride=999), range(2)):
        assert (one.divergence, one.agreed) == (0.0, one.tokens)
        assert one.loss == one.original_loss


def test_a_token_is_as_rare_as_it_is_in_the_text_however_windows_overlap() -> None:
    ids = [1, 2] * 20
    ids[20], ids[21], ids[22], ids[23] = 7, 8, 7, 7
    for stride in (4, 8, 16):
        starts = range(0, len(ids) - 15, stride)
        windows_NT = torch.tensor([ids[start : start + 16] for start in starts])
        text = torch.tensor(ids[: starts[-1] + 16])
        found = Texts(windows_NT, stride=stride).rare(0)
        assert torch.equal(found, Texts(text[None], stride=len(text)).rare(0))


def test_slices_are_by_place_and_by_how_rare_a_token_is_in_its_text(tmp_path: Path) -> None:
    """Two texts of two windows of 8 tokens, 4 apart: what is rare in one is not in the other."""
    folder = build_model(tmp_path / "model")
    model = StreamedModel(open_checkpoint(folder), torch.float32, CPU)
    windows_NT = torch.tensor([[5] * 7 + [6], [5] * 6 + [6, 6], [6] * 8, [6] * 7 + [5]])
    texts = Texts(windows_NT, starts=(0, 2), stride=4)
    assert [texts.rare(text).tolist() for text in (0, 1)] == [[6], [5, 6]]
    found = [one.slices for one in compared(model, model, texts, range(4))]
    tokens = [{name: some.tokens for name, some in slices.items()} for slices in found]
    first = {"first quarter": 1, "second quarter": 2, "third quarter": 2, "last quarter": 2}
    assert tokens[0] == first | {RARE: 1, "other tokens": 6}
    assert tokens[1] == {"third quarter": 2, "last quarter": 2, RARE: 2, "other tokens": 2}
    assert tokens[2] == first | {RARE: 7}
    assert sum(some.loss for some in list(found[1].values())[:2]) == pytest.approx(
        sum(some.loss for some in list(found[1].values())[2:])
    )
