"""Tokens that the model has not, windows beyond its positions, and texts that say little."""

from pathlib import Path

import pytest
import torch

from rayprune.specs.errors import ModelError, SpecError
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.texts.checks import check_known, check_varied
from rayprune.workers.texts.limits import check_positions, embedding_rows
from rayprune.workers.texts.reading import TextFacts
from tests.conftest import MakeModel, edit_json
from tests.models import build_model

IDS = TextFacts(("npy",), (), ("token ids",), 1, 1, 0, 9, True)

BEYOND = "evaluation.window: 257 tokens, but the model's config says 256 positions"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """260 tokens, 256 positions, rotary."""
    return open_checkpoint(build_model(tmp_path / "dense"))


def test_the_matrix_says_how_many_tokens_there_are(checkpoint: Checkpoint) -> None:
    assert embedding_rows(checkpoint) == 260


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_unknown_tokens_are_refused_with_numbers(shape: tuple[int, ...]) -> None:
    ids = torch.arange(12).reshape(shape)
    check_known(ids, 12, "/a.txt")
    check_known(ids[:0], 12, "/a.txt")
    check_known(ids, None, "/a.txt")
    found = r"/a\.txt: token 10 \(2 of 12 tokens .*embeddings have 10 rows"
    with pytest.raises(ModelError, match=found + ": the tokenizer is larger"):
        check_known(ids, 10, "/a.txt")
    with pytest.raises(SpecError, match=found + "; give token ids of this model"):
        check_known(ids, 10, "/a.txt", IDS)


def test_texts_that_say_little() -> None:
    ids = torch.arange(100)
    assert check_varied(ids, "/a.txt") == []
    ids[:50] = 7
    assert check_varied(ids, "/a.txt") == []
    ids[:60] = 7
    [warning] = check_varied(ids.reshape(10, 10), "/a.txt")
    assert "/a.txt: 60% of the 100 tokens that are read are token 7, and 41 tokens" in warning
    ids[:99] = 7
    with pytest.raises(SpecError, match=r"/a\.txt: 99% of the 100 tokens .*give a text that says"):
        check_varied(ids, "/a.txt")


def test_windows_beyond_computed_positions_are_warned_of(checkpoint: Checkpoint) -> None:
    assert check_positions(checkpoint, 256, "evaluation.window") == []
    [warning] = check_positions(checkpoint, 257, "evaluation.window")
    assert warning.startswith(BEYOND)


def test_windows_beyond_learned_positions_are_refused(make_model: MakeModel) -> None:
    learned = open_checkpoint(make_model("gpt2", "learned"))
    assert check_positions(learned, 256, "evaluation.window") == []
    with pytest.raises(SpecError, match=f"{BEYOND}.*set evaluation.window: 256"):
        check_positions(learned, 257, "evaluation.window")


def test_tokens_before_those_of_an_option_count(
    checkpoint: Checkpoint, make_model: MakeModel
) -> None:
    assert check_positions(checkpoint, 200, "evaluation.prompt_tokens", 56) == []
    [warning] = check_positions(checkpoint, 200, "evaluation.prompt_tokens", 57)
    assert "200 tokens behind 57" in warning
    assert warning.endswith("evaluation.prompt_tokens: 199 is safe")
    [warning] = check_positions(checkpoint, 1, "evaluation.prompt_tokens", 256)
    assert warning.endswith("give fewer tokens before them")
    learned = open_checkpoint(make_model("gpt2", "learned"))
    with pytest.raises(SpecError, match=r"behind 57, .* set evaluation\.prompt_tokens: 199"):
        check_positions(learned, 200, "evaluation.prompt_tokens", 57)


def test_without_a_limit_nothing_is_said(checkpoint: Checkpoint) -> None:
    edit_json(checkpoint.path / "config.json", max_position_embeddings=None)
    assert check_positions(open_checkpoint(checkpoint.path), 10**6, "evaluation.window") == []
