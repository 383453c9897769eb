"""The report of a run: its file, its tables, and what a notebook shows of it and of a plan."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rayprune.orchestrator.reporting.report import Report, read_report, summary
from rayprune.orchestrator.reporting.tables import Table
from rayprune.specs.errors import SpecError
from tests.unit.orchestrator.test_html_report import SCRIPT, Page, make_report


def report_of(**changes: Any) -> Report:
    return Report.model_validate(make_report() | {"run": "/runs/one"} | changes)


def written(folder: Path, content: object) -> Path:
    (folder / "report.json").write_text(json.dumps(content))
    return folder


def test_the_file_is_read_back_as_it_is(tmp_path: Path) -> None:
    models = {"pruned": "model", "recovered": None, "exports": {"gguf": "export/gguf"}}
    models |= {"own_class": False, "auto_class": "AutoModelForCausalLM"}
    content = make_report() | {"models": models, "newer": [1, {}]}
    report = read_report(written(tmp_path, content))
    assert report.to_dict() == content
    assert read_report(str(written(tmp_path, report.to_dict()))) == report


@pytest.mark.parametrize("content", [None, [], {}, "text", make_report() | {"layers": 3}])
def test_another_file_is_no_report(content: object, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"report\.json: is not a report: .*run the job again"):
        read_report(written(tmp_path, content))


def test_a_folder_without_a_report(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="name the folder of a finished run"):
        read_report(tmp_path)
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(SpecError, match="the run has not ended"):
        read_report(tmp_path)


def test_the_model_to_take() -> None:
    plain = report_of()
    assert (plain.model, plain.recovered_model) == (Path("/runs/one/model"), None)
    recovered = report_of(models={"pruned": "model", "recovered": "tasks/recover/model"})
    assert recovered.model == recovered.recovered_model == Path("/runs/one/tasks/recover/model")
    assert recovered.pruned_model == Path("/runs/one/model")
    assert recovered.page == Path("/runs/one/report.html")


def test_it_cannot_be_changed() -> None:
    report = report_of()
    with pytest.raises(ValidationError):
        report.parameters.after = 1  # type: ignore[misc]
    assert report.parameters.ratio == 112_949_568 / 134_515_008


def test_the_summary_says_what_was_reached() -> None:
    perplexity = {"before": 22.0, "after": 28.0, "recovered": 25.0}
    table, *lines = summary(report_of(perplexity=perplexity))
    assert isinstance(table, Table)
    assert ["perplexity", "22.000", "28.000", "1.2727"] in table.rows
    words = "\n".join(map(str, lines))
    for part in (
        "after recovery: 25.000 (1.1364 of before)",
        "held.txt: window 1024, stride 512, 20 windows, 20460 scored tokens",
        "sweep 30.0",
        "worker-0 3.00 GiB",
        "warning: 2,048",
        "model: /runs/one/model, report: /runs/one/report.html",
    ):
        assert part in words


def test_a_notebook_gets_text_and_no_script() -> None:
    report = report_of(warnings=[SCRIPT], peak_memory_bytes={SCRIPT: 1})
    html = report._repr_html_()
    assert "<script" not in html
    assert SCRIPT in Page(html).text
    assert "after / before" in Page(html).text
