"""Samples of the models' writing: whole models are loaded for them, one at a time, where they
fit.
"""

from rayprune.orchestrator.planning.worker_memory import gib, whole_model_bytes
from rayprune.orchestrator.planning.workload import Workload
from rayprune.specs.job import JobSpec
from rayprune.workers.store.layout import samples_task


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
    return tuple(map(samples_task, ("before", "after", *(["recovered"] if job.recover else []))))
