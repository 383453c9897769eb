"""What came of the tokens that were routed to experts."""

from collections.abc import Sequence
from typing import Any

from rayprune.specs.job import FEW_TOKENS
from rayprune.workers.model.description import Model
from rayprune.workers.store.files import Manifest


def few_tokens(layers: Sequence[Manifest], model: Model) -> list[str]:
    """A warning if some experts have seen too few tokens to be corrected safely."""
    widths = {name: member.num_units for name, member in model.members.items()}
    per_channel: dict[tuple[int, str], float] = {}
    for number, layer in enumerate(layers):
        groups: Any = layer.info["groups"]
        for name, facts in groups.items():
            if model.members[name].expert is not None:
                per_channel[number, name] = facts["tokens"] / widths[name]
    few = {place: each for place, each in per_channel.items() if each < FEW_TOKENS}
    if not few:
        return []
    (number, name), least = min(few.items(), key=lambda item: item[1])
    return [
        f"{len(few)} of {len(per_channel)} experts saw fewer than {FEW_TOKENS} tokens per channel"
        f" (layer {number}, expert {model.members[name].expert}: {least:.1f}): they are corrected"
        " only as far as held-out tokens bear it out; take more calibration tokens"
    ]
