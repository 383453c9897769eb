"""A job for a model and a machine: the settings that a recipe leaves open, each with its reason,
and what it gives up where the model's family or the machine does not allow it.

Nothing is known of families here: a setting is given up because the plan refuses it, and the plan's
words are the reason.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayprune.orchestrator.planning.case import Case, Setting, Settings, changed, reason
from rayprune.orchestrator.planning.plan import Plan
from rayprune.orchestrator.planning.sizing import SHARDS, fitting
from rayprune.specs.budget import DEFAULT_SPARSITY
from rayprune.specs.calibration import FEW_TOKENS
from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.recipe import RecipeName
from rayprune.specs.texts import TextSpec
from rayprune.workers.machine.host import SLOW_PACE, Host
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.texts.limits import check_other_text
from rayprune.workers.texts.reading import check_text
from rayprune.workers.texts.tokenizer import fast_encoder

NO_TEXT = "calibration.txt"
LENGTH = {"cpu": 512, "cuda": 2048}
LEAST_WINDOWS = {"cpu": 2 * SHARDS, "cuda": 128}
SHORTEST = 64
WINDOW, WINDOWS = 1024, 16
"""Of an evaluation: tokens of one, and how many."""
TOKENS_PER_CHANNEL = 2 * FEW_TOKENS
GIVEN_UP: tuple[Mapping[str, Any], ...] = (
    {"budget.per_layer": False},
    {"correction.drift": 0.0},
    {"method.scale": "weights"},
    {"parallel.placement": "shards"},
    {"recover": None},
    {"calibration.own": None},
    {"export.target": ["vllm"]},
    {"export.target": ["transformers"]},
    {"budget.round_to": "auto"},
    {
        "method": "trsp",
        "budget.per_layer": False,
        "correction.drift": 0.0,
        "parallel.placement": "shards",
    },
)
"""What is tried in turn where a plan refuses a setting."""


@dataclass(frozen=True)
class Proposal:
    """A job that fits, with reasons, and its plan."""

    settings: Settings
    """By key path, such as `budget.sparsity`."""
    host: Host
    job: JobSpec
    plan: Plan
    text_is_missing: bool
    """Whether there is no calibration text yet."""


def propose(
    name: str,
    checkpoint: Checkpoint,
    host: Host,
    aim: RecipeName,
    text: Path | None = None,
    sparsity: float = DEFAULT_SPARSITY,
    held_out: Path | None = None,
) -> Proposal:
    """Propose a job; `name` is what it calls the model: a folder, or OWNER/NAME.

    Raises:
        SpecError: a text will not do, or no setting makes the budget possible.
        ModelError: the model is not known, or cannot be pruned.
        ResourceError: the machine is too small.
    """
    if why_not := checkpoint.model.not_pruned:
        raise ModelError(f"{name}: it can be planned, not pruned: {why_not}")
    case = Case(checkpoint, host)
    settings = _first(case, name, aim, text, sparsity)
    if held_out:
        if text:
            read, judged = (TextSpec(path=os.fspath(path)) for path in (text, held_out))
            check_other_text([read], judged, "--held-out")
        settings |= _evaluation(case, held_out)
    settings = _allowed(case, settings)
    settings = _enough_text(case, settings, text)
    settings, plan = fitting(case, settings)
    return Proposal(settings, host, case.job(settings), plan, text is None)


def _first(case: Case, name: str, aim: RecipeName, text: Path | None, sparsity: float) -> Settings:
    usual = LENGTH[case.device]
    length = min(usual, case.checkpoint.model.positions or usual)
    groups = case.checkpoint.model.groups
    widest = max(group.num_units for group in groups if group.kind == "ffn")
    first = {
        "recipe": Setting(aim),
        "model.path": Setting(name),
        "calibration.path": Setting(os.fspath(text) if text else NO_TEXT),
        "calibration.samples": Setting(max(LEAST_WINDOWS[case.device], _windows(widest, length))),
        "calibration.sequence_length": Setting(length, "tokens of a window"),
        "budget.sparsity": Setting(sparsity, "of the decoder-layer parameters, at least"),
        "parallel.device": Setting(case.device),
    }
    return first | _types(case, first)


def _types(case: Case, settings: Settings) -> Settings:
    """float32 where the recipe computes in bfloat16 and the machine's cores would take longer."""
    pace, job = case.host.bfloat16_pace, case.job(settings)
    if pace < SLOW_PACE:
        return {}
    sections = (name.removesuffix(".dtype") for name, t in job.dtypes.items() if t == "bfloat16")
    why = f"bfloat16 would take {pace:.0f} times as long on this machine's cores"
    return {section: Setting({"dtype": "float32"}, why) for section in sections}


def _evaluation(case: Case, held_out: Path) -> Settings:
    """Quality on a text of its own, of an amount that is soon measured."""
    window, there = min(WINDOW, case.checkpoint.model.positions or WINDOW), _tokens(case, held_out)
    while window > SHORTEST and there is not None and there < window:
        window //= 2
    return {
        "evaluation.path": Setting(os.fspath(held_out), "of the dense and the pruned model"),
        "evaluation.window": Setting(window, "tokens"),
        "evaluation.max_windows": Setting(WINDOWS, "the first ones; null: all"),
    }


def _allowed(case: Case, settings: Settings) -> Settings:
    """The settings without what the model's family does not allow."""
    while True:
        try:
            case.free_plan(settings)
        except SpecError as error:
            settings = _yielding(case, settings, error)
        else:
            return settings


def _yielding(case: Case, settings: Settings, refusal: SpecError) -> Settings:
    """The settings with the first change after which the refusal is gone, or is another one.

    Raises:
        SpecError: the refusal, where no change helps.
    """
    for change in GIVEN_UP:
        tried = changed(case, settings, change, refusal)
        if tried is None:
            continue
        try:
            case.free_plan(tried)
        except SpecError as error:
            if reason(error) == reason(refusal):
                continue
        return tried
    raise refusal


def _enough_text(case: Case, settings: Settings, text: Path | None) -> Settings:
    """Windows for twice the tokens below which corrections overfit, as far as the text goes."""
    each = case.free_plan(settings).tokens_per_neuron
    given = settings["calibration.samples"].value
    usual = settings["calibration.sequence_length"]
    wanted = max(given, _windows(given * usual.value / each, usual.value))
    why = (
        f"windows: {wanted * each / given:.0f} tokens per FFN channel; below {FEW_TOKENS}"
        " corrections overfit, more is better for long"
    )
    length, there = usual, _tokens(case, text) if text else None
    # windows for each one of the text: the model's own come beside them
    each_gives = sum(case.job(settings).calibration.weights)
    if there is not None and each_gives * there < wanted * usual.value:
        while length.value > SHORTEST and each_gives * there < LEAST_WINDOWS["cpu"] * length.value:
            length = Setting(length.value // 2, "tokens of a window: the text is short")
        enough = math.ceil(wanted * usual.value / each_gives)
        why = f"windows: all that the text has; {enough:,} tokens would be enough"
        wanted = max(2, int(there // length.value * each_gives))
    settings = settings | {
        "calibration.samples": Setting(wanted, why),
        "calibration.sequence_length": length,
    }
    if wanted < SHARDS:
        settings["calibration.shards"] = Setting(wanted)
    return settings


def _in_shards(windows: float) -> int:
    return math.ceil(windows / SHARDS) * SHARDS


def _windows(channels: float, length: int) -> int:
    """Windows with enough tokens for so many channels, in whole shards."""
    return math.ceil(channels * TOKENS_PER_CHANNEL / length / SHARDS) * SHARDS


def _tokens(case: Case, text: Path) -> int | None:
    """Tokens of a short text; None: it is long, or its tokens cannot be counted here."""
    encode = fast_encoder(case.checkpoint.path) if case.checkpoint.has_weights else None
    _, facts = check_text(TextSpec(path=os.fspath(text)), encode)
    return facts.tokens if facts.complete else None
