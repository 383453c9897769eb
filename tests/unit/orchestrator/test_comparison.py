"""Runs side by side: the frontier, the one to take, and the page."""

from pathlib import Path
from typing import Any

import pytest

from rayprune.orchestrator.reporting.comparison import (
    Compared,
    layers,
    on_frontier,
    protocols,
    recommendation,
    recommended,
    results,
)
from rayprune.orchestrator.reporting.comparison_page import _scatter
from rayprune.orchestrator.reporting.report import Report
from tests.unit.orchestrator.test_html_report import SCRIPT, make_report, svgs, two_texts


def run(name: str, parameters: int, ratio: float | None, **changes: Any) -> Compared:
    perplexity = None if ratio is None else {"before": 10.0, "after": 10.0 * ratio}
    sizes = {"before": 1000, "after": parameters}
    facts = {"perplexity": perplexity, "parameters": sizes, "decoder_parameters": sizes}
    report = make_report() | facts | {"run": Path("/runs") / name} | changes
    return Compared(name, Report.model_validate(report))


LARGE, BEST, WORSE, SMALL = (
    run("large", 900, 1.1), run("best", 800, 1.1), run("worse", 850, 1.15), run("small", 500, 2.0)
)  # fmt: skip
UNMEASURED = run("unmeasured", 1, None)
RUNS = [SMALL, WORSE, UNMEASURED, BEST, LARGE]


def test_the_frontier_is_what_no_other_beats() -> None:
    assert on_frontier(RUNS) == [BEST, SMALL]
    assert on_frontier([LARGE, LARGE]) == [LARGE, LARGE]  # equals do not beat each other
    assert on_frontier([UNMEASURED]) == []


def test_the_smallest_that_is_good_enough_is_recommended() -> None:
    assert recommended(RUNS, 1.1) == BEST
    assert recommended(RUNS, 2.0) == SMALL
    assert recommended(RUNS, 1.05) is None


def test_why_none_is_recommended_is_told() -> None:
    assert recommendation(RUNS, 1.1).startswith("Recommended is best, the smallest model of at")
    assert "no model has at most 1.05 times" in recommendation(RUNS, 1.05)
    assert "the best has 1.1 times" in recommendation(RUNS, 1.05)
    assert "give the job an evaluation" in recommendation([UNMEASURED], 1.1)


def test_a_recovered_model_counts_as_it_is_taken() -> None:
    perplexity = {"before": 10.0, "after": 20.0, "recovered": 11.0}
    assert run("recovered", 500, None, perplexity=perplexity).perplexity == 1.1


def test_the_table_has_every_run() -> None:
    rows = {row[0]: row[1:] for row in results(RUNS).rows}
    assert rows["best"] == ["20.0%", "800", "11.000", "1.1000", "", "*", "40.0"]
    assert rows["worse"][5] == ""
    assert rows["unmeasured"][2:6] == ["not measured", "", "", ""]


def test_numbers_of_different_protocols_are_not_compared_unseen() -> None:
    assert len(list(protocols([BEST, SMALL]))) == 1
    windows = [
        run(name, 700, 1.3, evaluation=make_report()["evaluation"] | {"tokens": name * 8})
        for name in ("ab", "cd")
    ]
    assert on_frontier(windows) == [], "the same file, other windows of it"
    assert len(list(protocols(windows))) == 3
    older = run("older", 500, 2.0, evaluation=make_report()["evaluation"] | {"tokens": None})
    assert on_frontier([windows[0], older]) == [windows[0], older]
    other = make_report()["evaluation"] | {"stride": 1024}
    warning, *each = protocols([BEST, run("other", 700, 1.3, evaluation=other)])
    assert "cannot be compared" in warning
    assert len(each) == 2
    mixed = [BEST, run("other", 700, 1.3, evaluation=other)]
    assert on_frontier(mixed) == []
    assert recommended(mixed, 2.0) is None
    assert "measured in different ways" in recommendation(mixed, 2.0)


def test_layers_stand_side_by_side() -> None:
    heads, neurons = layers([BEST, SMALL])
    assert (heads.title, neurons.title) == ("KV groups", "FFN channels")
    assert neurons.columns == ["layer", "best", "small"]
    assert neurons.rows == [["all", "1,120", "1,120"]]
    report = make_report(2)
    report["layers"][1]["groups"]["neurons"]["kept"] = 640
    _, neurons = layers([BEST, run("uneven", 700, 1.3, layers=report["layers"])])
    assert neurons.rows[1] == ["1", "1,120", "640"]
    report = make_report()
    report["dense"] = {"name": "m", "hub_id": None, "licence": {}, "units": {"heads": 3}}
    for layer in report["layers"]:
        del layer["groups"]["heads"]
    whole = run("whole", 700, 1.3, layers=report["layers"], dense=report["dense"])
    heads, _ = layers([BEST, whole])
    assert heads.rows[0][2] == "3"


@pytest.mark.usefixtures("drawn")
def test_the_drawing_names_each_run() -> None:
    named = [run(SCRIPT, 700, 0.9), BEST, SMALL]
    other = make_report()["evaluation"] | {"stride": 1024}
    unlike = _scatter([BEST, run("other", 700, 1.3, evaluation=other)])
    assert "None is better than another" in unlike
    (drawing,) = svgs(_scatter(named))
    assert {SCRIPT, "best", "small"} <= {text.text for text in drawing.iter("text")}


def test_texts_stand_side_by_side() -> None:
    first, second = run("first", 900, 1.1, **two_texts()), run("second", 800, 1.1)
    table = results([first, second])
    assert table.columns[5:] == ["KL", "on wiki", "on topics", "unbeaten", "seconds"]
    assert table.rows[0][5:8] == ["0.5000", "1.2500", "2.5000"]
    assert table.rows[1][5:8] == ["", "", ""]
