"""Commands about jobs: run, submit, plan, validate, sweep, schema."""

import argparse
import json
from pathlib import Path
from typing import Any

import rayprune
from rayprune.orchestrator.reporting.events import Event
from rayprune.specs.job import JobSpec
from rayprune.specs.machine import PROFILES
from rayprune.specs.schema import job_schema_text


def add(commands: Any) -> None:
    """Add them to the command line."""
    run = _run_command(
        commands, "run", _run, "run a job, or go on where an earlier attempt stopped"
    )
    shown = run.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="show no progress, the result alone")
    shown.add_argument(
        "--json",
        action="store_true",
        help="print every event, and at last the report (event `report`), as a line of JSON",
    )
    submit = _run_command(
        commands, "submit", _submit, "run a job on a Ray cluster, from outside it"
    )
    submit.set_defaults(ends_with_its_reader=False)
    submit.add_argument(
        "--address", required=True, metavar="http://HOST:8265", help="the cluster's dashboard"
    )
    submit.add_argument(
        "--no-wait", action="store_true", help="return as soon as the cluster has the job"
    )
    _sweep_command(commands)
    plan = _job_command(
        commands,
        "plan",
        _plan,
        "show what a job will do and what it takes, from the model's config or headers alone",
    )
    plan.add_argument(
        "--profile",
        metavar="NAME|FILE",
        help="machine the times are for: " + ", ".join(PROFILES) + ", or a YAML file",
    )
    validate = _job_command(
        commands, "validate", _validate, "check a job, its model and its texts, before any work"
    )
    validate.add_argument("--out", type=Path, help="run folder whose disk is checked too")
    validate.add_argument(
        "--deep", action="store_true", help="tokenise all texts too, with the model's tokenizer"
    )
    schema = commands.add_parser("schema", help="print the JSON schema of job files")
    schema.set_defaults(command=lambda _: print(job_schema_text(), end=""))


def _job_command(commands: Any, name: str, command: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.add_argument("job", type=Path, metavar="JOB.yaml", help="job file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        dest="overrides",
        help="override a field; may be repeated",
    )
    parser.set_defaults(command=command)
    return parser


def _run_command(commands: Any, name: str, command: Any, text: str) -> argparse.ArgumentParser:
    parser = _job_command(commands, name, command, text)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="run folder: tasks, model/ and report.json; on a cluster, an absolute path that every"
        " node sees",
    )
    parser.add_argument(
        "--redo",
        choices=["stale"],
        help="do again what other package versions or another kind of device has made",
    )
    parser.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="folder of finished tasks by what they are made from, shared by runs",
    )
    return parser


def _sweep_command(commands: Any) -> None:
    sweep = _job_command(
        commands, "sweep", _sweep, "run a job at several settings, and compare what comes of them"
    )
    sweep.add_argument("--out", type=Path, required=True, help="folder of the runs and sweep.html")
    sweep.add_argument(
        "--within",
        type=float,
        default=1.2,
        metavar="RATIO",
        help="recommend the smallest model of at most so many times the dense one's perplexity",
    )


def _load(options: argparse.Namespace) -> JobSpec:
    return rayprune.load_job(options.job, options.overrides)


def _run(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.reporting.progress import print_parts
    from rayprune.orchestrator.reporting.report import summary

    report = rayprune.run(
        _load(options),
        options.out,
        progress=_print_json if options.json else not options.quiet,
        redo_stale=options.redo == "stale",
        store=options.store,
    )
    if options.json:
        _print_json(Event("report", report.to_dict()))
    else:
        print_parts(summary(report))


def _print_json(event: Event) -> None:
    print(json.dumps({"event": event.name, **event.fields}), flush=True)


def _submit(options: argparse.Namespace) -> int:
    from rayprune.orchestrator.execution.submit import submit

    return submit(
        _load(options),
        options.out,
        options.address,
        not options.no_wait,
        redo=options.redo,
        store=options.store,
    )


def _sweep(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.points import points_of, summary, sweep
    from rayprune.orchestrator.reporting.progress import print_parts

    points = points_of(options.job, options.overrides, options.out)
    runs = sweep(points, options.out, options.within, True, lambda words: print(words, flush=True))
    print_parts(summary(runs, options.out, options.within))


def _plan(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.reporting.plan_view import print_plan

    print_plan(rayprune.plan(_load(options), options.profile))


def _validate(options: argparse.Namespace) -> None:
    for warning in rayprune.validate(_load(options), options.out, options.deep):
        print(f"warning: {warning}")
    print(f"{options.job}: valid")
