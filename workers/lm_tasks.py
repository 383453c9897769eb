"""Tasks of lm-eval, EleutherAI's language model evaluation harness, asked of a model in this
process. An extra of the package (`rayprune[eval]`): imported only where a job has tasks.

Bars, and advice for its own command, are not shown.
"""

import difflib
import io
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from rayprune.specs.errors import ModelError, RaypruneError, SpecError
from rayprune.specs.evaluation import EvaluationSpec

MOST_WORDS = 400
"""Characters that are shown of an error of lm-eval's."""
VERSION = version("lm_eval")
OWN = str(Path(lm_eval.tasks.__file__).parent)
"""The folder of the tasks that come with it."""


def check_tasks(spec: EvaluationSpec) -> None:
    """Check that there are such tasks; no data is read.

    Raises:
        SpecError: there is none of a name, or a file of the folder is none that lm-eval can read.
    """
    with _at_work(spec):
        _tasks(spec)


def open_tasks(spec: EvaluationSpec) -> dict[str, Any]:
    """Load the documents of all tasks, from files or as the library `datasets` does; of every task
    how many there are, and the version. Groups of tasks stand for what is in them.

    Raises:
        SpecError: there is no such task, its data cannot be loaded, or it takes no examples where
            the job gives some: lm-eval would leave them out.
    """
    with _at_work(spec):
        found = _tasks(spec).load(list(spec.tasks))["tasks"]
        without = [name for name, t in sorted(found.items()) if t.get_config("num_fewshot") == 0]
        if spec.few_shot and without:
            raise SpecError(
                f"evaluation.few_shot: {', '.join(without)} is asked without examples, as its own"
                " file says (num_fewshot: 0); leave few_shot out, or ask it in a job of its own"
            )
        return {
            name: {"version": str(task.VERSION), "documents": len(task.eval_docs)}
            for name, task in sorted(found.items())
        }


def ask(spec: EvaluationSpec, network: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """What a model achieves: of every task and metric the value, its standard error where lm-eval
    has one, and how it was measured.

    Raises:
        SpecError: a task cannot be loaded, or its code fails.
        ModelError: the tokenizer has no token to begin with, or a value is no finite number.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer has neither a bos_token nor an eos_token,"
            " with which lm-eval begins; add one to tokenizer_config.json, or leave"
            " evaluation.tasks out"
        )
    with _at_work(spec):
        model = HFLM(network, backend="causal", tokenizer=tokenizer, batch_size=spec.tasks_batch)
        found = simple_evaluate(
            model,
            tasks=list(spec.tasks),
            num_fewshot=spec.few_shot,
            limit=spec.tasks_limit,
            task_manager=_tasks(spec),
            log_samples=False,
        )
    return list(_scores(found))


def _scores(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, form = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise ModelError(f"evaluation.tasks: {task}: {metric} is {value}: predicts nothing")
            error = values.get(f"{metric}_stderr,{form}")
            known = isinstance(error, int | float) and math.isfinite(error)
            yield {
                "task": task,
                "metric": metric if form == "none" else f"{metric}, {form}",
                "value": float(value),
                "stderr": float(error) if known else None,
                "version": str(found["versions"].get(task)),
                "few_shot": found["n-shot"].get(task),
                "documents": found["n-samples"].get(task, {}).get("effective"),
                "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
            }


def _tasks(spec: EvaluationSpec) -> TaskManager:
    """The tasks of the job's folder and, unless it has all that are asked for, lm-eval's own, whose
    files take ten seconds to read.

    Raises:
        SpecError: there is none of a name.
    """
    folder = spec.tasks_folder
    if folder and set(spec.tasks) <= set(_read(folder).all_tasks):
        return _read(folder)
    found = _read(OWN, *([folder] if folder else []))
    for name in spec.tasks:
        if name not in found.all_tasks:
            near = difflib.get_close_matches(name, found.all_tasks, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            where = f"nor has {folder}" if folder else "give evaluation.tasks_folder for your own"
            raise SpecError(
                f"evaluation.tasks: lm-eval {VERSION} has no task {name!r}, {where}; {hint}"
                "`lm-eval ls tasks` lists them"
            )
    return found


@cache
def _read(*folders: str) -> TaskManager:
    """The tasks of some folders; a later one goes before."""
    return TaskManager(include_path=list(folders), include_defaults=False)


@contextmanager
def _at_work(spec: EvaluationSpec) -> Iterator[None]:
    """In the job's folder of tasks, so that names of files in it are meant from there, and without
    a word of lm-eval's.

    Raises:
        SpecError: instead of whatever it raises.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with chdir(spec.tasks_folder or "."), redirect_stderr(io.StringIO()):
            yield
    except (RaypruneError, MemoryError):
        raise
    # a foreign library, and the code of tasks: anything at all
    except Exception as error:
        words = " ".join(str(error).split()) or "no reason given"
        raise SpecError(
            f"evaluation.tasks: lm-eval {VERSION}: {type(error).__name__}: {words[:MOST_WORDS]};"
            f" correct the task's file, or take another than {', '.join(spec.tasks)}"
        ) from error
    finally:
        logger.setLevel(level)
