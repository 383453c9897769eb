"""Files of a run folder are damaged: `verify` says which, and the same command again ends with the
bytes of an undisturbed run, or refuses and says why. Never another result.
"""

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import edit_json, folder_bytes
from tests.faults.calm import Calm, result_of
from tests.faults.conftest import MakeCalm, Record
from tests.faults.forks import attempt
from tests.faults.hooks import DieAt
from tests.faults.reliability import Row

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
Harm = Callable[[Path], None]


def one(path: Path) -> Path:
    """The only, or the last, file of a pattern such as `RUN/cache/*/*`."""
    parts = path.parts
    first = next((n for n, part in enumerate(parts) if "*" in part), len(parts))
    found = sorted(Path(*parts[:first]).glob("/".join(parts[first:]))) if first < len(parts) else []
    return found[-1] if found else path


def rewrite(path: Path, data: bytes) -> None:
    """Other content under the same name, in a file of its own (not through hard links)."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def flip(path: Path) -> None:
    """One bit of the last bytes, which are values, not headers."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 0b100
    rewrite(path, bytes(data))


def cut(path: Path) -> None:
    rewrite(path, path.read_bytes()[: path.stat().st_size // 2])


def grow(path: Path) -> None:
    rewrite(path, path.read_bytes() + bytes(64))


def empty(path: Path) -> None:
    rewrite(path, b"")


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def garbage(path: Path) -> None:
    rewrite(path, bytes(range(256)) * 4)


def says(text: str) -> Harm:
    """Its whole content becomes this text."""
    return lambda path: rewrite(path, text.encode())


def another(name: str) -> Harm:
    """The content of another file, whose name is relative to this one's folder."""
    return lambda path: rewrite(path, (path.parent / name).read_bytes())


def appended(text: str) -> Harm:
    return lambda path: rewrite(path, path.read_bytes() + text.encode())


def edited(change: Callable[[Any], None]) -> Harm:
    """A JSON document with something changed inside."""

    def harm(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        rewrite(path, (json.dumps(document, indent=2) + "\n").encode())

    return harm


def put(**keys: Any) -> Harm:
    """Some keys of a JSON document."""

    def harm(path: Path) -> None:
        rewrite(path, path.read_bytes())
        edit_json(path, **keys)

    return harm


def another_entry(path: Path) -> None:
    """An entry of a store takes the place of another one."""
    entries = sorted({file.parent for file in path.parents[2].glob("*/*/manifest.json")})
    delete(entries[-1])
    shutil.copytree(entries[0], entries[-1])


def outside(path: Path) -> Path:
    return next(folder for folder in path.parents if folder.name == "disturbed").parent / "outside"


def moved_and_linked(path: Path) -> None:
    """The same content, but it lies outside, behind a link."""
    outside(path).mkdir()
    path.rename(outside(path) / path.name)
    path.symlink_to(outside(path) / path.name)


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a file")


def _kept(manifest: Any) -> None:
    manifest["info"]["kept"]["neurons"][0] += 1


def _errors(manifest: Any) -> None:
    manifest["info"]["groups"]["neurons"]["held_out_error"] = 0.001


def _perplexity(manifest: Any) -> None:
    manifest["info"]["result"]["perplexity"] = 1.5


def _gates(manifest: Any) -> None:
    gates = manifest["info"]["result"]["gates"]
    gates[0], gates[1] = gates[1], gates[0]


def _result(manifest: Any) -> None:
    manifest["info"]["result"] = {"heads": 2, "neurons": 28}


def _digests(manifest: Any) -> None:
    text = json.dumps(manifest["info"])
    digest = re.findall(r"[0-9a-f]{64}", text)[-1]
    manifest["info"] = json.loads(text.replace(digest, "0" * 64))


def _report(report: Any) -> None:
    report["perplexity"]["after"] = 1.0


@dataclass(frozen=True)
class Damage:
    """One kind: what is done to which file, and what is seen afterwards."""

    name: str
    file: str
    harm: Harm
    verify: int | None = 5
    """Exit code of `verify`; None: it is no matter, or the run is not finished."""
    run: tuple[int, ...] = (0,)
    """Exit codes that the same command may end with."""
    kind: str = "stat"
    stop: str | None = None
    """Damage what is left of a run that died before its first operation on such a path."""


LAYER, MANIFEST = "tasks/layer-0001/layer.safetensors", "tasks/layer-0001/manifest.json"
HALF_SHARDS, HALF_WAVES = "tasks/layer-0002/", "tasks/selection-0002"
HALF_STATISTICS = "tasks/statistics-0002"
STATE = "tasks/recover/step-*/*"
DAMAGES = [
    Damage("one bit", LAYER, flip),
    Damage("half of it is missing", LAYER, cut),
    Damage("bytes are appended", LAYER, grow),
    Damage("empty", LAYER, empty),
    Damage("deleted", LAYER, delete),
    Damage("the content of another layer", LAYER, another("../layer-0000/layer.safetensors")),
    Damage("a link to the same content outside", LAYER, moved_and_linked, None, (0, 2, 5)),
    Damage("a folder of that name", LAYER, a_folder, 5, (0, 2, 5)),
    Damage("one bit", "tasks/calibration-tokens/tokens.safetensors", flip),
    Damage("deleted", "tasks/calibration-tokens/tokens.safetensors", delete),
    Damage("one bit", "tasks/evaluation-tokens/tokens.safetensors", flip),
    Damage("one bit", "tasks/outer/outer.safetensors", flip),
    Damage("half of it is missing", MANIFEST, cut),
    Damage("deleted", MANIFEST, delete),
    Damage("`[]`", MANIFEST, says("[]")),
    Damage("binary", MANIFEST, garbage),
    Damage("`files` is emptied", MANIFEST, put(files={})),
    Damage("another fingerprint", MANIFEST, put(fingerprint="0" * 64)),
    Damage("another layer's", MANIFEST, another("../layer-0000/manifest.json")),
    Damage("another unit kept", MANIFEST, edited(_kept)),
    Damage("another error", MANIFEST, edited(_errors)),
    Damage("another shape", "tasks/shape/manifest.json", edited(_result)),
    Damage("another perplexity", "tasks/evaluate-after/manifest.json", edited(_perplexity)),
    Damage("another digest", "tasks/source/manifest.json", edited(_digests)),
    Damage("`info` is a list", MANIFEST, put(info=[])),
    Damage("one bit", "model/model-00002-of-00004.safetensors", flip),
    Damage("half of it is missing", "model/model-00001-of-00004.safetensors", cut),
    Damage("another key", "model/config.json", put(rms_norm_eps=0.5)),
    Damage("half of it is missing", "model/config.json", cut),
    Damage("one byte more", "model/tokenizer.json", appended(" ")),
    Damage("deleted", "model/tokenizer.json", delete),
    Damage("names another file", "model/model.safetensors.index.json", put(weight_map={})),
    Damage("half of it is missing", "model/manifest.json", cut),
    Damage("weights that hide ours", "model/model.safetensors", says("x" * 100), 5, (0, 3, 5)),
    Damage("an adapter is laid beside", "model/adapter_config.json", says("{}"), 5, (0, 3, 5)),
    Damage("a link to the same content outside", "model", moved_and_linked, None, (0, 2, 5)),
    Damage("a file of that name", "model", a_file, 5, (0, 2, 5)),
    Damage("a link to the same content outside", "tasks", moved_and_linked, None, (0, 2, 5)),
    Damage("a file of that name", "tasks/layer-0001", a_file, 5, (0, 2, 5)),
    Damage("half of it is missing", "report.json", cut),
    Damage("`{}`", "report.json", says("{}")),
    Damage("another perplexity", "report.json", edited(_report)),
    Damage("deleted", "report.html", delete, None),
    Damage("`[]`", "plan.json", says("[]")),
    Damage("half of it is missing", "plan.json", cut),
    Damage("a torn line", "events.jsonl", appended('{"time": 1.0, "ev'), None),
    Damage("lines of other kinds", "events.jsonl", appended('null\n[]\n3\n{}\n{"a": 1}\n'), None),
    Damage("binary", "events.jsonl", garbage, None),
    Damage("a folder of that name", "events.jsonl", a_folder, None, (2,)),
    Damage("deleted", "job.yaml", delete, None, (2,)),
    Damage("binary", "job.yaml", garbage, None, (0, 2)),
    Damage("another job's", "job.yaml", says("model: 3\n"), None, (0, 2)),
    Damage("a folder of that name", "run.lock", a_folder, None, (2,)),
    Damage("one bit", "cache/shard-*/*", flip, None, stop=HALF_SHARDS),
    Damage("half of it is missing", "cache/shard-*/*", cut, None, stop=HALF_SHARDS),
    Damage("empty", "cache/shard-*/*", empty, None, stop=HALF_SHARDS),
    Damage("a folder of that name", "cache/shard-*/*", a_folder, None, stop=HALF_SHARDS),
    Damage(
        "the content of another shard",
        "cache/shard-0001/*",
        lambda path: rewrite(path, one(path.parent.parent / "shard-0002" / "*").read_bytes()),
        None,
        stop=HALF_SHARDS,
    ),
    Damage("deleted", "cache", delete, None, stop=HALF_SHARDS),
    Damage("one bit", "cache/dense-*/*", flip, None, (0,), "layers, stored", HALF_STATISTICS),
    Damage("half of it is missing", "cache/dense-*/*", cut, None, (0,), "refit, drift", HALF_WAVES),
    Damage("one bit", "tasks/layer-0000/layer.safetensors", flip, None, stop=HALF_SHARDS),
    Damage(
        "another unit kept", "tasks/layer-0000/manifest.json", edited(_kept), None, (0,), "stat",
        HALF_SHARDS,
    ),
    Damage(
        "the content of another micro-batch",
        "cache/dense-*/00000.safetensors",
        another("00001.safetensors"),
        None,
        (0,),
        "refit, drift",
        HALF_WAVES,
    ),
    Damage("one bit", "store/*/*/layer*", flip, None, (0,), "layers, stored"),
    Damage("half of it is missing", "store/*/*/manifest.json", cut, None, (0,), "layers, stored"),
    Damage("another's", "store/*/*/manifest.json", another_entry, None, (0,), "layers, stored"),
    Damage("one bit", STATE, flip, None, (0,), "recovered", "tasks/recover/model"),
    Damage("half of it is missing", STATE, cut, None, (0,), "recovered", "tasks/recover/model"),
    Damage(
        "lines of other kinds",
        "tasks/recover/training.jsonl",
        appended('null\n[]\n{"step": "a"}\n{"lo'),
        None,
        (0,),
        "recovered",
        "tasks/recover/model",
    ),
    Damage("one bit", "tasks/recover/model/outer.safetensors", flip, kind="recovered"),
    Damage("lines of other kinds", "tasks/recover/training.jsonl", appended("null\n3\n"), None,
           (0,), "recovered"),
    Damage("other gates", "tasks/gates-0000/manifest.json", edited(_gates),
           kind="trsp"),
]  # fmt: skip


def place_of(out: Path, file: str) -> Path:
    """A path in the run folder; `store/...` in the store beside it, and then the run folder is
    gone, so that all comes from the store.
    """
    if not file.startswith("store/"):
        return out / file
    shutil.rmtree(out)
    return out.with_name(out.name + "-store") / file.removeprefix("store/")


def half(job: Calm, stop: str) -> Path:
    """What a run leaves that dies before its first operation on such a path."""
    out = job.fresh()
    number = next(n for n, operation in enumerate(job.operations) if stop in operation.path + "/")
    assert job.attempt(out, DieAt(out, number)).code == -9
    return out


@pytest.mark.parametrize(
    "damage", DAMAGES, ids=[f"{d.kind}-{d.file}-{d.name}".replace(" ", "_") for d in DAMAGES]
)
def test_damage(damage: Damage, calm: MakeCalm, record: Record) -> None:
    job = calm(damage.kind)
    out = half(job, damage.stop) if damage.stop else job.copied()
    shutil.rmtree(out.parent / "outside", ignore_errors=True)
    damage.harm(one(place_of(out, damage.file)))
    seen = []
    beyond = folder_bytes(out.parent / "outside")
    if damage.verify is not None:
        found = attempt(["verify", str(out)])
        assert found.code == damage.verify, found.words
        assert "Traceback" not in found.words, found.err
        seen.append(f"`verify`: {found.code}")
    again = job.attempt(out)
    assert "Traceback" not in again.words, again.err
    assert again.code in damage.run, again.words
    assert folder_bytes(out.parent / "outside") == beyond, "written outside"
    equal = result_of(out) == job.expected if again.code == 0 else None
    seen.append("`run`: mended" if again.code == 0 else f"`run`: refused, {again.code}")
    outcome = "nothing lost" if again.code == 0 else "nothing half-done"
    place = damage.file + (", half-way" if damage.stop else "")
    record(Row("damage", place, damage.name, "; ".join(seen), outcome, 1, equal))
    assert equal is not False, "another result"
    if again.code == 0:
        checked = attempt(["verify", str(out)])
        assert checked.code == 0, checked.words


SILENT = {"events.jsonl", "run.lock", "report.html", "job.yaml"}
"""Files of which `verify` knows nothing."""


def bit_flips(run: Path, number: int) -> list[tuple[Path, int]]:
    """Random places in the files of a run, as many in small files as in large ones."""
    draw = random.Random(0)
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    chosen = [draw.choice(files).relative_to(run) for _ in range(number)]
    return [(path, draw.randrange(8 * (run / path).stat().st_size)) for path in chosen]


@pytest.mark.parametrize("stop", [None, HALF_SHARDS], ids=["finished", "half-way"])
def test_any_bit(stop: str | None, calm: MakeCalm, record: Record) -> None:
    """Bits at random, in any file: noticed by `verify`, and never another result."""
    job, problems = calm("stat"), []
    places = bit_flips(half(job, stop) if stop else job.run, 20)
    for name, bit in places:
        out = half(job, stop) if stop else job.copied()
        data = bytearray((out / name).read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        rewrite(out / name, bytes(data))
        what = f"{name}, bit {bit}"
        verified = None if stop else attempt(["verify", str(out)])
        if verified and str(name) not in SILENT and verified.code != 5:
            problems.append(f"{what}: verify ended with {verified.code}: {verified.words[-300:]}")
        again = job.attempt(out)
        if again.code not in (0, 2, 5) or "Traceback" in again.words:
            problems.append(f"{what}: run ended with {again.code}: {again.words[-300:]}")
        elif again.code == 0 and result_of(out) != job.expected:
            problems.append(f"{what}: another result")
    where = "any file, half-way" if stop else "any file"
    seen = "`run`: mended or refused" if stop else "`verify`: 5; `run`: mended or refused"
    record(Row("damage", where, "one bit, at random", seen, "nothing lost", len(places), True))
    assert not problems, "\n".join(problems)
