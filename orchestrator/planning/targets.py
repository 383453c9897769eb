"""Whether the engines that a job names can hold what it makes, before it is made."""

from collections.abc import Mapping, Sequence

from rayprune.orchestrator.planning.shapes import Shape
from rayprune.specs.job import JobSpec
from rayprune.workers.model.checkpoint import Checkpoint
from rayprune.workers.model.folder import read_json
from rayprune.workers.texts.pieces import TOKENIZER, vocabulary


def check_targets(job: JobSpec, checkpoint: Checkpoint, shapes: Sequence[Shape]) -> None:
    """Check every target of the job with every shape that is open.

    Raises:
        SpecError: an engine cannot hold it; the ways that are left.
    """
    for shape in shapes:
        there = shape.remaining(checkpoint.num_layers)
        layers = _uneven(job, checkpoint, [shape.kept_in(layer) for layer in there])
        export = job.export
        checkpoint.check_targets(export.target, there, layers, export.form, export.dtype)


def _uneven(
    job: JobSpec, checkpoint: Checkpoint, layers: Sequence[Mapping[str, int]]
) -> list[Mapping[str, int]]:
    """The layers; where sizes will differ but are not known yet, the last one with one KV group or
    channel more than the rest, or less.
    """
    if not job.sizes_differ or len(layers) < 2:
        return list(layers)
    model, asked = checkpoint.model, job.budget.kv_groups
    free = [
        group.name
        for group in model.groups
        if not group.fixed and (group.kind == "ffn" or asked == "auto")
    ]
    last = {
        name: count + (1 if count < model.units[name] else -1) if name in free else count
        for name, count in layers[-1].items()
    }
    return [*layers[:-1], last]


def check_tokenizer(job: JobSpec, checkpoint: Checkpoint) -> None:
    """Check that llama.cpp has the model's tokenizer, where the job asks for its file.

    Raises:
        ModelError: it has not, or there is no `tokenizer.json`.
    """
    if any(target.startswith("gguf") for target in job.converted):
        file = checkpoint.path / TOKENIZER
        vocabulary(read_json(file), checkpoint.model.vocabulary, str(file))
