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


def accelerator(machine: str) -> str:
    """A line with the GPU's name, for results of one."""
    if machine != "cuda":
        return ""
    import torch

    return f"GPU: {torch.cuda.get_device_name()}.\n\n"


def page(name: str, content: str, machine: str) -> str:
    """A result under its date, command, machine and versions."""
    import torch

    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])
    versions = ", ".join(f"{key} {value}" for key, value in environment().items())
    instructions = torch.backends.cpu.get_cpu_capability()
    return (
        f"# {name}, {datetime.date.today()}\n\n`{command}`\n\n{accelerator(machine)}Machine:"
        f" {processor()}, {os.cpu_count()} cores, {instructions}. {versions}.\n\n{content}\n"
    )


def write(name: str, content: str, machine: str = "cpu", folder: Path = RESULTS) -> Path:
    """Write a result to FOLDER/NAME_MACHINE_DATE.md, over one of the same day."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}_{machine}_{datetime.date.today()}.md"
    file.write_text(page(name, content, machine), encoding="utf-8")
    return file


def record(name: str, content: str, machine: str = "cpu", folder: Path = RESULTS) -> Path:
    """Write a result and print it."""
    file = write(name, content, machine, folder)
    print(f"{file.read_text(encoding='utf-8')}\nwritten to {file}", flush=True)
    return file
