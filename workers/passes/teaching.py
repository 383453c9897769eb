"""What a model says of the next tokens, kept in files: of every token its likeliest successors one
by one, all others together. The model goes through its layers one at a time.

Letters: N windows, T tokens, K likeliest successors, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rayprune.specs.errors import VerificationError
from rayprune.workers.machine.blocks import EVALUATED_AT_ONCE
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.evaluate import behind_layers
from rayprune.workers.passes.sealed import read_sealed, write_sealed
from rayprune.workers.store.files import read_manifest
from rayprune.workers.store.layout import taught_file

_IDS, _LOGARITHMS = "tokens", "log_probabilities"


@torch.inference_mode()
def teach(
    model: Callable[[], StreamedModel],
    windows_NT: Tensor,
    first: int,
    top: int,
    folder: Path,
    belongs: str,
) -> None:
    """Write a file for each window: the `top` likeliest successors of every token, int32, and the
    logarithms of their probabilities, fp32 (T, K). What lies there and is whole stays.

    `first` is the number of the first of these windows; `belongs` names the task. Numerics: logits
    as computed, logarithms in fp32.
    """
    missing = [
        number
        for number in range(len(windows_NT))
        if read_sealed(taught_file(folder, first + number), belongs) is None
    ]
    if not missing:
        return
    streamed = model()
    for group in torch.tensor(missing).split(EVALUATED_AT_ONCE):
        batches = behind_layers(streamed, windows_NT[group])
        for number, batch in zip(group.tolist(), batches, strict=True):
            logits_TV = streamed.logits(windows_NT[number][None], batch.hidden_BTD)[0].float()
            found = torch.log_softmax(logits_TV, -1).topk(top)
            tensors = {_IDS: found.indices.to(torch.int32), _LOGARITHMS: found.values}
            write_sealed(taught_file(folder, first + number), tensors, belongs)


@dataclass(frozen=True)
class Taught:
    """A folder of such files, whose task is done."""

    folder: Path
    belongs: str

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """The likeliest successors of a window's tokens, int64, and their logarithms, fp32 (T, K).

        Raises:
            VerificationError: the file is not as it was written.
        """
        file = taught_file(self.folder, number)
        if (found := read_sealed(file, self.belongs)) is None:
            raise VerificationError(
                f"{file}: is missing or damaged; run the same command again, it is computed anew"
            )
        return found[_IDS].to(torch.int64), found[_LOGARITHMS]


def taught(folder: Path) -> Taught:
    """What a finished task has written.

    Raises:
        VerificationError: it is not finished.
    """
    if (done := read_manifest(folder)) is None:
        raise VerificationError(f"{folder}: is not finished; run the same command again")
    return Taught(folder, done.fingerprint)
