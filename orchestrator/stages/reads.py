"""What every kind of task reads of the job: a changed option makes stale what reads it, and nothing
else.

What a task reads besides (texts, model, other tasks, sizes that follow from the budget) are its
inputs, given where the task is made.
"""

import re
from collections.abc import Mapping
from typing import Any

from rayprune.orchestrator.execution.run_folder import HOW_COMPUTED
from rayprune.specs.job import JobSpec
from rayprune.specs.texts import TextSpec, WindowsSpec
from rayprune.specs.training import HOW_TRAINED
from rayprune.workers.store.layout import (
    CALIBRATION_TASK,
    EVALUATION_TASK,
    EXPORT_TASK,
    GATE_TASK,
    GATE_TOKENS_TASK,
    GRADIENTS_TASK,
    LM_TASKS_TASK,
    OUTER_TASK,
    OWN_TEXT_TASK,
    RECOVER_TASK,
    RECOVERY_TOKENS_TASK,
    REGULARISE_TASK,
    SENSITIVITY_TASK,
    SHAPE_TASK,
    SOURCE_TASK,
    TEACHER_TASK,
    UPDATES_TASK,
    converted_task,
    lm_tasks_task,
    samples_task,
)
from rayprune.workers.texts.limits import spread_windows

CONVERTED_TASKS = tuple(map(converted_task, ("vllm", "gguf", "gguf-q8_0")))
SAMPLES_TASKS = tuple(map(samples_task, ("before", "after", "recovered")))
ASKED_TASKS = tuple(map(lm_tasks_task, ("before", "after", "recovered")))
_ASKED = {"tasks", "tasks_limit", "tasks_batch", "few_shot"}
BOUNDARY = "boundary"
"""Hidden states that a wave of the dense path leaves behind: no task, but they depend on things as
one does.
"""
_ACTIVATIONS = (*HOW_COMPUTED, "parallel.threads_per_worker")
_STATISTICS = (
    *_ACTIVATIONS,
    "parallel.micro_batch",
    "calibration.shards",
    "calibration.held_out_shards",
    "method.needs_rows",
)
_SELECTION = (*_STATISTICS, "method.selector")
_CUT = (*_SELECTION, "correction", "export.dtype")
_TEXT = ("calibration.texts", "calibration.sequence_length", "calibration.bos")
_TRAINING = ("parallel.device", "parallel.threads_per_worker", *_TEXT, "calibration.samples")
_ALLOCATION = ("bounds", "export.form", "export.pad", "export.tensor_parallel")

_WRITTEN = ("engine", "prompts", "temperature", "seed", "dtype")
_GRADIENTS = (*_ACTIVATIONS, "gradient_windows")
_SENSITIVITY = (*_ACTIVATIONS, "divergence_windows")
_SHAPE = (*_CUT, *_ALLOCATION, "budget.probe_samples", "budget.probe_layers")
_LAYER = (*_CUT, "parallel.propagation", "export.form", "export.pad")
_EXPORT = ("export.dtype", "export.form", "export.pad")
_RECOVER = ("parallel.device", "parallel.threads_per_worker", "recover")

READS: Mapping[str, tuple[str, ...]] = {
    SOURCE_TASK: (),
    "own": (*_ACTIVATIONS, *(f"calibration.own.{name}" for name in _WRITTEN)),
    OWN_TEXT_TASK: (),
    CALIBRATION_TASK: (*_TEXT, "calibration.samples"),
    EVALUATION_TASK: ("evaluation", "windows_read", *_TEXT),
    GRADIENTS_TASK: _GRADIENTS,
    "statistics": _STATISTICS,
    "survey": _CUT,
    SENSITIVITY_TASK: _SENSITIVITY,
    "probed": (*_ACTIVATIONS, "method.needs_rows", "budget.probe_samples"),
    "dropped": (*_ACTIVATIONS, "drop_windows"),
    "generation": (*_ACTIVATIONS, "divergence_windows", *_ALLOCATION),
    SHAPE_TASK: _SHAPE,
    "selection": (*_SELECTION, "method.mask", "method.seed"),
    "regularised": (*_STATISTICS, "method"),
    "recovered": (*_ACTIVATIONS, "parallel.micro_batch", "recover"),
    REGULARISE_TASK: (*_TRAINING, "method"),
    "gates": (*_TRAINING, "method"),
    UPDATES_TASK: (*_TRAINING, "method"),
    "layer": _LAYER,
    BOUNDARY: (*_ACTIVATIONS, "parallel.micro_batch", "calibration.shards"),
    OUTER_TASK: ("export.dtype",),
    EXPORT_TASK: _EXPORT,
    **dict.fromkeys(CONVERTED_TASKS, ()),
    RECOVERY_TOKENS_TASK: ("recovery",),
    TEACHER_TASK: (*_ACTIVATIONS, "recover.teacher_top"),
    RECOVER_TASK: _RECOVER,
    GATE_TOKENS_TASK: (*_TEXT, "calibration.samples", "windows_read", "method.gate.samples"),
    # what all tasks of its pass read
    GATE_TASK: (*_GRADIENTS, *_SENSITIVITY, *_SHAPE, *_LAYER, *_EXPORT, *_RECOVER),
    "evaluate-before": (*_ACTIVATIONS, "evaluation.stride"),
    "evaluate-after": (*_ACTIVATIONS, "evaluation.stride"),
    "evaluate-recovered": (*_ACTIVATIONS, "evaluation.stride"),
    **dict.fromkeys(SAMPLES_TASKS, (*_ACTIVATIONS, "samples")),
    LM_TASKS_TASK: ("asked.tasks",),
    **dict.fromkeys(ASKED_TASKS, (*_ACTIVATIONS, "asked")),
}
"""By kind of task; a section's name stands for all of it."""
KEPT_IN_STORE = {
    "own",
    OWN_TEXT_TASK,
    CALIBRATION_TASK,
    RECOVERY_TOKENS_TASK,
    TEACHER_TASK,
    EVALUATION_TASK,
    GRADIENTS_TASK,
    "statistics",
    "survey",
    SENSITIVITY_TASK,
    "dropped",
    "generation",
    "probed",
    SHAPE_TASK,
    "selection",
    "layer",
    OUTER_TASK,
    "evaluate-before",
    "evaluate-after",
    *SAMPLES_TASKS,
    LM_TASKS_TASK,
    *ASKED_TASKS,
}
"""Kinds of tasks that a store keeps. Not `source`, since a folder's files tell it apart in that
folder alone; not trainings, whose folders hold more than their results; not the exported model.
"""
WITHOUT_ACTIVATIONS = {
    SOURCE_TASK,
    OWN_TEXT_TASK,
    CALIBRATION_TASK,
    EVALUATION_TASK,
    RECOVERY_TOKENS_TASK,
    GATE_TOKENS_TASK,
    OUTER_TASK,
    EXPORT_TASK,
    *CONVERTED_TASKS,
    LM_TASKS_TASK,
}
"""Tasks whose result does not depend on how workers compute."""


def kind_of(task: str) -> str:
    """A task's name without its number."""
    return re.sub(r"-\d{4}$", "", task)


def options_read(job: JobSpec, task: str) -> dict[str, object]:
    """The options that a task reads, by dotted name."""
    known = _known(job)
    return {name: _at(known, name) for name in READS[kind_of(task)]}


def _at(known: Any, name: str) -> object:
    for key in name.split("."):
        known = known.get(key) if isinstance(known, Mapping) else None
    return known


def _known(job: JobSpec) -> dict[str, Any]:
    """The job as it is read: what is left to a default is resolved, and what does not change a
    result is left out.
    """
    left_out: Any = {
        "evaluation": {"path", "format", "field", "texts", "prompts", "prompt_tokens"}
        | {"tasks_folder", *_ASKED},
        "recover": HOW_TRAINED | {"text", "samples"},  # they are in its tokens
        "method": {"training": HOW_TRAINED, "gates": HOW_TRAINED},
    }
    known: dict[str, Any] = job.model_dump(mode="json", exclude=left_out)
    known["parallel"]["propagation"] = job.parallel.effective_propagation
    known["export"]["form"] = job.export.form
    known["method"]["needs_rows"] = job.method.needs_rows
    selector = job.method.selector
    elsewhere: Any = {"training", "gates", "inner"}  # an inner method has tasks of its own
    known["method"]["selector"] = selector.model_dump(mode="json", exclude=elsewhere)
    calibration, evaluation = job.calibration, job.evaluation
    known["calibration"]["texts"] = _readings(calibration)
    if job.recover:
        text = job.recovery_text
        known["recovery"] = {
            "texts": _readings(text),
            "samples": text.samples,
            "sequence_length": text.sequence_length,
        }
    if evaluation:
        texts = {name: _reading(text) for name, text in evaluation.by_name.items()}
        one = evaluation.texts is None
        known["evaluation"] |= {"text": next(iter(texts.values()))} if one else {"texts": texts}
        known["evaluation"]["stride"] = evaluation.effective_stride
        known["samples"] = evaluation.model_dump(mode="json", include={"prompts", "prompt_tokens"})
        known["asked"] = evaluation.model_dump(mode="json", include=_ASKED)
    elsewhere = {"latency_table", "probe_samples", "probe_layers", "experts", "expert_score"}
    # what jobs of earlier versions could not ask for
    elsewhere |= {n for n in ("tokens_per_second", "memory") if getattr(job.budget, n) is None}
    elsewhere |= {"drop_layers", "drop_score", "drop_samples"}
    known["bounds"] = job.budget.model_dump(
        mode="json", exclude=dict.fromkeys(elsewhere, True) | {"allocation": {"generations"}}
    )
    for name in ("windows_read", "gradient_windows", "divergence_windows", "drop_windows"):
        known[name] = getattr(job, name)
    if len(calibration.texts) > 1:
        known |= {name: _by_text(job, known[name]) for name in _SPREAD}
        known["budget"]["probe_samples"] = _by_text(job, job.budget.probe_samples)
    else:
        known["bounds"]["allocation"].pop("objective", None)
    return known


_SPREAD = ("gradient_windows", "divergence_windows")


def _by_text(job: JobSpec, count: int) -> list[int]:
    """How many of so many windows are of each text."""
    texts = [
        text for _, text in spread_windows(job.calibration, min(count, job.calibration.samples))
    ]
    return [texts.count(number) for number in range(len(job.calibration.texts))]


def _readings(spec: WindowsSpec) -> list[dict[str, object]]:
    return [_reading(text) for text in spec.texts]


def _reading(text: TextSpec) -> dict[str, object]:
    """How a text is read, and its weight if it has one; where it lies does not matter."""
    return {"format": text.format, "field": text.field, "weight": getattr(text, "weight", None)}
