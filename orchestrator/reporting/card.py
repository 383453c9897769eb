"""The model card: README.md of an exported folder, as the Hugging Face Hub reads it.

It says what the model's values depend on and what was measured of them, and nothing of where or
when it was made: the same job gives the same card. Speeds, which `rayprune bench` adds, say where
they were measured.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from rayprune.orchestrator.reporting.facts import Dense, Score
from rayprune.orchestrator.reporting.report import Report
from rayprune.orchestrator.reporting.speeds import protocol, speed_rows
from rayprune.orchestrator.reporting.tables import text, titled
from rayprune.specs.own_text import OWN_TEXT

TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModel": "feature-extraction",
}
"""What the Hub calls what a class does; of others it is told nothing."""
PERPLEXITY, DIVERGENCE, AGREEMENT = "perplexity", "kl_divergence", "top_1_agreement"
COSINE = "embedding_cosine"
LOADING = """## How to load it

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("FOLDER"{code})
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""
LIMITS = """## Limits

{history}
On text of other kinds it loses more: measure it on yours. What the dense model cannot do, or should
not be used for, holds for this one too.
"""


def model_card(report: Report, recovered: bool) -> str:
    """The card of a run's pruned, or of its recovered model."""
    dense = report.dense or Dense(name="model", hub_id=None, licence={}, units={})
    metadata = _metadata(report, dense, recovered).to_yaml()
    return f"---\n{metadata}\n---\n\n" + "\n".join(_body(report, dense, recovered))


@dataclass(frozen=True)
class _Measure:
    """One number of the evaluation, on a text."""

    text: str
    name: str
    before: float
    after: float


def _measures(report: Report, recovered: bool) -> list[_Measure]:
    """What the evaluation has found of the model: on all texts together, and on each of several."""
    if not report.evaluation:
        return []
    together = _together(report, recovered)
    if len(report.texts) < 2:
        where = _file(report.evaluation.files)
        return [_Measure(where, *measure) for measure in together]
    found = [_Measure("all texts", *measure) for measure in together]
    for where, models in report.texts.items():
        before, after = models.get("before"), models["recovered" if recovered else "after"]
        if before and before.perplexity and after.perplexity:
            found.append(_Measure(where, PERPLEXITY, before.perplexity, after.perplexity))
        if after.divergence is not None and after.agreement is not None:
            found.append(_Measure(where, DIVERGENCE, 0.0, after.divergence))
            found.append(_Measure(where, AGREEMENT, 1.0, after.agreement))
        if after.cosine is not None:
            found.append(_Measure(where, COSINE, 1.0, after.cosine))
    return found


def _together(report: Report, recovered: bool) -> list[tuple[str, float, float]]:
    found = []
    if of := report.perplexity:
        after = of.recovered if recovered else of.after
        found = [(PERPLEXITY, of.before, after)] if after is not None else []
    if close := report.closeness.get("recovered" if recovered else "after"):
        found.append((DIVERGENCE, 0.0, close.divergence))
        found.append((AGREEMENT, 1.0, close.agreement))
    if loss := report.masked_lm_loss:
        found.append(("masked_lm_loss", loss.before, loss.after))
    if report.embeddings:
        found.append((COSINE, 1.0, report.embeddings.cosine))
    return found


def _metadata(report: Report, dense: Dense, recovered: bool) -> ModelCardData:
    """What the Hub shows beside a card, and finds models by."""
    task = TASKS.get(report.models.auto_class)
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type="text",
            dataset_name=measure.text,
            metric_type=measure.name,
            metric_name=_protocol(report),
            metric_value=round(measure.after, 4),
        )
        for measure in _measures(report, recovered)
    ]
    model = "recovered" if recovered else "after"
    results += [
        EvalResult(
            task_type=task or "other",
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_name=_asked(report, score),
            metric_value=round(score.values[model], 4),
        )
        for score in report.scores
    ]
    data = ModelCardData(
        base_model=dense.hub_id,
        library_name="transformers",
        pipeline_tag=task,
        tags=["rayprune", "pruned", report.method["name"]],
        model_name=f"{dense.name}-pruned",
        eval_results=results or None,
    )
    for key, value in dense.licence.items():
        data[key] = value
    return data


def _body(report: Report, dense: Dense, recovered: bool) -> Iterator[str]:
    name, method, inner = text(dense.name), report.method["name"], report.method.get("inner")
    used = f"`method: {method}`" + (f", `inner: {inner['name']}`" if inner else "")
    by = f"by rayprune {report.rayprune_version} ({used})"
    lost = f"without {1 - report.decoder_parameters.ratio:.1%} of the parameters of its layers"
    how = f"{lost}, removed {by}" if report.is_pruned else f"as it is, written {by}"
    yield f"# {name}-pruned\n"
    if report.zeros:
        part = report.zeros / report.decoder_parameters.before
        others = f"{lost} and with {part:.1%} of them" if report.is_pruned else f"with {part:.1%}"
        of = "" if report.is_pruned else " of the parameters of its layers"
        how = f"{others}{of} set to zero (`sparsity.json`) {by}"
    yield f"{name} {how}{' and trained afterwards' if recovered else ''}.\n"
    yield "| | before | after |\n| --- | --: | --: |"
    sizes = {
        "parameters": report.parameters,
        "of them in the layers": report.decoder_parameters,
        "bytes on disk": report.bytes_on_disk,
    }
    if report.served_bytes:
        sizes["bytes where a GPU holds 2:4 matrices without their zeros"] = report.served_bytes
    for title, size in sizes.items():
        yield f"| {title} | {size.before:,} | {size.after:,} |"
    for group, kept in report.kept.items():
        units = f"{dense.units[group]:,}" if group in dense.units else "unknown"
        yield f"| {titled(group)} of a layer | {units} | {kept} |"
    yield from (speeds := list(speed_rows(report.speeds, "recovered" if recovered else "pruned")))
    yield from _quality(report, recovered)
    if report.speeds and speeds:
        yield f"{protocol(report.speeds)}.\n"
    code = ", trust_remote_code=True" if report.models.own_class else ""
    yield LOADING.format(auto_class=report.models.auto_class, code=code)
    history = []
    if report.is_pruned:
        history.append(f"What stays was chosen, and corrected, on {_windows(report.calibration)}.")
    if recovered and report.recovery:
        history.append(f"It was trained on {_windows(report.recovery)}.")
    yield LIMITS.format(history="\n".join(history))


def _windows(used: Mapping[str, Any]) -> str:
    """A section of windows in words."""
    texts = [_file(part["path"]) for part in (used, *used["mix"])]
    names = ", ".join([*map(_cell, texts), *([OWN_TEXT] if used.get("own") else [])])
    return f"{used['samples']:,} windows of {used['sequence_length']:,} tokens of {names}"


def _quality(report: Report, recovered: bool) -> Iterator[str]:
    measures = _measures(report, recovered)
    for measure in measures:
        words, where = measure.name.replace("_", " "), _cell(measure.text)
        yield f"| {words} on {where} | {measure.before:.4f} | {measure.after:.4f} |"
    for score in report.scores:
        after = score.words("recovered" if recovered else "after")
        yield f"| {_cell(f'{score.metric} of {score.task}')} | {score.words('before')} | {after} |"
    for measure in measures:
        if measure.name == PERPLEXITY:
            where = f" on {_cell(measure.text)}" if len(report.texts) > 1 else ""
            yield f"\nRatio of the perplexities{where} {measure.after / measure.before:.4f}."
    for words in dict.fromkeys(_asked(report, score) for score in report.scores):
        yield f"\nTasks: {words}; ± standard error."
    yield f"\n{_protocol(report)}.\n" if measures else "\nIts quality was not measured.\n"


def _protocol(report: Report) -> str:
    used = report.evaluation
    assert used is not None, "what was measured comes with its protocol"
    scored = f", {used.scored_tokens:,} scored tokens" if used.scored_tokens else ""
    windows = f"{used.windows:,} windows of {used.window:,} tokens{text(used.begun)}"
    return f"{windows}, stride {used.stride:,}{scored}"


def _asked(report: Report, score: Score) -> str:
    """How a task of lm-eval was asked."""
    used = report.evaluation
    assert used is not None, "what was measured comes with its protocol"
    parts = [f"lm-eval {used.lm_eval}, task version {score.version}"]
    if score.few_shot is not None:
        parts.append(f"{score.few_shot} shots")
    if score.documents is not None:
        parts.append(f"{score.documents:,} documents")
    return ", ".join(parts)


def _file(path: str) -> str:
    """A text by its name alone: the folders above it are nobody's business."""
    return Path(path).name


def _cell(name: str) -> str:
    """A file's name, as words of a table."""
    return text(name).replace("|", "&#124;").replace("\n", " ")
