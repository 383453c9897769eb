"""What a worker keeps and where: decided by the plan, obeyed by the workers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPlan:
    """How a worker stays within `memory.worker`. Results do not depend on it."""

    keep_inputs: bool = True
    """Consumer inputs are kept from a statistic to the cut that follows, else computed again."""
    spill_hidden: bool = False
    """Hidden states lie in files that are mapped, else in memory."""
    spill_statistics: bool = False
    """Statistics and factors lie in files that are mapped, else in memory."""
    keep_activations: bool = False
    """A training that leaves it open keeps the activations inside all layers for the backward pass,
    else computes them again.
    """
    free_bytes: int = 0
    """What is freed stays with the worker, for what it allocates next, up to so many bytes."""
    layers_per_chunk: int = 1
    """`layers` placement: consecutive layers a worker works on at the same time."""
