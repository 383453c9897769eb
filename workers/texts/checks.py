"""What is checked of tokens before any other work: that the model has them, that they say
something, that windows fit, and that the evaluation text is another one.
"""

from collections import Counter

import torch
from torch import Tensor

from rayprune.specs.errors import SpecError
from rayprune.workers.texts.limits import check_counts, unknown_token
from rayprune.workers.texts.reading import TextFacts

SHARED_RUN = 64
"""Tokens in a row that two texts do not have in common by chance."""
SHARED_FRACTION = 0.01
"""Of the evaluation tokens, so many may lie in such runs: quotations and boilerplate."""
_CHUNK = 2**16


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
    raise unknown_token(path, int(unknown[0]), len(unknown), ids_NT.numel(), rows, facts)


def check_varied(ids_NT: Tensor, path: str) -> list[str]:
    """Warnings about a text that says little.

    Raises:
        SpecError: nearly all of it is one token.
    """
    tokens, counts = torch.unique(ids_NT, return_counts=True)
    return check_counts(Counter(dict(zip(tokens.tolist(), counts.tolist(), strict=True))), path)


def check_apart(calibration_ST: Tensor, evaluation_NT: Tensor, option: str, path: str) -> list[str]:
    """Refuse to judge a model by the text it was calibrated or trained on; warnings where that
    cannot be told.

    Raises:
        SpecError: more than `SHARED_FRACTION` of the evaluation tokens lie in runs that the
            calibration text has too.
    """
    fraction = shared_fraction(calibration_ST, evaluation_NT)
    if fraction is None:
        return [
            f"{option}: {path}: whether it stands in the windows for calibration or training"
            f" too cannot be told with windows of {evaluation_NT.shape[1]} tokens, and"
            f" {calibration_ST.shape[1]} in calibration: at least {SHARED_RUN // 2} would do"
        ]
    if fraction > SHARED_FRACTION:
        raise SpecError(
            f"{option}: {path}: {fraction:.0%} of its tokens stand in the windows for"
            " calibration or training too, so perplexity would flatter the pruned model; evaluate"
            " on other text, for instance the part behind those windows"
        )
    return []


def check_gate_apart(trained_ST: Tensor, gate_NT: Tensor, path: str) -> None:
    """Refuse to let a gate judge by text that was trained on.

    Raises:
        SpecError: more than `SHARED_FRACTION` of its tokens lie in runs that this text has too.
    """
    fraction = shared_fraction(trained_ST, gate_NT) or 0.0
    if fraction > SHARED_FRACTION:
        raise SpecError(
            f"recover.text: {path}: {fraction:.0%} of the tokens that method.gate looks at, behind"
            " the calibration's, stand in it too, so the gate would flatter the pruned model; train"
            " on other text, or leave recover.text out"
        )


def shared_fraction(calibration_ST: Tensor, evaluation_NT: Tensor) -> float | None:
    """The fraction of evaluation tokens in runs of `SHARED_RUN` tokens (at most half a window) that
    calibration windows hold too; None where windows are too short to tell.

    The calibration windows are cut into runs, every run of the evaluation windows is compared with
    all of them, by hash. Runs that lie in two windows are not seen: where windows are short, up to
    half of what there is.
    """
    if min(calibration_ST.shape[1], evaluation_NT.shape[1]) >= SHARED_RUN // 2:
        return _shared(calibration_ST, evaluation_NT)
    # windows of one text stand in a row; where texts are mixed they do not, so none proves nothing
    found = _shared(calibration_ST.reshape(1, -1), evaluation_NT.reshape(1, -1))
    return found if found > SHARED_FRACTION else None


def _shared(calibration_ST: Tensor, evaluation_NT: Tensor) -> float:
    """The fraction for windows that are long enough, or texts as one window."""
    size = min(SHARED_RUN, calibration_ST.shape[1] // 2, evaluation_NT.shape[1] // 2)
    # products wrap around: a hash
    factors = torch.randint(2**62, (size,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    runs = calibration_ST[:, : calibration_ST.shape[1] // size * size].reshape(-1, size)
    known = (runs * factors).sum(1)
    chunks = evaluation_NT.unfold(1, size, 1).split(max(1, _CHUNK // evaluation_NT.shape[1]))
    hits = sum(int(torch.isin((chunk * factors).sum(-1), known).sum()) for chunk in chunks)
    return min(1.0, hits * size / evaluation_NT.numel())
