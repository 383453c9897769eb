"""What a table of measured times predicts of the shapes that a plan leaves open."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayprune.orchestrator.planning.shapes import Shape
from rayprune.specs.job import JobSpec
from rayprune.specs.latency import load_latency
from rayprune.workers.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class PredictedSpeed:
    """Tokens per second of one measured pass."""

    what: str
    """The pass in words."""
    dense: float
    shapes: tuple[float, ...]
    """Of every open shape, in their order."""

    def of(self, place: int) -> "PredictedSpeed":
        """That of one shape."""
        return PredictedSpeed(self.what, self.dense, (self.shapes[place],))


def predicted_speeds(
    job: JobSpec, checkpoint: Checkpoint, shapes: Sequence[Shape]
) -> tuple[PredictedSpeed, ...]:
    """For every pass of `budget.latency_table`, how fast the dense model and the shapes are.

    Padded layers are as wide as the widest.
    """
    if job.budget.latency_table is None:
        return ()
    numbers, pad = range(checkpoint.num_layers), job.export.pad
    dense = [checkpoint.model.units for _ in numbers]
    written = [[shape.written_in(layer, pad) for layer in numbers] for shape in shapes]
    return tuple(
        PredictedSpeed(
            str(timed),
            timed.per_second(timed.model(dense)),
            tuple(timed.per_second(timed.model(layers)) for layers in written),
        )
        for timed in load_latency(job.budget.latency_table).passes
    )
