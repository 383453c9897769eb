"""Commands about models and machines, without a job: inspect, profile, latency,
generate.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rayprune
from rayprune.orchestrator.commands import bench
from rayprune.orchestrator.commands.bench import device_arguments
from rayprune.orchestrator.reporting.events import Event
from rayprune.specs.errors import SpecError
from rayprune.specs.machine import profile_text
from rayprune.workers.machine.output import print_on
from rayprune.workers.store.layout import OWN_FILE, task_folder

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
        "--batch", type=int, default=32, help="documents that are written together"
    )
    generate.add_argument("--temperature", type=float, default=1.0, help="of the samples")
    generate.add_argument("--seed", type=int, default=0, help="of the samples")
    begin = generate.add_mutually_exclusive_group()
    begin.add_argument(
        "--prompts",
        type=Path,
        metavar="TEXT",
        help="text whose parts the documents go on from; default: from nothing",
    )
    begin.add_argument(
        "--chat", action="store_true", help="write chats, both sides, by the model's own template"
    )
    generate.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the computation; auto: the model's own on a GPU, float32 on a CPU",
    )
    generate.add_argument(
        "--engine",
        choices=["transformers", "vllm"],
        default="transformers",
        help="what computes; vllm: where it is installed",
    )
    generate.add_argument(
        "--workers", type=int, default=1, help="with several, each has the whole model"
    )
    generate.add_argument(
        "--out",
        type=Path,
        metavar="RUN",
        help="run folder that keeps what is written: the same command goes on in it",
    )
    generate.set_defaults(command=_generate, keeps_tasks=True)


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
    from rayprune.orchestrator.reporting.progress import watched
    from rayprune.specs.latency import latency_text
    from rayprune.workers.tools.latency import Wanted, measure_latency

    o = options
    wanted = Wanted(o.phase, o.batch, o.tokens, o.threads, o.device, o.dtype)
    print(latency_text(measure_latency(o.model, wanted, watched)), end="")


def _generate(options: argparse.Namespace) -> None:
    if min(options.tokens, options.length) < 8 or options.batch < 1 or options.temperature <= 0:
        raise SpecError(
            "--tokens and --length must be at least 8, --batch at least 1, --temperature above 0"
        )
    own = {name: getattr(options, name) for name in ("tokens", "length", "engine", "batch", "seed")}
    own |= {"temperature": options.temperature, "prompts": "chat" if options.chat else "none"}
    own |= {"prompts": "calibration"} if options.prompts else {}
    job: dict[str, Any] = {
        "model": {"path": options.model, "dtype": options.dtype},
        # of a job that goes no further: none of it is read but for prompts
        "calibration": {
            "path": options.prompts or options.model,
            "samples": (shards := max(2, options.workers)),
            "shards": shards,
            "sequence_length": 8,
            "own": own,
        },
        "budget": {"kv_groups": 1},
        "parallel": {"workers": options.workers},
        "cluster": {"executor": "in-process" if options.workers == 1 else "ray"},
    }
    with TemporaryDirectory(prefix="rayprune-") as folder:
        out = options.out or Path(folder)
        rayprune.generate(job, out, partial(_print_written, out))


def _print_written(out: Path, event: Event) -> None:
    """What is written, once it is; how far that goes, to standard error."""
    if event.name != "text-written":
        return
    print(f"rayprune: {event}", file=sys.stderr, flush=True)
    for name in event.fields["tasks"]:
        text = (task_folder(out, name) / OWN_FILE).read_text(encoding="utf-8")
        print_on(text, end="")
