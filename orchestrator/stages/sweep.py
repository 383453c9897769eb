"""The sweep from the driver's side. Names and numbers pass through here; statistics and cuts go
from worker to worker.

On the pruned path, per layer and coupled group: collect, reduce, decide; then write the layer. On
the dense path all layers at once (`rayprune.orchestrator.stages.stream`); with `propagation: refit`
that pass only selects, and a second one on the pruned path corrects.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rayprune.orchestrator.execution.failures import WorkerFailure
from rayprune.orchestrator.execution.steps import Call, Collected, Decided, Steps
from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.reduce import reduced
from rayprune.orchestrator.stages.sparsify import sparsify_layers
from rayprune.orchestrator.stages.stream import layer_work, stream_layers
from rayprune.orchestrator.stages.subject import Subject
from rayprune.specs.errors import RaypruneError
from rayprune.workers.numerics.damping import Rest, Trial, best_trial
from rayprune.workers.store.files import MANIFEST_NAME, Manifest, Task, fingerprint, read_manifest
from rayprune.workers.store.layout import layer_task, selection_task
from rayprune.workers.store.shards import even_parts

if TYPE_CHECKING:
    from rayprune.workers.network.slicing import Cut


def prune_layers(context: Context, subject: Subject) -> list[Manifest]:
    """Prune every layer that is not finished; the manifests of all of them.

    Raises:
        RaypruneError: from the first layer that fails; the finished ones stay.
    """
    if context.job.method.masks:
        return sparsify_layers(context, subject)
    if context.job.parallel.effective_propagation == "dense":
        return _dense_path(context, subject)
    if context.job.selects_first and subject.selections is None:
        subject = replace(subject, selections=tuple(select_units(context, subject)))
    return _PrunedPath(context, subject).run()


def _dense_path(context: Context, subject: Subject) -> list[Manifest]:
    shape, pad, work = subject.plan.shape, context.job.export.pad, []
    for layer in range(subject.plan.model.num_layers):
        sizes = shape.kept_in(layer), shape.written_in(layer, pad), shape.position(layer)
        groups = subject.plan.pruned_groups(layer)  # on the dense path no other is decided
        work.append(
            layer_work(
                context,
                subject,
                layer,
                layer_task(layer),
                Steps.settle,
                sizes,
                groups,
                **subject.ranked_by,
            )
        )
    return stream_layers(context, subject, "sweep", work)


def select_units(context: Context, subject: Subject) -> list[Manifest]:
    """Select the units of all layers that stay, from activations of the dense model."""
    work = []
    for layer in range(subject.plan.model.num_layers):
        kept, groups = subject.plan.shape.kept_in(layer), subject.plan.pruned_groups(layer)
        name, ranked_by = selection_task(layer), subject.ranked_by
        work.append(
            layer_work(context, subject, layer, name, Steps.select, (kept,), groups, **ranked_by)
        )
    return stream_layers(context, subject, "select", work)


@dataclass(frozen=True)
class _Written:
    """A layer that is decided, and whose file a worker is writing."""

    layer: int
    task: Task
    worker: int
    cuts: Sequence[Decided]
    """Of all its groups; none where workers are to take them from the file."""
    groups: dict[str, dict[str, Any]]
    seconds: float
    steps: dict[str, float]
    """Seconds by step."""


class _PrunedPath:
    """One layer after the other. A layer depends on all layers below it: it saw activations from
    there. Its file is written while the workers go on with the next layer.
    """

    def __init__(self, context: Context, subject: Subject) -> None:
        self._context, self._subject = context, subject
        self._finished: list[Manifest] = []
        self._below = ""
        self._written: _Written | None = None
        self._ahead: list[Call[None]] = []
        """Steps past the layer below; those behind them on a worker alone wait for them."""
        self._failed = False
        parts = even_parts(context.job.calibration.shards, context.executor.num_workers)
        self._shards = [(worker, (part.start, part.stop)) for worker, part in enumerate(parts)]
        described = subject.model.checkpoint.model
        self._experts = described.experts and described.experts.name
        self._members_of = {group.name: list(group.members) for group in described.groups}
        self._units = {
            member.name: member.num_units
            for members in self._members_of.values()
            for member in members
            if member.expert is None
        }
        """Units of each group but those of single experts, which one worker decides."""

    def run(self) -> list[Manifest]:
        """Prune every layer that is not finished; the manifests of all of them."""
        num_layers = self._subject.plan.model.num_layers
        with self._context.stage("sweep", num_layers):
            try:
                for layer in range(num_layers):
                    self._see_to(layer)
                self._confirm_surely()
            except RaypruneError:
                self._let_finish()
                raise
        return self._finished

    def _let_finish(self) -> None:
        """A layer that is decided stays, whatever has come behind it."""
        if written := self._written:
            executor = self._context.executor
            with suppress(RaypruneError, WorkerFailure):  # the first error is told
                executor.wait([executor.on(written.worker).finish_writing()])

    def _see_to(self, layer: int) -> None:
        context, name = self._context, layer_task(layer)
        manifest = context.scope.folder(name) / MANIFEST_NAME
        if context.store or manifest.exists():  # whether it is finished depends on those below
            self._confirm_surely()
        if self._written is None:
            task = self._task(layer)
            if done := context.finished(task):
                context.emit("task-found", task=context.scope.task(task.name))
                self._note(layer, done)
                return
        context.attempt(name, partial(self._prune_up_to, layer))

    def _confirm_surely(self) -> None:
        if written := self._written:
            self._context.attempt(
                written.task.name, partial(self._prune_up_to, written.layer, confirm=True)
            )

    def _prune_up_to(self, layer: int, confirm: bool = False) -> None:
        """An attempt at a layer; behind one that has failed, at the layer below too, if its file
        was lost with its writer.
        """
        if self._failed and (written := self._written):
            executor = self._context.executor
            executor.wait([executor.on(written.worker).finish_writing()])
            is_there = read_manifest(written.task.folder) is not None
            # its cuts may be lost as well
            self._written = replace(written, cuts=()) if is_there else None
        self._failed = True
        for each in range(len(self._finished), layer + 1):
            if self._written is None or self._written.layer < each:
                self._prune(each)
        if confirm:
            self._confirm()
        self._failed = False

    def _task(self, layer: int) -> Task:
        depends = _depends(self._context, self._subject, layer, self._below)
        return self._context.task(layer_task(layer), depends)

    def _note(self, layer: int, done: Manifest) -> None:
        """Go on behind a finished layer."""
        assert layer == len(self._finished), "layers are finished in order"
        self._finished.append(done)
        self._below = fingerprint([self._below, done.digest, done.info["kept"]])

    def _confirm(self) -> None:
        """Wait until the file of the layer below is there."""
        if (written := self._written) is None:
            return
        executor = self._context.executor
        executor.wait([executor.on(written.worker).finish_writing()])
        self._context.layer_finished(
            "sweep", written.layer, written.seconds, written.steps, written.groups
        )
        self._note(written.layer, self._context.done(written.task))
        self._written = None

    def _prune(self, layer: int) -> None:
        """One layer on the workers: statistics from all of them, decisions and writing by one,
        another for each layer.
        """
        context, plan, start = self._context, self._subject.plan, time.monotonic()
        executor, kept = context.executor, plan.shape.kept_in(layer)
        executor.seconds_since()
        self._ahead = []  # of an attempt that has failed
        self._go_past()
        worker = layer % executor.num_workers
        cuts: list[Decided] = []
        groups: dict[str, dict[str, Any]] = {}
        for name in plan.decided_groups(layer):
            before = tuple(cuts)  # what one expert reads does not depend on another
            for member in self._members(name, groups):
                decision = (
                    self._route(layer, worker, kept[name], before)
                    if name == self._experts
                    else self._decide(layer, worker, member, kept[name], before)
                )
                (receipt,) = executor.wait([decision])
                groups[member] = receipt["group"]
                cuts.append(decision.payload)
        self._confirm()
        written, task = plan.shape.written_in(layer, context.job.export.pad), self._task(layer)
        sizes = written, plan.shape.position(layer)
        self._wait([executor.on(worker).write_layer(layer, task, *sizes, groups, *cuts)])
        seconds = time.monotonic() - start
        steps = executor.seconds_since()
        self._written = _Written(layer, task, worker, cuts, groups, seconds, steps)

    def _members(self, name: str, groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """What is decided of a group one by one: itself, or each of the experts that stay."""
        members = self._members_of[name]
        if chosen := groups.get(self._experts or ""):
            members = [m for m in members if m.expert is None or m.expert in chosen["units"]]
        return [member.name for member in members]

    def _decide(
        self, layer: int, worker: int, name: str, num_kept: int, cuts: Sequence[Decided]
    ) -> Call["Cut"]:
        """Statistics of a group from all workers, and a decision by one."""
        executor, shards = self._context.executor, self._shards if num_kept else []
        if len(shards) > 1 and self._context.job.parallel.transport == "collective":
            executor.join_workers()
            self._wait([executor.on(n).hold(layer, name, own, *cuts) for n, own in shards])
            return self._decide_together(layer, worker, name, num_kept, parts=())
        collected = [
            executor.on(place).collect(layer, name, owned, *cuts) for place, owned in shards
        ]
        self._wait(collected)
        parts = reduced(executor, collected)
        if len(shards) < 2 or name not in self._units:
            return executor.on(worker).decide(layer, name, num_kept, *parts)
        return self._decide_together(layer, worker, name, num_kept, parts)

    def _decide_together(
        self, layer: int, worker: int, name: str, num_kept: int, parts: Sequence[Collected]
    ) -> Call["Cut"]:
        """A decision by all workers, each of which corrects some outputs; the damping is chosen
        here, by what they have found. Without parts the workers hold the statistics.
        """
        executor = self._context.executor
        workers = [executor.on(place) for place, _ in self._shards]
        begun = executor.wait(
            [
                each.begin_share(layer, name, num_kept, (index, len(workers)), *parts)
                for index, each in enumerate(workers)
            ]
        )

        def trial(damping: float) -> Trial:
            found = executor.wait([each.try_damping(damping) for each in workers])
            return Trial.joined(Trial(**receipt["trial"]) for receipt in found)

        best = best_trial(self._context.job.correction, trial)
        rest = Rest.joined(Rest(**receipt["rest"]) for receipt in begun)
        summary = {
            "kept": num_kept,
            "of": self._units[name],
            "damping": best.damping,
            "training_error": rest.training_error(best),
            "held_out_error": rest.held_out_error(best),
        }
        rows = [each.end_share(best.damping) for each in workers]
        executor.wait(rows)
        return executor.on(worker).join(summary, *(call.payload for call in rows))

    def _route(
        self, layer: int, worker: int, num_kept: int, cuts: Sequence[Decided]
    ) -> Call["Cut"]:
        """Which experts stay, decided by one worker from what all have seen of them."""
        executor = self._context.executor
        routed = [executor.on(place).route(layer, owned, *cuts) for place, owned in self._shards]
        self._wait(routed)
        return executor.on(worker).keep_experts(num_kept, *(call.payload for call in routed))

    def _go_past(self) -> None:
        """Let the workers' shards go past the layer below while its file is written; once it is,
        where its cuts are read from it, and where hidden states are saved, whose name tells what
        they depend on. No worker waits there for another.
        """
        if (written := self._written) is None:
            return
        every = self._context.job.memory.checkpoint_layers
        if not written.cuts or (every and (written.layer + 1) % every == 0):
            self._confirm()
        if written.cuts:
            executor = self._context.executor
            self._ahead = [
                executor.on(worker).advance(written.layer, owned, *written.cuts)
                for worker, owned in self._shards
            ]

    def _wait(self, calls: Sequence[Call[Any]]) -> None:
        """Wait for steps, and for those that lie before them."""
        ahead, self._ahead = self._ahead, []
        self._context.executor.wait([*ahead, *calls])


def _depends(context: Context, subject: Subject, layer: int, below: str) -> dict[str, object]:
    """What a layer depends on, where activations come from the pruned layers `below`."""
    shape, model, selections = subject.plan.shape, subject.model, subject.selections
    depends: dict[str, object] = {
        "calibration-tokens": subject.tokens.digest,
        "headers": model.checkpoint.identity,
        "outer": model.outer_digest,
        "layer": model.layer_digests[layer],
        "layers below": below,
        "kept": shape.kept_in(layer),
        "written": shape.written_in(layer, context.job.export.pad),
        "position": shape.position(layer),
        **subject.ranked_by,
    }
    if selections:
        depends["selection"] = selections[layer].digest
    experts = model.checkpoint.model.experts
    if experts and experts.name in subject.plan.pruned_groups(layer):
        depends["expert_score"] = context.job.budget.expert_score
    if context.job.correction.drift:
        depends["dense"] = model.up_to(layer)
    return depends
