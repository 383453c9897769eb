"""What a worker keeps in memory: chosen by the plan, obeyed by the worker."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPlan:
    """Where a worker leaves what it will need again. The result does not depend on it."""

    keep_inputs: bool = True
    """Whether consumer inputs are kept until the cut is applied, or computed again."""
    spill_hidden: bool = False
    """Whether hidden states lie in a file instead of memory."""
    spill_statistics: bool = False
    """Whether statistics lie in a file instead of memory."""
    layers_per_chunk: int = 1
    """Placement `layers`: layers a worker holds at a time."""
