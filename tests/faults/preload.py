"""Imported once, by the process that others are forked from: all that a run imports late, too."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

from rayprune.orchestrator.reporting import charts
from tests.conftest import undrawn, write_job
from tests.faults.kinds import KINDS
from tests.models import build_model


def warm_up() -> None:
    """Run small jobs that import what the others need."""
    from rayprune.orchestrator.cli import main

    charts._drawn = undrawn
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        text = Path(folder, "text.txt")
        text.write_text("A cat sat on a mat, and then another one. " * 100)
        model = build_model(Path(folder, "dense"), num_hidden_layers=2)
        small = {"samples": 4, "sequence_length": 16, "shards": 2}
        for name in ("stat", "recovered"):
            sections = {"calibration": small} | KINDS[name].sections
            sections.pop("evaluation", None)
            job = write_job(Path(folder, "job.yaml"), text, model, **sections)
            main(["run", str(job), "--out", str(Path(folder, name))])
            main(["verify", str(Path(folder, name))])


if os.environ.get("OMP_NUM_THREADS") == "1":  # a process with a pool of threads cannot be forked
    warm_up()
