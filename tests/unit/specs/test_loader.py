"""Job files and overrides: what is read, what is refused, and what the refusal says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayprune.specs.errors import SpecError
from rayprune.specs.explain import models
from rayprune.specs.job import JobSpec
from rayprune.specs.latency import load_latency
from rayprune.specs.loader import differing_fields, dump_job, load_job
from rayprune.specs.machine import load_profile

REQUIRED = "model: {path: m}\ncalibration: {path: c}\n"

Load = Callable[..., JobSpec]
Refuse = Callable[..., list[str]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a text, by default after the two required sections, as the job file `job.yaml`."""

    def load_text(text: str | bytes, *overrides: str, whole: bool = False) -> JobSpec:
        content = text.encode() if isinstance(text, str) else text
        (tmp_path / "job.yaml").write_bytes(content if whole else REQUIRED.encode() + content)
        return load_job(tmp_path / "job.yaml", overrides)

    return load_text


@pytest.fixture
def refuse(load: Load, tmp_path: Path) -> Refuse:
    """Load a text that must be refused; the lines of the message, with the file named as
    `job.yaml`.
    """

    def refuse_text(text: str | bytes, *overrides: str, whole: bool = False) -> list[str]:
        with pytest.raises(SpecError) as caught:
            load(text, *overrides, whole=whole)
        return str(caught.value).replace(f"{tmp_path}{os.sep}", "").split("\n")

    return refuse_text


# --- scalars and structure ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1e5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("+2", 2.0),
        ("010", 10.0),
        ("0o10", 8.0),
        ("0x1F", 31.0),
        ("0", 0.0),
        ("!!float 3", 3.0),
    ],
)
def test_numbers_follow_yaml_1_2(load: Load, text: str, value: float) -> None:
    assert load(f"correction: {{damping: {text}}}").correction.damping == value


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "yes",
        "on",
        "off",
        "y",
        "12:30:45",
        "2024-01-02",
        "1_000",
        "0b11",
        "=",
        "<<",
        "!!str 12",
        "'true'",
        "truE",
    ],
)
def test_texts_follow_yaml_1_2(load: Load, text: str) -> None:
    assert load(f"cluster: {{address: {text}}}").cluster.address == text.removeprefix(
        "!!str "
    ).strip("'")


@pytest.mark.parametrize("text", ["~", "null", "Null", "NULL", ""])
def test_null_follows_yaml_1_2(load: Load, text: str) -> None:
    assert load(f"evaluation: {text}").evaluation is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("true", "true"),
        ("FALSE", "false"),
        ("08", "8"),
        (".inf", "Infinity"),
        ("-.INF", "-Infinity"),
        (".NaN", "NaN"),
    ],
)
def test_no_text_is_read_as_number_or_bool(refuse: Refuse, text: str, shown: str) -> None:
    assert refuse(f"cluster: {{address: {text}}}") == [
        f"job.yaml:3: cluster.address: must be a text (got {shown}); put it in quotes"
    ]


def test_byte_order_mark_and_json_are_accepted(load: Load) -> None:
    job = load(
        b'\xef\xbb\xbf{"model": {"path": "/m"}, "calibration": {"path": "/c", "samples": 9}}',
        whole=True,
    )
    assert job.calibration.samples == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "budget:\n  sparsity: 0.1\n  sparsity: 0.3\n",
            'job.yaml:5: duplicate key "sparsity", first given at job.yaml:4; remove one',
        ),
        ("1: x\n", 'job.yaml:3: "1" is not a field name; correct it'),
        ("[a]: x\n", "job.yaml:3: a list or mapping is not a field name; correct it"),
        ("export:\n  dtype: !secret auto\n", "job.yaml:4: unexpected tag !secret; remove it"),
        ("export:\n  dtype: !!binary YQ==\n", "job.yaml:4: unexpected tag !!binary; remove it"),
        ("export: !!set {a}\n", "job.yaml:3: unexpected tag !!set; remove it"),
        ("export: !!str {a: 1}\n", "job.yaml:3: unexpected tag !!str; remove it"),
        ("export:\n  dtype: !!int abc\n", 'job.yaml:4: "abc" cannot be read as !!int; correct it'),
        pytest.param(
            "cluster: {address: " + "9" * 5000 + "}",
            'job.yaml:3: "' + "9" * 76 + "... cannot be read as !!int",
            id="digits",
        ),
        (
            'cluster:\n  address: "a\\0b"\n',
            'job.yaml:4: "a\\u0000b" holds a NUL or half a surrogate pair; remove it',
        ),
        (
            'cluster:\n  address: "\\ud800"\n',
            'job.yaml:4: "\\ud800" holds a NUL or half a surrogate pair; remove it',
        ),
        (
            'model2: {path: "~\\0"}\n',
            'job.yaml:3: "~\\u0000" holds a NUL or half a surrogate pair; remove it',
        ),
        (
            "<<: {budget: {}}\n",
            (
                "job.yaml:3: <<: unknown field; known fields: schema_version, recipe, model,"
                " calibration, budget, "
            ),
        ),
    ],
)
def test_structural_problems_name_the_line(refuse: Refuse, text: str, message: str) -> None:
    assert refuse(text)[0].startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "budget: {sparsity: 0.1\n",
            "job.yaml:4:1: not valid YAML: while parsing a flow mapping, expected ',' or '}'",
        ),
        (
            "budget:\n\tsparsity: 1\n",
            (
                "job.yaml:4:1: not valid YAML: while scanning for the next token, found character"
                " '\\t'"
            ),
        ),
        ("a: *nowhere\n", "job.yaml:3:4: not valid YAML: found undefined alias 'nowhere'"),
        (
            "---\na: 1\n",
            (
                "job.yaml:3:1: not valid YAML: expected a single document in the stream, but found"
                " another document"
            ),
        ),
        ("a: \x07\n", "job.yaml:3:4: the character U+0007 is not allowed in YAML"),
        (b"a: \xff\n", "job.yaml:3: not valid UTF-8 at byte 43"),
        ('a: "\\UFFFFFFFF"\n', "job.yaml: not valid YAML: "),
        pytest.param(
            "a: " + "[" * 100_000 + "\n",
            "job.yaml:3:35: not valid YAML: nested deeper than 32 levels",
            id="deep",
        ),
        (
            "a: &a []\nb: [" + "*a," * 101 + "]\n",
            "job.yaml:4:305: not valid YAML: more than 100 aliases",
        ),
        ("a: &a [*a]\n", "job.yaml:3: more than 32 levels or 10000 values, aliases expanded"),
        pytest.param("#" * 2**20, "job.yaml: larger than 1048576 bytes", id="large"),
    ],
)
def test_unreadable_yaml_names_the_place(refuse: Refuse, text: str | bytes, message: str) -> None:
    (line,) = refuse(text)
    assert line.startswith(message)


def test_nested_aliases_cannot_multiply(refuse: Refuse) -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 11)]
    (line,) = refuse("\n".join(["a0: &a0 [x]", *levels]))
    assert "10000 values" in line


def test_aliases_are_expanded(load: Load) -> None:
    job = load(
        "model: {path: &m /data}\ncalibration: {path: *m}\nevaluation: {path: *m}", whole=True
    )
    assert (job.model.path, job.calibration.path) == ("/data", "/data")


@pytest.mark.parametrize("text", ["", "# nothing\n", "just a text", "[1, 2]", "null"])
def test_top_level_must_be_a_mapping(refuse: Refuse, text: str) -> None:
    (line,) = refuse(text, whole=True)
    assert line.endswith("the file must be a mapping of sections, such as `model:`")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SpecError, match="cannot read the job file") as caught:
            load_job(path)
        assert str(path) in str(caught.value)


# --- validation messages ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget:\n  sparsity: 1.5", "job.yaml:4: budget.sparsity: must be less than 1 (got 1.5)"),
        ("budget:\n  sparsity: 0", "job.yaml:4: budget.sparsity: must be greater than 0 (got 0)"),
        (
            "budget:\n  round_to: 1e2",
            'job.yaml:4: budget.round_to: must be an integer, or "auto" (got 100.0)',
        ),
        (
            "budget:\n  round_to: true",
            'job.yaml:4: budget.round_to: must be an integer, or "auto" (got true)',
        ),
        (
            "budget:\n  round_to:\n    5000",
            'job.yaml:4: budget.round_to: must be at most 4096, or "auto" (got 5000)',
        ),
        (
            'budget:\n  sparsity: "1e-3"',
            'job.yaml:4: budget.sparsity: must be a number (got "1e-3"); remove the quotes',
        ),
        (
            'budget:\n  round_to: "8"',
            (
                'job.yaml:4: budget.round_to: must be an integer, or "auto" (got "8"); remove the'
                " quotes"
            ),
        ),
        (
            "budget:\n  sparsty: 1",
            'job.yaml:4: budget.sparsty: unknown field; did you mean "sparsity"?',
        ),
        (
            "memory:\n  zzz: 1",
            "job.yaml:4: memory.zzz: unknown field; known fields: worker, checkpoint_layers",
        ),
        ("bugdet: {}", 'job.yaml:3: bugdet: unknown field; did you mean "budget"?'),
        (
            "budget:\n  kv_groups: 0",
            'job.yaml:4: budget.kv_groups: must be at least 1, or "auto" (got 0)',
        ),
        (
            "budget:\n  kv_groups: auot",
            (
                'job.yaml:4: budget.kv_groups: must be an integer, or "auto" (got "auot"); did you'
                ' mean "auto"?'
            ),
        ),
        (
            "correction:\n  damping: .inf",
            'job.yaml:4: correction.damping: must be a finite number, or "held-out" (got Infinity)',
        ),
        (
            "correction:\n  damping: '1e-3'",
            (
                'job.yaml:4: correction.damping: must be a number, or "held-out" (got "1e-3");'
                " remove the quotes"
            ),
        ),
        (
            "correction:\n  candidates: []",
            "job.yaml:4: correction.candidates: must be a list of at least 1 value(s) (got [])",
        ),
        (
            "correction:\n  candidates: 1",
            "job.yaml:4: correction.candidates: must be a list (got 1)",
        ),
        (
            "correction:\n  candidates:\n  - 1\n  - x",
            'job.yaml:6: correction.candidates[1]: must be a number (got "x")',
        ),
        (
            "method:\n  name: stta",
            (
                'job.yaml:4: method.name: must be one of "composite", "flap", "numerical", "obs",'
                ' "stat", "wanda", "dress", "trsp", "progressive", "sparse", "none" (got "stta");'
                ' did you mean "stat"?'
            ),
        ),
        (
            "method:\n  name: obs\n  round: 3",
            'job.yaml:5: method.round: unknown field; did you mean "rounds"?',
        ),
        (
            "method:\n  name: obs\n  factorization: qr",
            (
                "job.yaml:5: method.factorization: unknown field; known fields: name, rounds,"
                " swaps, damping"
            ),
        ),
        (
            "method:\n  name: obs\n  rounds: 0",
            "job.yaml:5: method.rounds: must be at least 1 (got 0)",
        ),
        ("method: 7", "job.yaml:3: method: must be a section of fields (got 7)"),
        (
            "cluster:\n  executor: rya",
            (
                'job.yaml:4: cluster.executor: must be one of "ray", "in-process" (got "rya"); did'
                ' you mean "ray"?'
            ),
        ),
        (
            "cluster:\n  executor: 7",
            'job.yaml:4: cluster.executor: must be one of "ray", "in-process" (got 7)',
        ),
        (
            "parallel:",
            (
                "job.yaml:3: parallel: must be a section of fields (got null); add fields to it, or"
                " remove it"
            ),
        ),
        (
            "memory:\n  worker: 8GX",
            (
                "job.yaml:4: memory.worker: '8GX' is not a size; write for example 8GiB, 500MB or a"
                " number of bytes"
            ),
        ),
        ("memory:\n  worker: 0", "job.yaml:4: memory.worker: must be at least 1 (got 0)"),
        ("schema_version: 2", "job.yaml:3: schema_version: must be 1 (got 2)"),
        (
            "evaluation:\n  path: ''",
            'job.yaml:4: evaluation.path: must be a text of at least 1 character(s) (got "")',
        ),
        ("evaluation:\n  path: [a]", 'job.yaml:4: evaluation.path: must be a text (got ["a"])'),
        (
            "evaluation:\n  path: a\n  few_shot: 1",
            "job.yaml:3: evaluation: few_shot: there are no tasks; give tasks: [NAME], or leave it",
        ),
        (
            "evaluation:\n  path: a\n  stride: 2000",
            "job.yaml:3: evaluation: stride (2000) must not exceed window (1024)",
        ),
        (
            "parallel:\n  workers: 9",
            "job.yaml:1: parallel.workers (9) must not exceed calibration.shards (8)",
        ),
    ],
)
def test_invalid_field_is_explained(refuse: Refuse, text: str, message: str) -> None:
    (line,) = refuse(text)
    assert line.startswith(message)


def _fields(section: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        yield (*before, name)
        for inner in models(field.annotation) if len(before) < 3 else ():
            yield from _fields(inner, (*before, name))


def test_every_field_says_what_it_must_be() -> None:
    told = []
    for path in dict.fromkeys(_fields(JobSpec)):
        for value in ({}, [], [{}], {"a": 1}, {"": {"path": "x"}}, "x", "", -1, 1.5, True, None):
            job: dict[str, Any] = {"model": {"path": "m"}, "calibration": {"path": "c.txt"}}
            section = job
            for name in path[:-1]:
                section = section.setdefault(name, {})
            section[path[-1]] = value
            try:
                load_job(job)
            except SpecError as refused:
                told += str(refused).splitlines()
    assert len(told) > 1000
    assert [line for line in told if "must be valid (" in line] == []


def test_missing_fields_name_the_nearest_line(refuse: Refuse) -> None:
    assert refuse("\ncalibration:\n  samples: 4\n", whole=True) == [
        "job.yaml:2: model: is required; add it",
        "job.yaml:2: calibration.path: is required; add it",
    ]


def test_all_problems_are_reported_together(refuse: Refuse) -> None:
    lines = refuse(
        "budget:\n  sparsity: 2\n  sparsity: 2\nexport:\n  dtype: float33\n",
        "memory.worker=x",
        "nonsense",
    )
    assert [line.split(": ")[0] for line in lines] == [
        "job.yaml:5",
        "--set nonsense",
        "job.yaml:4",
        "--set memory.worker=x",
        "job.yaml:7",
    ]


def test_a_long_value_is_shortened(refuse: Refuse) -> None:
    (line,) = refuse(f"export: {{dtype: {'x' * 5000}}}")
    assert len(line) < 250


# --- overrides ---


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("budget.sparsity=1e-3", "budget", "sparsity", 1e-3),
        ("budget.kv_groups=auto", "budget", "kv_groups", "auto"),
        ("budget.kv_groups=2", "budget", "kv_groups", 2),
        ("correction.candidates=[1e-2, 0.1]", "correction", "candidates", (1e-2, 0.1)),
        ("memory.worker=8GiB", "memory", "worker", 8 * 2**30),
        ("memory.worker=null", "memory", "worker", None),
        ("memory.worker=", "memory", "worker", None),
        ("memory={worker: 500 MB}", "memory", "worker", 500_000_000),
        ("cluster.address=ray://host:10001", "cluster", "address", "ray://host:10001"),
        ("cluster.address=a=b", "cluster", "address", "a=b"),
    ],
)
def test_override_sets_a_value(
    load: Load, override: str, section: str, name: str, value: object
) -> None:
    text = "memory: {worker: 1}\nbudget: {kv_groups: 3}"
    assert getattr(getattr(load(text), section), name) != value
    assert getattr(getattr(load(text, override), section), name) == value


@pytest.mark.parametrize(
    "text",
    [
        "a #1",
        "a: b",
        "a:",
        "# a",
        "- a",
        "? a",
        "&a x",
        "*a",
        "!a x",
        "!!str 12",
        "%a",
        "@a",
        "`a`",
        "|",
        "> a",
        "a, b]",
        "a'b",
        'a"b"',
        " a",
        "a ",
        "a\tb",
        "a\nb",
        "---",
        "...",
        "yes",
        "NO",
        "on",
        "off",
        "2024-01-02",
        "12:30:45",
        "1_000",
        "0b11",
        "1e",
        "=",
        "<<",
        "a=b",
        "\x07",
        "\ufeffa",
        "\u00e9\u2028",
    ],
)
def test_an_override_keeps_every_character(load: Load, text: str) -> None:
    assert load("", f"cluster.address={text}").cluster.address == text
    assert load("", f"calibration.field={text}").calibration.field == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("'a #1'", "a #1"), ('"a\\tb"', "a\tb"), ("'2024'", "2024"), ("'null'", "null")],
)
def test_an_override_in_quotes_is_the_text_in_them(load: Load, text: str, value: str) -> None:
    assert load("", f"cluster.address={text}").cluster.address == value


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a folder", "nothing"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    for read in (load_job, lambda file: load_profile(str(file)), lambda file: load_latency(file)):
        words = {"a folder": "Is a directory", "nothing": "o such file"}.get(kind, kind)
        with pytest.raises(SpecError, match=rf"job\.yaml.*: .*{words}"):
            read(path)


def test_a_pipe_that_the_shell_has_opened_is_read() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rayprune.orchestrator.cli", "plan", "/dev/stdin"],
        input=REQUIRED.replace(" m}", " /nowhere}").encode(),
        capture_output=True,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert b"/nowhere" in done.stderr, done.stderr


def test_override_creates_a_null_section_and_the_last_wins(load: Load) -> None:
    job = load(
        "evaluation: null", "evaluation.path=/a", "evaluation.window=4", "evaluation.window=8"
    )
    assert job.evaluation is not None
    assert (job.evaluation.path, job.evaluation.window) == ("/a", 8)


def test_overrides_can_supply_whole_sections(load: Load) -> None:
    assert (
        load("{}", "model={path: /m}", "calibration.path=/c", whole=True).calibration.path == "/c"
    )


def test_overrides_reach_into_a_section_that_is_written_as_a_name(load: Load) -> None:
    job = load(
        "method: stat\nbudget: {allocation: search, per_layer: true}",
        "method.scale=gradients",
        "budget.allocation.generations=3",
    )
    assert (
        job.method.model_dump()["scale"],
        job.budget.allocation.model_dump()["generations"],
    ) == ("gradients", 3)
    assert load("", "method=obs", "method.name=wanda").method.name == "wanda"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.sparsity=1.5", "budget.sparsity: must be less than 1 (got 1.5)"),
        (
            "budget.sparsity=20",
            "budget.sparsity: must be less than 1 (got 20); as a fraction, 20% is 0.2",
        ),
        (
            "budget.sparsity=20%",
            'budget.sparsity: must be a number (got "20%"); as a fraction, 20% is 0.2',
        ),
        ("budget={sparsty: 1}", 'budget.sparsty: unknown field; did you mean "sparsity"?'),
        ("bugdet.sparsity=1", 'bugdet: unknown field; did you mean "budget"?'),
        (
            "evaluation.window=4",
            "evaluation: give either path, or texts by name: texts: {NAME: {path: FILE}}",
        ),
        ("model.path.x=1", "'x' cannot be set inside \"m\", which is no section; correct the name"),
        (
            "budget.sparsity",
            "not an override; write section.field=value, such as budget.sparsity=0.3",
        ),
        ("=1", "not an override; write section.field=value, such as budget.sparsity=0.3"),
        (
            "budget..sparsity=1",
            "not an override; write section.field=value, such as budget.sparsity=0.3",
        ),
        (
            "export.dtype=[",
            (
                "not valid YAML: while parsing a flow node, expected the node content, but found"
                " '<stream end>'; correct the syntax"
            ),
        ),
        (
            "export.dtype=\x07",
            'export.dtype: must be one of "auto", "float32", "bfloat16", "float16" (got "\\u0007")',
        ),
        ("model.path=\0", '"\\u0000" holds a NUL or half a surrogate pair; remove it'),
        ("model.path=2024", "model.path: must be a text (got 2024); put it in quotes"),
        ("model.path=~", "model.path: must be a text (got null)"),
    ],
)
def test_wrong_override_is_named(refuse: Refuse, override: str, message: str) -> None:
    name = override if override.isprintable() else json.dumps(override)
    assert refuse("evaluation: null", override) == [f"--set {name}: {message}"]


@pytest.mark.parametrize(
    ("override", "lost"),
    [
        ("model.path='a' #1", "#1"),
        ("calibration.mix=[{path: a}] # one", "# one"),
        ("calibration.mix=[{path: a\nb}]", "a\nb"),
        ("model.path='a\nb'", "'a\nb'"),
    ],
)
def test_what_a_reader_of_yaml_would_pass_over_is_named(
    refuse: Refuse, override: str, lost: str
) -> None:
    (line,) = refuse("", override)
    assert f"{json.dumps(lost)} would not be kept; put all of a text" in line


# --- paths ---


def test_paths_start_from_the_file_or_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "link").symlink_to("jobs")
    (tmp_path / "jobs" / "job.yaml").write_text(
        "model: {path: ../m}\ncalibration: {path: ~/c}\nevaluation: {path: /e/./x}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    job = load_job(Path("link/job.yaml"))
    assert job.evaluation is not None
    assert (job.model.path, job.calibration.path, job.evaluation.path) == (
        f"{tmp_path}/m",
        "/home/someone/c",
        "/e/x",
    )
    job = load_job(
        Path("link/job.yaml"), ["model.path=m", "evaluation={path: e}", "calibration.path=~/d"]
    )
    assert job.evaluation is not None
    assert (job.model.path, job.calibration.path, job.evaluation.path) == (
        f"{tmp_path}/m",
        "/home/someone/d",
        f"{tmp_path}/e",
    )


def test_symlinks_stay_in_paths(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "link").symlink_to("jobs")
    (tmp_path / "jobs" / "job.yaml").write_text(REQUIRED)
    assert load_job(tmp_path / "link" / "job.yaml").model.path == f"{tmp_path}/link/m"


# --- dump and compare ---


@pytest.mark.parametrize(
    "text",
    [
        "",
        "correction: {drift: 1e-7, candidates: [1e-05, 123456.789, 1e6]}\nmemory: {worker: 8GiB}",
        "evaluation: {path: e, stride: 3}\nbudget: {kv_groups: 2}\nschema_version: 1",
        *(
            f"cluster: {{address: {text!r}}}"
            for text in (
                "1e5",
                "0o17",
                "no",
                "12:30:45",
                "null",
                "~",
                "=",
                "<<",
                " a: b #c ",
                "é",
                "a" + " b" * 200,
            )
        ),
        'cluster: {address: "two\\nlines\\t\\x85\\u2028\\U0001F600"}',
    ],
)
def test_dump_reads_back_equal(load: Load, text: str, tmp_path: Path) -> None:
    job = load(text)
    dumped = dump_job(job)
    (tmp_path / "dumped.yaml").write_text(dumped, encoding="utf-8")
    again = load_job(tmp_path / "dumped.yaml")
    assert again == job
    assert dump_job(again) == dumped
    assert yaml.safe_load(dumped) == job.model_dump(mode="json")


def test_dump_has_every_field_in_declared_order(load: Load) -> None:
    assert list(yaml.safe_load(dump_job(load("")))) == list(JobSpec.model_fields)


def test_differing_fields(load: Load) -> None:
    base = load("")
    assert differing_fields(base, base) == []
    assert differing_fields(base, load("", "budget.sparsity=0.3")) == [
        "budget.sparsity: 0.2 -> 0.3"
    ]
    assert (
        differing_fields(
            base, load("", "parallel.workers=2", "memory.worker=1GiB", "evaluation.path=/e")
        )
        == []
    )
    assert differing_fields(
        base, load("", "correction.candidates=[1]", "parallel.micro_batch=1")
    ) == [
        "correction.candidates: [0.001, 0.01, 0.03, 0.1, 0.3, 1.0] -> [1.0]",
        "parallel.micro_batch: 4 -> 1",
    ]


def test_loading_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, rayprune.specs.loader, rayprune.specs.schema; sys.exit(bool({'torch', 'ray',"
        " 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# --- a mapping in place of a file ---

SECTIONS: dict[str, Any] = {"model": {"path": "m"}, "calibration": {"path": Path("texts/c")}}


def test_a_mapping_is_the_same_job_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(
        "model: {path: m}\ncalibration: {path: texts/c}\nmethod: {name: stat}\n"
        "correction: {candidates: [0.1, 1]}\n"
    )
    sections = SECTIONS | {"method": "stat", "correction": {"candidates": (0.1, 1)}}
    assert load_job(sections) == load_job(tmp_path / "job.yaml") == load_job("job.yaml")
    job = load_job(sections, ["model.path=other", "budget.sparsity=0.3"])
    assert (job.model.path, job.budget.sparsity) == (str(tmp_path / "other"), 0.3)
    assert load_job(job.model_dump(mode="json")) == job


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"sparsty": 0.3}}, "budget.sparsty: unknown field; did you mean"),
        ({"budget": {"sparsity": "0.3"}}, "budget.sparsity: must be a number"),
        ({"budget": {"sparsity": 2}}, "budget.sparsity: must be less than 1"),
        ({"calibration": None}, "calibration: must be a section of fields"),
        ({"calibration": {"path": "c\0"}}, "holds a NUL"),
        ({"calibration": {"path": b"c"}}, "b'c' is a bytes; write it as text"),
        ({"budget": {1: 2}}, "1 is not a field name"),
        ({"parallel": {"workers": {2}}}, "{2} is a set; write it"),
    ],
)
def test_what_is_wrong_with_a_mapping(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_job(SECTIONS | changes)
    assert str(caught.value).startswith("the job's mapping: ")
    assert words in str(caught.value)


def test_a_mapping_that_holds_itself() -> None:
    section: dict[str, Any] = {"path": "m"}
    section["path"] = section
    with pytest.raises(SpecError, match="more than 32 levels; does it hold itself"):
        load_job(SECTIONS | {"model": section})


def test_an_override_of_a_mapping_is_named() -> None:
    with pytest.raises(SpecError, match=r"--set budget\.sparsity=x: budget\.sparsity: must be"):
        load_job(SECTIONS, ["budget.sparsity=x"])


def test_one_override_may_come_by_itself() -> None:
    job = {"model": {"path": "/m"}, "calibration": {"path": "/c"}}
    assert load_job(job, "budget.sparsity=0.3").budget.sparsity == 0.3
