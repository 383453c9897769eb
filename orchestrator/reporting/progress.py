"""What the user sees while a job runs: the one module that knows rich.

On a terminal a live bar per stage; elsewhere (logs, `ray job logs`) one plain line per event.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Column, Table

from rayprune.orchestrator.reporting.events import brief, plain_line
from rayprune.orchestrator.reporting.tables import Part, narrowed
from rayprune.specs.errors import printable
from rayprune.workers.machine.output import write_nowhere


def _whole() -> Column:
    """A column that is never cut; only the note behind it gives way."""
    return Column(no_wrap=True)


class _Output(Console):
    """Standard output. A run goes on when nobody reads it any more: rich would end the process."""

    def __init__(self) -> None:
        super().__init__(emoji=False)  # `:bug:` in a path is no beetle

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        write_nowhere()


class ProgressView:
    """Shows events as they come."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _Output()
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<10}", table_column=_whole()),
            BarColumn(bar_width=12, table_column=_whole()),
            MofNCompleteColumn(table_column=_whole()),
            TimeElapsedColumn(table_column=_whole()),
            TimeRemainingColumn(table_column=_whole()),
            TextColumn(
                "{task.fields[note]}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=self._console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._part: TaskID | None = None
        """What goes on within a step of the stage."""
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
                name = " ".join(filter(None, (event.get("scope"), event["stage"])))
                self._task = self._progress.add_task(
                    escape(printable(name)), total=event.get("steps"), note=""
                )
            case "step-finished" | "task-found" if self._task is not None:
                self._progress.update(
                    self._task,
                    advance=1,
                    note=escape(printable(f"{event.get('seconds', 0):.1f} s, {brief(event)}")),
                )
            case "text-written" if self._task is not None:
                rate = event.get("tokens_per_second")
                speed = f", {rate:,.0f} tokens/s" if rate else ""
                note = f"{event['done']:,} of {event['of']:,} tokens{speed}"
                self._progress.update(self._task, advance=len(event["tasks"]), note=note)
            case ("micro-batches" | "windows-evaluated" | "candidates-measured") as name if (
                self._task is not None
            ):
                self._show_part(name, event["done"], event["of"])
            case "stage-finished" if self._task is not None:
                self._end_part()
                self._progress.update(
                    self._task,
                    total=event.get("steps", 1),
                    completed=event.get("steps", 1),
                    note=f"{event['seconds']:.1f} s",
                )
            case _:
                self._progress.console.print(plain_line(event), highlight=False, markup=False)

    def _show_part(self, name: str, done: int, of: int) -> None:
        """A bar of its own while a step of the stage is under way."""
        if self._part is None:
            self._part = self._progress.add_task(f"  {_PARTS[name]}", total=of, note="")
        self._progress.update(self._part, completed=done, total=of)
        if done == of:
            self._end_part()

    def _end_part(self) -> None:
        if self._part is not None:
            self._progress.remove_task(self._part)
            self._part = None


_PARTS = {"micro-batches": "text", "windows-evaluated": "windows", "candidates-measured": "tried"}
"""What a step is done piece by piece of, by event."""


def watched(items: Sequence[int], name: str) -> Iterable[int]:
    """Give items one by one and show on standard error, beside what a command prints, how many are
    done: as a bar on a terminal, elsewhere that they have begun.
    """
    console = Console(stderr=True, emoji=False)
    if not console.is_terminal:
        console.print(f"{name}: {len(items)} rounds", highlight=False, markup=False)
    return track(items, name, console=console, disable=not console.is_terminal)


def print_parts(parts: Iterable[Part], console: Console | None = None) -> None:
    """Print lines and tables; of a table words are left-aligned, numbers right."""
    console = console or _Output()
    for part in narrowed(parts, console.width):
        if isinstance(part, str):
            console.print(printable(part), highlight=False, markup=False, soft_wrap=True)
            continue
        table = Table(title=escape(printable(part.title)), title_justify="left")
        for number, column in enumerate(part.columns):
            justify: Any = "left" if part.holds_words(number) else "right"
            table.add_column(escape(printable(column)), justify=justify, overflow="fold")
        for row in part.rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        console.print(table)
