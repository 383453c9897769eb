"""How long trainings take, and asking a teacher for one: steps over the ranks, each forward and
backward.
"""

import math
from collections.abc import Sequence

from rayprune.orchestrator.planning.workload import TrainingLoad, Workload
from rayprune.specs.machine import MachineProfile
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.machine.blocks import EVALUATED_AT_ONCE
from rayprune.workers.store.layout import RECOVER_TASK, TEACHER_TASK

Seconds = dict[str, float]
"""By what takes them."""


def training_flops(load: Workload, training: TrainingLoad, choice: MemoryPlan) -> int:
    """Arithmetic of a training: 2 operations for a parameter and a token in every pass. Forward,
    backward through activations and (unless adapters alone are trained) weights, what is computed
    again; a teacher that is there, forward; the windows that are measured on, forward. Where layers
    are recovered alone, teacher and model once forward in all windows.
    """
    passes = 2 if training.lora_rank else 3
    passes += not training.keeps(choice)
    own, dense = _passed(load, training.task == RECOVER_TASK), _teaching(load, training)
    taught = training.teacher * (not training.each_layer) * dense
    streamed = training.teacher * training.streamed_windows * (own + dense)
    trained = training.trained_windows * (passes * own + taught)
    looked_at = training.measured_windows * (own + taught)
    return 2 * training.sequence_length * (streamed + trained + looked_at)


def training_seconds(
    load: Workload, training: TrainingLoad, choice: MemoryPlan, machine: MachineProfile
) -> Seconds:
    """Seconds of a training: arithmetic; weights, their gradients and moments in memory; layers
    that ranks send each other, for each micro-batch forward and backward.
    """
    ranks = load.workers
    batches = math.ceil(training.trained_windows / ranks / training.windows)
    weights = _passed(load, training.task == RECOVER_TASK) + load.outer_parameters
    held = 0 if training.lora_rank else 16 * training.steps * weights / ranks
    return {
        "arithmetic": training_flops(load, training, choice) / ranks / machine.forward_flops,
        "memory": ((held + 3 * batches * training.pass_bytes * weights) / machine.memory_bandwidth),
        "network": (
            2 * batches * training.pass_bytes * weights / machine.network_bandwidth
            if ranks > 1 and not training.each_layer
            else 0.0
        ),
    }


def teacher_flops(load: Workload, training: TrainingLoad) -> int:
    """Arithmetic of asking the dense model once, of every window."""
    return 2 * training.taught_windows * training.sequence_length * _teaching(load, training)


def teacher_seconds(load: Workload, training: TrainingLoad, machine: MachineProfile) -> Seconds:
    """Seconds of it: the model is read for every group of windows."""
    each = math.ceil(training.taught_windows / load.workers)
    read = math.ceil(each / EVALUATED_AT_ONCE) * load.bytes_on_disk
    written = training.taught_bytes / load.workers
    return {
        "arithmetic": teacher_flops(load, training) / load.workers / machine.forward_flops,
        "disk": (read + written) / machine.disk_bandwidth,
    }


def named(load: Workload) -> Sequence[tuple[str, TrainingLoad]]:
    """What is done for trainings, by the name of its stage."""
    return [
        found
        for training in load.trainings
        for found in (
            *([(TEACHER_TASK, training)] if training.taught_windows else []),
            (training.task, training),
        )
    ]


def _passed(load: Workload, pruned: bool) -> int:
    """Parameters that a token passes through, with the head; of the pruned model in proportion."""
    active = load.active_parameters
    if pruned:
        layers = sum(kind.num_layers * kind.parameters for kind in load.kinds)
        active = active * (load.pruned_parameters - load.outer_parameters) // layers
    return active + load.vocabulary * load.hidden


def _teaching(load: Workload, training: TrainingLoad) -> int:
    """Parameters of the dense model that a token passes through."""
    if training.taught_by is None:
        return _passed(load, pruned=False)
    return training.taught_by + load.vocabulary * load.hidden
