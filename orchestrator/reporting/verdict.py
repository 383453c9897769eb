"""What came of a run, in a few sentences of facts: no word in them that a number does not say."""

from collections.abc import Iterator

from rayprune.orchestrator.reporting.report import Report


def verdict(report: Report) -> str:
    """The run in two or three sentences."""
    return " ".join(_sentences(report))


def _sentences(report: Report) -> Iterator[str]:
    name = report.dense.name if report.dense else "The model"
    decoder, whole = (1 - size.ratio for size in (report.decoder_parameters, report.parameters))
    if report.is_pruned or not report.zeros:
        yield f"{name} is {whole:.1%} smaller: {decoder:.1%} of its decoder parameters are gone."
    if report.zeros:
        zero = report.zeros / report.decoder_parameters.before
        if report.is_pruned:
            yield f"{zero:.1%} of them are zero in what stays."
        else:
            yield f"{name} keeps its size: {report.done}."
    if close := report.closeness.get(report.taken):
        agreed = f"{close.agreement:.1%} of tokens"
        yield f"It expects the same next token as the dense model for {agreed}."
    ratios = {name: ratio for name in report.texts if (ratio := report.ratio(name)) is not None}
    if len(ratios) > 1:
        least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        yield (
            f"Its perplexity is {ratios[least]:.3f} times the dense one's on {least},"
            f" {ratios[most]:.3f} times on {most}."
        )
    elif found := report.perplexity:
        ratio = (found.recovered or found.after) / found.before
        yield f"Its perplexity is {ratio:.3f} times the dense one's."
    if loss := report.masked_lm_loss:
        masked = f"{loss.after:.3f} nats for a masked token, the dense model {loss.before:.3f}"
        yield f"It loses {masked}."
    if alike := report.embeddings:
        yield f"Its embeddings have a cosine of {alike.cosine:.4f} with the dense model's."
    if report.evaluation is None:
        yield "How good it is was not measured."
