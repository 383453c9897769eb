"""Times of the stages, against what one bound gives."""

from dataclasses import replace

import pytest

from rayprune.orchestrator.planning.memory_choice import choose_memory
from rayprune.orchestrator.planning.timing import STAGES, WORK, stages
from rayprune.orchestrator.planning.workload import TrainingLoad, Workload
from rayprune.specs.machine import PROFILES
from rayprune.specs.memory import MemoryPlan
from rayprune.workers.store.layout import RECOVER_TASK, REGULARISE_TASK, TEACHER_TASK
from tests.unit.orchestrator.workloads import BIG, LOAD, REFIT


def test_times_need_a_machine() -> None:
    assert all(stage.seconds is None for stage in stages(BIG, MemoryPlan(), None))
    timed = stages(BIG, MemoryPlan(), PROFILES["cpu-core"])
    assert all(stage.seconds is not None and stage.seconds >= 0 for stage in timed)
    seconds = {stage.name: stage for stage in timed}
    selection = 6 * (2**14) ** 3 // 3
    assert seconds["selection"].flops == pytest.approx(selection)
    assert seconds["selection"].seconds == pytest.approx(selection / 25e9, rel=1e-6)
    assert seconds["selection"].bound_by == "arithmetic"


def test_refit_has_the_same_stages() -> None:
    assert [stage.name for stage in stages(REFIT, MemoryPlan(), PROFILES["cpu-core"])] == list(
        STAGES
    )


def test_gradients_are_three_forward_passes() -> None:
    load = replace(BIG, gradient_windows=4)
    (stage,) = [
        stage
        for stage in stages(load, MemoryPlan(), PROFILES["cpu-core"])
        if stage.name == "gradients"
    ]
    flops = (
        3 * 4 * load.sequence_length * 2 * (load.active_parameters + load.vocabulary * load.hidden)
    )
    # a layer this small computes faster than its hidden states are written
    assert (stage.flops, stage.bound_by) == (flops, "disk")
    states = 2 * load.num_layers * 4 * load.sequence_length * load.hidden * load.element_bytes
    assert stage.seconds == pytest.approx(
        (2 * load.bytes_on_disk + states) / PROFILES["cpu-core"].disk_bandwidth
    )
    assert [
        stage.flops for stage in stages(load, MemoryPlan(), None) if stage.name == "gradients"
    ] == [flops]


def test_files_take_disk_time() -> None:
    spilled = MemoryPlan(keep_inputs=False, spill_hidden=True, spill_statistics=True)
    seconds = {stage.name: stage.seconds for stage in stages(LOAD, spilled, PROFILES["cpu-core"])}
    # hidden states are spread over two workers
    assert seconds["files"] == pytest.approx((2 * 6 * 1600 + 6 * 128 * 4 * 4) / 0.5e9)
    assert (
        next(
            stage.seconds
            for stage in stages(LOAD, MemoryPlan(), PROFILES["cpu-core"])
            if stage.name == "files"
        )
        == 0
    )


def test_decisions_run_at_the_same_time_where_workers_own_layers() -> None:
    def seconds(load: Workload) -> dict[str, float | None]:
        choice = choose_memory(load, None)
        return {stage.name: stage.seconds for stage in stages(load, choice, PROFILES["h100-80gb"])}

    shards, layers = (
        seconds(replace(BIG, workers=6)),
        seconds(replace(BIG, workers=6, placement="layers", propagation="dense")),
    )
    assert shards["selection"] == pytest.approx(6 * layers["selection"])  # type: ignore[operator]


def test_a_training_counts_all_its_passes_and_those_of_its_teacher() -> None:
    head, dense = LOAD.vocabulary * LOAD.hidden, 6 * 300
    first = TrainingLoad(1, False, 4, 16, task=REGULARISE_TASK, steps=3, trained_windows=12)
    (stage,) = stages(replace(LOAD, trainings=(first,)), MemoryPlan(), None)[len(WORK) :]
    assert (stage.name, stage.flops) == (REGULARISE_TASK, 2 * 16 * 12 * 4 * (dense + head))
    pruned = LOAD.output_bytes // LOAD.written_element_bytes - LOAD.outer_parameters
    recovery = replace(
        first,
        keeps_activations=True,
        lora_rank=2,
        teacher=True,
        task=RECOVER_TASK,
        measured_windows=5,
    )
    (stage,) = stages(replace(LOAD, trainings=(recovery,)), MemoryPlan(), None)[len(WORK) :]
    passes = 12 * (2 * (pruned + head) + dense + head) + 5 * (pruned + head + dense + head)
    assert stage.flops == 2 * 16 * passes
    asked = replace(recovery, teacher=False, taught_windows=7, teacher_top=4)
    teacher, stage = stages(replace(LOAD, trainings=(asked,)), MemoryPlan(), None)[len(WORK) :]
    assert (teacher.name, teacher.flops) == (TEACHER_TASK, 2 * 16 * 7 * (dense + head))
    assert stage.flops == 2 * 16 * (12 * 2 + 5) * (pruned + head)
