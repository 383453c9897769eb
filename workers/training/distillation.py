"""Recovery from a teacher, the dense model: its next-token distribution is the goal.

The next-token loss fits the text, which brings the model away from the dense one on every other
text; the divergence from the dense model falls on all of them (docs/training.md).
Letters: B windows, T tokens, K likeliest successors, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.workers.model.description import Model
from rayprune.workers.training.objectives import Objective

LEAST_REST = 1e-6
"""Of a probability that is 1 less others in fp32: below it nothing but rounding is left."""
Successors = Callable[[int], tuple[Tensor, Tensor]]
"""Of a window, by its number: its tokens' likeliest successors, and their logarithms (T, K)."""


class Distillation(Objective):
    """KL of the teacher's next-token distribution from the student's, and how far the last hidden
    states lie apart.
    """

    def __init__(
        self, described: Model, teacher: nn.Module, teaching: Model, hidden: float
    ) -> None:
        """`teaching` describes the teacher; `hidden` weighs the squared relative distance of the
        last hidden states.
        """
        super().__init__(described)
        self._teaching = teaching
        self._teacher: Any = teacher.eval().requires_grad_(False)
        self._hidden = hidden

    def losses(self, model: Any, batch_BT: Tensor) -> dict[str, Tensor]:
        """KL(teacher, student), mean over tokens, and the distance."""
        states: list[Tensor] = []
        norms = [
            network.get_submodule(described.last_norm)
            for network, described in ((self._teacher, self._teaching), (model, self.described))
        ]
        handles = [
            norm.register_forward_hook(lambda _, args, out: states.append(out)) for norm in norms
        ]
        with torch.no_grad():
            log_p = torch.log_softmax(
                self._teacher(input_ids=batch_BT, use_cache=False).logits.float(), -1
            )
        log_q = torch.log_softmax(model(input_ids=batch_BT, use_cache=False).logits.float(), -1)
        for handle in handles:
            handle.remove()
        parts = {"divergence": (log_p.exp() * (log_p - log_q)).sum(-1).mean()}
        if self._hidden:
            goal, found = (state.float() for state in states)
            missed_BT, size_BT = ((each**2).sum(-1) for each in (found - goal, goal))
            least = torch.finfo(torch.float32).tiny  # of a token that the model makes nothing of
            parts["hidden"] = self._hidden * (missed_BT / size_BT.clamp_min(least)).mean()
        return parts


class TopDistillation(Objective):
    """The same without the teacher, from what it has said before: its likeliest tokens count one by
    one, all others as one.

    sum_k p_k (log p_k - log q_k) + r (log r - log s), r = 1 - sum_k p_k, s = 1 - sum_k q_k. It is
    at most the whole divergence: what the rest is made of is not compared.
    """

    def __init__(self, described: Model, successors: Successors) -> None:
        super().__init__(described)
        self._successors = successors
        self._numbers: Sequence[int] = ()

    def before_batch(self, numbers: Sequence[int]) -> None:
        """Note the windows."""
        self._numbers = numbers

    def losses(self, model: nn.Module, batch_BT: Tensor) -> dict[str, Tensor]:
        """KL(teacher, student), mean over tokens."""
        said = [self._successors(number) for number in self._numbers]
        ids_BTK, log_p_BTK = (
            torch.stack(tensors).to(batch_BT.device) for tensors in zip(*said, strict=True)
        )
        logits_BTV = model(input_ids=batch_BT, use_cache=False).logits.float()
        log_q_BTK = logits_BTV.gather(-1, ids_BTK) - logits_BTV.logsumexp(-1, keepdim=True)
        known_BT = (log_p_BTK.exp() * (log_p_BTK - log_q_BTK)).sum(-1)
        rest_p_BT, rest_q_BT = (
            (1 - log_BTK.exp().sum(-1)).clamp_min(LEAST_REST) for log_BTK in (log_p_BTK, log_q_BTK)
        )
        rest_BT = rest_p_BT * (rest_p_BT.log() - rest_q_BT.log())
        return {"divergence": (known_BT + rest_BT).mean()}
