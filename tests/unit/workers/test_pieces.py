"""Tokenizers as llama.cpp has them."""

from typing import Any

import pytest

from rayprune.specs.errors import ModelError
from rayprune.workers.texts.pieces import TokenType, vocabulary

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = BYTES | {"use_regex": True}
LLAMA_3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
TEKKEN = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|"
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|"
    "\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def several(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def raw(cut: Any, whole: bool = False, normalizer: Any = None) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": ["a b"]}
    added = [
        {"id": 2, "content": "<s>", "special": True},
        {"id": 4, "content": "<tool>", "special": False},
    ]
    return {
        "model": model | {"byte_fallback": False, "ignore_merges": whole},
        "pre_tokenizer": cut,
        "normalizer": normalizer,
        "added_tokens": added,
    }


@pytest.mark.parametrize(
    ("name", "cut", "whole"),
    [
        ("gpt-2", WORDS, False),
        ("smollm", several({"type": "Digits", "individual_digits": True}, WORDS), False),
        ("llama-bpe", several(split(LLAMA_3), BYTES), True),
        ("qwen2", several(split(LLAMA_3.replace("{1,3}", "")), BYTES), False),
        ("tekken", several(split(TEKKEN), BYTES), True),
    ],
)
def test_how_text_is_cut_is_recognised(name: str, cut: dict[str, Any], whole: bool) -> None:
    found = vocabulary(raw(cut, whole, {"type": "NFC"}), 6, "tokenizer.json")
    assert (found.kind, found.cut, found.scores) == ("gpt2", name, None)
    assert list(found.tokens) == ["a", "b", "<s>", "ab", "<tool>", "[PAD5]"]
    normal, control, own = TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED
    assert list(found.types) == [normal, normal, control, normal, own, TokenType.UNUSED]


@pytest.mark.parametrize(
    "changed",
    [
        raw(several(split(LLAMA_3), BYTES), whole=False),
        raw(split(r"\s+")),
        raw(WORDS | {"add_prefix_space": True}),
        raw(WORDS, normalizer={"type": "Lowercase"}),
        raw(None),
        raw(WORDS) | {"model": {"type": "Unigram"}},
        raw(WORDS) | {"model": {"type": "BPE", "merges": []}},
    ],
)
def test_another_cut_is_refused_by_name(changed: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"is not one of llama\.cpp's that are known here \(gpt-2"):
        vocabulary(changed, 6, "tokenizer.json")


def test_an_older_file_names_neither_its_model_nor_added_tokens() -> None:
    given = raw(WORDS)
    del given["model"]["type"], given["added_tokens"]
    found = vocabulary(given, 4, "tokenizer.json")
    assert list(found.tokens) == ["a", "b", "[PAD2]", "ab"]


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(ModelError, match="has a token 4, but the embeddings have 4 rows"):
        vocabulary(raw(WORDS), 4, "tokenizer.json")


PREPEND = {"type": "Prepend", "prepend": "▁"}
SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}


@pytest.mark.parametrize(
    ("normalizer", "cut", "in_front"),
    [
        ({"type": "Sequence", "normalizers": [PREPEND, SPACE]}, None, True),
        (SPACE, None, False),
        (None, METASPACE | {"prepend_scheme": "first"}, True),
        (None, METASPACE | {"prepend_scheme": "never"}, False),
    ],
)
def test_pieces_have_scores_in_the_order_of_merges(
    normalizer: Any, cut: Any, in_front: bool
) -> None:
    given = raw(cut, normalizer=normalizer)
    vocab = {"<unk>": 0, "<0x0A>": 1, "a": 3, "b": 5, "aa": 6, "aab": 7}
    given["model"] |= {
        "vocab": vocab,
        "merges": [["a", "a"], ["aa", "b"], ["a", "ab"]],
        "byte_fallback": True,
        "unk_token": "<unk>",
    }
    found = vocabulary(given, 8, "tokenizer.json")
    assert (found.kind, found.cut, found.space_in_front) == ("llama", "default", in_front)
    assert found.scores == [-3.0, -3.0, -3.0, -3.0, -3.0, -3.0, 0.0, -1.0]
    assert found.types[:2] == [TokenType.UNKNOWN, TokenType.BYTE]
