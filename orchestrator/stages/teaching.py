"""The stage that asks the dense model once what a recovery will be taught, so that it need not be
there in the training.
"""

from dataclasses import replace
from functools import partial

from rayprune.orchestrator.stages.context import Context
from rayprune.orchestrator.stages.subject import ModelAt
from rayprune.workers.machine.blocks import EVALUATED_AT_ONCE
from rayprune.workers.store.files import Manifest, Task, commit
from rayprune.workers.store.layout import RECOVERY_TOKENS_TASK, TEACHER_TASK, Scope, taught_file
from rayprune.workers.store.training_stage import forget_another


def ask_teacher(context: Context, teacher: ModelAt, tokens: Manifest) -> Manifest:
    """The teacher's likeliest next tokens in all windows that a recovery is trained and measured
    on, once for all passes; what was written before a run was cut off is kept, window by window.
    """
    whole = replace(context, scope=Scope(context.scope.run))
    inputs = {"model": teacher.identity, "recovery-tokens": tokens.digest}
    task = whole.task(TEACHER_TASK, inputs)
    samples = context.job.recovery_text.samples
    return whole.once(task, partial(_ask, whole, teacher, task, samples))


def _ask(context: Context, teacher: ModelAt, task: Task, num_windows: int) -> None:
    executor, tokens = context.executor, str(context.scope.folder(RECOVERY_TOKENS_TASK))
    forget_another(task.folder, task.fingerprint)
    shares = executor.shares(num_windows)
    with context.stage(TEACHER_TASK, 1):
        for first in range(0, shares[0][1][1], EVALUATED_AT_ONCE):
            calls = [
                executor.on(worker).teach(
                    str(teacher.path),
                    tokens,
                    task,
                    (start + first, min(start + first + EVALUATED_AT_ONCE, stop)),
                )
                for worker, (start, stop) in shares
                if start + first < stop
            ]
            executor.wait(calls)
    files = [taught_file(task.folder, number).name for number in range(num_windows)]
    commit(task, files, {"computed_on": executor.computed_on})
