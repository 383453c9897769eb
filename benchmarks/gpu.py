"""What is to be measured on one GPU that is at hand for minutes only, without Ray or a network;
the most important comes first.

    python -m benchmarks.gpu --minutes 9 --folder /data

The parts, by name:

    tests        pytest tests/gpu
    sweep-4      a sweep over 4 layers of Llama-2-7B's shape with random weights, 128 x 2048 tokens:
                 seconds by layer and step, floors that the hardware sets, peak memory
    sweep-32     the same with 32 layers; about 30 GB of disk
    kernels      the building blocks of such a layer's decision, alone: seconds, errors
    sparse       products with its matrices, dense, 2:4 as semi-structured tensors, and in blocks

Each part runs in a process of its own and writes one result, as it goes: benchmarks/results (or
--results DIR)/gpu-..._cuda_DATE.md. It is started if the time that is left is what it is expected
to take, judged by the parts before it, and killed when the time is over. `--only sweep-4,tests`
runs some parts; `--layers 2 8` gives other sweeps (sweep-2 and sweep-8). The exit code is 1 if a
part failed or was killed.

Everything can be tried without a GPU:

    python -m benchmarks.gpu --device cpu --shape tiny --folder DIR --results DIR
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from benchmarks.random_model import SHAPES
from benchmarks.results import RESULTS, record

Outcome = tuple[str, dict[str, float]]
"""What came of a part, in words, and numbers that tell what later parts take."""
Work = Callable[[argparse.Namespace], Outcome]
TESTS_SECONDS = 180.0
"""After which the tests are stopped."""
START_SECONDS = 20.0
"""A sweep's, around its layers: imports, tokens, first use, embeddings."""
LAYER_SECONDS = 3.0
"""One layer's, its random weights and export too, as long as nothing was measured: three times
Llama-2-7B's on an H100."""
SPARE_SECONDS = 5.0
"""Left over at the limit."""


@dataclass(frozen=True)
class Part:
    """A part, and the seconds that it is expected to take."""

    name: str
    seconds: float
    work: Work
    layers: int = 0
    """Of a sweep: its seconds are scaled by those of an earlier one."""

    def expected(self, measured: dict[str, float]) -> float:
        """Seconds, given what an earlier sweep measured."""
        if not self.layers or not measured:
            return self.seconds
        return measured["seconds"] + (self.layers - measured["layers"]) * measured["per_layer"]


def run_tests(options: argparse.Namespace) -> Outcome:
    """The tests that need a GPU."""
    command, limit = ["pytest", "tests/gpu", "-q"], min(TESTS_SECONDS, options.seconds_left - 10)
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=max(1.0, limit),
        )
        output, ending = done.stdout, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, ending = error.stdout or b"", f"stopped after {limit:.0f} s"
    lines = output.decode(errors="replace").splitlines() or ["no output"]
    is_good = ending == "exit code 0"
    tail = "" if is_good else "\n\n```\n" + "\n".join(lines[-60:]) + "\n```"
    content = f"`{' '.join(command)}`: {ending}; {lines[-1]}{tail}"
    record("gpu-tests", content, options.device, options.results)
    return ("done" if is_good else "FAILED") + f": {lines[-1]}", {}


def run_sweep(options: argparse.Namespace, layers: int) -> Outcome:
    """A sweep; its libraries are loaded in the process that runs it."""
    from benchmarks.gpu_sweep import sweep

    return sweep(options, layers)


def run_kernels(options: argparse.Namespace) -> Outcome:
    """Building blocks alone."""
    from benchmarks.gpu_kernels import kernels

    return kernels(options)


def run_sparse(options: argparse.Namespace) -> Outcome:
    """Products with sparse matrices."""
    from benchmarks.sparse_products import products

    options.tokens = [1, 16, options.micro_batch * options.sequence_length]
    return products(options)


def parts(layers: Sequence[int]) -> list[Part]:
    """All parts, in order of importance."""
    sweeps = [
        Part(
            f"sweep-{number}",
            START_SECONDS + number * LAYER_SECONDS,
            partial(run_sweep, layers=number),
            number,
        )
        for number in layers
    ]
    return [
        Part("tests", 120.0, run_tests),
        *sweeps,
        Part("kernels", 45.0, run_kernels),
        Part("sparse", 45.0, run_sparse),
    ]


def _report(work: Work, options: argparse.Namespace, to: "Connection[Outcome, object]") -> None:
    to.send(work(options))


def in_a_process(work: Work, options: argparse.Namespace, seconds: float) -> Outcome:
    """Run a part in a process of its own: neither its memory nor a broken GPU context outlives it,
    and it is killed with all that it has started when the seconds are over.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(work, options, sender))
    process.start()
    sender.close()
    try:
        process.join(seconds)
        if process.is_alive():
            return f"KILLED after {seconds:.0f} s", {}
    finally:
        kill(process.pid)
        process.join()
    return receiver.recv() if process.exitcode == 0 else (f"FAILED ({process.exitcode})", {})


def kill(pid: int | None) -> None:
    """Kill a process and what it has started, if it still runs."""
    try:
        process = psutil.Process(pid)
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in tree:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue


def run_parts(chosen: Sequence[Part], options: argparse.Namespace) -> bool:
    """Run those parts that the time is enough for; whether all went well."""
    end = time.monotonic() + 60 * options.minutes - SPARE_SECONDS
    measured: dict[str, float] = {}
    outcomes = {}
    for part in chosen:
        start, expected = time.monotonic(), part.expected(measured)
        left = end - start
        print(f"\n== {part.name}: {expected:.0f} s expected, {left:.0f} s left", flush=True)
        if left < expected:
            outcomes[part.name] = "left out: too little time"
        else:
            given = argparse.Namespace(**vars(options), seconds_left=left)
            outcome, numbers = in_a_process(part.work, given, left)
            took = time.monotonic() - start
            outcomes[part.name] = f"{outcome} ({took:.0f} s)"
            if numbers:
                measured = numbers | {"seconds": took}
        print(f"== {part.name}: {outcomes[part.name]}", flush=True)
    print("", *(f"{name}: {outcome}" for name, outcome in outcomes.items()), sep="\n", flush=True)
    return not any(outcome.startswith(("FAILED", "KILLED")) for outcome in outcomes.values())


def options_of(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the parts that it chooses."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="limit of all parts together")
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder for the models and the runs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32], help="of each sweep")
    parser.add_argument("--samples", type=int, help="default: 128; of tiny 16")
    parser.add_argument("--sequence-length", type=int, help="default: 2048; of tiny 64")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--placement", choices=["shards", "layers"], default="shards")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(words)
    samples, length = (16, 64) if options.shape == "tiny" else (128, 2048)
    options.samples = options.samples or samples
    options.sequence_length = options.sequence_length or length
    names = [part.name for part in parts(options.layers)]
    options.only = options.only.split(",") if options.only else names
    if unknown := set(options.only) - set(names):
        parser.error(f"no parts {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for."""
    options = options_of(words)
    chosen = [part for part in parts(options.layers) if part.name in options.only]
    return 0 if run_parts(chosen, options) else 1


if __name__ == "__main__":
    sys.exit(main())
