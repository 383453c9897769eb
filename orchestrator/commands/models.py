"""Commands about models and machines, without a job: inspect, profile, latency,
generate.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rayprune.orchestrator.commands import bench
from rayprune.orchestrator.commands.bench import device_arguments
from rayprune.specs.machine import profile_text

PHASES = ("prefill", "decode")


def add(commands: Any) -> None:
    """Add them to the command line."""
    inspect = commands.add_parser(
        "inspect", help="show what a model folder holds and what can go of it, from headers alone"
    )
    inspect.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    inspect.set_defaults(command=_inspect)
    profile = commands.add_parser(
        "profile", help="measure this machine; prints a profile for `plan --profile`"
    )
    profile.set_defaults(command=_profile)
    _latency_command(commands)
    bench.add(commands)
    _generate_command(commands)


def _latency_command(commands: Any) -> None:
    latency = commands.add_parser(
        "latency", help="measure a model's layers by size; prints a table for budget.latency_table"
    )
    latency.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    latency.add_argument(
        "--phase", nargs="+", choices=PHASES, default=PHASES, help="reading prompts, writing tokens"
    )
    latency.add_argument(
        "--batch", type=int, nargs="+", default=[1], help="sequences that are computed together"
    )
    latency.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[512],
        help="of each: of the prompt, or before the token that is written",
    )
    latency.add_argument("--threads", type=int, help="CPU threads; default: as torch chooses")
    device_arguments(latency, None)
    latency.set_defaults(command=_latency)


def _generate_command(commands: Any) -> None:
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


def _inspect(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.planning.inspection import inspect
    from rayprune.orchestrator.reporting.inspection_view import inspection_parts
    from rayprune.orchestrator.reporting.progress import print_parts

    print_parts(inspection_parts(inspect(options.model)))


def _profile(options: argparse.Namespace) -> None:
    from rayprune.workers.tools.profile import measure

    del options
    print(profile_text(measure()), end="")


def _latency(options: argparse.Namespace) -> None:
    from rayprune.specs.latency import latency_text
    from rayprune.workers.tools.latency import Wanted, measure_latency

    o = options
    wanted = Wanted(o.phase, o.batch, o.tokens, o.threads, o.device, o.dtype)
    print(latency_text(measure_latency(o.model, wanted)), end="")


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
