"""A proposed job as a file with comments, and what it will take in a few lines."""

import os
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rayprune.orchestrator.planning.case import Setting
from rayprune.orchestrator.planning.preflight import check_packages
from rayprune.orchestrator.planning.proposal import Proposal
from rayprune.orchestrator.planning.worker_memory import gib
from rayprune.orchestrator.reporting.plan_view import duration
from rayprune.specs.core_yaml import CoreDumper
from rayprune.specs.errors import ResourceError
from rayprune.specs.job import JobSpec
from rayprune.specs.recipe import given_by, recipe
from rayprune.specs.schema import SCHEMA_FILE
from rayprune.workers.machine.host import Host

WIDTH = 100
_EVALUATION = """
# evaluation: # perplexity before and after, on a text that is not used above
#   path: held_out.txt
"""


def job_text(proposal: Proposal, file: Path) -> str:
    """The job as YAML that `load_job` reads: sections in their usual order, a reason behind or
    above a value.
    """
    model = proposal.plan.model
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# {model.model_type}, {model.num_layers} layers, {model.parameters:,} parameters;"
        f" {_machine(proposal.host)}",
        *_commands(file.name),
        "",
        *_recipe(proposal),
    ]
    sections = _sections(_from_there(proposal.settings, file.parent))
    for name in JobSpec.model_fields:
        if name in sections and name != "recipe":
            lines += ["", *_section(name, sections[name])]
    return "\n".join(lines) + "\n" + ("" if "evaluation" in sections else _EVALUATION)


def _machine(host: Host) -> str:
    gpus = f"{len(host.gpus)} x {host.gpus[0].name}" if host.gpus else "no GPU"
    if host.profile:
        return gpus if host.gpus else f"{host.cores} x {host.profile.name}"
    return f"{host.cores} cores, {gib(host.memory_bytes)}, {gpus}"


def _from_there(settings: dict[str, Setting], folder: Path) -> dict[str, Setting]:
    """The settings with relative paths from the file's folder in place of the current one."""
    placed = dict(settings)
    for field in ("model.path", "calibration.path", "evaluation.path"):
        if field not in settings:
            continue
        value, why = settings[field].value, settings[field].why
        if not os.path.isabs(value) and os.path.exists(value):
            placed[field] = Setting(os.path.relpath(value, folder), why)
    return placed


def _commands(name: str) -> Iterator[str]:
    name = shlex.quote(name)
    told = {
        f"rayprune plan {name}": "what it will take",
        f"rayprune run {name} --out runs/one": "do it; the same command goes on after a stop",
        f"rayprune explain {name}": "where every value comes from",
    }
    for command, what in told.items():
        yield f"#   {command:<{max(map(len, told))}}  {what}"


def _recipe(proposal: Proposal) -> Iterator[str]:
    name = proposal.job.recipe
    assert name is not None
    yield from _comment(recipe(name).about, "")
    yield f"recipe: {name}"


def _sections(settings: dict[str, Setting]) -> dict[str, Setting | dict[str, Setting]]:
    found: dict[str, Any] = {}
    for field, setting in settings.items():
        section, _, name = field.partition(".")
        if name:
            found.setdefault(section, {})[name] = setting
        else:
            found[section] = setting
    return found


def _section(name: str, content: Setting | dict[str, Setting]) -> Iterator[str]:
    if isinstance(content, Setting):
        yield from _line(name, content, "")
        return
    yield f"{name}:"
    for field, setting in content.items():
        yield from _line(field, setting, "  ")


def _line(name: str, setting: Setting, indent: str) -> Iterator[str]:
    """The value, its reason behind it where there is room, else above."""
    line = f"{indent}{name}: {_yaml(setting.value)}"
    why = " ".join(setting.why.split())
    if not why:
        yield line
    elif len(line) + len(why) + 3 <= WIDTH:
        yield f"{line} # {why}"
    else:
        yield from _comment(why, indent)
        yield line


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=mark, subsequent_indent=mark)


def _yaml(value: Any) -> str:
    text: str = yaml.dump(
        value, Dumper=CoreDumper, default_flow_style=True, allow_unicode=True, width=2**31
    )
    return text.removesuffix("...\n").strip()


def _set_aside(proposal: Proposal) -> Iterator[str]:
    """What of the recipe the job does not take, and why."""
    name = proposal.job.recipe
    assert name is not None
    given = [line.partition(":")[0] for line in given_by(recipe(name))]
    for field, setting in proposal.settings.items():
        if any(each == field or each.startswith(f"{field}.") for each in given):
            why = " ".join(setting.why.split())
            yield f"not as the recipe has it: {field}: {_yaml(setting.value)} ({why})"


def taken(proposal: Proposal, file: Path) -> Iterator[str]:
    """What a proposed job will take, in lines."""
    plan = proposal.plan
    yield f"wrote {os.fspath(file)}: recipe {proposal.job.recipe}"
    yield from _set_aside(proposal)
    sizes = sorted({shape.parameters for shape in plan.shapes})
    open_yet = f" to {sizes[-1]:,}, by the shape that a probe picks," if len(sizes) > 1 else ""
    yield f"keeps {sizes[0]:,}{open_yet} of {plan.model.parameters:,} parameters"
    yield (
        f"takes {plan.workers} worker{'s' if plan.workers > 1 else ''} ({plan.device}), about"
        f" {gib(plan.needs.worker_memory_bytes)} of {gib(plan.needs.memory_limit_bytes or 0)} each"
    )
    if plan.seconds is not None:
        yield f"takes at least {duration(plan.seconds)} on {plan.machine}, beside the start"
    yield f"writes at most {plan.output_bytes / 2**20:,.0f} MiB"
    for warning in (*plan.fallbacks, *plan.warnings):
        yield f"warning: {warning}"
    try:
        check_packages(proposal.job)
    except ResourceError as error:
        yield f"before a run: {error}"
    if proposal.job.evaluation is None:
        yield "measures no quality: --held-out FILE gives a text for that"
    if proposal.text_is_missing:
        text = file.parent / proposal.settings["calibration.path"].value
        yield f"first put a text of the kind that the model will read into {text}"
