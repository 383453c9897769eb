"""The model card: README.md of an exported folder, as the Hugging Face Hub reads it.

It says what the model's values depend on and what was measured of them, and nothing of where or
when it was made: the same job gives the same card.
"""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from rayprune.orchestrator.reporting.report import Dense, Report
from rayprune.orchestrator.reporting.tables import text, titled

TASK = "text-generation"
LOADING = """## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{code})
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""
LIMITS = """## Limits

What stays was chosen, and corrected, on {samples:,} windows of {length:,} tokens of {texts}.
On text of other kinds it loses more: measure it on yours. What the dense model cannot do, or should
not be used for, holds for this one too.
"""


def model_card(report: Report, recovered: bool) -> str:
    """The card of a run's pruned, or of its recovered model."""
    dense = report.dense or Dense(name="model", hub_id=None, licence={}, units={})
    metadata = _metadata(report, dense, recovered).to_yaml()
    return f"---\n{metadata}\n---\n\n" + "\n".join(_body(report, dense, recovered))


def _metadata(report: Report, dense: Dense, recovered: bool) -> ModelCardData:
    """What the Hub shows beside a card, and finds models by."""
    results = None
    if (measured := _perplexity(report, recovered)) and report.evaluation:
        result = EvalResult(
            task_type=TASK,
            dataset_type="text",
            dataset_name=_file(report.evaluation.path),
            metric_type="perplexity",
            metric_name=_protocol(report),
            metric_value=round(measured, 4),
        )
        results = [result]
    return ModelCardData(
        base_model=dense.hub_id,
        **dense.licence,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["rayprune", "pruned", report.method["name"]],
        model_name=f"{dense.name}-pruned",
        eval_results=results,
    )


def _body(report: Report, dense: Dense, recovered: bool) -> Iterator[str]:
    name, method = text(dense.name), report.method["name"]
    yield f"# {name}-pruned\n"
    yield (
        f"{name} without {1 - report.decoder_parameters.ratio:.1%} of its decoder-layer parameters,"
        f" removed by rayprune {report.rayprune_version} (`method: {method}`)"
        f"{' and trained afterwards' if recovered else ''}.\n"
    )
    yield "| | before | after |\n| --- | --: | --: |"
    sizes = {
        "parameters": report.parameters,
        "decoder-layer parameters": report.decoder_parameters,
        "bytes on disk": report.bytes_on_disk,
    }
    for title, size in sizes.items():
        yield f"| {title} | {size.before:,} | {size.after:,} |"
    for group, kept in report.kept.items():
        before = f"{dense.units[group]:,}" if group in dense.units else "unknown"
        yield f"| {titled(group)} of a layer | {before} | {kept} |"
    measured = _perplexity(report, recovered)
    if report.perplexity and report.evaluation and measured:
        before, where = report.perplexity.before, _cell(_file(report.evaluation.path))
        yield f"| perplexity of {where} | {before:.3f} | {measured:.3f} |"
        yield f"\nRatio of the perplexities {measured / before:.4f}. {_protocol(report)}.\n"
    else:
        yield "\nIts quality was not measured.\n"
    yield LOADING.format(code=", trust_remote_code=True" if report.models.own_class else "")
    used = report.calibration
    texts = [used["path"], *(part["path"] for part in used["mix"])]
    yield LIMITS.format(
        samples=used["samples"],
        length=used["sequence_length"],
        texts=", ".join(_cell(_file(path)) for path in texts),
    )


def _perplexity(report: Report, recovered: bool) -> float | None:
    if report.perplexity is None:
        return None
    return report.perplexity.recovered if recovered else report.perplexity.after


def _protocol(report: Report) -> str:
    used = report.evaluation
    assert used is not None, "perplexities come with their protocol"
    return (
        f"Perplexity with window {used.window:,}, stride {used.stride:,}, {used.windows:,} windows,"
        f" {used.scored_tokens:,} scored tokens"
    )


def _file(path: str) -> str:
    """A text by its name alone: the folders above it are nobody's business."""
    return Path(path).name


def _cell(name: str) -> str:
    """A file's name, as words of a table."""
    return text(name).replace("|", "&#124;").replace("\n", " ")
