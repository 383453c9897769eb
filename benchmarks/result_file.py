"""Dated result files: what was run, on what, with what."""

import datetime
import os
import platform
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def record(name: str, title: str, command: str, environment: Mapping[str, object], body: list[str]) -> None:
    """Print a result and write it to results/NAME_DATE.md."""
    today = datetime.date.today()
    versions = ", ".join(f"{key} {value}" for key, value in environment.items())
    head = [f"# {title}, {today}", "", f"`{command}`", "", f"Machine: {processor()}, {os.cpu_count()} cores. {versions}.", ""]
    page = "\n".join([*head, *body, ""])
    file = FOLDER / f"{name}_{today}.md"
    file.write_text(page, encoding="utf-8")
    print(f"{page}\nwritten to {file}")
