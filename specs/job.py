"""The job: every option of a run, with its unit and its bounds.

All models are frozen and closed: an unknown key is an error, and a validated job never changes.
A field's docstring is its documentation in the JSON schema.
"""

import os
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rayprune.specs.allocation import CurvesAllocation
from rayprune.specs.budget import TARGETS, BudgetSpec
from rayprune.specs.calibration import CalibrationSpec
from rayprune.specs.cluster import ClusterSpec, ParallelSpec
from rayprune.specs.evaluation import EvaluationSpec
from rayprune.specs.export import ExportSpec
from rayprune.specs.methods import MethodSpec
from rayprune.specs.methods.options import InSteps
from rayprune.specs.methods.ranking.stat import StatOptions
from rayprune.specs.recipe import RecipeName
from rayprune.specs.section import FloatType, Section
from rayprune.specs.sizes import ByteSize
from rayprune.specs.texts import MOST_SAMPLES, PathMarker, WindowsSpec
from rayprune.specs.training import HOW_TRAINED, RecoverSpec, TrainingSpec

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ModelPath = Annotated[str, Field(min_length=1), PathMarker(or_name=True)]


class ModelSpec(Section):
    """The model to prune."""

    path: ModelPath
    """Folder with `config.json`, the tokenizer and safetensors weights; or, where there is no such
    folder, OWNER/NAME on the Hugging Face Hub: it is fetched into the Hub's cache.
    """
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Branch, tag or commit on the Hub; null: main. The commit is part of the result."""
    dtype: FloatType = "auto"
    """Floating-point type of the forward passes; `auto`: the checkpoint's own on a GPU (float32 in
    place of a bfloat16 that it has no instructions for), float32 on a CPU.
    """

    @property
    def on_hub(self) -> bool:
        """Whether it is still a name, not a folder."""
        return not os.path.isabs(self.path)

    @model_validator(mode="after")
    def _revision_of_a_name(self) -> Self:
        if self.revision is not None and not self.on_hub:
            raise ValueError(
                f"revision {self.revision!r} is of a name on the Hub, but path is a folder: leave"
                " one of them out"
            )
        return self


class CorrectionSpec(Section):
    """The least-squares correction that is folded into the next weight."""

    damping: Annotated[float, Field(ge=0.0, le=1e6)] | Literal["held-out"] = "held-out"
    """Ridge added to the statistic, as a multiple of its mean diagonal; `held-out`: the candidate
    with the least held-out error.
    """
    candidates: tuple[Annotated[float, Field(gt=0.0, le=1e6)], ...] = Field(
        default=(1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), min_length=1, max_length=32
    )
    """Damping values tried when `damping` is `held-out`, as multiples of the mean diagonal; from
    the largest down, until the held-out error rises.
    """
    drift: float = Field(default=0.0, ge=0.0, le=1.0)
    """Fraction of what the residual stream has drifted from the dense model's that every block's
    correction also makes up for.
    """

    @model_validator(mode="after")
    def _candidates_are_tried(self) -> Self:
        if self.damping != "held-out" and self.given("candidates"):
            raise ValueError(
                f"candidates: none is tried with damping: {self.damping:g}; leave one of them out"
            )
        return self


class MemorySpec(Section):
    """What a worker may hold."""

    worker: ByteSize | None = None
    """Memory of one worker in bytes (or `8GiB`); activations are recomputed instead of kept when
    they do not fit. null: no limit.
    """
    checkpoint_layers: int = Field(default=4, ge=0, le=10_000)
    """Hidden states are saved every so many layers, so that a restart replays fewer layers; 0:
    never.
    """


class JobSpec(Section):
    """One pruning job."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    recipe: RecipeName | None = None
    """A bundle of defaults for an aim, over which all that the job says itself wins; null: none."""
    model: ModelSpec
    calibration: CalibrationSpec
    budget: BudgetSpec = BudgetSpec()
    method: MethodSpec = StatOptions()
    correction: CorrectionSpec = CorrectionSpec()
    parallel: ParallelSpec = ParallelSpec()
    memory: MemorySpec = MemorySpec()
    export: ExportSpec = ExportSpec()
    recover: RecoverSpec | None = None
    evaluation: EvaluationSpec | None = None
    cluster: ClusterSpec = ClusterSpec()

    @model_validator(mode="after")
    def _probe_fits(self) -> Self:
        if self.budget.kv_groups == "auto" and self.budget.probe_samples > self.calibration.samples:
            raise ValueError(
                f"budget.probe_samples ({self.budget.probe_samples}) must not exceed"
                f" calibration.samples ({self.calibration.samples})"
            )
        has_own_way = self.method.removes_layers or self.steps or self.method.cuts_first
        if self.budget.drop_layers is not None and has_own_way:
            raise ValueError(
                f"budget.drop_layers: method {self.method.name} has a way of its own; leave it out,"
                " or drop the layers in a run before, without a target"
            )
        if self.method.trainings and (self.budget.per_layer or self.parallel.placement == "layers"):
            raise ValueError(
                f"method {self.method.name} leaves out budget.per_layer and parallel.placement: it"
                " has one way of its own"
            )
        if self.method.trains_layers_alone:
            wanted = max(training.samples or 0 for training in self.method.trainings)
            if wanted > self.calibration.samples:
                raise ValueError(
                    f"method.training.samples ({wanted}) must not exceed calibration.samples"
                    f" ({self.calibration.samples})"
                )
        if self.budget.allocation.name == "threshold" and not self.method.comparable_scores:
            raise ValueError(
                f"budget.allocation: threshold: the scores of {self.method.name} cannot be compared"
                " between layers; use curves"
            )
        if self.correction.drift and self.parallel.effective_propagation == "dense":
            raise ValueError(
                "correction.drift: on the dense path nothing drifts; set it to 0, or"
                " parallel.propagation to pruned or refit"
            )
        if self.parallel.placement == "shards" and self.parallel.workers > self.calibration.shards:
            raise ValueError(
                f"parallel.workers ({self.parallel.workers}) must not exceed calibration.shards"
                f" ({self.calibration.shards}): a shard is the unit of work; raise"
                " calibration.shards"
            )
        return self

    @model_validator(mode="after")
    def _something_reads_it(self) -> Self:
        units = ("kv_groups", "experts", "probe_samples", "probe_layers")
        if self.method.removes_layers and (
            given := [
                *(f"budget.{name}" for name in self.budget.given(*units)),
                *(["correction"] if self.correction != CorrectionSpec() else []),
            ]
        ):
            raise ValueError(
                f"method {self.method.name} removes whole layers; leave out {given[0]}"
            )
        if self.budget.allocation.name != "threshold":
            chosen_by = self.method.selector
            why = "budget.allocation: threshold alone reads it"
            chosen_by.leave_out(why, *chosen_by.read_by_threshold)
        if not self.budget.per_layer:
            self.export.leave_out("without budget.per_layer all layers are alike", "pad")
        return self

    @model_validator(mode="after")
    def _transport_fits(self) -> Self:
        if self.parallel.transport != "collective":
            return self
        unread = {
            "cluster.executor: in-process": self.cluster.executor == "in-process",
            f"method {self.method.name}": self.method.removes_nothing
            or (self.method.masks is not None and self.method.cuts_first is None),
        }
        if given := [what for what, is_given in unread.items() if is_given]:
            raise ValueError(
                f"parallel.transport: collective: with {given[0]} workers exchange no statistics of"
                " groups; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_removed(self) -> Self:
        if not self.method.removes_nothing:
            return self
        if self.recover is None:
            raise ValueError(
                f"method {self.method.name} removes nothing, and without a section recover nothing"
                " is trained: add recover, or choose a method"
            )
        given = {
            "budget": self.budget != BudgetSpec(),
            "correction": self.correction != CorrectionSpec(),
            "parallel.placement": self.parallel.placement != "shards",
        }
        if names := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"method {self.method.name} removes nothing; leave out {names[0]}")
        return self

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if (steps := self.steps) is None:
            return self
        others = [name for name in TARGETS[1:] if getattr(self.budget, name) is not None]
        if others or self.budget.sparsity is None:
            given = f"leave out budget.{others[0]}" if others else "give budget.sparsity"
            raise ValueError(
                f"method {self.method.name}: its steps are fractions of the decoder's parameters:"
                f" {given}"
            )
        if steps.sparsities[-1] != self.budget.sparsity:
            raise ValueError(
                f"method.schedule: ends at {steps.sparsities[-1]:g}, but budget.sparsity is"
                f" {self.budget.sparsity:g}; give both the same"
            )
        if self.export.dtype != "auto" and self.model.dtype == "auto":
            raise ValueError(
                f"method {self.method.name} with export.dtype: steps read what the ones before have"
                " written; set model.dtype too"
            )
        return self

    @model_validator(mode="after")
    def _own_samples_fit(self) -> Self:
        if self.steps and self.more_own_samples:
            raise ValueError(
                f"recover.own_samples: method {self.method.name} measures its gate on these"
                " windows; leave it out, or raise recover.samples"
            )
        trained, seen = self.recover and self.recover.samples, self.calibration.samples
        if self.more_own_samples and trained and trained < seen:
            raise ValueError(
                f"recover.own_samples: they lie behind windows that pruning has seen, of which"
                f" recover.samples takes {trained} of {seen}; leave recover.samples out"
            )
        if self.more_own_samples + max(trained or 0, seen) > MOST_SAMPLES:
            raise ValueError(
                f"recover.own_samples: with the others more than {MOST_SAMPLES:,} windows; lower it"
            )
        return self

    @model_validator(mode="after")
    def _masks_fit(self) -> Self:
        if self.method.masks is None:
            return self
        alone, budget = self.method.cuts_first is None, self.budget
        unread = {
            "budget": (alone and budget != BudgetSpec(), "without method.inner no unit goes"),
            "budget.per_layer": (budget.per_layer, "layers that differ in size get no zeros"),
            "budget.latency_table": (
                budget.latency_table is not None,
                "its times are those of matrices without zeros",
            ),
            "correction": (
                alone and self.correction != CorrectionSpec(),
                "method.damping is its own",
            ),
            "recover": (self.recover is not None, "a training would fill the zeros"),
            "parallel.placement: layers": (
                self.parallel.placement == "layers",
                "zeros are made layer after layer",
            ),
        }
        for option, (given, reason) in unread.items():
            if given:
                raise ValueError(f"method {self.method.name}: {reason}; leave out {option}")
        return self

    @property
    def steps(self) -> InSteps | None:
        """The passes over the model, where they are several."""
        return self.method.in_steps(self.budget.sparsity or 0.0)

    @property
    def trains_on_ranks(self) -> bool:
        """Whether a gang of ranks trains the whole model, before the cut or after it."""
        return (self.recover is not None and self.recover.scope == "model") or (
            len(self.method.trainings) > 0 and not self.method.trains_layers_alone
        )

    @property
    def sizes_differ(self) -> bool:
        """Whether layers are written in sizes of their own."""
        return self.budget.per_layer and not self.export.pad

    @property
    def converted(self) -> tuple[str, ...]:
        """Targets that get a folder of their own beside the model's."""
        own = ("gguf", "gguf-q8_0", *(["vllm"] if self.sizes_differ else []))
        return tuple(target for target in dict.fromkeys(self.export.target) if target in own)

    @property
    def own_dtype(self) -> FloatType:
        """Type in which the model writes text of its own; `auto`: as of its forward passes."""
        own = self.calibration.own
        return self.model.dtype if own is None or own.dtype == "auto" else own.dtype

    @property
    def dtypes(self) -> dict[str, str]:
        """Types that something is computed in, by the option of each."""
        own, trainings = self.calibration.own, self._trainings
        return {
            "model.dtype": self.model.dtype,
            **({"calibration.own.dtype": own.dtype} if own else {}),
            **{f"{name}.dtype": training.dtype for name, training in trainings.items()},
        }

    @property
    def more_own_samples(self) -> int:
        """Windows of the model's own text that a recovery takes beyond the calibration's."""
        return self.recover.own_samples if self.recover and self.calibration.own else 0

    @property
    def most_read(self) -> tuple[str, int]:
        """The option that takes most windows of the calibration text, and how many: the
        calibration, or a training that takes more.
        """
        read = {"calibration": self.calibration.samples} | self.trained_samples
        return max(read.items(), key=lambda taken: taken[1])

    @property
    def windows_read(self) -> int:
        """Windows that are read of the calibration text."""
        return self.most_read[1]

    @property
    def trained_samples(self) -> dict[str, int]:
        """Windows of the calibration text that trainings take, by the option of each; those that
        take all windows of the calibration, or another text, are left out.
        """
        return {name: each.samples for name, each in self._trainings.items() if each.samples}

    @property
    def _trainings(self) -> dict[str, TrainingSpec]:
        """By the option of each."""
        options = ((f"method.{name}", value) for name, value in self.method)
        trainings = {name: value for name, value in options if isinstance(value, TrainingSpec)}
        return trainings | ({"recover": self.recover} if self.recover else {})

    @property
    def recovery_text(self) -> WindowsSpec:
        """What a recovery is trained on, as many windows as it takes.

        Raises:
            ValueError: the job has none.
        """
        if self.recover is None:
            raise ValueError("the job has no section recover")
        samples = self.recover.samples or self.calibration.samples
        return self.recover.text or self.calibration.model_copy(update={"samples": samples})

    @property
    def recovery_option(self) -> str:
        """Where the job says what a recovery is trained on."""
        return "recover.text" if self.recover and self.recover.text else "calibration"

    @property
    def divergence_windows(self) -> int:
        """Calibration windows on which divergences are measured for an allocation, at least one of
        every text; 0: none.
        """
        allocation, calibration = self.budget.allocation, self.calibration
        if not isinstance(allocation, CurvesAllocation):
            return 0
        return min(max(allocation.samples, len(calibration.weights)), calibration.samples)

    @property
    def drop_windows(self) -> int:
        """Calibration windows on which is measured which layers go; 0: none."""
        measured = isinstance(self.budget.drop_layers, int)
        return min(self.budget.drop_samples, self.calibration.samples) if measured else 0

    @property
    def gradient_windows(self) -> int:
        """Calibration windows on which gradients of the loss are measured; 0: none."""
        return min(self.method.selector.gradient_windows, self.calibration.samples)

    @property
    def selects_first(self) -> bool:
        """Whether the units that stay are chosen in a pass of their own, before the sweep."""
        return self.method.selects_first or self.parallel.effective_propagation == "refit"

    def result_part(self) -> dict[str, object]:
        """The options the pruned model depends on: all but where, with how many workers, how it is
        judged and what is done with it.
        """
        left_out: Any = {
            "cluster": True,
            "evaluation": True,
            "memory": True,
            "recipe": True,  # what it gives stands in the other fields
            "recover": True,
            "parallel": {"workers", "transport", "retries", "step_seconds"},
        }
        left_out["method"] = {"training": HOW_TRAINED, "gates": HOW_TRAINED}
        document: dict[str, object] = self.model_dump(mode="json", exclude=left_out)
        return document
