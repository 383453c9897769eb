"""What the user sees: plain lines in a log, a bar on a terminal."""

import contextlib
import io
from typing import Any

import pytest
from rich.console import Console

from rayprune.orchestrator.reporting.progress import ProgressView, plain_line, print_table

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
                "heads 3/4 error 0.123, neurons 20/48 error 0.500",
                "memory 1.00 GiB",
            ],
        ),
        (
            {"event": "x", "peak_memory_bytes": {"driver": 2**29, "worker-0": 3 * 2**29}},
            ["x memory 1.50 GiB"],
        ),
        ({"event": "x", "peak_memory_bytes": {}}, ["x"]),
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


def test_a_view_that_is_left_by_an_error_stops() -> None:
    out = io.StringIO()
    view = ProgressView(Console(file=out, force_terminal=True, width=80))
    with contextlib.suppress(KeyError), view:
        view.show(EVENTS[2])
        raise KeyError
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_tables_show_every_cell() -> None:
    out = io.StringIO()
    print_table(
        "a title",
        ["name", "value"],
        [["first", "1"], ["a very long name indeed", "22,222"]],
        Console(file=out, width=30),
    )
    shown = " ".join(out.getvalue().split())
    for words in ("a title", "name", "value", "first", "22,222"):
        assert words in shown
