"""What is checked of tokens before any other work: that the model has them, that they say
something, that windows fit, and that the evaluation text is another one.
"""

import torch
from torch import Tensor

from rayprune.specs.errors import ModelError, SpecError
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.texts.reading import TextFacts

SHARED_RUN = 64
"""Tokens in a row that two texts do not have in common by chance."""
SHARED_FRACTION = 0.01
"""Of the evaluation tokens, so many may lie in such runs: quotations and boilerplate."""
MUCH_OF_ONE, ALL_OF_ONE = 0.5, 0.98
"""Parts of a text that may be one and the same token: with more, a warning, an error."""
_CHUNK = 2**16


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the embedding matrix on disk, which may differ from `vocab_size`; None: not found."""
    info = checkpoint.tensors.get(checkpoint.model.embedding)
    return info.shape[0] if info else None


def check_known(
    ids_NT: Tensor, rows: int | None, path: str, facts: TextFacts | None = None
) -> None:
    """Check that the model has an embedding for every token (any shape, int64).

    Raises:
        ModelError: the tokenizer gives a token that it has not.
        SpecError: a text that consists of token ids holds one that it has not.
    """
    if rows is None or ids_NT.numel() == 0 or int(ids_NT.max()) < rows:
        return
    unknown = ids_NT[ids_NT >= rows]
    found = (
        f"{path}: token {int(unknown[0])} ({len(unknown)} of {ids_NT.numel()} tokens are like it),"
        f" but the model's embeddings have {rows} rows"
    )
    if facts is not None and "token ids" in facts.holds:
        raise SpecError(f"{found}; give token ids of this model")
    raise ModelError(
        f"{found}: the tokenizer is larger than the model; copy the tokenizer that belongs to it,"
        " or give the model its rows (resize_token_embeddings)"
    )


def check_varied(ids_NT: Tensor, path: str) -> list[str]:
    """Warnings about a text that says little.

    Raises:
        SpecError: nearly all of it is one token.
    """
    counts = torch.unique(ids_NT, return_counts=True)
    share = int(counts[1].max()) / ids_NT.numel()
    token = int(counts[0][counts[1].argmax()])
    if share <= MUCH_OF_ONE:
        return []
    found = (
        f"{path}: {share:.0%} of the {ids_NT.numel():,} tokens that are read are token {token}, and"
        f" {len(counts[0])} tokens occur at all"
    )
    if share > ALL_OF_ONE:
        raise SpecError(f"{found}; give a text that says something")
    return [f"{found}: what is kept will suit little else"]


def check_positions(checkpoint: Checkpoint, length: int, option: str) -> list[str]:
    """Warnings about windows that are longer than the model's positions.

    Raises:
        SpecError: the model has none beyond them.
    """
    limit = checkpoint.model.positions
    if limit is None or length <= limit:
        return []
    found = f"{option}: {length} tokens, but the model's config says {limit} positions"
    if checkpoint.model.position_table:
        raise SpecError(f"{found}, and it has learned no others; set {option}: {limit}")
    return [f"{found}: it was not trained on longer texts; {option}: {limit} is safe"]


def check_apart(calibration_ST: Tensor, evaluation_NT: Tensor, path: str) -> list[str]:
    """Refuse to judge a model by the text it was calibrated or trained on; warnings where that
    cannot be told.

    Raises:
        SpecError: more than `SHARED_FRACTION` of the evaluation tokens lie in runs that the
            calibration text has too.
    """
    fraction = shared_fraction(calibration_ST, evaluation_NT)
    if fraction is None:
        return [
            f"evaluation.path: {path}: whether it stands in the windows for calibration or training"
            f" too cannot be told with windows of {evaluation_NT.shape[1]} tokens, and"
            f" {calibration_ST.shape[1]} in calibration: at least {SHARED_RUN // 2} would do"
        ]
    if fraction > SHARED_FRACTION:
        raise SpecError(
            f"evaluation.path: {path}: {fraction:.0%} of its tokens stand in the windows for"
            " calibration or training too, so perplexity would flatter the pruned model; evaluate"
            " on other text, for instance the part behind those windows"
        )
    return []


def shared_fraction(calibration_ST: Tensor, evaluation_NT: Tensor) -> float | None:
    """The fraction of evaluation tokens in runs of `SHARED_RUN` tokens (at most half a window) that
    calibration windows hold too; None where windows are too short to tell.

    The calibration windows are cut into runs, every run of the evaluation windows is compared with
    all of them, by hash. Runs that lie in two windows are not seen: where windows are short, up to
    half of what there is.
    """
    size = min(SHARED_RUN, calibration_ST.shape[1] // 2, evaluation_NT.shape[1] // 2)
    if size < SHARED_RUN // 4:
        return None
    # products wrap around: a hash
    factors = torch.randint(2**62, (size,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    runs = calibration_ST[:, : calibration_ST.shape[1] // size * size].reshape(-1, size)
    known = (runs * factors).sum(1)
    chunks = evaluation_NT.unfold(1, size, 1).split(max(1, _CHUNK // evaluation_NT.shape[1]))
    hits = sum(int(torch.isin((chunk * factors).sum(-1), known).sum()) for chunk in chunks)
    return min(1.0, hits * size / evaluation_NT.numel())
