"""Runs that are killed at random and go on, for hours if need be: every one must end with the bytes
and numbers of an undisturbed run.

python -m benchmarks.soak --rounds 500

A round is one run. It is killed up to four times: before a random operation on a file, in the
middle of one (torn), or at a random moment; then the same command goes on to the end.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

from benchmarks.results import record, table
from tests.faults.calm import Calm, calm_run, result_of
from tests.faults.hooks import DieAt, InterruptAt
from tests.faults.kinds import KINDS

MOST_KILLS = 4


def disturb(calm: Calm, out: Path, draw: random.Random) -> str:
    """One attempt that is most likely killed; in which way, or `ended` where it was not."""
    way = draw.choice(["operation", "torn", "moment", "moment", "interrupted"])
    number = draw.randrange(len(calm.operations))
    if way == "moment":
        ended = calm.attempt(out, kill_after=draw.uniform(0.05, 1.5 * calm.seconds))
    elif way == "interrupted":
        ended = calm.attempt(out, InterruptAt(out, number))
    else:
        ended = calm.attempt(out, DieAt(out, number, torn=way == "torn"))
    if ended.code == 0:
        return "ended"
    expected = 130 if way == "interrupted" else -signal.SIGKILL
    if ended.code != expected:
        raise AssertionError(f"{calm.name}: {way}, {number}: {ended.code}: {ended.words}")
    return way


def one_round(calm: Calm, out: Path, seed: int) -> Counter[str]:
    """One run, killed and gone on with; how it was killed.

    Raises:
        AssertionError: it did not end as an undisturbed run does.
    """
    draw, ways = random.Random(seed), Counter[str]()
    for _ in range(draw.randint(1, MOST_KILLS)):
        ways[disturb(calm, out, draw)] += 1
    ended = calm.attempt(out, timeout=300)
    if ended.code or result_of(out) != calm.expected:
        raise AssertionError(f"{calm.name}, seed {seed}: {ended.code}: {ended.words}")
    for folder in (out, out.with_name(out.name + "-store")):
        shutil.rmtree(folder, ignore_errors=True)
    return ways


def soak(folder: Path, rounds: int, first_seed: int, processes: int, seconds: float) -> str:
    """Run so many rounds, or as many as the time allows; the result as Markdown."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(topics[key] for key in sorted(topics))[:60_000], encoding="utf-8")
    calm = {name: calm_run(folder, text, name) for name in KINDS}
    begin, failed = time.monotonic(), list[str]()
    ways, done = {name: Counter[str]() for name in KINDS}, Counter[str]()

    def go(seed: int) -> None:
        name = list(KINDS)[seed % len(KINDS)]
        if time.monotonic() - begin > seconds:
            return
        try:
            ways[name].update(one_round(calm[name], folder / f"round-{seed}", seed))
        except AssertionError as error:
            failed.append(str(error))
            print(error, file=sys.stderr, flush=True)
        done[name] += 1
        if done.total() % 20 == 0:
            print(f"{done.total()} rounds, {time.monotonic() - begin:.0f} s", flush=True)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(go, range(first_seed, first_seed + rounds)))
    return report(done, ways, failed, time.monotonic() - begin)


def report(
    done: Counter[str], ways: dict[str, Counter[str]], failed: Sequence[str], seconds: float
) -> str:
    """The result as Markdown."""
    columns = ["operation", "torn", "moment", "interrupted"]
    total = sum(ways.values(), Counter[str]())
    rows = [
        [name, done[name], *(ways[name][way] for way in columns), ways[name]["ended"]]
        for name in done
    ]
    rows.append(["all", done.total(), *(total[way] for way in columns), total["ended"]])
    kills = sum(total[way] for way in columns)
    words = [
        f"{done.total()} runs, killed or interrupted {kills} times, {seconds / 60:.0f} minutes:"
        f" {done.total() - len(failed)} ended with the model's bytes and the report's numbers of an"
        " undisturbed run.",
        table(["job", "runs", *columns, "ended before the kill"], rows),
        "*operation*: SIGKILL before a random operation on a file; *torn*: when half of it is"
        " written; *moment*: SIGKILL after a random time; *interrupted*: SIGTERM at a random"
        " operation.",
        *failed,
    ]
    return "\n\n".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--processes", type=int, default=2, help="rounds at the same time")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        limits = (options.seed, options.processes, 60 * options.minutes)
        result = soak(Path(folder), options.rounds, *limits)
    record("soak", result)


if __name__ == "__main__":
    main()
