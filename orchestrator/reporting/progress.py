"""What the user sees while a job runs: the one module that knows rich.

On a terminal a live bar per stage; elsewhere (logs, `ray job logs`) one plain line per event.
"""

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class ProgressView:
    """Shows events as they come."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._progress.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if not self._live:
            self._console.print(
                f"[{time.monotonic() - self._start:8.1f}s] {plain_line(event)}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            return
        match event["event"]:
            case "stage-started":
                self._task = self._progress.add_task(
                    event["stage"], total=event.get("steps"), note=""
                )
            case "step-finished" | "task-found" if self._task is not None:
                self._progress.update(
                    self._task,
                    advance=1,
                    note=f"{event.get('seconds', 0):.1f} s/step, {_note(event)}",
                )
            case "stage-finished" if self._task is not None:
                self._progress.update(
                    self._task,
                    total=event.get("steps", 1),
                    completed=event.get("steps", 1),
                    note=f"{event['seconds']:.1f} s",
                )
            case _:
                self._progress.console.print(plain_line(event), highlight=False, markup=False)


def plain_line(event: dict[str, Any]) -> str:
    """One event as one line."""
    rest = {
        key: value
        for key, value in event.items()
        if key not in ("event", "peak_memory_bytes", "groups", "candidates")
    }
    words = [
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in rest.items()
    ]
    return " ".join([event["event"], *words, *([note] if (note := _note(event)) else [])])


def _note(event: dict[str, Any]) -> str:
    """Kept units and held-out error of a layer, and the largest worker's memory."""
    parts = [
        f"{name} {info['kept']}/{info['of']} error {info['held_out_error']:.3f}"
        for name, info in event.get("groups", {}).items()
    ]
    if memory := event.get("peak_memory_bytes"):
        parts.append(f"memory {max(memory.values()) / 2**30:.2f} GiB")
    return ", ".join(parts)


def print_table(
    title: str, columns: list[str], rows: list[list[str]], console: Console | None = None
) -> None:
    """Print a small table; words are left-aligned, numbers right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        is_words = any(row[number][:1].isalpha() for row in rows)
        table.add_column(column, justify="left" if is_words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    (console or Console()).print(table)
