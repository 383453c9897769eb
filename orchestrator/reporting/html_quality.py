"""What the report's page says of quality: on every text, of some of its tokens, and samples."""

from collections.abc import Sequence

from rayprune.orchestrator.reporting.facts import Slice
from rayprune.orchestrator.reporting.page import drawings, folded, note, section, wide_table
from rayprune.orchestrator.reporting.report import MODELS, Report, score_table
from rayprune.orchestrator.reporting.tables import text


def quality(report: Report) -> str:
    """A row for every text and model; and how it was measured."""
    if report.evaluation is None:
        return section("Quality", note("Quality was not measured: the job has no evaluation."))
    used = report.evaluation
    scored = f", {used.scored_tokens:,} scored tokens" if used.scored_tokens else ""
    told = (
        f"{used.windows:,} windows of {used.window:,} tokens{used.begun}, stride"
        f" {used.stride:,}{scored}, of {used.files}. The text was not calibrated or trained on. KL:"
        " divergence of the next-token distribution from the dense model's, in nats for a token."
        " Agreement: tokens for which both expect the same one most."
    )
    if used.tokenizer:
        told += f" Tokenizer {used.tokenizer[:12]}."
    rows = [_row(report, name, model) for name, found in report.texts.items() for model in found]
    columns = ["Text", "Model", "Tokens", *(title for title, _, _ in _columns(report))]
    table = wide_table("Quality on each text", columns, rows) if rows else ""
    return section("Quality", table, note(told), _slices(report), _scores(report))


Column = tuple[str, str, str]
"""Title, field of `OnText`, form."""
COLUMNS: Sequence[Column] = (
    ("Perplexity", "perplexity", "{:,.3f}"),
    ("KL", "divergence", "{:.4f}"),
    ("Agreement", "agreement", "{:.1%}"),
    ("Loss of masked tokens", "masked_lm_loss", "{:.4f}"),
    ("Cosine of embeddings", "cosine", "{:.4f}"),
    ("Least cosine", "least_cosine", "{:.4f}"),
)


def _columns(report: Report) -> list[Column]:
    """What was measured of any model."""
    found = [measured for models in report.texts.values() for measured in models.values()]
    return [c for c in COLUMNS if any(getattr(each, c[1]) is not None for each in found)]


def _row(report: Report, name: str, model: str) -> list[str]:
    measured, dense, cells = report.texts[name][model], report.texts[name].get("before"), []
    for _, field, form in _columns(report):
        value = getattr(measured, field)
        words = "" if value is None else form.format(value)
        if field == "perplexity" and dense and dense.perplexity and measured is not dense:
            words += f" (× {value / dense.perplexity:.3f})"
        cells.append(words)
    tokens = f"{measured.scored_tokens:,}" if measured.scored_tokens else ""
    return [name, MODELS.get(model, model), tokens, *cells]


def _slices(report: Report) -> str:
    """The model to take on some of the tokens of every text."""
    rows = [
        [name, which, f"{of.tokens:,}", f"{of.ratio:.3f}", *_closeness(of)]
        for name, models in report.texts.items()
        if report.taken in models
        for which, of in (models[report.taken].slices or {}).items()
    ]
    if not rows:
        return ""
    columns = ["Text", "Which tokens", "Tokens", "Perplexity, times dense", "KL", "Agreement"]
    told = (
        "Quarters: by a token's place in its window. Rare: the rarest tokens of a text that make up"
        " a tenth of it."
    )
    table = wide_table("Quality by kind of token", columns, rows)
    return folded("By place in the window, and of rare tokens", table + note(told))


def _scores(report: Report) -> str:
    """What the models achieve in tasks of lm-eval."""
    if not report.scores or report.evaluation is None:
        return ""
    table = score_table(report)
    asked = report.evaluation
    told = f"Asked by lm-eval {asked.lm_eval}, {asked.tasks_batch} at once; ± standard error."
    return f"<h3>Tasks</h3>{wide_table(table.title, table.columns, table.rows)}{note(told)}"


def _closeness(of: Slice) -> tuple[str, str]:
    return f"{of.divergence:.4f}", f"{of.agreement:.1%}"


def samples(report: Report) -> str:
    """How the models go on with the job's prompts, side by side."""
    parts = []
    for sample in report.samples:
        parts.append(f"<h3>{text(sample.prompt)}</h3>")
        parts.append(
            drawings(
                f"<div>{note(MODELS.get(model, model))}<blockquote>{text(words)}</blockquote></div>"
                for model, words in sample.texts.items()
            )
        )
    told = note("Each model takes the likeliest token; one prompt says little of a model.")
    return section("Samples", told, *parts) if parts else ""
