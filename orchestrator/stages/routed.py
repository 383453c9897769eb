"""What came of the tokens that were routed to experts."""

from collections.abc import Sequence
from typing import Any

from rayprune.specs.calibration import FEW_TOKENS
from rayprune.workers.model.description import Model
from rayprune.workers.store.files import Manifest


def few_tokens(layers: Sequence[Manifest], model: Model) -> list[str]:
    """A warning if some experts have seen too few tokens to be corrected safely."""
    experts = {n: member for n, member in model.members.items() if member.expert is not None}
    per_channel: dict[tuple[int, str], float] = {}
    for number, layer in enumerate(layers):
        groups: Any = layer.info["groups"]
        for name, facts in groups.items():
            if name in experts:
                per_channel[number, name] = facts["tokens"] / experts[name].num_units
    few = {place: each for place, each in per_channel.items() if each < FEW_TOKENS}
    if not few:
        return []
    (number, name), least = min(few.items(), key=lambda item: item[1])
    return [
        f"{len(few)} of {len(per_channel)} experts saw fewer than {FEW_TOKENS} tokens per channel"
        f" (layer {number}, expert {experts[name].expert}: {least:.1f}): they are corrected"
        " only as far as held-out tokens bear it out; take more calibration tokens"
    ]
