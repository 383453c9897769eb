"""Text to windows: what is read, in which order, and what is said about texts that do not serve."""

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rayprune.specs.calibration import CalibrationSpec
from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.evaluation import EvaluationSpec
from rayprune.specs.texts import TextSpec
from rayprune.workers.calibration import (
    AS_CUT,
    calibration_windows,
    evaluation_windows,
    load_tokenizer,
    opening_of,
    read_behind,
    read_evaluation,
    tokenize,
)
from rayprune.workers.texts.checks import check_apart, shared_fraction
from rayprune.workers.texts.limits import shares
from tests.models import begun, build_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """One token per byte."""
    return load_tokenizer(build_model(tmp_path_factory.mktemp("models") / "dense"))


@pytest.fixture(scope="module")
def long_words() -> PreTrainedTokenizerBase:
    """One token per word, so that a cut text ends in another token."""
    words = {f"word{number:020d}": number for number in range(500)}
    words_only = Tokenizer(models.WordLevel(words | {"?": 500}, unk_token="?"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, unk_token="?")


def write(path: Path, content: bytes | str) -> TextSpec:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return TextSpec(path=str(path))


def all_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


@pytest.mark.parametrize("count", [1, 100, 5000, 59_999])
def test_first_tokens_are_those_of_the_whole_text(
    count: int, tokenizer: PreTrainedTokenizerBase, text_file: Path
) -> None:
    tokens = tokenize(TextSpec(path=str(text_file)), tokenizer, count)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == all_tokens(tokenizer, text_file.read_text())[:count]


@pytest.mark.parametrize("count", [1, 3, 50, 499, 500, 501, None])
def test_long_tokens_have_more_of_the_text_read(
    count: int | None, long_words: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = " ".join(f"word{number:020d}" for number in range(500))
    assert (
        tokenize(write(tmp_path / "words.txt", text), long_words, count).tolist()
        == list(range(500))[:count]
    )


def test_special_tokens_are_added_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = "One document.\n\nAnother, with é and 漢字.\r\n"
    assert tokenize(write(tmp_path / "a.txt", text), tokenizer, None).tolist() == all_tokens(
        tokenizer, text.replace("\r\n", "\n")
    )


@pytest.mark.parametrize(("name", "form"), [("a.jsonl", "auto"), ("a.txt", "jsonl")])
@pytest.mark.parametrize("count", [10, 40, None])
def test_documents_are_joined_by_blank_lines(
    name: str, form: str, count: int | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    documents = ["First.", "Second: é\u2028x", "Third\nline."] * 20
    # blank lines are skipped
    lines = "\n\n".join(
        json.dumps({"body": text, "id": 1}, ensure_ascii=False) for text in documents
    )
    spec = write(tmp_path / name, lines + "\n").model_copy(update={"format": form, "field": "body"})
    expected = all_tokens(tokenizer, "".join(text + "\n\n" for text in documents))
    assert tokenize(spec, tokenizer, count).tolist() == expected[:count]


def test_json_lines_can_be_read_as_plain_text(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    spec = write(tmp_path / "a.jsonl", '{"text": 1}').model_copy(update={"format": "text"})
    assert tokenize(spec, tokenizer, None).tolist() == all_tokens(tokenizer, '{"text": 1}')


GOOD = '{"text": "fine"}\n\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl:3: no JSON; set format: text"),
        ("plain words", r"a\.jsonl:3: no JSON"),
        ("[" * 100_000, r"a\.jsonl:3: no JSON"),
        ('{"body": "x"}', r"a\.jsonl:3: no key 'text'; set field"),
        ("[1]", r"a\.jsonl:3: no key 'text'"),
        ("3", r"a\.jsonl:3: no key 'text'"),
        ('{"text": 3}', r"a\.jsonl:3: 'text' holds no text"),
        ('{"text": null}', r"a\.jsonl:3: 'text' holds no text"),
        ('{"text": "\\ud800"}', r"a\.jsonl:3: 'text' holds half a surrogate pair"),
    ],
)
def test_bad_lines_are_named(
    line: str, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        tokenize(write(tmp_path / "a.jsonl", GOOD + line), tokenizer, 10_000)


def test_lines_behind_the_needed_tokens_are_not_read(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    spec = write(tmp_path / "a.jsonl", json.dumps({"text": "x" * 2000}) + "\n{")
    assert len(tokenize(spec, tokenizer, 100)) == 100


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_refused(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=r"a\.\w+: not UTF-8 \(invalid"):
        tokenize(write(tmp_path / name, b'{"text": "caf\xe9"}'), tokenizer, None)


@pytest.mark.parametrize(
    ("name", "reason"), [("absent.txt", "No such file"), (".", "a directory without a text")]
)
def test_unreadable_texts_are_named(
    name: str, reason: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=f"cannot be read: .*{reason}"):
        tokenize(TextSpec(path=str(tmp_path / name)), tokenizer, 8)


def test_windows_are_the_first_ones_without_overlap(
    tokenizer: PreTrainedTokenizerBase, text_file: Path
) -> None:
    windows = calibration_windows(
        CalibrationSpec(path=str(text_file), samples=5, sequence_length=16, shards=2), tokenizer
    )
    assert windows.shape == (5, 16)
    assert windows.flatten().tolist() == all_tokens(tokenizer, text_file.read_text())[:80]


@pytest.mark.parametrize("length", [0, 1, 39, 40])
def test_short_texts_are_refused_with_need_and_have(
    length: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = write(tmp_path / "a.txt", "x" * length)
    spec = CalibrationSpec(path=text.path, samples=5, sequence_length=8, shards=2)
    if length == 40:
        assert calibration_windows(spec, tokenizer).shape == (5, 8)
        return
    with pytest.raises(
        SpecError,
        match=(
            rf"5 samples of 8 tokens need 40 tokens, the text has {length}; .*lower"
            r" calibration\.samples"
        ),
    ):
        calibration_windows(spec, tokenizer)


def test_texts_alternate_in_proportion_to_their_weights(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = {name: write(tmp_path / f"{name}.txt", name * 200).path for name in "abc"}
    mix = [{"path": texts["b"], "weight": 0.5}, {"path": texts["c"], "weight": 0.25}]
    spec = CalibrationSpec.model_validate(
        {"path": texts["a"], "mix": mix, "samples": 7, "sequence_length": 8, "shards": 2}
    )
    windows = calibration_windows(spec, tokenizer)
    assert tokenizer.batch_decode(windows) == [name * 8 for name in "abacaba"]


def test_windows_of_a_gate_lie_behind_all_that_are_read(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = {
        name: write(tmp_path / name, "".join(chr(start + n) * 8 for n in range(25))).path
        for name, start in (("a", ord("A")), ("b", ord("a")))
    }
    spec = CalibrationSpec.model_validate(
        {
            "path": texts["a"],
            "mix": [{"path": texts["b"], "weight": 0.5}],
            "samples": 6,
            "sequence_length": 8,
            "shards": 2,
        }
    )
    windows, _ = read_behind(spec, (6, 9), 5, tokenizer, AS_CUT)
    assert tokenizer.batch_decode(windows) == [letter * 8 for letter in "GHIde"]
    with pytest.raises(SpecError, match=r"26 samples .* 20 of them of the gate"):
        read_behind(spec, (6, 9), 30, tokenizer, AS_CUT)


def test_windows_begin_with_what_the_tokenizer_puts_before_a_text(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """In place of their own first token, once; token ids have what they have, but for those that
    the model has written.
    """
    assert opening_of(tokenizer) == AS_CUT
    begins = begun(cast(PreTrainedTokenizerFast, tokenizer))
    words = "".join(chr(ord("A") + n) * 8 for n in range(25))
    text = write(tmp_path / "text.txt", words)
    ids = write(tmp_path / "ids.jsonl", json.dumps({"input_ids": [7] * 80}) + "\n").path
    options = {"samples": 4, "sequence_length": 8, "shards": 2}

    def read(**changes: object) -> list[list[int]]:
        spec = CalibrationSpec.model_validate({"path": text.path} | options | changes)
        windows_ST: list[list[int]] = calibration_windows(spec, begins).tolist()
        return windows_ST

    as_cut = [1, *begins(words, add_special_tokens=False)["input_ids"]]
    assert read(bos=False) == [as_cut[n * 8 : n * 8 + 8] for n in range(4)]
    assert read() == [[1, *as_cut[n * 8 + 1 : n * 8 + 8]] for n in range(4)]
    assert read(path=ids) == read(path=ids, bos=False) == [[7] * 8] * 4
    written = CalibrationSpec.model_validate({"path": text.path, "own": {}} | options).with_own(ids)
    assert calibration_windows(written, begins)[1::2].tolist() == [[1, *[7] * 7]] * 2
    frame, spec = opening_of(begins), CalibrationSpec.model_validate({"path": text.path} | options)
    gate_ST, _ = read_behind(spec, (4, 6), 2, begins, frame)
    assert gate_ST.tolist() == [[1, *as_cut[n * 8 + 1 : n * 8 + 8]] for n in (6, 7)]
    evaluation = EvaluationSpec(path=text.path, window=8, stride=3, max_windows=5)
    found = evaluation_windows(evaluation, begins).tolist()
    assert found == [[1, *as_cut[n * 3 + 1 : n * 3 + 8]] for n in range(5)]
    with pytest.raises(SpecError, match="special tokens fill 1"):
        read_evaluation(evaluation.model_copy(update={"window": 1}), text, begins, frame)


def test_a_weight_that_gives_nothing_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.txt", "a" * 200).path
    spec = CalibrationSpec.model_validate(
        {
            "path": path,
            "mix": [{"path": path, "weight": 0.01}],
            "samples": 7,
            "sequence_length": 8,
            "shards": 2,
        }
    )
    with pytest.raises(SpecError, match=r"its weight gives it none of the 7 samples"):
        calibration_windows(spec, tokenizer)


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (7, [1], [7]),
        (7, [1, 1], [4, 3]),
        (10, [1, 0.5, 0.25], [6, 3, 1]),
        (3, [1, 1, 1], [1, 1, 1]),
    ],
)
def test_shares_are_whole_and_use_up_all(
    total: int, weights: list[float], expected: list[int]
) -> None:
    assert shares(total, weights) == expected


@pytest.mark.parametrize(
    ("stride", "max_windows", "starts"),
    [
        (8, None, range(0, 93, 8)),
        (8, 3, [0, 8, 16]),
        (3, 4, [0, 3, 6, 9]),
        (3, None, range(0, 93, 3)),
        (8, 1000, range(0, 93, 8)),
    ],
)
def test_evaluation_windows(
    stride: int,
    max_windows: int | None,
    starts: range | list[int],
    tokenizer: PreTrainedTokenizerBase,
    text_file: Path,
    tmp_path: Path,
) -> None:
    """A text of 100 tokens in windows of 8; an incomplete last one is dropped."""
    path = write(tmp_path / "a.txt", text_file.read_text()[:100]).path
    tokens = torch.tensor(all_tokens(tokenizer, text_file.read_text()[:100]))
    assert len(tokens) == 100
    windows = evaluation_windows(
        EvaluationSpec(path=path, window=8, stride=stride, max_windows=max_windows), tokenizer
    )
    assert torch.equal(windows, torch.stack([tokens[start : start + 8] for start in starts]))


def test_a_text_without_a_whole_window_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(
        SpecError, match=r"one window needs 8 tokens, the text has 7; lower evaluation\.window"
    ):
        evaluation_windows(
            EvaluationSpec(path=write(tmp_path / "a.txt", "x" * 7).path, window=8), tokenizer
        )


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"version": "1.0", "model": {"type": "Nonsense"}}']
)
def test_unusable_tokenizers_are_refused(content: str | None, tmp_path: Path) -> None:
    folder = build_model(tmp_path / "dense")
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("offset", [0, 1, 37, 200])
@pytest.mark.parametrize(
    ("samples", "length", "window"), [(8, 128, 256), (4, 40, 64), (16, 96, 32)]
)
def test_shared_text_is_found_at_any_offset(
    offset: int, samples: int, length: int, window: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    calibration, other = (
        torch.randint(50_000, (samples * length,), generator=generator),
        torch.randint(50_000, (4096,), generator=generator),
    )
    text = torch.cat([other[: 1024 + offset], calibration, other[1024 + offset :]])
    windows_NT = text[: len(text) // window * window].reshape(-1, window)
    expected = samples * length / windows_NT.numel()
    assert (
        0.4 * expected
        < shared_fraction(calibration.reshape(samples, length), windows_NT)
        <= 1.1 * expected
    )
    with pytest.raises(
        SpecError,
        match=r"evaluation\.path: /e\.txt: \d+% of its tokens stand in the windows for calibration",
    ):
        check_apart(calibration.reshape(samples, length), windows_NT, "evaluation.path", "/e.txt")
    short = text[:4096].reshape(-1, 16)
    assert shared_fraction(calibration.reshape(samples, length), short) > 0.01
    with pytest.raises(SpecError, match="of its tokens stand in the windows"):
        check_apart(calibration.reshape(samples, length), short, "evaluation.path", "/e.txt")
    short = other[:2048].reshape(-1, 16)
    assert shared_fraction(other[2048:].reshape(-1, 16), short) is None
    [warning] = check_apart(other[2048:].reshape(-1, 16), short, "evaluation.path", "/e.txt")
    assert "/e.txt: whether" in warning
    assert "cannot be told with windows of 16 tokens" in warning
    apart = other[: 4096 // window * window].reshape(-1, window)
    assert shared_fraction(calibration.reshape(samples, length), apart) == 0
    calibration_ST = calibration.reshape(samples, length)
    assert check_apart(calibration_ST, apart, "evaluation.path", "/e.txt") == []
