"""What each layer of a mixture of experts may lose: a pass over the dense model, layer by layer and
group by group, with one expert's statistics at a time.

Where there are no experts, statistics of whole chunks of layers are collected at once
(`stages.stream`).
"""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean

from rayprune.orchestrator.execution.executor import Executor
from rayprune.orchestrator.execution.steps import Call, Receipt
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.reduce import reduced
from rayprune.orchestrator.stages.subject import Subject
from rayprune.workers.model.description import Group
from rayprune.workers.store.files import Manifest, Task, commit
from rayprune.workers.store.layout import survey_file, survey_task
from rayprune.workers.store.shards import even_parts

Counts = Mapping[str, Sequence[int]]
"""Numbers of units that may stay, by group."""
Errors = dict[int, float]
"""Squared relative errors by number of units that stay."""


def survey_experts(
    context: Context, subject: Subject, counts: Counts, stored: Counts
) -> list[Manifest]:
    """For every layer the errors of its groups with so many units, and cuts for the `stored`
    numbers.

    Raises:
        RaypruneError: from the first layer that fails; the finished ones stay.
    """
    model, score = subject.model.checkpoint.model, context.job.budget.expert_score
    found = []
    with context.stage("survey", model.num_layers):
        for number, layer in enumerate(model.layers):
            wanted = asked(layer.groups, counts), asked(layer.groups, stored)
            depends = {**subject.up_to(number), "arguments": wanted, "expert_score": score}
            task = context.task(survey_task(number), depends)
            work = partial(_Survey(context, number, task, *wanted).run, layer.groups)
            found.append(context.once(task, work))
    return found


def asked(groups: Sequence[Group], counts: Counts) -> dict[str, list[int]]:
    """The counts of a layer's groups: of one that follows another those that belong to that
    one's.
    """
    found = {}
    for group in groups:
        leader, times = group.times or (group.name, 1)
        found[group.name] = [times * count for count in counts[leader]]
    return found


class _Survey:
    """One layer's."""

    def __init__(
        self, context: Context, layer: int, task: Task, counts: Counts, stored: Counts
    ) -> None:
        self._context, self._layer, self._task = context, layer, task
        self._counts, self._stored = counts, stored
        self._deciding = layer % context.executor.num_workers
        parts = even_parts(context.job.calibration.shards, context.executor.num_workers)
        self._shards = [(worker, (part.start, part.stop)) for worker, part in enumerate(parts)]
        self._files: list[str] = []

    def run(self, groups: Sequence[Group]) -> None:
        """Look at its groups in their order, and record what was found."""
        executor, start, errors = self._executor, time.monotonic(), dict[str, Errors]()
        executor.seconds_since()
        self._files, energies = [], list[float]()  # of an attempt that has failed
        for group in groups:
            if group.kind == "experts":
                errors[group.name], energies = self._whole_experts(group)
            elif self._counts[group.name]:
                found = [self._one(member.name, group) for member in group.members]
                errors[group.name] = _together(found, energies) if group.count > 1 else found[0]
        info = {"result": errors, "computed_on": executor.computed_on}
        commit(self._task, self._files, info)
        seconds = time.monotonic() - start
        steps = executor.seconds_since()
        self._context.layer_finished("survey", self._layer, seconds, steps, {})

    @property
    def _executor(self) -> Executor:
        return self._context.executor

    def _whole_experts(self, group: Group) -> tuple[Errors, list[float]]:
        """Their errors, and how much each adds to what the block gives."""
        on, counts = self._executor.on, self._counts[group.name]
        seen = [on(place).look_at_experts(self._layer, owned) for place, owned in self._shards]
        self._executor.wait(seen)
        payloads = (call.payload for call in seen)
        receipt = self._answer(on(self._deciding).survey_experts(self._task, counts, *payloads))
        self._files.append(survey_file(group.name))
        return receipt["errors"], receipt["energies"]

    def _one(self, name: str, group: Group) -> Errors:
        """The errors of a group, or of that of one expert."""
        on = self._executor.on
        seen = [on(place).look_at(self._layer, name, owned) for place, owned in self._shards]
        self._executor.wait(seen)
        parts = reduced(self._executor, seen)
        counts, stored = self._counts[group.name], self._stored[group.name]
        deciding = on(self._deciding)
        call = deciding.survey_group(self._layer, self._task, name, counts, stored, *parts)
        self._files.append(survey_file(name))
        errors: Errors = self._answer(call)["errors"]
        return errors

    def _answer(self, call: Call[None]) -> Receipt:
        (receipt,) = self._executor.wait([call])
        return receipt


def _together(found: Sequence[Errors], energies: Sequence[float]) -> Errors:
    """The error of all experts together, whose outputs are taken as orthogonal: the mean of theirs,
    each as much as it adds to the block's output.
    """
    whole = math.fsum(energies)
    if whole <= 0:
        return {count: fmean(each[count] for each in found) for count in found[0]}
    return {
        count: math.fsum(energy * each[count] for energy, each in zip(energies, found, strict=True))
        / whole
        for count in found[0]
    }
