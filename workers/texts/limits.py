"""What a model sets as limits to texts and windows: its tokens and its positions. No torch."""

import os
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from rayprune.specs.errors import ModelError, RaypruneError, SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.own_text import OWN_TEXT
from rayprune.specs.texts import TextSpec, WindowsSpec
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.texts.reading import TextFacts

MUCH_OF_ONE, ALL_OF_ONE = 0.5, 0.98
"""Parts of a text that may be one and the same token: with more, a warning, an error."""


def windows_of_texts(spec: WindowsSpec, option: str = "calibration") -> list[tuple[TextSpec, int]]:
    """The texts that are there, with how many windows are taken from each; `option` is where the
    job has them.

    Raises:
        SpecError: a text's weight is too small for a single window.
    """
    counts = _by_text(spec, spec.samples)
    for text, count in zip(spec.texts, counts, strict=True):
        if count == 0:
            raise SpecError(
                f"{text.path}: its weight gives it none of the {spec.samples} samples; raise the"
                f" weight or {option}.samples"
            )
    return list(zip(spec.texts, counts, strict=True))


def windows_behind(
    spec: WindowsSpec, read: Sequence[int], samples: int
) -> list[tuple[TextSpec, int, int]]:
    """The calibration texts that are there, with how many of the first windows of each any of these
    numbers of samples takes, and how many of `samples` are taken behind them.
    """
    first = map(max, zip(*(_by_text(spec, total) for total in read), strict=True))
    return list(zip(spec.texts, first, _by_text(spec, samples), strict=True))


def _by_text(spec: WindowsSpec, samples: int) -> list[int]:
    """How many of so many windows are of each text that is there."""
    return shares(samples, spec.weights)[: len(spec.texts)]


def with_own(job: JobSpec, path: str) -> JobSpec:
    """The job where the model's own text lies in a file: one more of the calibration's texts, and
    of a recovery's that trains on more of it.

    Raises:
        SpecError: a text's weight is too small for a single window.
    """
    calibration, recover = job.calibration.with_own(path), job.recover
    whole = job.model_copy(update={"calibration": calibration})
    if recover is None or not job.more_own_samples:
        return whole
    *others, own = (count for _, count in windows_of_texts(whole.recovery_text))
    counts = [*others, own + job.more_own_samples]
    mix = [
        text.model_copy(update={"weight": count / counts[0]})
        for text, count in zip(calibration.mix, counts[1:], strict=True)
    ]
    names = {*TextSpec.model_fields, "sequence_length", "bos"}
    text = WindowsSpec(**calibration.model_dump(include=names), mix=mix, samples=sum(counts))
    changed = recover.model_copy(update={"text": text, "samples": None, "own_samples": 0})
    return whole.model_copy(update={"recover": changed})


def texts_read(job: JobSpec) -> list[tuple[TextSpec, int, int]]:
    """The calibration texts, with how many windows a calibration or training takes of each, and
    how many a gate behind them; the model's own among them.

    Raises:
        SpecError: a text's weight is too small for a single window.
    """
    whole = with_own(job, OWN_TEXT)
    spec = whole.calibration
    read = windows_of_texts(spec.model_copy(update={"samples": job.windows_read}))
    if job.more_own_samples:
        _, trained = windows_of_texts(whole.recovery_text)[-1]
        read[-1] = read[-1][0], max(read[-1][1], trained)
    if job.steps is None:
        return [(text, count, 0) for text, count in read]
    return windows_behind(spec, (spec.samples, job.windows_read), job.steps.gate.samples)


def kept_out(job: JobSpec) -> list[int]:
    """Numbers of the windows that a recovery is measured on, not trained: of each text the last
    ones, ascending; the model's own text among them.

    Raises:
        SpecError: nothing would be left of a text.
    """
    if job.recover is None or job.recover.held_out is None:
        return []
    spec, windows = with_own(job, OWN_TEXT).recovery_text, job.recover.held_out.windows
    option = job.recovery_option
    read = windows_of_texts(spec, option)
    for text, count in read:
        if count <= windows:
            raise SpecError(
                f"{text.path}: recover.held_out keeps {windows} windows of each text out, but the"
                f" training reads {count} of this one; lower recover.held_out.windows, or raise"
                f" {option}.samples"
            )
    return [
        number
        for number, (text, place) in enumerate(order_of_windows(spec, option))
        if place >= read[text][1] - windows
    ]


def own_tokens(job: JobSpec) -> int:
    """Tokens that the model has to write itself; 0: none.

    Raises:
        SpecError: the job asks for fewer than it reads.
    """
    if (own := job.calibration.own) is None:
        return 0
    _, count, gate = texts_read(job)[-1]
    read = (count + gate) * job.calibration.sequence_length
    if own.tokens == "auto":
        return read
    if own.tokens < read:
        raise SpecError(
            f"calibration.own.tokens: {own.tokens}, but {count + gate} windows of"
            f" {job.calibration.sequence_length} tokens are read of them: {read}; raise it, leave"
            " it out, or lower calibration.own.weight or calibration.samples"
        )
    return own.tokens


def order_of_windows(spec: WindowsSpec, option: str = "calibration") -> list[tuple[int, int]]:
    """Of every window its text, and its place in it: texts alternate as their weights demand.

    Raises:
        SpecError: a text's weight is too small for a single window.
    """
    turns = sorted(
        ((place + 0.5) / count, number, place)
        for number, (_, count) in enumerate(windows_of_texts(spec, option))
        for place in range(count)
    )
    return [(number, place) for _, number, place in turns]


@lru_cache(maxsize=8)
def spread_windows(spec: WindowsSpec, count: int) -> tuple[tuple[int, int], ...]:
    """The places among all calibration windows of `count` of them, and the text that each is of:
    evenly spread over every text, in proportion to its windows, and where there are enough at least
    one of each. (Evenly over all windows would be of one text alone where texts alternate.)

    Raises:
        SpecError: a text's weight is too small for a single window.
    """
    places: list[list[int]] = [[] for _ in spec.texts]
    for place, (text, _) in enumerate(order_of_windows(spec)):
        places[text].append(place)
    counts = shares(count, [float(len(own)) for own in places])
    while count >= len(counts) and 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] = 1
    picked = [
        (own[len(own) * number // number_of], text)
        for text, (own, number_of) in enumerate(zip(places, counts, strict=True))
        for number in range(number_of)
    ]
    return tuple(sorted(picked))


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` things in proportion to weights, whole ones: the largest remainders round up, ties
    the earlier first.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(
        range(len(weights)), key=lambda number: (counts[number] - exact[number], number)
    )
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


def too_few_samples(
    spec: TextSpec,
    samples: int,
    length: int,
    found: int,
    gate: int = 0,
    option: str = "calibration",
    reader: str | None = None,
) -> SpecError:
    """The error of a text of an option that has fewer tokens than so many windows need, `gate` of
    them those of a gate; `reader` is who takes so many, where it is another option.
    """
    among = f", {gate} of them of the gate," if gate else ""
    lower = [f"{reader or option}.samples", *(["method.gate.samples"] if gate else [])]
    return SpecError(
        f"{spec.path}: too short: {samples} samples of {length} tokens{among} need"
        f" {samples * length} tokens, the text has {found}; give a longer text,"
        f" or lower {', '.join(lower)} or {option}.sequence_length"
    )


def no_window(text: TextSpec, window: int, found: int) -> SpecError:
    """The error of an evaluation text that is shorter than one window."""
    return SpecError(
        f"{text.path}: too short: one window needs {window} tokens, the text has"
        f" {found}; lower evaluation.window"
    )


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the embedding matrix on disk; None: not found."""
    info = checkpoint.tensors.get(checkpoint.model.embedding)
    return info.shape[0] if info else None


def unknown_token(
    path: str, token: int, alike: int, total: int, rows: int, facts: TextFacts | None
) -> RaypruneError:
    """The error of a token that the model has no embedding for: `alike` of `total` are like it."""
    found = (
        f"{path}: token {token} ({alike} of {total} tokens are like it),"
        f" but the model's embeddings have {rows} rows"
    )
    if facts is not None and "token ids" in facts.holds:
        return SpecError(f"{found}; give token ids of this model")
    return ModelError(
        f"{found}: the tokenizer is larger than the model; copy the tokenizer that belongs to it,"
        " or give the model its rows (resize_token_embeddings)"
    )


def check_ids(ids: Sequence[int], rows: int | None, path: str, facts: TextFacts) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        ModelError: the tokenizer gives a token that it has not.
        SpecError: a text that consists of token ids holds one that it has not.
    """
    if rows is not None and (unknown := [token for token in ids if token >= rows]):
        raise unknown_token(path, unknown[0], len(unknown), len(ids), rows, facts)


def check_counts(counts: Counter[int], path: str) -> list[str]:
    """Warnings about a text that says little, from how often every token occurs in it.

    Raises:
        SpecError: nearly all of it is one token.
    """
    if not counts:
        return []
    ((token, most),) = counts.most_common(1)
    total = counts.total()
    if most <= MUCH_OF_ONE * total:
        return []
    found = (
        f"{path}: {most / total:.0%} of the {total:,} tokens that are read are token {token}, and"
        f" {len(counts)} tokens occur at all"
    )
    if most > ALL_OF_ONE * total:
        raise SpecError(f"{found}; give a text that says something")
    return [f"{found}: what is kept will suit little else"]


def check_positions(checkpoint: Checkpoint, length: int, option: str, before: int = 0) -> list[str]:
    """Warnings about windows, `before` tokens and as many as an option says, that are longer than
    the model's positions.

    Raises:
        SpecError: the model has none beyond them.
    """
    limit = checkpoint.model.positions
    if limit is None or before + length <= limit:
        return []
    behind = f" behind {before}" if before else ""
    found = f"{option}: {length} tokens{behind}, but the model's config says {limit} positions"
    if (most := limit - before) < 1:
        remedy = "; give fewer tokens before them"
    elif checkpoint.model.position_table:
        remedy = f"; set {option}: {most}"
    else:
        remedy = f"; {option}: {most} is safe"
    if checkpoint.model.position_table:
        raise SpecError(f"{found}, and it has learned no others{remedy}")
    return [f"{found}: it was not trained on longer texts{remedy}"]


def check_other_text(read: Sequence[TextSpec], evaluation: TextSpec, option: str) -> None:
    """Refuse to judge a model by the very text that it is calibrated or trained on.

    Raises:
        SpecError: both are read from the same file.
    """
    for text in read:
        try:
            same = os.path.samefile(text.path, evaluation.path)
        except OSError:  # said where it is read
            continue
        if same and text.field == evaluation.field:
            raise SpecError(
                f"{option}: {evaluation.path}: is read for calibration or training too, so"
                " perplexity would flatter the pruned model; evaluate on other text"
            )
