"""Samples of the models' writing, and tasks that they are asked: whole models are loaded for them,
one at a time.
"""

from rayprune.orchestrator.planning.worker_memory import gib, whole_model_bytes
from rayprune.orchestrator.planning.workload import Workload
from rayprune.specs.errors import ResourceError
from rayprune.specs.job import JobSpec
from rayprune.workers.store.layout import LM_TASKS_TASK, lm_tasks_task, samples_task


def samples_left_out(job: JobSpec, load: Workload, limit_bytes: int | None) -> str:
    """Why there will be no samples, though the job has prompts; nothing where there will."""
    if job.evaluation is None or not job.evaluation.prompts or limit_bytes is None:
        return ""
    if (needed := whole_model_bytes(load)) <= limit_bytes:
        return ""
    return (
        f"evaluation.prompts: left out: the dense model takes {gib(needed)} as a whole, a worker"
        f" may use {gib(limit_bytes)}; raise memory.worker, or leave prompts out"
    )


def samples_tasks(job: JobSpec, left_out: str) -> tuple[str, ...]:
    """Names of the tasks."""
    if job.evaluation is None or not job.evaluation.prompts or left_out:
        return ()
    return tuple(map(samples_task, _models(job)))


def lm_tasks_tasks(job: JobSpec, load: Workload, limit_bytes: int | None) -> tuple[str, ...]:
    """Names of the tasks in which models are asked those of lm-eval.

    Raises:
        ResourceError: the dense model has no room as a whole.
    """
    if job.evaluation is None or not job.evaluation.tasks:
        return ()
    if limit_bytes is not None and (needed := whole_model_bytes(load)) > limit_bytes:
        raise ResourceError(
            f"evaluation.tasks: the dense model takes {gib(needed)} as a whole, a worker may use"
            f" {gib(limit_bytes)}; raise memory.worker, or leave tasks out"
        )
    return (LM_TASKS_TASK, *map(lm_tasks_task, _models(job)))


def _models(job: JobSpec) -> tuple[str, ...]:
    return ("before", "after", *(["recovered"] if job.recover else []))
