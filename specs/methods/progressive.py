"""Options of progressive pruning."""

from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from rayprune.specs.methods.gate import GateSpec
from rayprune.specs.methods.options import InSteps, MethodOptions
from rayprune.specs.methods.ranking import RANKINGS
from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.specs.section import one_of

DEFAULT_STEPS = 4

if TYPE_CHECKING:
    Inner: TypeAlias = MethodOptions
else:
    Inner = one_of(RANKINGS, "stat")


class ProgressiveOptions(MethodOptions):
    """Progressive pruning: several passes at growing sparsity, each over the model that the one
    before has left, for as long as a gate on what it keeps of the original is open.
    """

    name: Literal["progressive"] = "progressive"
    inner: Inner = StatOptions()
    """The method of every pass, one that ranks."""
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Number of passes; null: 4, or as many as a `schedule` that is a list has."""
    schedule: (
        Literal["cubic", "linear"]
        | Annotated[
            list[Annotated[float, Field(gt=0.0, lt=1.0)]], Field(min_length=1, max_length=1000)
        ]
    ) = "cubic"
    """What is gone after step t of T, of the original's decoder-layer parameters. `cubic`: 1 -
    (1 - t/T)^3 of `budget.sparsity`, large steps first; `linear`: t/T of it; a list: these
    fractions, rising to `budget.sparsity`.
    """
    gate: GateSpec = GateSpec()
    """What every step must keep of the original; where one does not, the step before is the
    result.
    """
    keep_steps: bool = False
    """Whether the model of every step stays, in `tasks/step-NN/`; else each goes once a later one
    has passed.
    """

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if isinstance(self.schedule, str):
            return self
        if any(later <= one for one, later in zip(self.schedule, self.schedule[1:], strict=False)):
            raise ValueError("schedule: the sparsities of a list must rise")
        if self.steps not in (None, len(self.schedule)):
            raise ValueError(
                f"steps ({self.steps}) and a schedule of {len(self.schedule)} sparsities; leave"
                " steps out"
            )
        return self

    def in_steps(self, sparsity: float) -> InSteps:
        """The passes on the way to a sparsity."""
        return InSteps(self._sparsities(sparsity), self.gate, self.keep_steps)

    def _sparsities(self, final: float) -> tuple[float, ...]:
        """s_t, t = 1 ... T."""
        if not isinstance(self.schedule, str):
            return tuple(self.schedule)
        count, power = self.steps or DEFAULT_STEPS, 3 if self.schedule == "cubic" else 1
        parts = [1 - (1 - step / count) ** power for step in range(1, count)]
        return (*(final * part for part in parts), final)

    @property
    def selector(self) -> MethodOptions:
        """The method of every pass."""
        return self.inner

    @property
    def needs_rows(self) -> bool:
        """As the method of every pass."""
        return self.inner.needs_rows

    @property
    def comparable_scores(self) -> bool:
        """As the method of every pass."""
        return self.inner.comparable_scores
