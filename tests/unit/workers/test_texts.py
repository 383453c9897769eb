"""Texts in every form give the same windows; what is no text, or may be several things, is refused
by name with the way out, at once.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from rayprune.specs.errors import SpecError
from rayprune.specs.texts import TextSpec
from rayprune.workers.calibration import load_tokenizer, tokenize
from rayprune.workers.texts import files, reading, records
from rayprune.workers.texts.reading import check_text, read_tokens
from tests.helpers import some
from tests.models import build_model

DOCUMENTS = [
    'First, with a comma and a "quote".',
    "Second: é 漢字\nin two lines",
    "",
    "Third; [with] {braces}\tand a tab",
    *(f"Document {number} goes on for some words." for number in range(40)),
]
WHOLE = "".join(document + "\n\n" for document in DOCUMENTS)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hello."},
]
CHAT_TEXT = "<system>Be kind.\n<user>Hello?\n<assistant>Hello.\n"
SHARED = [
    {"from": who, "value": message["content"]}
    for who, message in zip(("system", "human", "gpt"), CHAT, strict=True)
]
Write = Callable[[Path], Path]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """One token per byte."""
    return load_tokenizer(build_model(tmp_path_factory.mktemp("models") / "dense"))


@pytest.fixture
def talker(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> PreTrainedTokenizerBase:
    """The same with a chat template."""
    tokenizer.save_pretrained(tmp_path / "talker")
    (tmp_path / "talker" / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(tmp_path / "talker")


def put(name: str, content: bytes | str) -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def table(columns: dict[str, list[Any]], delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue()


def parquet(name: str, columns: dict[str, Any], **options: Any) -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, **options)
        return path

    return write


def arrow(name: str, columns: dict[str, Any], stream: bool = True) -> Write:
    def write(folder: Path) -> Path:
        path, rows = folder / name, pa.table(columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = pa.ipc.new_stream if stream else pa.ipc.new_file
        with new(str(path), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=7)
        return path

    return write


def dataset(name: str, *parts: dict[str, Any], **state: Any) -> Write:
    """As `Dataset.save_to_disk` writes it; the files' names are not in the rows' order."""

    def write(folder: Path) -> Path:
        found = []
        for number, part in enumerate(parts):
            found.append(f"data-{len(parts) - number:05d}-of-{len(parts):05d}.arrow")
            arrow(f"{name}/{found[-1]}", part)(folder)
        content = {"_data_files": [{"filename": file} for file in found], "_split": None} | state
        put(f"{name}/state.json", json.dumps(content))(folder)
        put(f"{name}/dataset_info.json", "{}")(folder)
        return folder / name

    return write


def many(*writes: Write, into: str = "folder") -> Write:
    def write(folder: Path) -> Path:
        (folder / into).mkdir()
        for one in writes:
            one(folder / into)
        return folder / into

    return write


def lines(*values: Any) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


ROWS = [{"id": number, "text": document} for number, document in enumerate(DOCUMENTS)]
COLUMNS = {"id": [row["id"] for row in ROWS], "text": DOCUMENTS}
JSONL, JSON = lines(*ROWS), json.dumps(ROWS, indent=1)
zstd = lambda text: pa_compressed(text, "zstd")  # noqa: E731


def pa_compressed(text: str, codec: str) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, codec) as stream:
        stream.write(text.encode())
    return bytes(out.getvalue().to_pybytes())


FORMS: dict[str, tuple[Write, dict[str, Any], str]] = {
    "jsonl": (put("a.jsonl", JSONL), {}, "jsonl"),
    "jsonl without a name": (put("a", JSONL), {}, "jsonl"),
    "jsonl called json": (put("a.json", JSONL), {}, "jsonl"),
    "jsonl called txt": (put("a.txt", JSONL), {}, "jsonl"),
    "jsonl called csv": (put("a.csv", JSONL), {}, "jsonl"),
    "jsonl with a mark": (put("a.jsonl", "\ufeff" + JSONL), {}, "jsonl"),
    "jsonl in UTF-16": (put("a.jsonl", JSONL.encode("utf-16")), {}, "jsonl"),
    "jsonl with blank lines": (
        put("a.jsonl", "\n \n" + JSONL.replace("\n", "\r\n\r\n")),
        {},
        "jsonl",
    ),
    "jsonl of texts": (put("a.jsonl", lines(*DOCUMENTS)), {}, "jsonl"),
    "jsonl of content": (put("a.jsonl", JSONL.replace('"text"', '"content"')), {}, "jsonl"),
    "jsonl of the only text": (put("a.jsonl", JSONL.replace('"text"', '"body"')), {}, "jsonl"),
    "jsonl, nested": (
        put("a.jsonl", lines(*({"a": {"b": [1, {"c": text}]}} for text in DOCUMENTS))),
        {"field": "a.b.1.c"},
        "jsonl",
    ),
    "jsonl, a key with a dot": (
        put("a.jsonl", lines(*({"a.b": text, "text": "no"} for text in DOCUMENTS))),
        {"field": "a.b"},
        "jsonl",
    ),
    "jsonl of long lines called txt": (
        put("a.txt", lines(*({"meta": "x" * 100_000, "text": text} for text in DOCUMENTS))),
        {},
        "jsonl",
    ),
    "json": (put("a.json", JSON), {}, "json"),
    "json called jsonl": (put("a.jsonl", JSON), {}, "json"),
    "json called txt": (put("a.txt", JSON), {}, "json"),
    "json in one line": (put("a.json", json.dumps(ROWS)), {}, "json"),
    "json in one line called jsonl": (put("a.jsonl", json.dumps(ROWS)), {}, "json"),
    "json of texts": (put("a.json", json.dumps(DOCUMENTS)), {}, "json"),
    "json with a list inside": (put("a.json", json.dumps({"v": 1, "data": ROWS})), {}, "json"),
    "json, the list inside named": (
        put("a.json", json.dumps({"a": [1.5], "data": ROWS, "c": ["x"]})),
        {"field": "data.text"},
        "json",
    ),
    "json, the key inside the only list": (
        put("a.json", json.dumps({"v": 1, "data": [{"q": "x", "body": t} for t in DOCUMENTS]})),
        {"field": "body"},
        "json",
    ),
    "json of columns": (put("a.json", json.dumps({"text": DOCUMENTS})), {}, "json"),
    "csv": (put("a.csv", table(COLUMNS)), {}, "csv"),
    "csv with a mark": (put("a.csv", "\ufeff" + table(COLUMNS)), {}, "csv"),
    "csv in UTF-16": (put("a.csv", table(COLUMNS).encode("utf-16")), {}, "csv"),
    "csv with semicolons": (put("a.csv", table(COLUMNS, ";")), {}, "csv"),
    "csv called txt": (put("a.txt", table(COLUMNS)), {"format": "csv"}, "csv"),
    "csv, a column": (
        put("a.csv", table({"a": ["x"] * len(DOCUMENTS), "b": DOCUMENTS})),
        {"field": "b"},
        "csv",
    ),
    "csv, the only text": (
        put("a.csv", table({"n": [1.5] * len(DOCUMENTS), "body": DOCUMENTS})),
        {},
        "csv",
    ),
    "tsv": (put("a.tsv", table(COLUMNS, "\t")), {}, "tsv"),
    "parquet": (parquet("a.parquet", COLUMNS), {}, "parquet"),
    "parquet without a name": (parquet("a.bin", COLUMNS), {}, "parquet"),
    "parquet in groups": (parquet("a.parquet", COLUMNS, row_group_size=3), {}, "parquet"),
    "parquet, nested": (
        parquet("a.parquet", {"a": [{"b": text} for text in DOCUMENTS]}),
        {"field": "a.b"},
        "parquet",
    ),
    "parquet, the only text": (
        parquet("a.parquet", {"n": COLUMNS["id"], "body": pa.array(DOCUMENTS, pa.large_string())}),
        {},
        "parquet",
    ),
    "arrow stream": (arrow("a.arrow", COLUMNS), {}, "arrow"),
    "arrow file": (arrow("a.arrow", COLUMNS, stream=False), {}, "arrow"),
    "saved dataset": (
        dataset("d", {"text": DOCUMENTS[:5]}, {"text": DOCUMENTS[5:30]}, {"text": DOCUMENTS[30:]}),
        {},
        "arrow",
    ),
    "gzip": (put("a.jsonl.gz", gzip.compress(JSONL.encode())), {}, "jsonl, gzip"),
    "gzip in parts": (
        put("a.gz", gzip.compress(JSONL[:999].encode()) + gzip.compress(JSONL[999:].encode())),
        {},
        "jsonl, gzip",
    ),
    "gzip without a name": (put("a.jsonl", gzip.compress(JSONL.encode())), {}, "jsonl, gzip"),
    "gzip of csv": (put("a.csv.gz", gzip.compress(table(COLUMNS).encode())), {}, "csv, gzip"),
    "gzip of json": (put("a.json.gz", gzip.compress(JSON.encode())), {}, "json, gzip"),
    "zstd": (put("a.jsonl.zst", zstd(JSONL)), {}, "jsonl, zstd"),
    "zstd in parts": (put("a.zst", zstd(JSONL[:999]) + zstd(JSONL[999:])), {}, "jsonl, zstd"),
    "lz4": (put("a.jsonl.lz4", pa_compressed(JSONL, "lz4")), {}, "jsonl, lz4"),
    "bz2": (put("a.jsonl.bz2", bz2.compress(JSONL.encode())), {}, "jsonl, bz2"),
    "xz": (put("a.jsonl.xz", lzma.compress(JSONL.encode())), {}, "jsonl, xz"),
    "folder of texts": (
        many(*(put(f"{number:03d}.txt", text) for number, text in enumerate(DOCUMENTS))),
        {},
        "text",
    ),
    "folder beside other things": (
        many(
            put("b.jsonl", lines(*ROWS[4:])),
            put("a.jsonl", lines(*ROWS[:4])),
            put(".hidden", b"\0\1"),
            put("README.md", "not this"),
            put("LICENSE", "nor this"),
            put("_SUCCESS", ""),
        ),
        {},
        "jsonl",
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("count", [40, None])
def test_every_form_gives_the_same_windows(
    name: str, count: int | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write, options, form = FORMS[name]
    spec = TextSpec(path=str(write(tmp_path)), **options)
    ids, facts = read_tokens(spec, tokenizer, count)
    expected: list[int] = tokenizer(WHOLE)["input_ids"]
    assert ids == expected[:count]
    assert (facts.forms, facts.holds, facts.tokens) == ((form,), ("text",), len(ids))
    assert facts.complete == (count is None)
    if count is None:
        assert (facts.documents, facts.characters) == (len(DOCUMENTS), sum(map(len, DOCUMENTS)))


@pytest.mark.parametrize("name", FORMS)
def test_a_quick_look_agrees(name: str, tmp_path: Path) -> None:
    write, options, form = FORMS[name]
    _, facts = check_text(TextSpec(path=str(write(tmp_path)), **options))
    assert (facts.forms, facts.documents, facts.complete) == ((form,), len(DOCUMENTS), True) or (
        "long lines" in name and facts.forms == (form,)
    )


def test_a_folder_may_mix_forms(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write = many(
        put("a.txt", DOCUMENTS[0]),
        put("b.jsonl.gz", gzip.compress(lines(*ROWS[1:9]).encode())),
        parquet("c.parquet", {"text": DOCUMENTS[9:20]}),
        put("d.csv", table({"text": DOCUMENTS[20:]})),
    )
    ids, facts = read_tokens(TextSpec(path=str(write(tmp_path))), tokenizer, None)
    assert ids == tokenizer(WHOLE)["input_ids"]
    assert facts.forms == ("text", "jsonl, gzip", "parquet", "csv")
    assert (facts.files, facts.fields) == (4, ("text",))


def test_a_byte_order_mark_is_no_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = "Words with é.\nMore."
    expected = tokenizer(text)["input_ids"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        path = put(f"{encoding}.txt", text.encode(encoding))(tmp_path)
        assert tokenize(TextSpec(path=str(path)), tokenizer, None).tolist() == expected


IDS = [[5, 6, 7], [], [8, 9, 10, 11, 12]]
TOKEN_FORMS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "a.jsonl": (lambda p: p.write_text(lines(*({"input_ids": ids} for ids in IDS))), {}),
    "b.jsonl": (lambda p: p.write_text(lines(*IDS)), {}),
    "c.jsonl": (
        lambda p: p.write_text(lines(*({"a": {"codes": i}} for i in IDS))),
        {"field": "a.codes"},
    ),
    "a.json": (lambda p: p.write_text(json.dumps(IDS)), {}),
    "b.json": (lambda p: p.write_text(json.dumps([*IDS[0], *IDS[2]])), {}),
    "a.parquet": (lambda p: parquet(p.name, {"input_ids": IDS, "labels": IDS})(p.parent), {}),
    "b.parquet": (
        lambda p: parquet(p.name, {"x": pa.array(IDS, pa.list_(pa.uint16()))})(p.parent),
        {"field": "x"},
    ),
    "a.csv": (lambda p: p.write_text(table({"input_ids": IDS})), {}),
    "a.npy": (lambda p: np.save(p, np.array([*IDS[0], *IDS[2]], np.uint16)), {}),
    "b.npy": (lambda p: np.save(p, np.arange(5, 13, dtype=np.int64).reshape(2, 4)), {}),
    "c.npy": (lambda p: np.save(p, np.asfortranarray(np.arange(5, 13).reshape(4, 2))), {}),
}


@pytest.mark.parametrize("name", TOKEN_FORMS)
@pytest.mark.parametrize("count", [2, 8, None])
def test_token_ids_are_taken_as_they_are(
    name: str, count: int | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write, options = TOKEN_FORMS[name]
    write(tmp_path / name)
    spec = TextSpec(path=str(tmp_path / name), **options)
    ids, facts = read_tokens(spec, tokenizer, count)
    assert ids == list(range(5, 13))[:count]
    assert facts.holds == ("token ids",)
    ids, facts = check_text(spec)
    assert len(ids) == facts.tokens == 8


CHATS: dict[str, tuple[Write, dict[str, Any]]] = {
    "messages": (put("a.jsonl", lines({"prompt": "p", "messages": CHAT}, {"messages": CHAT})), {}),
    "conversations": (put("a.jsonl", lines(*[{"id": "x", "conversations": SHARED}] * 2)), {}),
    "json": (put("a.json", json.dumps([{"conversations": SHARED}] * 2)), {}),
    "nested": (put("a.jsonl", lines(*[{"data": {"chat": CHAT}}] * 2)), {"field": "data.chat"}),
    "bare": (put("a.jsonl", lines(CHAT, CHAT)), {}),
    "parquet": (parquet("a.parquet", {"messages": [CHAT, CHAT], "n": [1, 2]}), {}),
    "json in csv": (put("a.csv", table({"messages": [json.dumps(CHAT)] * 2})), {}),
    "parts": (
        put(
            "a.jsonl",
            lines(
                *[
                    {
                        "messages": [
                            CHAT[0],
                            {
                                "role": "user",
                                "content": [{"type": "text", "text": "Hel"}, {"text": "lo?"}],
                            },
                            CHAT[2],
                        ]
                    }
                ]
                * 2
            ),
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_chats_go_through_the_template(
    name: str, talker: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write, options = CHATS[name]
    spec = TextSpec(path=str(write(tmp_path)), **options)
    ids, facts = read_tokens(spec, talker, None)
    expected: list[int] = talker(CHAT_TEXT, add_special_tokens=False)["input_ids"]
    assert ids == expected * 2
    assert (facts.holds, facts.documents) == (("chats",), 2)
    assert check_text(spec)[1].characters == 2 * len("Be kind.Hello?Hello.")


def test_a_list_of_messages_is_one_chat(talker: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    spec = TextSpec(path=str(put("a.json", json.dumps(CHAT, indent=1))(tmp_path)))
    assert talker.decode(tokenize(spec, talker, None)) == CHAT_TEXT


@pytest.mark.parametrize("options", [{}, {"field": "text"}])
@pytest.mark.parametrize("speaker", ["from", "role"])
def test_records_that_have_a_sender_are_no_chat(
    speaker: str, options: dict[str, Any], talker: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{speaker: "a@b", "text": "Hello."}, {speaker: "c@d", "text": "Hello?"}]
    found = [
        tokenize(TextSpec(path=str(put(name, content)(tmp_path)), **options), talker, None)
        for name, content in (("a.jsonl", lines(*rows)), ("a.json", json.dumps(rows)))
    ]
    assert found[0].tolist() == found[1].tolist()
    assert talker.decode(found[0]) == "Hello.\n\nHello?\n\n"


def test_messages_may_be_read_as_records(talker: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = put("a.json", json.dumps(CHAT))(tmp_path)
    found = tokenize(TextSpec(path=str(path), field="content"), talker, None)
    assert talker.decode(found) == "Be kind.\n\nHello?\n\nHello.\n\n"


def test_templates_are_told_one_date(talker: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    talker.chat_template = "{{ strftime_now('%d %b %Y') }}"
    spec = TextSpec(path=str(CHATS["messages"][0](tmp_path)))
    assert talker.decode(tokenize(spec, talker, None)) == "26 Jul 2024" * 2


BOTH = {"title": "x", "body": "y"}
GZ = gzip.compress(JSONL.encode())
NPZ = io.BytesIO()
np.savez(NPZ, a=np.arange(3))
BAD: dict[str, tuple[Write, dict[str, Any], str]] = {
    "absent": (lambda folder: folder / "no.txt", {}, r"no\.txt: cannot be read: No such file"),
    "empty folder": (
        many(),
        {},
        r"folder: cannot be read: a directory without a text; name a file",
    ),
    "folder of folders": (
        many(put("train/a.txt", "x")),
        {},
        r"folder: holds folders \(train\); name",
    ),
    "folder of a model card": (many(put("README.md", "x")), {}, "without a text"),
    "folder with a picture": (
        many(put("a.txt", "x"), put("b.png", b"\x89PNG\r\n\x1a\n\0\0")),
        {},
        r"b\.png: a picture, not a text; give the text",
    ),
    "zip": (put("a.txt", NPZ.getvalue()), {}, r"a\.txt: a zip archive .* not a text"),
    "pdf": (put("a.pdf", b"%PDF-1.7 ..."), {}, r"a\.pdf: a PDF, not a text"),
    "sqlite": (put("a.db", b"SQLite format 3\0"), {}, r"a\.db: an SQLite database, not"),
    "tar in gzip": (
        put("a.tgz", gzip.compress(b"name".ljust(257, b"\0") + b"ustar\0")),
        {},
        r"a\.tgz: a tar archive, not a text",
    ),
    "NULs": (put("a.txt", b"abc\0\0def"), {}, r"a\.txt: holds a NUL at byte 3: .*format: text"),
    "UTF-16 without a mark": (
        put("a.txt", "abc".encode("utf-16-le")),
        {},
        r"a\.txt: holds a NUL at byte 1: .*byte order mark",
    ),
    "latin-1": (put("a.txt", b"caf\xe9 au lait"), {}, r"a\.txt: not UTF-8 .*at byte 3\); convert"),
    "latin-1, late": (
        put("a.txt", b"x" * 3_000_000 + b"\xe9 au"),
        {},
        r"a\.txt: not UTF-8 .*at byte 3000000\)",
    ),
    "latin-1 in jsonl": (
        put("a.jsonl", JSONL.encode() + b'{"text": "caf\xe9"}\n'),
        {},
        rf"a\.jsonl: not UTF-8 .*at byte {len(JSONL.encode()) + 13}\)",
    ),
    "latin-1 in csv": (put("a.csv", b"id,text\n1,caf\xe9\n"), {}, r"a\.csv: not UTF-8 .*byte 13\)"),
    "torn UTF-8": (put("a.txt", "é".encode()[:1]), {}, r"a\.txt: not UTF-8 .*at byte 0\)"),
    "torn UTF-16": (put("a.txt", "ab".encode("utf-16")[:-1]), {}, r"a\.txt: not UTF-16"),
    "no JSON": (
        put("a.txt", "{curly} words\nand more\n"),
        {},
        r"a\.txt: starts like JSON but is none .*format: text",
    ),
    "wiki": (put("a.txt", "[[Link]] to a page"), {}, r"a\.txt: starts like JSON .*format: text"),
    "torn JSON": (put("a.json", JSON[:-9]), {}, r"a\.json: starts like JSON but is none"),
    "several JSON values": (
        put("a.json", '{\n"text": "x"\n}\n{\n"text": "y"\n}'),
        {},
        r"a\.json: starts like JSON but is none \(Extra data.*one value to a line",
    ),
    "Python's words": (put("a.json", "[{'text': 'x'}]"), {}, r"a\.json: starts like JSON"),
    "prose called json": (put("a.json", "words"), {}, r"a\.json: .*format: text"),
    "prose called jsonl": (put("a.jsonl", "words\n"), {}, r"a\.jsonl:1: no JSON; set format: text"),
    "a JSON number": (put("a.json", "17"), {}, r"a\.json: a single value of JSON"),
    "quoted lines": (
        put("a.txt", '"one"\n"two"\n'),
        {},
        r"a\.txt: every line .*format: jsonl, or format: text",
    ),
    "two texts": (
        put("a.jsonl", lines(BOTH)),
        {},
        r"a\.jsonl:1: several fields hold text: title, body; set field",
    ),
    "no text": (put("a.jsonl", lines({"id": 1})), {}, r"a\.jsonl:1: no key 'text'; set field .*id"),
    "wrong field": (
        put("a.jsonl", lines({"texts": "x", "id": 1})),
        {"field": "txets"},
        r"a\.jsonl:1: no key 'txets'; .*did you mean 'texts'\? There are texts, id",
    ),
    "wrong nested field": (
        put("a.jsonl", lines({"a": {"b": "x"}})),
        {"field": "a.c"},
        r"a\.jsonl:1: no key 'a\.c'; set field",
    ),
    "wrong column": (
        put("a.csv", table(COLUMNS)),
        {"field": "txt"},
        r"a\.csv: no key 'txt'; .*did you mean 'text'\? There are id, text",
    ),
    "wrong parquet column": (
        parquet("a.parquet", COLUMNS),
        {"field": "txt"},
        r"a\.parquet: no key 'txt'; .*did you mean 'text'",
    ),
    "an object for a text": (
        put("a.jsonl", lines({"text": {"en": "x"}})),
        {},
        r"a\.jsonl:1: 'text' holds no text, .*an object: en; set field .*dots",
    ),
    "texts for a text": (
        put("a.jsonl", lines({"text": ["x"]}, {})),
        {},
        r"a\.jsonl:1: 'text' holds no text",
    ),
    "nothing for a text": (
        parquet("a.parquet", {"text": ["x", None]}),
        {},
        r"a\.parquet: row 2: 'text' holds no text, .*nothing",
    ),
    "bytes": (parquet("a.parquet", {"text": [b"x"]}), {}, r"a\.parquet: row 1: .*bytes"),
    "two lists": (
        put("a.json", json.dumps({"train": ROWS, "test": ROWS})),
        {},
        r"a\.json: several lists: train, test; set field",
    ),
    "one message a line": (
        put("a.jsonl", lines(*CHAT)),
        {},
        r"a\.jsonl:1: is one message, not a chat; put",
    ),
    "two text columns": (
        put("a.csv", table({"q": ["what"], "a": ["that"]})),
        {},
        r"a\.csv: several fields hold text: q, a; set field",
    ),
    "csv without names": (
        put("a.csv", '1,"words"\n2,"more"\n'),
        {},
        r"a\.csv: its first row does not name columns",
    ),
    "ragged csv": (
        put("a.csv", "id,text\n1,x\n2,y,z\n"),
        {},
        r"a\.csv:3: 3 cells where the first row has 2",
    ),
    "open quote": (
        put("a.csv", 'id,text\n1,"x\n2,y\n'),
        {},
        r"a\.csv:3: no row of a table .*quotes",
    ),
    "two columns of a name": (
        put("a.csv", "text,text\nx,y\n"),
        {},
        r"a\.csv: 2 columns are named 'text'",
    ),
    "prose called csv": (
        put("a.csv", "Once upon a time, there was. A king!\nEnd.\n"),
        {},
        r"a\.csv: .*format: text",
    ),
    "csv called txt": (
        put("a.txt", table(COLUMNS)),
        {},
        r"a\.txt: .*looks like one .*set format: csv, or format: text",
    ),
    "tsv called txt": (
        put("a.txt", table({"id": [1, 2], "text": ["x", "y"]}, "\t")),
        {},
        r"a\.txt: .*set format: tsv, or format: text",
    ),
    "numbers": (put("a.txt", "1 2 3\n" * 9), {}, r"a\.txt: holds whole numbers alone; .*\.npy"),
    "bars": (put("a.txt", "id|text\n1|x\n"), {}, r"a\.txt: .*looks like one .*format: csv"),
    "a name too long": (lambda folder: folder / ("x" * 300), {}, r"xx: cannot be read: File name"),
    "an empty list": (put("a.json", "[]"), {}, r"a\.json: is empty; give a text"),
    "an empty object": (put("a.json", "{}"), {}, r"a\.json: is empty; give a text"),
    "html": (put("a.txt", "<!DOCTYPE html><p>x</p>"), {}, r"a\.txt: holds markup.*format: text"),
    "text called parquet": (
        put("a.parquet", "words"),
        {},
        r"a\.parquet: named as parquet, but holds none",
    ),
    "torn parquet": (
        put("a.parquet", b"PAR1" + b"\1" * 99),
        {},
        r"a\.parquet: no whole parquet file .*fetch",
    ),
    "torn arrow": (
        put("a.arrow", b"\xff\xff\xff\xff\x99\0\0\0abc"),
        {},
        r"a\.arrow: no whole arrow file",
    ),
    "parquet as text": (
        parquet("a.txt", COLUMNS),
        {"format": "text"},
        r"a\.txt: is parquet, not text as format says",
    ),
    "text as parquet": (
        put("a.txt", "x"),
        {"format": "parquet"},
        r"a\.txt: is no such file, not parquet",
    ),
    "parquet in gzip": (
        lambda folder: put("a.gz", gzip.compress(parquet("a", COLUMNS)(folder).read_bytes()))(
            folder
        ),
        {},
        r"a\.gz: a compressed parquet file; decompress it first",
    ),
    "torn gzip": (put("a.gz", GZ[:-20]), {}, r"a\.gz: damaged .*fetch or compress it again"),
    "flipped gzip": (put("a.gz", GZ[:90] + b"\0\0\0" + GZ[93:]), {}, r"a\.gz: "),
    "torn zstd": (put("a.zst", zstd(JSONL)[:-20]), {}, r"a\.zst: damaged"),
    "torn bz2": (put("a.bz2", bz2.compress(JSONL.encode())[:-20]), {}, r"a\.bz2: damaged"),
    "torn xz": (put("a.xz", lzma.compress(JSONL.encode())[:-20]), {}, r"a\.xz: damaged"),
    "gzip twice": (put("a.gz", gzip.compress(GZ)), {}, r"a\.gz: is compressed twice"),
    "a field of plain text": (
        put("a.txt", "words"),
        {"field": "text"},
        r"a\.txt: plain text has no field 'text'",
    ),
    "blanks": (put("a.txt", " \n\t\n" * 99), {}, r"a\.txt: nothing but blanks and NULs in its 396"),
    "NULs as text": (put("a.txt", b"\0" * 99), {"format": "text"}, r"a\.txt: nothing but blanks"),
    "splits": (
        many(put("dataset_dict.json", "{}"), put("train/state.json", "{}")),
        {},
        r"folder: a dataset of several splits; name one of them: train",
    ),
    "picked rows": (
        dataset("d", {"text": ["x"]}, _indices_files=[{"filename": "i.arrow"}]),
        {},
        r"d: keeps its rows' order .*flatten_indices",
    ),
    "no state": (many(put("state.json", "[]")), {}, r"state\.json: no state of a saved dataset"),
    "state outside": (
        many(put("state.json", '{"_data_files": [{"filename": "../x"}]}')),
        {},
        r"state\.json: points to '\.\./x', outside",
    ),
    "padding among token ids": (
        put("a.jsonl", lines({"input_ids": [1, -100]})),
        {},
        r"a\.jsonl:1: 'input_ids' holds -100, which is no token id; leave padding",
    ),
    "floats for token ids": (
        lambda folder: (np.save(folder / "a.npy", np.ones(3)), folder / "a.npy")[1],
        {},
        r"a\.npy: holds float64 of shape \(3,\); token ids are whole numbers",
    ),
    "objects for token ids": (
        lambda folder: (
            np.save(folder / "a.npy", np.array([{}], object), allow_pickle=True),
            folder / "a.npy",
        )[1],
        {},
        r"a\.npy: no whole npy file",
    ),
    "a chat without a template": (
        CHATS["messages"][0],
        {},
        r"a\.jsonl:1: is a chat, but .*no chat template; put",
    ),
    "text in the column of chats": (
        put("a.csv", "messages\nwords\n"),
        {},
        r"a\.csv:2: 'messages' is text, but neither JSON",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_texts_are_refused_by_name(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write, options, message = BAD[name]
    spec = TextSpec(path=str(write(tmp_path)), **options)
    start = time.process_time()
    with pytest.raises(SpecError, match=message) as refused:
        read_tokens(spec, tokenizer, None)
    assert time.process_time() - start < 1
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    "name", [name for name in BAD if name not in ("latin-1, late", "a chat without a template")]
)
def test_a_quick_look_refuses_them_too(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write, options, message = BAD[name]
    with pytest.raises(SpecError, match=message):
        check_text(TextSpec(path=str(write(tmp_path)), **options), tokenizer.encode)


@pytest.mark.parametrize("where", ["itself", "in a folder", "by a link"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "broken link"])
def test_what_never_ends_is_never_opened(
    kind: str, where: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "texts" / "a.txt"
    path.parent.mkdir()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            server = socket.socket(socket.AF_UNIX)
            server.bind(os.path.relpath(path))
            server.close()
        case "device":
            path.symlink_to("/dev/zero")
        case "broken link":
            path.symlink_to("gone.txt")
    link = tmp_path / "link.txt"
    link.symlink_to(path)
    named = {"itself": path, "in a folder": path.parent, "by a link": link}[where]
    start = time.monotonic()  # what blocks takes no processor time
    for look in (check_text, lambda spec: read_tokens(spec, tokenizer, 8)):
        with pytest.raises(
            SpecError, match=r"\.txt( \(a link to .*\): cannot|: cannot be read: a)"
        ):
            look(TextSpec(path=str(named)))
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"from": "alien", "value": "x"}], r"message 1: is from 'alien'; known are human"),
        ([*CHAT, {"role": "user"}], r"message 4: has no text under 'content'; there are role"),
        ([{"from": "human", "text": "x"}], r"message 1: has no text under 'value'; .*from, text"),
        ([{"role": 3, "content": "x"}], r"message 1: its role is no text"),
        ([{"from": ["human"], "value": "x"}], r"message 1: is from \['human'\]; known are human"),
        (
            [{"role": "assistant", "content": {"a": 1}, "tool_calls": []}],
            r"message 1: has no text under 'content'",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            r"message 1: holds 'image'; only text can be read",
        ),
    ],
)
def test_bad_messages_are_named(
    messages: list[Any], message: str, talker: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = put("a.jsonl", lines({"messages": messages}))(tmp_path)
    with pytest.raises(SpecError, match=rf"a\.jsonl:1: {message}"):
        tokenize(TextSpec(path=str(path)), talker, None)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.foo.bar }}",
        "{% for",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_fails_is_named(
    template: str, talker: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    talker.chat_template = template
    with pytest.raises(SpecError, match=r"a\.jsonl:1: the model's chat template refuses this chat"):
        tokenize(TextSpec(path=str(CHATS["messages"][0](tmp_path))), talker, None)


MARKERS = [
    "Prose, with a comma.\nMore prose, with one.\nAnd, again.\n",
    "  An indented line; then another\n",
    '"Well," she said.\n"No!"\n',
    "# Heading\n\n- a list\n",
    "text",
    "def f(x):\n    return {x: [1]}\n",
]


@pytest.mark.parametrize("text", MARKERS)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.md", "a.py"])
def test_prose_is_prose(
    text: str, name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    spec = TextSpec(path=str(put(name, text)(tmp_path)))
    assert tokenize(spec, tokenizer, None).tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", ["csv called txt", "no JSON", "html", "NULs", "quoted lines"])
def test_plain_text_can_be_forced(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = BAD[name][0](tmp_path)
    text = path.read_text()
    spec = TextSpec(path=str(path), format="text")
    assert tokenize(spec, tokenizer, None).tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "form", some(["text", "jsonl", "jsonl.gz", "csv", "parquet", "npy"], "text", "parquet")
)
def test_no_more_is_read_than_is_needed(
    form: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """64 MB of text behind the few tokens that are asked for."""
    documents = ["some words " * 60] * 100_000
    writes: dict[str, Write] = {
        "text": put("a.txt", "".join(documents)),
        "jsonl": put("a.jsonl", lines({"text": documents[0]}) * len(documents)),
        "jsonl.gz": put(
            "a.jsonl.gz", gzip.compress((lines({"text": documents[0]}) * 100_000).encode(), 1)
        ),
        "csv": put("a.csv", "text\n" + f"{documents[0]}\n" * len(documents)),
        "parquet": parquet("a.parquet", {"text": documents}, use_dictionary=False),
        "npy": lambda folder: (
            np.save(folder / "a.npy", np.ones(8_000_000, np.int64)),
            folder / "a.npy",
        )[1],
    }
    spec = TextSpec(path=str(writes[form](tmp_path)))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        start = time.process_time()
        for _ in range(2):
            assert len(tokenize(spec, tokenizer, 100)) == 100
            check_text(spec)
        assert time.process_time() - start < 3
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert pa.total_allocated_bytes() - before < 2**24


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_without_an_end_is_refused(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_LINE", 2**20)
    path = put(name, '{"text": "' + "x" * 2**22 if "json" in name else "text\n" + "x" * 2**22)(
        tmp_path
    )
    with pytest.raises(
        SpecError, match=rf"{name}:\d: a line of more than 1,048,576 characters; give"
    ):
        tokenize(TextSpec(path=str(path)), tokenizer, 8)


def test_too_large_a_document_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MOST_JSON", 2**10)
    path = put("a.json", JSON)(tmp_path)
    with pytest.raises(SpecError, match=r"a\.json: a JSON document of more than .*JSON Lines"):
        tokenize(TextSpec(path=str(path)), tokenizer, 8)
    monkeypatch.setattr(reading, "_QUICK_JSON", 2**10)
    assert not check_text(TextSpec(path=str(path)))[1].complete


def test_a_text_read_whole_has_a_limit(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_CHARACTERS", 2**10)
    spec = TextSpec(path=str(put("a.txt", "words " * 999)(tmp_path)))
    with pytest.raises(SpecError, match=r"more than 1,024 characters; set evaluation\.max_windows"):
        tokenize(spec, tokenizer, None)
    assert len(tokenize(spec, tokenizer, 2000)) == 2000
