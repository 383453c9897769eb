"""Which damping a correction takes. Needs no torch: where workers share the outputs of a weight,
the driver adds up what they have found, and chooses.

Sums over outputs are kept by blocks, so that they do not depend on who has computed which.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

from rayprune.specs.errors import ModelError
from rayprune.specs.job import CorrectionSpec

Blocks = tuple[float, ...]
"""A number for each block of outputs."""


@dataclass(frozen=True)
class Trial:
    """A damping, its squared error on the held-out tokens, and that on the tokens of the fit, each
    less what no damping changes (`Rest`).
    """

    damping: float
    held_out: Blocks
    training: Blocks

    @property
    def error(self) -> float:
        """What dampings are compared by."""
        return sum(self.held_out)

    @classmethod
    def joined(cls, trials: Iterable[Self]) -> Self:
        """The same damping's, of all outputs."""
        trials = list(trials)
        held_out, training = zip(*((each.held_out, each.training) for each in trials), strict=True)
        return cls(trials[0].damping, sum(held_out, ()), sum(training, ()))


@dataclass(frozen=True)
class Rest:
    """Squared errors that no damping changes, and the squared outputs of the uncut weight."""

    held_out: Blocks
    training: Blocks
    held_out_output: Blocks
    training_output: Blocks

    @classmethod
    def joined(cls, rests: Iterable[Self]) -> Self:
        """Of all outputs."""
        parts = zip(*(tuple(vars(rest).values()) for rest in rests), strict=True)
        return cls(*(sum(part, ()) for part in parts))

    def held_out_error(self, trial: Trial) -> float:
        """|Z_K W_K' - Z W - E| / |Z W| on the held-out tokens; on those of the fit, where none of
        the others has come (to an expert).
        """
        if not sum(self.held_out_output):
            return self.training_error(trial)
        return relative(trial.error + sum(self.held_out), sum(self.held_out_output))

    def training_error(self, trial: Trial) -> float:
        """The same on the tokens of the fit."""
        return relative(sum(trial.training) + sum(self.training), sum(self.training_output))


def best_trial(options: CorrectionSpec, trial: Callable[[float], Trial]) -> Trial:
    """The trial with the least error, of candidates from the largest down until the error rises:
    with less damping a fit to the training tokens alone only goes on.

    The larger one of equals; candidates that are too small to solve with are passed over.

    Raises:
        ModelError: so are all.
    """
    candidates = options.candidates if options.damping == "held-out" else (options.damping,)
    best: Trial | None = None
    for damping in sorted(candidates, reverse=True):
        try:
            found = trial(damping)
        except ModelError:
            if best is None:
                raise
            break  # with less damping it is more singular still
        if best is not None and found.error > best.error:
            break
        if best is None or found.error < best.error:
            best = found
    assert best is not None, "there is at least one candidate"
    return best


def relative(error: float, energy: float) -> float:
    """The root of squared errors over squared outputs; 0 where there are none."""
    return (max(0.0, error) / energy) ** 0.5 if energy > 0 else 0.0
