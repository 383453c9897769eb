"""What the user sees: plain lines in a log, a bar on a terminal."""

import contextlib
import io
import re
from typing import Any

import pytest
from rich.console import Console

from rayprune.orchestrator.reporting.events import Event, plain_line
from rayprune.orchestrator.reporting.progress import ProgressView, print_parts
from rayprune.orchestrator.reporting.tables import Table, narrowed

GROUPS = {
    "heads": {"kept": 3, "of": 4, "held_out_error": 0.12345},
    "neurons": {"kept": 20, "of": 48, "held_out_error": 0.5},
}
EVENTS: list[dict[str, Any]] = [
    {"event": "run-started", "job": "/runs/[bold]a[/bold]", "workers": 2},
    {"event": "step-finished", "stage": "early", "layer": 0},
    {"event": "stage-started", "stage": "sweep", "steps": 2},
    {
        "event": "step-finished",
        "stage": "sweep",
        "layer": 0,
        "seconds": 1.23456,
        "groups": GROUPS,
        "peak_memory_bytes": {"driver": 2**30},
    },
    {
        "event": "worker-failed",
        "task": "layer-0001",
        "detail": "worker 1: [Errno 9] [/x]",
        "decision": "retry",
    },
    {"event": "step-finished", "stage": "sweep", "layer": 1, "resumed": True},
    {
        "event": "stage-finished",
        "stage": "sweep",
        "steps": 2,
        "seconds": 3.0,
        "peak_memory_bytes": {},
    },
    {"event": "run-finished"},
]


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"event": "run-finished"}, ["run-finished"]),
        (
            {"event": "stage-started", "stage": "sweep", "steps": 3},
            ["stage-started stage=sweep steps=3"],
        ),
        (
            {"event": "stage-finished", "stage": "sweep", "seconds": 12.34567},
            ["stage-finished stage=sweep seconds=12.35"],
        ),
        (
            EVENTS[3],
            [
                "step-finished",
                "layer=0",
                "keeps 3 of 4 KV groups, 20 of 48 FFN channels; error 0.123, 0.500",
                "memory 1.00 GiB",
            ],
        ),
        (
            {"event": "x", "peak_memory_bytes": {"driver": 2**29, "worker-0": 3 * 2**29}},
            ["x memory 1.50 GiB"],
        ),
        ({"event": "x", "peak_memory_bytes": {}}, ["x"]),
        (
            {"event": "x", "steps": {"flow": 8.8418, "check_head": 0.0143, "settle": 0.25}},
            ["x steps=flow 8.8, settle 0.2"],
        ),
    ],
)
def test_plain_lines(event: dict[str, Any], expected: list[str]) -> None:
    line = plain_line(event)
    assert "\n" not in line
    assert line.startswith(event["event"])
    for words in expected:
        assert words in line


def test_a_log_gets_one_line_per_event() -> None:
    out = io.StringIO()
    with ProgressView(Console(file=out, width=40)) as view:
        for event in EVENTS:
            view.show(event)
    lines = out.getvalue().splitlines()
    assert len(lines) == len(EVENTS)
    for line, event in zip(lines, EVENTS, strict=True):
        assert line.startswith("[")
        assert line.endswith("s] " + plain_line(event))
    assert "[bold]a[/bold]" in lines[0]
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_bars_and_the_events_between_them() -> None:
    out = io.StringIO()
    with ProgressView(Console(file=out, force_terminal=True, width=160)) as view:
        for event in EVENTS:
            view.show(event)
    shown = out.getvalue()
    for words in ("sweep", "2/2", "run-started", "[Errno 9] [/x]", "run-finished"):
        assert words in shown


def test_80_columns_keep_count_elapsed_and_time_left() -> None:
    out = io.StringIO()
    memory = {"driver": 2**30, "worker-0": 2**31}
    with ProgressView(Console(file=out, force_terminal=True, width=80)) as view:
        view.show({"event": "stage-started", "stage": "sensitivity", "steps": 128})
        view.show(EVENTS[3] | {"peak_memory_bytes": memory})
        view.show({"event": "windows-evaluated", "stage": "evaluate", "done": 64, "of": 999})
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", out.getvalue()).replace("\r", "\n")
    last = [line for line in shown.splitlines() if "sensitivity" in line][-1]
    assert len(last) <= 80
    for words in ("1/128", "0:00:0", "-:--:--"):
        assert words in last
    assert [line for line in shown.splitlines() if "windows" in line and "64/999" in line]


def test_a_step_has_a_bar_of_its_own_until_it_is_done() -> None:
    out = io.StringIO()
    with ProgressView(Console(file=out, force_terminal=True, width=100)) as view:
        view.show({"event": "stage-started", "stage": "sweep", "steps": 30})
        for done in (3, 6, 8):
            view.show({"event": "micro-batches", "done": done, "of": 8})
            view._progress.refresh()
            if done == 6:
                assert "6/8" in out.getvalue()
        before = len(out.getvalue())
    assert "0/30" in out.getvalue()[before:]
    assert "8/8" not in out.getvalue()


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            {
                "event": "shape-chosen",
                "kept": {"heads": 3, "neurons": 1126},
                "decoder_parameters": 84934656,
                "parameters": 113,
                "weight_bytes": 5,
                "latency_ms": 0,
                "layers": (),
                "candidates": {"1": {}},
            },
            "shape-chosen KV groups 3, FFN channels 1126: 84,934,656 decoder parameters,"
            " 113 parameters, 5 weight bytes",
        ),
        (
            {
                "event": "layers-allocated",
                "layers": [{"heads": 1, "neurons": 8}, {"heads": 2, "neurons": 4}],
                "predicted": 0.25,
            },
            "layers-allocated KV groups 1 to 2, FFN channels 4 to 8; predicted 0.25",
        ),
        (
            {"event": "waiting-for-nodes", "have": {"CPU": 1.0}, "need": {"CPU": 2.0}, "x": []},
            "waiting-for-nodes have=CPU 1 need=CPU 2",
        ),
        ({"event": "run-finished", "step_seconds": {"collect": 1.0}}, "run-finished"),
    ],
)
def test_events_are_told_in_words(event: dict[str, Any], line: str) -> None:
    assert plain_line(event) == line


def test_a_view_that_is_left_by_an_error_stops() -> None:
    out = io.StringIO()
    view = ProgressView(Console(file=out, force_terminal=True, width=80))
    with contextlib.suppress(KeyError), view:
        view.show(EVENTS[2])
        raise KeyError
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_tables_show_every_cell() -> None:
    out = io.StringIO()
    rows = [["first", "1"], ["a very long name indeed", "22,222"], ["[/red]", "[b]"]]
    print_parts([Table("a title", ["name", "value"], rows)], Console(file=out, width=30))
    shown = " ".join(out.getvalue().split())
    for words in ("a title", "name", "value", "first", "22,222", "[/red]", "[b]"):
        assert words in shown


def test_a_terminal_does_not_obey_what_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Names come from files that others have written."""
    sneaky = "\x1b[2Jname\r\nof a file \u00e9 \u2192"
    print_parts([sneaky, Table(sneaky, ["a", sneaky], [["b", sneaky]])])
    assert not set(capsys.readouterr().out) & {"\x1b", "\r"}
    line = plain_line({"event": "x", "detail": sneaky})
    assert line.endswith("of a file \u00e9 \u2192")
    assert not set(line) & {"\x1b", "\r", "\n"}


def test_an_event_knows_what_it_is_about() -> None:
    event = Event.of(EVENTS[3])
    assert (event.name, event.stage, event.layer, event.task) == ("step-finished", "sweep", 0, None)
    assert event.seconds == pytest.approx(1.23456)
    assert event.fields["groups"] == GROUPS
    assert str(event) == plain_line(EVENTS[3])


def test_a_table_that_is_too_wide_becomes_several() -> None:
    columns = ["run", "parameters", "perplexity", "seconds"]
    table = Table("results", columns, [["budget.sparsity=0.1", "121,243,968", "27.431", "197.0"]])
    out = io.StringIO()
    print_parts([table], Console(file=out, width=45))
    words = out.getvalue()
    assert words.count("results") == 2
    assert all(each in words for each in ("parameters", "121,243,968", "27.431", "197.0"))
    assert list(narrowed([table], 80)) == [table.of(range(4))]
