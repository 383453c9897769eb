"""Several runs side by side: what differs in their jobs, what came of each, and which to take."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rayprune.orchestrator.reporting.report import Report
from rayprune.orchestrator.reporting.tables import Part, Table, titled
from rayprune.specs.loader import differences, load_job
from rayprune.workers.store.layout import JOB_FILE


@dataclass(frozen=True)
class Compared:
    """A finished run, by the name it has among others."""

    name: str
    report: Report

    @property
    def removed(self) -> float:
        """Fraction of the decoder-layer parameters that went."""
        return 1 - self.report.decoder_parameters.ratio

    @property
    def perplexity(self) -> float | None:
        """Of the model to take, as a multiple of the dense one's; None: not measured."""
        if (found := self.report.perplexity) is None:
            return None
        return (found.recovered or found.after) / found.before


def on_frontier(runs: Sequence[Compared]) -> list[Compared]:
    """The runs that no other beats: none is as small with less perplexity, or smaller with as
    little; those that were measured, from the largest model to the smallest. None, where they were
    measured in different ways.
    """

    def beats(one: Compared, other: Compared) -> bool:
        a, b = _place(one), _place(other)
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    if not _measured_alike(runs):
        return []
    measured = [run for run in runs if run.perplexity is not None]
    return sorted(
        (run for run in measured if not any(beats(other, run) for other in measured)),
        key=lambda run: -run.report.parameters.after,
    )


def _place(run: Compared) -> tuple[int, float]:
    assert run.perplexity is not None, "the frontier is of measured runs"
    return run.report.parameters.after, run.perplexity


def recommended(runs: Sequence[Compared], within: float) -> Compared | None:
    """The smallest model whose perplexity is at most `within` times the dense one's; none, where
    they were measured in different ways.
    """
    if not _measured_alike(runs):
        return None
    good = [run for run in runs if run.perplexity is not None and run.perplexity <= within]
    return min(good, key=_place, default=None)


def rule(within: float) -> str:
    """How one is recommended, in words."""
    return f"the smallest model of at most {within:g} times the dense model's perplexity"


def recommendation(runs: Sequence[Compared], within: float) -> str:
    """Which one to take, or why none."""
    if best := recommended(runs, within):
        return f"Recommended is {best.name}, {rule(within)}: {best.report.model}"
    ratios = [run.perplexity for run in runs if run.perplexity is not None]
    if not ratios:
        return "None is recommended: perplexity was not measured; give the job an evaluation."
    if not _measured_alike(runs):
        return "None is recommended: perplexities were measured in different ways."
    return (
        f"None is recommended: no model has at most {within:g} times the dense model's perplexity,"
        f" the best has {min(ratios):.4g} times."
    )


def results(runs: Sequence[Compared]) -> Table:
    """Size, quality and time of every run; `*` marks those that no other beats in size and
    perplexity. Where several texts were measured, the perplexity on each is there as a multiple of
    the dense model's.
    """
    best, texts = on_frontier(runs), _texts(runs)
    columns = ["run", "removed", "parameters", "perplexity", "times dense", "KL"]
    rows = [
        [
            run.name,
            f"{run.removed:.1%}",
            f"{run.report.parameters.after:,}",
            *_quality(run),
            *(_ratio(run.report, text) for text in texts),
            "*" if run in best else "",
            f"{run.report.seconds['total']:.1f}",
        ]
        for run in runs
    ]
    columns += [*(f"on {text}" for text in texts), "unbeaten", "seconds"]
    return Table("results", columns, rows)


def score_tables(runs: Sequence[Compared]) -> Iterator[Table]:
    """What the models to take achieve in tasks of lm-eval, a column for each run, and the first
    run's dense model."""
    names = dict.fromkeys(score.name for run in runs for score in run.report.scores)
    if not names:
        return
    found = [{score.name: score for score in run.report.scores} for run in runs]
    rows = [
        [
            name,
            next(scores[name].words("before") for scores in found if name in scores),
            *(
                scores[name].words(run.report.taken) if name in scores else ""
                for run, scores in zip(runs, found, strict=True)
            ),
        ]
        for name in names
    ]
    yield Table("tasks of lm-eval", ["task", "dense", *(run.name for run in runs)], rows)


def _texts(runs: Sequence[Compared]) -> list[str]:
    """The texts that were measured, where a run has several."""
    found = dict.fromkeys(text for run in runs for text in run.report.texts)
    return list(found) if any(len(run.report.texts) > 1 for run in runs) else []


def _ratio(report: Report, text: str) -> str:
    ratio = report.ratio(text) if text in report.texts else None
    return "" if ratio is None else f"{ratio:.4f}"


def _quality(run: Compared) -> tuple[str, str, str]:
    """Perplexity, as a multiple of the dense model's, and KL divergence from that in nats; on all
    texts together.
    """
    found = run.report.perplexity
    if found is None or run.perplexity is None:
        return "not measured", "", ""
    close = run.report.closeness.get(run.report.taken)
    divergence = f"{close.divergence:.4f}" if close else ""
    return f"{found.recovered or found.after:.3f}", f"{run.perplexity:.4f}", divergence


def job_differences(runs: Sequence[Compared]) -> Iterator[Part]:
    """In which options each run's job differs from the first one's."""
    jobs = [load_job(run.report.run / JOB_FILE).model_dump(mode="json") for run in runs]
    for run, job in zip(runs[1:], jobs[1:], strict=True):
        found = list(differences(jobs[0], job))
        yield f"{run.name}, beside {runs[0].name}: " + ("; ".join(found) or "the same job")


def protocols(runs: Sequence[Compared]) -> Iterator[str]:
    """How the perplexities were measured; a warning where they cannot be compared."""
    used = _protocols(runs)
    asked = {run.name: _asked(run.report) for run in runs if run.report.scores}
    if len(set(asked.values())) > 1:
        yield "warning: tasks of lm-eval were asked in different ways, and cannot be compared"
        yield from (f"{name}: {words}" for name, words in asked.items())
    if len(set(used.values())) > 1:
        yield "warning: perplexities were measured in different ways, and cannot be compared"
        yield from (f"{name}: {words}" for name, words in used.items())
    else:
        yield from set(used.values())


def _protocols(runs: Sequence[Compared]) -> dict[str, str]:
    """How each run's perplexity was measured, of those that have one."""
    measured = {run.name: run.report.evaluation for run in runs if run.report.evaluation}
    known = all(each.tokens for each in measured.values())  # reports of earlier versions have none
    return {
        name: (
            f"perplexity of {each.files}: window {each.window}{each.begun}, stride {each.stride},"
            f" {each.scored_tokens} scored tokens"
            + (f", windows {str(each.tokens)[:8]}" if known else "")
        )
        for name, each in measured.items()
    }


def _measured_alike(runs: Sequence[Compared]) -> bool:
    return len(set(_protocols(runs).values())) <= 1


def _asked(report: Report) -> str:
    """How the tasks of lm-eval were asked, in words."""
    each = (
        f"{score.task} (version {score.version}, {score.few_shot} shots,"
        f" {score.documents} documents)"
        for score in report.scores
    )
    version = report.evaluation.lm_eval if report.evaluation else None
    return f"lm-eval {version}: {', '.join(dict.fromkeys(each))}"


def layers(runs: Sequence[Compared]) -> Iterator[Table]:
    """What every layer keeps, a column for each run; one table for each group."""
    groups = [name for run in runs for layer in run.report.layers for name in layer.groups]
    for group in dict.fromkeys(groups):
        kept = [_kept(run.report, group) for run in runs]
        rows = [
            [str(number), *(f"{found[number]:,}" if number in found else "" for found in kept)]
            for number in sorted({number for found in kept for number in found})
        ]
        if len({tuple(row[1:]) for row in rows}) == 1:
            rows = [["all", *rows[0][1:]]]
        yield Table(titled(group), ["layer", *(run.name for run in runs)], rows)


def _kept(report: Report, group: str) -> Mapping[int, int]:
    """By layer; of a group that lost nothing anywhere, all."""
    kept = {each.layer: each.groups[group].kept for each in report.layers if group in each.groups}
    if kept or report.dense is None or group not in report.dense.units:
        return kept
    return {each.layer: report.dense.units[group] for each in report.layers}


def comparison(runs: Sequence[Compared]) -> Iterator[Part]:
    """All there is to say of several runs."""
    yield from job_differences(runs)
    yield from layers(runs)
    yield from protocols(runs)
    yield results(runs)
    yield from score_tables(runs)
