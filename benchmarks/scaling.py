"""How the sweep scales: both placements with 1, 2, ... workers of one thread, and Ray against the
same work in one process.

    python -m benchmarks.scaling TEXT [--placements layers shards] [--workers 1 2] [--repeats 2]
    [--set a.b=c ...]

The demo model and the demo's job, evaluation left out. The fastest of the repeats counts. The row
"at once" is what the machine allows: as many whole sweeps in processes that know nothing of each
other, and how much of them is done in the time of one.
"""

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.demo_model import run
from benchmarks.results import record, table

PLACEMENTS = ("layers", "shards")


def sweep_seconds(
    text: Path, placement: str, executor: str, workers: int, options: argparse.Namespace
) -> float:
    """Seconds of the sweep alone: start-up, tokens and probe left out."""
    settings = [f"calibration.path={text}", "evaluation=null", f"parallel.placement={placement}"]
    settings += [f"cluster.executor={executor}", f"parallel.workers={workers}"]

    def once() -> float:
        with tempfile.TemporaryDirectory() as folder:
            report = run([*settings, *options.overrides], Path(folder))
        return float(report["seconds"]["sweep"])

    return min(once() for _ in range(options.repeats))


def at_once(text: Path, placement: str, count: int, options: argparse.Namespace) -> float:
    """Seconds of the slowest of so many sweeps in processes of their own."""
    with ThreadPoolExecutor(count) as pool:
        sweeps = [
            pool.submit(sweep_seconds, text, placement, "in-process", 1, options)
            for _ in range(count)
        ]
        return max(sweep.result() for sweep in sweeps)


def rows(placement: str, text: Path, options: argparse.Namespace) -> list[list[Any]]:
    """One placement: in process, then on Ray with growing worker counts."""
    alone = sweep_seconds(text, placement, "in-process", 1, options)
    seconds = {
        workers: sweep_seconds(text, placement, "ray", workers, options)
        for workers in options.workers
    }
    first, most = seconds[min(seconds)], max(seconds)
    together = at_once(text, placement, most, options)
    result = [
        [placement, "in process", 1, f"{alone:.1f}", "", ""],
        [placement, "at once", most, f"{together:.1f}", f"{most * alone / together:.2f}", ""],
    ]
    return result + [
        [placement, "Ray", w, f"{s:.1f}", f"{first / s:.2f}", f"{s / alone - 1:+.1%}"]
        for w, s in seconds.items()
    ]


def main() -> None:
    """Run all, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="UTF-8 text, for instance WikiText-2")
    parser.add_argument("--placements", choices=PLACEMENTS, nargs="+", default=PLACEMENTS)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    options = parser.parse_args()
    found = [
        line
        for placement in options.placements
        for line in rows(placement, options.text.absolute(), options)
    ]
    columns = [
        "placement",
        "executor",
        "workers",
        "seconds of sweep",
        "speed against the fewest workers",
        "time against one process",
    ]
    record("scaling", table(columns, found))


if __name__ == "__main__":
    main()
