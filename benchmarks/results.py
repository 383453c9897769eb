"""Result files of the benchmarks: dated Markdown with the command, the machine and the versions."""

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.run_folder import environment

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, the first column left-aligned."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def record(name: str, content: str, machine: str = "cpu") -> Path:
    """Print a result and write it to results/NAME_MACHINE_DATE.md."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])
    versions = ", ".join(f"{key} {value}" for key, value in environment().items())
    head = (
        f"# {name}, {datetime.date.today()}\n\n`{command}`\n\nMachine: {processor()},"
        f" {os.cpu_count()} cores. {versions}.\n\n"
    )
    file = RESULTS / f"{name}_{machine}_{datetime.date.today()}.md"
    file.write_text(head + content + "\n", encoding="utf-8")
    print(f"{head}{content}\nwritten to {file}")
    return file
