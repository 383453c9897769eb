"""The command line. Heavy imports wait until a command needs them: help, validate, schema and plan
import neither torch nor ray.
"""

import argparse
import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rayprune
from rayprune.specs.errors import INTERRUPTED, RaypruneError, SpecError, printable
from rayprune.specs.job import JobSpec
from rayprune.specs.machine import PROFILES, profile_text
from rayprune.specs.schema import job_schema_text
from rayprune.workers.machine.shortage import explained

RESEND_SECONDS = 0.1
MEMORY_ADVICE = "free some, or lower what the job asks for; finished tasks are kept"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 ok, 2 spec, 3 model, 4 resources, 5 verification,
    130 interrupted.
    """
    _open_standard_streams()
    options = _parser().parse_args(arguments)
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, _interrupt)
        sys.unraisablehook = _unraisable
    with suppress(OSError, ValueError):  # where the stream is no file
        faulthandler.enable()  # a mapped file that is cut off ends the process: say where
    try:
        code: int = options.command(options) or 0
        sys.stdout.flush()
        return code
    except BaseException as error:  # the process boundary
        if options.command is not _submit and _reader_is_gone(error):
            return 0
        return _exit_code(error)


def _exit_code(error: BaseException) -> int:
    """Tell what has ended a command, by what lies behind it; the exit code."""
    if isinstance(error, SystemExit):
        raise error
    found = explained(error, "", MEMORY_ADVICE)
    if isinstance(found, KeyboardInterrupt):
        return _told("interrupted; run the same command again to go on", INTERRUPTED)
    if isinstance(found, RaypruneError):
        return _told(str(found), found.exit_code)
    if isinstance(error, OSError) and error.filename is not None:
        place = printable(os.fsdecode(error.filename))
        return _told(f"{place}: {error.strerror}; finished tasks are kept", SpecError.exit_code)
    with suppress(OSError):
        traceback.print_exception(error)  # a bug, shown in full
    return 1


def _told(words: str, code: int) -> int:
    """Say why a command ends, to whoever still listens; the exit code."""
    with suppress(OSError):
        print(f"rayprune: {words}", file=sys.stderr, flush=True)
    return code


def _open_standard_streams() -> None:
    """Let a stream that the caller has closed lead nowhere: else the next file that is opened would
    get its number, and what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _reader_is_gone(error: BaseException) -> bool:
    """Whether whoever read the output has stopped, as `head` does: then there is no more to do."""
    from rayprune.orchestrator.reporting.progress import write_nowhere

    if not isinstance(error, BrokenPipeError):
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        write_nowhere()
        return True
    return False


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _unraisable(ignored: "sys.UnraisableHookArgs") -> None:
    """An interrupt that struck inside a finalizer is lost to the command: Python drops what these
    raise. Interrupt it again.
    """
    if isinstance(ignored.exc_value, KeyboardInterrupt):
        threading.Timer(RESEND_SECONDS, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(ignored)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayprune", description="Prune large language models, layer by layer, on Ray."
    )
    parser.add_argument("--version", action="version", version=f"rayprune {rayprune.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _run_command(commands, "run", _run, "run a job, or go on where an earlier attempt stopped")
    submit = _run_command(
        commands, "submit", _submit, "run a job on a Ray cluster, from outside it"
    )
    submit.add_argument(
        "--address", required=True, metavar="http://HOST:8265", help="the cluster's dashboard"
    )
    submit.add_argument(
        "--no-wait", action="store_true", help="return as soon as the cluster has the job"
    )
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
    profile = commands.add_parser(
        "profile", help="measure this machine; prints a profile for `plan --profile`"
    )
    profile.set_defaults(command=_profile)
    latency = commands.add_parser(
        "latency", help="measure a model's layers by size; prints a table for budget.latency_table"
    )
    latency.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    latency.add_argument(
        "--batch", type=int, default=1, help="sequences that are computed together"
    )
    latency.add_argument(
        "--tokens",
        type=int,
        default=512,
        help="tokens of each; 1: a step of decoding, without earlier tokens",
    )
    latency.add_argument("--threads", type=int, help="CPU threads; default: as torch chooses")
    latency.set_defaults(command=_latency)
    bench = commands.add_parser(
        "bench", help="measure models side by side in transformers on the CPU, in turns"
    )
    bench.add_argument(
        "models", type=Path, nargs="+", metavar="MODEL", help="model folder; the first is the base"
    )
    bench.add_argument("--tokens", type=int, default=512, help="tokens of the prompt")
    bench.add_argument("--new", type=int, default=32, help="tokens that are written behind it")
    bench.add_argument("--rounds", type=int, default=5, help="measurements of each, in turns")
    bench.add_argument("--threads", type=int, default=1, help="CPU threads")
    bench.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation"
    )
    bench.set_defaults(command=_bench)
    generate = commands.add_parser(
        "generate", help="let a model write text, as JSON Lines, for calibration.mix"
    )
    generate.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    generate.add_argument("--tokens", type=int, default=65536, help="tokens in all, at least")
    generate.add_argument("--length", type=int, default=512, help="tokens of a document")
    generate.add_argument(
        "--batch", type=int, default=16, help="documents that are written together"
    )
    generate.add_argument("--temperature", type=float, default=1.0, help="of the samples")
    generate.add_argument("--seed", type=int, default=0, help="of the samples")
    generate.add_argument(
        "--prompts",
        type=Path,
        metavar="TEXT",
        help="text whose parts the documents go on from; default: from nothing",
    )
    generate.set_defaults(command=_generate)
    validate = _job_command(
        commands, "validate", _validate, "check a job, its model and its texts, before any work"
    )
    validate.add_argument("--out", type=Path, help="run folder whose disk is checked too")
    validate.add_argument(
        "--deep", action="store_true", help="tokenise all texts too, with the model's tokenizer"
    )
    schema = commands.add_parser("schema", help="print the JSON schema of job files")
    schema.set_defaults(command=lambda _: print(job_schema_text(), end=""))
    for name, command, text in (
        ("report", _report, "show the report of a run"),
        ("verify", _verify, "check a run's files and that its model loads"),
    ):
        parser_of_run = commands.add_parser(name, help=text)
        parser_of_run.add_argument("run", type=Path, metavar="RUN", help="run folder")
        parser_of_run.set_defaults(command=command)
    verify = parser_of_run
    verify.add_argument(
        "--engine",
        choices=["transformers", "llama.cpp", "vllm"],
        help="let this engine go on with texts, and compare its tokens with transformers' in"
        " float32",
    )
    return parser


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


def _load(options: argparse.Namespace) -> JobSpec:
    return rayprune.load_job(options.job, options.overrides)


def _run(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.reporting.progress import print_parts
    from rayprune.orchestrator.reporting.report import summary

    print_parts(
        summary(
            rayprune.run(
                _load(options),
                options.out,
                progress=True,
                redo_stale=options.redo == "stale",
                store=options.store,
            )
        )
    )


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


def _plan(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.reporting.plan_view import print_plan

    print_plan(rayprune.plan(_load(options), options.profile))


def _profile(options: argparse.Namespace) -> None:
    from rayprune.workers.tools.profile import measure

    del options
    print(profile_text(measure()), end="")


def _latency(options: argparse.Namespace) -> None:
    from rayprune.specs.latency import latency_text
    from rayprune.workers.tools.latency import measure_latency

    print(
        latency_text(
            measure_latency(options.model, options.batch, options.tokens, options.threads)
        ),
        end="",
    )


def _bench(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.reporting.progress import print_parts
    from rayprune.orchestrator.reporting.speed_view import speed_table
    from rayprune.workers.tools.bench import bench

    wanted = (options.tokens, options.new, options.rounds, options.threads, options.dtype)
    print_parts([speed_table([asdict(found) for found in bench(options.models, *wanted)])])


def _generate(options: argparse.Namespace) -> None:
    from rayprune.workers.tools.generate import generate

    wanted = {
        name: getattr(options, name)
        for name in ("model", "tokens", "length", "batch", "temperature", "seed", "prompts")
    }
    about = -(-options.tokens // max(1, options.length))
    for number, text in enumerate(generate(**wanted), 1):
        print(json.dumps({"text": text}), flush=True)
        if number % max(1, options.batch) == 0:
            print(f"rayprune: {number} of about {about} documents", file=sys.stderr, flush=True)


def _validate(options: argparse.Namespace) -> None:
    for warning in rayprune.validate(_load(options), options.out, options.deep):
        print(f"warning: {warning}")
    print(f"{options.job}: valid")


def _report(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.reporting.progress import print_parts
    from rayprune.orchestrator.reporting.report import layer_table, summary

    report = rayprune.read_report(options.run)
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


if __name__ == "__main__":
    sys.exit(main())
