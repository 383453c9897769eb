"""How weights are trained: the options that every training stage has."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayprune.specs.section import Section, Seed
from rayprune.specs.texts import WindowsSpec

Norm = Literal["l1", "l2"]
Loss = Literal["distillation", "lm"]
"""What a training of the whole model minimises: the divergence from the dense model's next-token
distribution, or next-token prediction.
"""
HOW_TRAINED = {"micro_batch", "activation_checkpointing", "checkpoint_steps"}
"""Options of a training that its result does not depend on, but for rounding; they may change
between attempts.
"""


class TrainingSpec(Section):
    """Gradient steps on the calibration text, on as many ranks as there are workers."""

    samples: Annotated[int, Field(ge=1)] | None = None
    """Windows of the calibration text that are trained on; null: `calibration.samples`."""
    epochs: float = Field(default=1.0, gt=0.0, le=1000.0)
    """How often each window is used."""
    batch: int = Field(default=8, ge=1, le=65536)
    """Windows per step, over all ranks."""
    micro_batch: int = Field(default=1, ge=1, le=4096)
    """Windows that one rank computes together."""
    learning_rate: float = Field(default=1e-4, gt=0.0, le=10.0)
    """Largest rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up, to zero at the end."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Part of the steps in which the rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=10.0)
    """Of AdamW."""
    clip: float = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient; larger ones are scaled down."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations in forward and backward passes; weights that are trained are
    kept in float32.
    """
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Activations inside a layer are computed again in the backward pass instead of kept; `auto`:
    kept where `memory.worker` is given and they fit.
    """
    checkpoint_steps: int = Field(default=50, ge=1)
    """Weights and optimizer state are saved every so many steps; a training that was cut off goes
    on from there.
    """
    seed: Seed = 0
    """Seed of the order of the windows."""


class LoraSpec(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) on every linear map of the layers; merged into the
    weights on export.
    """

    rank: int = Field(default=16, ge=1, le=4096)
    """Rank of an adapter's two factors."""
    alpha: int = Field(default=32, ge=1)
    """An adapter's product counts alpha / rank times."""


class HeldOutSpec(Section):
    """Windows that are kept out of a training, on which the loss is measured in its course; the
    state in which it was least is the result.
    """

    windows: int = Field(default=2, ge=1, le=100_000)
    """Windows of each text that are kept out, its last ones."""
    every: int = Field(default=10, ge=1)
    """Steps from one measurement to the next; the first is before the training, the last behind
    it.
    """
    patience: Annotated[int, Field(ge=1)] | None = None
    """Measurements in a row without a better one after which the training ends; null: it goes on to
    its last step.
    """


class RecoverSpec(TrainingSpec):
    """Training of the pruned model towards the dense one."""

    learning_rate: Annotated[float, Field(gt=0.0, le=10.0)] | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Largest rate of AdamW; `auto`: by the size of the dense model, 1e-3 for adapters and 3e-4 for
    all weights up to 135M parameters, falling with the root of the size beyond.
    """
    text: WindowsSpec | None = None
    """What is trained on; null: `calibration`'s text."""
    own_samples: int = Field(default=0, ge=0, le=1_000_000)
    """With `calibration.own`: windows of the model's own text behind those of the calibration,
    which no pruning has seen.
    """
    scope: Literal["model", "layer"] = "model"
    """`model`: all layers are trained together, on ranks that hold the model; `layer`: every layer
    alone, towards what the dense model's makes of the same input, many at a time, in the memory of
    one layer.
    """
    lora: LoraSpec | None = None
    """Train adapters alone, beside weights that are held in `dtype`; null: train all weights."""
    loss: Loss = "distillation"
    """`distillation`: the dense model's next-token distribution is the goal (KL divergence); `lm`:
    next-token prediction.
    """
    hidden: float = Field(default=0.0, ge=0.0)
    """`distillation`: weight of the squared relative distance between the last hidden states."""
    teacher_top: Annotated[int, Field(ge=1, le=65536)] | None = None
    """`distillation`: of the dense model's distribution so many likeliest tokens count one by one,
    all others together. They are computed once, layer by layer, and kept in files, so that the
    dense model is not there in the training; null: it is, and all tokens count.
    """
    held_out: HeldOutSpec | None = None
    """Windows that the training is measured on; null: its last step is the result."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.text and self.samples is not None:
            raise ValueError(
                "samples beside text: text.samples says how many windows are trained on; leave"
                " samples out"
            )
        if self.text and self.own_samples:
            raise ValueError(
                "own_samples beside text: text says what is trained on; put the model's own text"
                " into text.mix, or leave one of them out"
            )
        if self.scope == "layer":
            unread = ("loss", "hidden", "teacher_top", "activation_checkpointing")
            if names := self.given(*unread):
                raise ValueError(
                    f"{names[0]} with scope: layer: it means nothing to a layer that is trained"
                    " alone, towards the dense layer's output; leave it out, or set scope: model"
                )
        if self.loss == "lm":
            given = {"hidden": self.hidden > 0, "teacher_top": self.teacher_top is not None}
            if names := [name for name, is_given in given.items() if is_given]:
                raise ValueError(
                    f"{names[0]} with loss: lm: only a distillation has a teacher; leave it out, or"
                    " set loss: distillation"
                )
        if self.hidden and self.teacher_top is not None:
            raise ValueError(
                "hidden beside teacher_top: the dense model's hidden states are not kept; leave one"
                " of them out"
            )
        return self
