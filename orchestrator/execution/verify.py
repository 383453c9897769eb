"""Whether a finished run is as it was written: from the report over the tasks' manifests to every
file, and what the model's folder holds besides.
"""

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from rayprune.orchestrator.execution.records import planned_tasks, read_sealed_report
from rayprune.specs.errors import SpecError, VerificationError
from rayprune.workers.store.files import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    damaged_files,
    read_manifest,
    record_of,
)
from rayprune.workers.store.layout import (
    EXPORT_TASK,
    LAYER_FILE,
    OUTER_FILE,
    TRAINED_FOLDER,
    is_model,
    model_folder,
    task_folder,
)
from rayprune.workers.store.plain import check_plain

ALONE = ("regularised", "recovered")
"""What tasks are called whose layers are no part of the exported model."""
AGAIN = "run the job again to rebuild it"


def verify_run(run: Path) -> list[str]:
    """Follow a finished run from its report to every file of its models; the names of the tasks
    that were checked.

    Raises:
        VerificationError: the run is not finished, a file differs from its record, is missing or
            is a link, or a model's folder holds what the run has not written.
    """
    report = read_sealed_report(run)
    try:
        check_plain(run, "a run folder holds none: remove it from there")
    except SpecError as error:
        raise VerificationError(str(error)) from None
    for name, digest in report["records"]["files"].items():
        if not (run / name).is_file() or record_of(run / name).sha256 != digest:
            raise VerificationError(f"{run / name}: is missing or differs from its record; {AGAIN}")
    found = {
        name: _whole(task_folder(run, name), name, digest)
        for name, digest in report["records"]["tasks"].items()
    }
    if missing := [name for name in planned_tasks(run) if name not in found]:
        raise VerificationError(f"{run}: task {missing[0]} is not finished; run the job again")
    cards = {run / name for name in report["records"]["files"]}
    for name in found:
        _check_strays(task_folder(run, name), name, found[name], cards)
    _check_parts(run, found)
    _check_told(run, report, found)
    return list(found)


def _whole(folder: Path, name: str, digest: str) -> Manifest:
    """The manifest of a task, as the report knows it, with files that fit it."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise VerificationError(
            f"{folder}: task {name} is not finished, or its {MANIFEST_NAME} is damaged; {AGAIN}"
        )
    if manifest.sha256 != digest:
        raise VerificationError(
            f"{folder / MANIFEST_NAME}: is another one than when the report was written; {AGAIN}"
        )
    if damaged := damaged_files(folder, manifest):
        raise VerificationError(f"{folder / damaged[0]}: differs from its record; {AGAIN}")
    return manifest


def _check_strays(folder: Path, name: str, manifest: Manifest, cards: Set[Path]) -> None:
    """Check that the model in a task's folder, if there is one, has no file of anybody else's."""
    exported = is_model(name.rpartition("/")[2])
    model = folder if exported else folder / TRAINED_FOLDER
    ours = {folder / file for file in manifest.files} | cards
    for file in _files(model):
        if file not in ours | ({folder / MANIFEST_NAME} if exported else set()):
            raise VerificationError(
                f"{file}: was not written by this run; remove it, or move it elsewhere"
            )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _check_parts(run: Path, found: Mapping[str, Manifest]) -> None:
    """Check that an exported model holds the parts that its pass has made."""
    for name, exported in found.items():
        scope, _, task = name.rpartition("/")
        if task != EXPORT_TASK:
            continue
        for part, record in _parts(found, scope):
            if record not in exported.files.values():
                raise VerificationError(
                    f"{task_folder(run, name)}: does not hold what {part} has made; {AGAIN}"
                )


def _parts(found: Mapping[str, Manifest], scope: str) -> Iterator[tuple[str, FileRecord]]:
    """The files of layers and of what is outside them."""
    for name, manifest in found.items():
        if name.rpartition("/")[0] == scope and not manifest.task.startswith(ALONE):
            for file in (LAYER_FILE, OUTER_FILE):
                if file in manifest.files:
                    yield name, manifest.files[file]


def _check_told(run: Path, report: Mapping[str, Any], found: Mapping[str, Manifest]) -> None:
    """Check that a report tells what the manifests say."""
    results: dict[str, Any] = {
        name.removeprefix("evaluate-"): manifest.info["result"]
        for name, manifest in found.items()
        if name.startswith("evaluate-")
    }
    texts: dict[str, Any] = {
        name.removeprefix("evaluate-"): manifest.info.get("texts", {})
        for name, manifest in found.items()
        if name.startswith("evaluate-")
    }
    measured: dict[str, Any] = {
        key: {name: result[key] for name, result in results.items() if key in result} or None
        for key in ("perplexity", "masked_lm_loss")
    }
    alike = {key: results.get("after", {}).get(key) for key in ("cosine", "least_cosine")}
    measured["embeddings"] = alike if alike["cosine"] is not None else None
    measured["closeness"] = {
        name: {key: result[key] for key in ("divergence", "agreement")}
        for name, result in results.items()
        if "divergence" in result
    }
    if "texts" in report:  # those of the first versions have none
        measured["texts"] = {
            text: {name: found[text] for name, found in texts.items() if found[text]}
            for text in next(iter(texts.values()), {})
        }
    models = report["models"]
    told = {key: report.get(key) for key in measured}
    if told != measured or run / models["pruned"] != model_folder(run):
        raise VerificationError(f"{run}: its report tells of other models than its tasks; {AGAIN}")
