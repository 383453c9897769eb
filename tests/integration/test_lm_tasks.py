"""Tasks of lm-eval, asked in a run, against lm-eval itself."""

import json
from pathlib import Path
from random import Random

import pytest
import yaml

from rayprune.orchestrator.planning.preflight import check_job
from rayprune.orchestrator.reporting.card import model_card
from rayprune.orchestrator.reporting.comparison import Compared, comparison
from rayprune.orchestrator.reporting.tables import Table
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import SpecError
from rayprune.specs.loader import load_job
from tests.conftest import MakeJob
from tests.helpers import quiet
from tests.models import build_model

lm_eval = pytest.importorskip("lm_eval")
WORDS = ["the", "cat", "dog", "runs", "fast", "slow", "under", "over", "tree", "house", "red"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task, of its own data."""
    chance, folder = Random(0), tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {
            "question": " ".join(chance.choices(WORDS, k=5)),
            "choices": [" ".join(chance.choices(WORDS, k=2)) for _ in range(3)],
            "answer": chance.randrange(3),
        }
        for _ in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "which_words",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": "rows.jsonl"},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} goes on:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "which.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture
def job(make_job: MakeJob, text_file: Path, tasks: Path, tmp_path: Path) -> Path:
    """A job with that task; its model's tokenizer ends texts, as lm-eval wants it."""
    model = build_model(tmp_path / "dense")
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "!"}))
    (tmp_path / "held_out.txt").write_text(text_file.read_text()[-5000:])
    evaluation = {
        "path": str(tmp_path / "held_out.txt"),
        "window": 24,
        "max_windows": 2,
        "tasks": ["which_words"],
        "tasks_folder": str(tasks),
        "tasks_limit": 10,
    }
    return make_job(model, evaluation=evaluation)


def test_a_report_tells_what_lm_eval_says(
    job: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_job(load_job(job), tmp_path / "run", quiet)
    assert [score.metric for score in report.scores] == ["acc", "acc_norm"]
    monkeypatch.chdir(tasks)  # the task names its rows from there
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    for name, model in (("before", tmp_path / "dense"), ("after", report.model)):
        found = lm_eval.simple_evaluate(
            "hf",
            {"pretrained": str(model), "dtype": "float32", "device": "cpu"},
            tasks=["which_words"],
            limit=10,
            task_manager=manager,
        )["results"]["which_words"]
        for score in report.scores:
            assert score.values[name] == found[f"{score.metric},none"]
            assert score.stderr[name] == found[f"{score.metric}_stderr,none"]
            assert (score.documents, score.few_shot) == (10, 0)
    assert report.evaluation is not None
    assert report.evaluation.lm_eval == lm_eval.__version__
    assert "which_words acc" in report.page.read_text(encoding="utf-8")
    assert "| acc of which_words |" in model_card(report, recovered=False)
    tables = [part for part in comparison([Compared("a", report)]) if isinstance(part, Table)]
    assert "which_words acc" in [row[0] for table in tables for row in table.rows]


@pytest.mark.parametrize(
    ("setting", "models"),
    [
        ("recover={scope: layer, batch: 4, epochs: 1}", ["before", "after", "recovered"]),
        ("method={name: progressive, steps: 2, gate: {samples: 3}}", ["before", "after"]),
        ("budget.drop_layers=[1]", ["before", "after"]),
    ],
)
def test_every_model_of_a_job_is_asked(
    setting: str, models: list[str], job: Path, tmp_path: Path
) -> None:
    report = run_job(load_job(job, [setting, "budget.sparsity=0.4"]), tmp_path / "run", quiet)
    assert [list(score.values) for score in report.scores] == [models, models]


def test_what_is_no_task_is_refused_before_the_run(
    job: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayprune.workers.lm_tasks.OWN", str(tasks))  # all of them take long
    with pytest.raises(SpecError, match=r"no task 'which_word', .* did you mean 'which_words'"):
        check_job(load_job(job, ["evaluation.tasks=[which_word]"]))
    with pytest.raises(SpecError, match="no tasks; give tasks"):
        load_job(job, ["evaluation.tasks=[]"])


def test_what_a_task_lacks_is_found_before_any_other_work(
    job: Path, tasks: Path, tmp_path: Path
) -> None:
    file = tasks / "which.yaml"
    file.write_text(file.read_text() + "num_fewshot: 0\n")
    with pytest.raises(SpecError, match="which_words is asked without examples"):
        run_job(load_job(job, ["evaluation.few_shot=2"]), tmp_path / "run", quiet)
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(SpecError, match=r"evaluation\.tasks: lm-eval .*rows\.jsonl"):
        run_job(load_job(job), tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "tasks" / "calibration-tokens").exists()
