"""A whole model writes in vLLM: the engine computes, in a process of its own, the numbers of each
document choose which token follows, as in `rayprune.workers.network.sampling`.

Letters: B documents, T tokens of a prompt, L tokens that are written, V vocabulary.
"""

import atexit
import os
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayprune.workers.network.sampling import Dialogue, Rules, chosen
from rayprune.workers.stock import refused_by

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is the text's
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all workers take one core
# which vLLM reads when it is imported
import vllm
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

REMEDY = "set calibration.own.engine: transformers"


class VllmAuthor:
    """A model that writes in vLLM, on one device."""

    def __init__(
        self, model: Path, dtype: torch.dtype, length: int, documents: int, cache_bytes: int
    ) -> None:
        """Load it, for so many documents at a time of so many tokens, prompts among them.

        Raises:
            ModelError: vLLM cannot compute it.
        """
        self._model = model
        with refused_by("vLLM", model, REMEDY):
            self._engine = vllm.LLM(
                model=str(model),
                dtype=str(dtype).removeprefix("torch."),
                skip_tokenizer_init=True,
                enforce_eager=True,
                async_scheduling=False,
                max_model_len=length,
                max_num_seqs=documents,
                kv_cache_memory_bytes=cache_bytes,
                logits_processors=[f"{__name__}:Drawn"],
            )
        close = weakref.finalize(self, self._engine.llm_engine.engine_core.shutdown)
        atexit.register(close)  # before multiprocessing waits for its processes to end

    def sampled(self, prompts_BT: Tensor, draws_BL: Tensor, rules: Rules) -> Tensor:
        """As `rayprune.workers.network.sampling.sampled`, but for the rounding of products.

        Raises:
            ModelError: vLLM cannot compute it, or a probability is not finite.
        """
        wanted = [
            vllm.SamplingParams(
                temperature=0.0,
                max_tokens=len(draws_L),
                ignore_eos=True,
                detokenize=False,
                extra_args={"rules": asdict(rules), "draws": draws_L},
            )
            for draws_L in draws_BL.tolist()
        ]
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in prompts_BT.tolist()]
        with refused_by("vLLM", self._model, REMEDY):
            found = self._engine.generate(prompts, wanted, use_tqdm=False)
        return torch.tensor([list(document.outputs[0].token_ids) for document in found])


class _Document:
    """One that is being written."""

    def __init__(self, params: vllm.SamplingParams, output_ids: list[int]) -> None:
        assert params.extra_args
        self.rules = Rules(**params.extra_args["rules"])
        self.draws: list[float] = params.extra_args["draws"]
        self._dialogue = Dialogue(self.rules)
        self.written = output_ids
        """Grows in the engine."""
        self._decided = [self._dialogue.follows(token) for token in output_ids]

    @property
    def step(self) -> int:
        """Tokens that are written."""
        return len(self.written)

    def decide(self, token: int) -> int:
        """The token that follows where this one is drawn; the same when it is asked again."""
        if self.step == len(self._decided):
            self._decided.append(self._dialogue.follows(token))
        return self._decided[self.step]


class Drawn(LogitsProcessor):  # type: ignore[misc]
    """Leaves of every document's scores one token, which the search for the best then takes."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._documents: dict[int, _Document] = {}

    def is_argmax_invariant(self) -> bool:
        """It is not."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow which document is in which row."""
        process_dict_updates(
            self._documents, batch_update, lambda params, _, written: _Document(params, written)
        )

    def apply(self, logits: Tensor) -> Tensor:
        """One token for every row, (B, V)."""
        rows = sorted(self._documents)
        documents = [self._documents[row] for row in rows]
        if not documents:
            return logits
        draws = [document.draws[document.step] for document in documents]
        draws_B = torch.tensor(draws, dtype=torch.float64)
        tokens = chosen(logits[rows], draws_B, documents[0].rules)
        decided = [
            document.decide(int(token)) for document, token in zip(documents, tokens, strict=True)
        ]
        logits[rows] = -torch.inf
        logits[rows, decided] = 0.0
        return logits
