"""Commands about jobs: demo, init, run, submit, sweep, plan, explain, validate, schema."""

import argparse
import json
from pathlib import Path
from typing import Any

import rayprune
from rayprune.orchestrator.reporting.events import Event
from rayprune.specs.budget import DEFAULT_SPARSITY
from rayprune.specs.errors import SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import read_job
from rayprune.specs.machine import PROFILES
from rayprune.specs.recipe import RECIPES
from rayprune.specs.schema import job_schema_text
from rayprune.workers.machine.output import print_on


def add(commands: Any) -> None:
    """Add them to the command line."""
    demo = commands.add_parser("demo", help="prune SmolLM2-135M, which is fetched, in some minutes")
    demo.add_argument(
        "--out", type=Path, default=Path("rayprune-demo"), help="folder of all that it makes"
    )
    demo.set_defaults(command=_demo, keeps_tasks=True)
    _init_command(commands)
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
    explained = _job_command(
        commands, "explain", _explain, "show where every value of a job comes from"
    )
    explained.add_argument("--all", action="store_true", help="show defaults too")
    validate = _job_command(
        commands, "validate", _validate, "check a job, its model and its texts, before any work"
    )
    validate.add_argument("--out", type=Path, help="run folder whose disk is checked too")
    validate.add_argument(
        "--deep", action="store_true", help="tokenise all texts too, with the model's tokenizer"
    )
    schema = commands.add_parser("schema", help="print the JSON schema of job files")
    schema.set_defaults(command=lambda _: print(job_schema_text(), end=""))


def _init_command(commands: Any) -> None:
    init = commands.add_parser("init", help="write a job for a model and a machine")
    init.add_argument("model", metavar="MODEL", help="model folder, or OWNER/NAME on the Hub")
    init.add_argument("--text", type=Path, metavar="FILE", help="text to calibrate on")
    init.add_argument(
        "--held-out", type=Path, metavar="FILE", help="another text to measure the result on"
    )
    init.add_argument("--aim", choices=RECIPES, default="fast", help="the recipe; default: fast")
    init.add_argument(
        "--sparsity", type=float, default=DEFAULT_SPARSITY, help="part of the decoder that goes"
    )
    init.add_argument(
        "--profile", metavar="NAME|FILE", help="for machines like this, not for the one it runs on"
    )
    init.add_argument(
        "--workers", type=int, metavar="N", help="with --profile: how many of them; default: 1"
    )
    init.add_argument("--out", type=Path, default=Path("job.yaml"), help="job file to write")
    init.set_defaults(command=_init)


def _job_command(
    commands: Any,
    name: str,
    command: Any,
    text: str,
    overrides: str = "override a field; may be repeated",
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.add_argument("job", type=Path, metavar="JOB.yaml", help="job file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help=overrides
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
    parser.set_defaults(keeps_tasks=True)
    return parser


def _sweep_command(commands: Any) -> None:
    sweep = _job_command(
        commands,
        "sweep",
        _sweep,
        "run a job at several settings, and compare what comes of them",
        "values of a field, with commas between them: budget.sparsity=0.1,0.2; repeated, every"
        " combination is a point",
    )
    sweep.set_defaults(keeps_tasks=True)
    sweep.add_argument("--out", type=Path, required=True, help="folder of the runs and sweep.html")
    sweep.add_argument(
        "--within",
        type=float,
        default=1.2,
        metavar="RATIO",
        help="recommend the smallest model of at most so many times the dense one's perplexity",
    )


def _demo(options: argparse.Namespace) -> None:
    from rayprune.workers.tools.demo import prepare, prepare_job

    for line in prepare(options.out):
        print(line, flush=True)
    job, out = prepare_job(options.out), options.out / "run"
    print(f"rayprune run {job} --out {out}", flush=True)
    _show_result(rayprune.run(rayprune.load_job(job), out, progress=True))


def _init(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.entry import propose_job
    from rayprune.orchestrator.reporting.job_file import job_text, taken
    from rayprune.orchestrator.reporting.progress import print_parts
    from rayprune.specs.machine import load_profile
    from rayprune.workers.machine.host import this_host, workers_like
    from rayprune.workers.store.files import write_text

    if options.out.exists():
        raise SpecError(f"{options.out}: is there already; remove it, or choose another --out")
    if options.workers is not None and (options.workers < 1 or not options.profile):
        raise SpecError("--workers: at least 1, and with --profile, whose machines it counts")
    host = (
        workers_like(load_profile(options.profile), options.workers or 1)
        if options.profile
        else this_host()
    )
    found = propose_job(
        options.model, host, options.aim, options.text, options.sparsity, options.held_out
    )
    write_text(options.out, job_text(found, options.out))
    print_parts(taken(found, options.out))


def _load(options: argparse.Namespace) -> JobSpec:
    return rayprune.load_job(options.job, options.overrides)


def _run(options: argparse.Namespace) -> None:
    """Run a job and show what came of it."""
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
        _show_result(report)


def _show_result(report: "rayprune.Report") -> None:
    from rayprune.orchestrator.reporting.progress import print_parts
    from rayprune.orchestrator.reporting.report import summary

    print_parts(summary(report))


def _print_json(event: Event) -> None:
    print_on(json.dumps({"event": event.name, **event.fields}))


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
    from rayprune.orchestrator.reporting.job_view import recipe_parts
    from rayprune.orchestrator.reporting.plan_view import print_plan
    from rayprune.orchestrator.reporting.progress import print_parts

    job, said = read_job(options.job, options.overrides)
    plan = rayprune.plan(job, options.profile)
    print_parts(recipe_parts(job, said))
    print_plan(plan)


def _explain(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.reporting.job_view import origin_parts
    from rayprune.orchestrator.reporting.progress import print_parts

    job, said = read_job(options.job, options.overrides)
    print_parts(origin_parts(job, said, options.all))


def _validate(options: argparse.Namespace) -> None:
    for warning in rayprune.validate(_load(options), options.out, options.deep):
        print(f"warning: {warning}")
    print(f"{options.job}: valid")
