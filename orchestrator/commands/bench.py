"""The command `bench`: models, or those of a run, measured side by side."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rayprune.orchestrator.reporting.speeds import Speeds, speed_parts
from rayprune.specs.errors import SpecError


def device_arguments(command: Any, dtype: str | None) -> None:
    """Where, and in which type, something is measured."""
    command.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where it is measured"
    )
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default=dtype,
        help=f"of the computation; default: {dtype or 'bfloat16 on a GPU, float32 on a CPU'}",
    )


def add(commands: Any) -> None:
    """Add it to the command line."""
    bench = commands.add_parser(
        "bench", help="measure models side by side in transformers, in turns"
    )
    bench.add_argument(
        "models", type=Path, nargs="*", metavar="MODEL", help="model folder; the first is the base"
    )
    bench.add_argument(
        "--run",
        type=Path,
        help="instead: the dense and the pruned model of a finished run; report and card tell it",
    )
    bench.add_argument("--tokens", type=int, default=512, help="tokens of the prompt")
    bench.add_argument("--new", type=int, default=32, help="tokens that are written behind it")
    bench.add_argument("--rounds", type=int, default=5, help="measurements of each, in turns")
    bench.add_argument("--threads", type=int, help="CPU threads; default: as torch chooses")
    bench.add_argument(
        "--price", type=float, help="of an hour of the machine: adds what a million tokens cost"
    )
    device_arguments(bench, "float32")
    bench.set_defaults(command=_bench)


def _bench(options: argparse.Namespace) -> None:
    from rayprune.orchestrator.reporting.progress import print_parts

    if bool(options.models) == bool(options.run):
        raise SpecError("bench: name models, or a finished run with --run, one of the two")
    if options.price is not None and not options.price > 0:
        raise SpecError(f"--price {options.price:g}: must be above 0")
    if options.run:
        from rayprune.orchestrator.benched import models_of, record

        found = measured(models_of(options.run), options)
        print_parts(speed_parts(found))
        record(options.run, found)
    else:
        print_parts(speed_parts(measured(named(options.models), options)))


def named(models: Sequence[Path]) -> dict[str, Path]:
    """Models by the ends of their paths: two parts, or as many as tell them apart.

    Raises:
        SpecError: one is given twice.
    """
    parts = [model.absolute().parts for model in models]
    if twice := [model for model in models if parts.count(model.absolute().parts) > 1]:
        raise SpecError(f"{twice[0]}: is named twice; give every model once")
    length = 2
    while len({each[-length:] for each in parts}) < len(parts):
        length += 1
    return {str(Path(*each[-length:])): model for each, model in zip(parts, models, strict=True)}


def measured(models: Mapping[str, Path], options: argparse.Namespace) -> Speeds:
    """What models take, by their names."""
    from rayprune.workers.machine.device import device_of
    from rayprune.workers.tools.bench import Conditions, bench
    from rayprune.workers.tools.timing import chosen_threads, versions, where

    o, device = options, device_of(options.device)
    threads = chosen_threads(o.threads)
    wanted = Conditions(o.tokens, o.new, o.rounds, threads, o.dtype, device.type)
    found = [asdict(speed) for speed in bench(list(models.values()), wanted)]
    return Speeds.model_validate(
        {
            "machine": where(device, threads),
            "device": device.type,
            "dtype": o.dtype,
            "versions": versions(),
            "tokens": o.tokens,
            "new": o.new,
            "rounds": o.rounds,
            "price_per_hour": o.price,
            "models": [{"name": name, **speed} for name, speed in zip(models, found, strict=True)],
        }
    )
