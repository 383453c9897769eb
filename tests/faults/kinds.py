"""Kinds of jobs that are killed and damaged: together they have every kind of task, cache and
file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import write_job
from tests.faults.forks import Fault
from tests.faults.hooks import OneLayerAtATime
from tests.models import build_model

TRAINING = {"epochs": 1.5, "batch": 4, "learning_rate": 1e-3, "checkpoint_steps": 1}
CURVES = {"name": "curves", "samples": 2, "levels": 4}
SEARCH = {"name": "search", "generations": 2, "offspring": 3, "samples": 2, "levels": 4}


@dataclass(frozen=True)
class Kind:
    """A kind of job: its sections, its model's config, and which of its files no kind before it
    has, as a regular expression on paths in the run folder.
    """

    sections: Mapping[str, Any]
    own: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    evaluated: bool = False
    stored: bool = False
    """Whether it keeps its tasks in a store."""
    waves: bool = False
    """Whether its layers are done one by one on the dense path, with boundary files between."""

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What every process that runs it is told first."""
        return (OneLayerAtATime(),) if self.waves else ()


KINDS: dict[str, Kind] = {
    "stat": Kind({"memory": {"checkpoint_layers": 1}}, "", evaluated=True),
    "gradients": Kind({"method": {"scale": "gradients", "gradient_samples": 6}}, "gradients"),
    "obs": Kind({"method": {"name": "obs"}, "budget": {"kv_groups": 1}}, "^$"),
    "numerical, threshold": Kind(
        {
            "method": {"name": "numerical"},
            "budget": {"per_layer": True, "allocation": {"name": "threshold"}},
        },
        "survey|shape|model/modeling",
    ),
    "curves": Kind(
        {"budget": {"per_layer": True, "allocation": CURVES}, "export": {"pad": True}},
        "survey|sensitivity|shape",
    ),
    "search": Kind({"budget": {"per_layer": True, "allocation": SEARCH}}, "generation"),
    "layers, stored": Kind(
        {
            "parallel": {"placement": "layers"},
            "budget": {"kv_groups": 1},
            "memory": {"checkpoint_layers": 1},
        },
        "statistics|cache|^store",
        stored=True,
        waves=True,
    ),
    "shapes, stored": Kind({}, "probed", stored=True),
    "refit, drift": Kind(
        {
            "parallel": {"placement": "layers", "propagation": "refit"},
            "correction": {"drift": 0.5},
            "budget": {"kv_groups": 1},
        },
        "selection|cache",
        waves=True,
    ),
    "own text": Kind(
        {
            "calibration": {
                "samples": 8,
                "sequence_length": 32,
                "shards": 4,
                "own": {"length": 48, "batch": 2},
            },
            "budget": {"kv_groups": 1},
        },
        "own",
    ),
    "flap": Kind({"method": {"name": "flap"}}, "^$"),
    "dress": Kind(
        {"method": {"name": "dress", "mask": "random", "training": TRAINING}},
        "regularise|selection",
    ),
    "dress, layers alone": Kind(
        {"method": {"name": "dress", "scope": "layer", "training": TRAINING}}, "regularise"
    ),
    "trsp": Kind(
        {
            "method": {"name": "trsp", "gates": TRAINING, "training": TRAINING},
            "budget": {"sparsity": 0.3},
        },
        "gates|updates",
        {"num_hidden_layers": 4},
    ),
    "whole layers": Kind(
        {
            "budget": {
                "drop_layers": 1,
                "drop_score": "divergence",
                "drop_samples": 4,
                "kv_groups": 1,
                "sparsity": 0.6,
            }
        },
        "dropped|layers/plan",
        {"num_hidden_layers": 3},
    ),
    "progressive": Kind(
        {
            "method": {
                "name": "progressive",
                "steps": 2,
                "schedule": "linear",
                "gate": {"samples": 2},
            },
            "budget": {"kv_groups": 2, "sparsity": 0.3},
        },
        "gate|step-01/export",
        {"num_hidden_layers": 1},
    ),
    "sparse": Kind(
        {"method": {"name": "sparse"}, "budget": {"sparsity": None, "round_to": "auto"}}, "sparsity"
    ),
    "widths, then sparse": Kind(
        {"method": {"name": "sparse", "inner": "stat"}, "budget": {"kv_groups": 1}}, "widths/plan"
    ),
    "recovered": Kind(
        {"budget": {"kv_groups": 1}, "recover": TRAINING | {"loss": "lm"}},
        "recover",
        evaluated=True,
    ),
    "recovered, adapters": Kind(
        {
            "budget": {"kv_groups": 1},
            "recover": TRAINING
            | {"lora": {"rank": 4}, "teacher_top": 4, "held_out": {"windows": 1, "every": 2}},
        },
        "teacher",
    ),
}


def prepare(folder: Path, text: Path, name: str) -> Path:
    """A job of a kind over a tiny model, in a folder."""
    kind, sections = KINDS[name], dict(KINDS[name].sections)
    calibration = {"samples": 8, "sequence_length": 32, "shards": 4}
    sections.setdefault("calibration", calibration)
    if kind.evaluated:
        held_out = folder / "held_out.txt"
        held_out.write_text(
            "Nothing of this stands in the text that was trained on, nowhere at all. " * 8
        )
        sections["evaluation"] = {"path": str(held_out), "window": 16, "max_windows": 4}
    model = build_model(folder / "dense", **kind.changes)
    return write_job(folder / "job.yaml", text, model, **sections)


def command(job: Path, out: Path, name: str) -> list[str]:
    """The command line that runs it."""
    store = ["--store", str(out.with_name(out.name + "-store"))] if KINDS[name].stored else []
    return ["run", str(job), "--out", str(out), *store]
