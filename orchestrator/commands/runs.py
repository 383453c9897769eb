"""Commands about finished runs: report, verify, compare, push, track."""

import argparse
import json
from pathlib import Path
from typing import Any

import rayprune
from rayprune.specs.errors import SpecError


def add(commands: Any) -> None:
    """Add them to the command line."""
    report = _run_command(commands, "report", _report, "show the report of a run")
    report.add_argument("--json", action="store_true", help="print it as JSON")
    verify = _run_command(
        commands, "verify", _verify, "check a run's files and that its model loads"
    )
    verify.add_argument(
        "--engine",
        choices=["transformers", "ctranslate2", "llama.cpp", "vllm"],
        help="let this engine go on with texts, and compare its tokens with transformers' in"
        " float32",
    )
    compare = commands.add_parser("compare", help="show runs side by side")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    compare.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")
    compare.set_defaults(command=_compare)
    track = _run_command(commands, "track", _track, "copy a run's numbers to a tracker")
    track.add_argument(
        "--to", choices=["tensorboard", "mlflow", "wandb", "trackio"], required=True, help="tracker"
    )
    track.add_argument(
        "--at",
        metavar="PLACE",
        help="folder for TensorBoard and W&B, tracking URI of MLflow, project of trackio",
    )
    push = _run_command(commands, "push", _push, "send a run's model to the Hugging Face Hub")
    push.add_argument("repo", metavar="OWNER/NAME", help="repository on the Hub")
    push.add_argument("--public", action="store_true", help="make it public; default: private")
    push.add_argument("--dry-run", action="store_true", help="show what would be sent")


def _run_command(commands: Any, name: str, command: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.set_defaults(command=command)
    return parser


def _report(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.reporting.progress import print_parts
    from rayprune.orchestrator.reporting.report import layer_table, summary

    report = rayprune.read_report(options.run)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    print_parts([layer_table(report), *summary(report)])


def _verify(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.execution.verify import verify_run

    tasks = verify_run(options.run)
    from rayprune.workers.network.load_check import check_loads

    report = rayprune.read_report(options.run)
    check_loads(report.pruned_model, report.parameters.after)
    print(f"{options.run}: {len(tasks)} tasks agree with their records, the model loads")
    if options.engine:
        from rayprune.workers.engines.agreement import compare_run, described

        targets = report.models.exports
        for found in compare_run(options.engine, options.run, report.model, targets):
            print(described(options.engine, found))


def _compare(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.reporting.comparison import Compared, comparison
    from rayprune.orchestrator.reporting.comparison_page import comparison_page
    from rayprune.orchestrator.reporting.progress import print_parts
    from rayprune.workers.store.files import write_text

    if len(options.runs) < 2:
        raise SpecError(f"{options.runs[0]}: the only run; name two or more to compare")
    if options.html and options.html.is_dir():
        raise SpecError(f"{options.html}: is a folder; name a file")
    runs = [Compared(str(run), rayprune.read_report(run)) for run in options.runs]
    print_parts(comparison(runs))
    if options.html:
        title, lead = "Runs side by side", f"{len(runs)} runs."
        write_text(options.html, comparison_page(title, lead, runs, options.html.parent))


def _track(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.tracking import track

    print(f"{track(options.run, options.to, options.at)} numbers are in {options.to}")


def _push(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.publish import push, upload_of

    upload = upload_of(options.run, options.repo)
    for name, size in upload.files.items():
        print(f"{size / 2**20:10.2f} MiB  {name}")
    total = f"{sum(upload.files.values()) / 2**20:,.2f} MiB in {len(upload.files)} files"
    if options.dry_run:
        print(f"{total} would go to {upload.repo}; nothing was sent")
    else:
        print(f"{total} are at {push(upload, options.public)}")
