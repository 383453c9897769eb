"""What stages take and return: a model, and what is known of it in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayprune.orchestrator.planning.plan import Plan
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.store.files import Manifest, fingerprint, record_of
from rayprune.workers.store.training_stage import Goal


@dataclass(frozen=True)
class ModelAt:
    """A model in a folder, with digests of its values."""

    checkpoint: Checkpoint
    outer_digest: str
    """Of the tensors outside the layers."""
    layer_digests: tuple[str, ...]
    """Of every layer."""
    identified: bool = False
    """Whether the digests are those that workers take of the values they read."""

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.checkpoint.path

    @property
    def identity(self) -> str:
        """Of config, headers and all values."""
        return self.up_to(len(self.layer_digests) - 1)

    def up_to(self, layer: int) -> str:
        """Of config, headers, and the values that hidden states behind a layer depend on."""
        return fingerprint(
            {
                "headers": self.checkpoint.identity,
                "outer": self.outer_digest,
                "layers": self.layer_digests[: layer + 1],
            }
        )


def made_model(folder: Path, made: Manifest) -> ModelAt:
    """A model that a task has written."""
    checkpoint = open_checkpoint(folder)
    return ModelAt(checkpoint, made.digest, (made.digest,) * checkpoint.num_layers)


@dataclass(frozen=True)
class Subject:
    """A model, the plan to prune it by, and what is known of it so far."""

    plan: Plan
    model: ModelAt
    tokens: Manifest
    """The text that goes through the model: that of the calibration."""
    texts: tuple[str, ...]
    """Digests of the files it was read from."""
    recovery_tokens: Manifest | None = None
    """The text that a recovery is trained on."""
    gradients: Manifest | None = None
    """The gradients that activations are scaled by, where the method asks for them."""
    selections: tuple[Manifest, ...] | None = None
    """The units that stay, where they were chosen before a training."""
    numbers: Sequence[int] | None = None
    """The numbers that the model's layers have in the original; None: the same."""
    goal: Goal | None = None
    """What the layers are to give, where they are trained alone after the cut."""

    def up_to(self, layer: int) -> dict[str, str]:
        """What activations of the model within a layer depend on."""
        return {self.tokens.task: self.tokens.digest, "model": self.model.up_to(layer)}

    def all_of_it(self) -> dict[str, str]:
        """What anything that runs through the whole dense model depends on."""
        return self.up_to(len(self.model.layer_digests) - 1)

    @property
    def ranked_by(self) -> dict[str, str]:
        """What units are chosen by, besides activations and weights."""
        return {"gradients": self.gradients.digest} if self.gradients else {}


@dataclass(frozen=True)
class Measured:
    """One of several passes, and how close its model is to the original."""

    number: int
    """Counted from 1."""
    sparsity: float
    """What was to go, of the original's decoder parameters."""
    removed: float
    """What is gone of them."""
    decoder_parameters: int
    parameters: int
    perplexity: float
    """As a multiple of the original's."""
    divergence: float
    """From the original, in nats per token."""
    agreement: float
    """Fraction of tokens for which both expect the same next one most."""
    exceeded: tuple[str, ...]
    """The gate's bounds that it does not keep, in words; none: it has passed."""


@dataclass(frozen=True)
class Judged:
    """What an evaluation has measured of a model."""

    result: Mapping[str, Any]
    """Of all texts together."""
    texts: Mapping[str, Mapping[str, Any]]
    """Of each text, by name."""


@dataclass(frozen=True)
class Pruned:
    """What came of a pass over a model, or of several."""

    plan: Plan
    dense: ModelAt
    pruned: ModelAt
    recovered: ModelAt | None
    layers: Sequence[Mapping[str, Any]]
    """What was decided about the groups of every layer, in the last pass."""
    judged: Mapping[str, Judged] | None
    """What was measured of every model, by name, where there is a text for it."""
    samples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What every model goes on with after the job's prompts, by the model's name."""
    scores: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """What every model achieves in the job's tasks of lm-eval, by the model's name."""
    allocation: Mapping[str, Any] | None = None
    """How layers that differ got their sizes: what was predicted, measured and tried."""
    dropped: Mapping[str, Any] | None = None
    """Whole layers that have gone before, and what was measured to choose them."""
    steps: tuple[Measured, ...] = ()
    """The passes, where they are several; all but perhaps the last have passed the gate."""


def digests(tasks: Sequence[Manifest]) -> dict[str, str]:
    """What tasks have made, by name."""
    return {done.task: done.digest for done in tasks}


def file_digests(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of files, by name."""
    return {file.name: record_of(file).sha256 for file in files}
