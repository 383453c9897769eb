"""Bytes that a run leaves in its folder, task by task, and those that lie there only meanwhile."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rayprune.orchestrator.planning.workload import TrainingLoad, Workload
from rayprune.workers.store.layout import EXPORT_TASK, RECOVER_TASK, TEACHER_TASK

STATE_BYTES, BEST_BYTES = 12, 4
"""A trained parameter in a saved state: itself and its two moments, in fp32; where windows are held
out, the best one too."""


@dataclass(frozen=True)
class DiskNeed:
    """What one task writes."""

    task: str
    stays_bytes: int
    meanwhile_bytes: int = 0


def disk_needs(load: Workload) -> tuple[DiskNeed, ...]:
    """The trained model, the pruned and the recovered one, in their order; hidden states and texts
    are not counted.
    """
    model = load.outer_parameters + sum(kind.num_layers * kind.parameters for kind in load.kinds)
    first = [training for training in load.trainings if training.task != RECOVER_TASK]
    recoveries = [training for training in load.trainings if training.task == RECOVER_TASK]
    return (
        *(DiskNeed(each.task, load.bytes_on_disk, _states(load, each, model)) for each in first),
        DiskNeed(EXPORT_TASK, load.output_bytes),
        *(need for each in recoveries for need in _recovery(load, each)),
    )


def _recovery(load: Workload, training: TrainingLoad) -> Iterator[DiskNeed]:
    if training.taught_windows:
        yield DiskNeed(TEACHER_TASK, training.taught_bytes)
    states = _states(load, training, load.pruned_parameters)
    yield DiskNeed(training.task, load.output_bytes, states)


def _states(load: Workload, training: TrainingLoad, parameters: int) -> int:
    """Saved states of weights and optimizer: the last one goes when the next one is whole."""
    sides = [kind.matrix_sides for kind in load.kinds for _ in range(kind.num_layers)]
    if training.lora_rank:
        parameters = training.lora_rank * sum(sides)
    if training.each_layer:
        adapters = training.lora_rank * max(sides)
        parameters = load.workers * (adapters or load.layer_parameters)
    return training.saved_states * (STATE_BYTES + BEST_BYTES * training.keeps_best) * parameters


def still_needed(needs: Sequence[DiskNeed], finished: Collection[str]) -> int:
    """The most that is yet to be written at once, without the tasks that are finished."""
    written = most = 0
    for need in needs:
        if need.task not in finished:
            most = max(most, written + need.stays_bytes + need.meanwhile_bytes)
            written += need.stays_bytes
    return most
