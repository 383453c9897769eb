"""Steps that compare models: perplexity and divergence from the dense one, and what an encoder has
kept.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rayprune.workers.calibration import load_tokenizer
from rayprune.workers.machine.device import check_room
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.greedy import greedy
from rayprune.workers.network.load_check import loaded
from rayprune.workers.network.micro_batch import Store
from rayprune.workers.network.slicing import Cut
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.comparison import Texts, compared
from rayprune.workers.passes.divergence import Kept, divergences
from rayprune.workers.passes.encoding import cosines, embeddings, masked_losses
from rayprune.workers.passes.influence import influences
from rayprune.workers.passes.survey import stored_cut
from rayprune.workers.passes.teaching import teach
from rayprune.workers.steps.step import Droppable, Receipt, drop_all, step
from rayprune.workers.store.files import Task
from rayprune.workers.store.layout import (
    EVALUATION_TASK,
    MASKED,
    SURVEY_FILE,
    TOKENS,
    TOKENS_FILE,
    survey_file,
    survey_task,
)
from rayprune.workers.workbench import Workbench


class Judging:
    """How good a model is."""

    def __init__(self, bench: Workbench, before: Sequence[Droppable]) -> None:
        self._bench, self._before = bench, before
        self._job = bench.job

    @step
    def divergences(
        self, candidates: Sequence[Sequence[Kept]], owned: tuple[int, int]
    ) -> tuple[Receipt, None]:
        """For every candidate allocation its divergence from the dense model, on each of some of
        the calibration windows.
        """
        drop_all(self._before)
        windows = self._bench.spread_windows(self._job.divergence_windows, range(*owned))
        return {"sums": divergences(self._bench.model, windows, candidates, self._surveyed)}, None

    def _surveyed(self, layer: int, group: str, count: int) -> Cut:
        """The cut of a layer's group for so many units."""
        apart = self._bench.checkpoint.model.experts is not None
        name = survey_file(group) if apart else SURVEY_FILE
        return stored_cut(self._bench.scope.folder(survey_task(layer)) / name, group, count)

    @step
    def without_layers(
        self, candidates: Sequence[Sequence[int]], owned: tuple[int, int]
    ) -> tuple[Receipt, None]:
        """For every candidate, the layers that it leaves out, its divergence from the dense model,
        on each of some of the calibration windows.
        """
        drop_all(self._before)
        windows = self._bench.spread_windows(self._job.drop_windows, range(*owned))
        model = self._bench.model
        numbers = range(model.checkpoint.num_layers)
        kept: list[list[Kept]] = [
            [None if n in gone else {} for n in numbers] for gone in candidates
        ]

        def cut(layer: int, name: str, count: int) -> Cut:
            raise AssertionError("no layer loses a part")

        return {"sums": divergences(model, windows, kept, cut)}, None

    @step
    def influences(self, owned: tuple[int, int]) -> tuple[Receipt, None]:
        """How much every layer of the dense model turns the hidden states, on each of some of the
        calibration windows.
        """
        drop_all(self._before)
        windows = self._bench.spread_windows(self._job.drop_windows, range(*owned))
        return {"sums": influences(self._bench.model, windows)}, None

    @step
    def embed(self, model_path: str, owned: tuple[int, int]) -> tuple[Receipt, None]:
        """Cosines of some evaluation windows' embeddings under the encoder of a folder with those
        under the dense one.
        """
        drop_all(self._before)
        windows_NT = self._bench.tokens(EVALUATION_TASK)[slice(*owned)]
        if len(windows_NT) == 0:
            return {"cosines": []}, None
        dense_ND, pruned_ND = (
            embeddings(path, windows_NT, *self._how)
            for path in (self._bench.checkpoint.path, Path(model_path))
        )
        return {"cosines": cosines(pruned_ND, dense_ND)}, None

    @step
    def unmask(self, model_path: str, owned: tuple[int, int]) -> tuple[Receipt, None]:
        """Negative log-likelihoods (nats) of the masked tokens of some evaluation windows under the
        encoder of a folder.
        """
        drop_all(self._before)
        part, read_NT = slice(*owned), self._bench.tokens(EVALUATION_TASK, MASKED)[slice(*owned)]
        if len(read_NT) == 0:
            return {"losses": []}, None
        windows_NT = self._bench.tokens(EVALUATION_TASK)[part]
        return {"losses": masked_losses(Path(model_path), windows_NT, read_NT, *self._how)}, None

    @step
    def compare(
        self,
        original: str,
        other: str,
        tokens: str,
        owned: tuple[int, int],
        stride: int,
        starts: Sequence[int] = (0,),
    ) -> tuple[Receipt, None]:
        """Compare the models of two folders on some of the windows that a task has written in the
        folder `tokens`, in the tokens that no earlier one of the same text, `stride` apart, has
        scored. Texts start at these windows.
        """
        drop_all(self._before)
        texts = Texts(load_file(Path(tokens) / TOKENS_FILE)[TOKENS], starts, stride)
        first, second = (
            StreamedModel(open_checkpoint(Path(path)), *self._how) for path in (original, other)
        )
        found = compared(first, second, texts, range(*owned))
        return {"windows": [asdict(each) for each in found]}, None

    @step
    def go_on(self, model_path: str) -> tuple[Receipt, None]:
        """What the model of a folder, loaded as a whole, goes on with after each of the job's
        prompts.

        Raises:
            ResourceError: it does not fit into the memory that is free.
        """
        assert self._job.evaluation is not None
        spec, tokenizer = self._job.evaluation, load_tokenizer(Path(model_path))
        prompts = [tokenizer(prompt)["input_ids"] for prompt in spec.prompts]
        found = greedy(self._whole(model_path, "evaluation.prompts"), prompts, spec.prompt_tokens)
        return {"texts": [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]}, None

    @step
    def open_lm_tasks(self) -> tuple[Receipt, None]:
        """Load the documents of the job's tasks of lm-eval.

        Raises:
            SpecError: there is no such task, or its data cannot be loaded.
        """
        from rayprune.workers.lm_tasks import VERSION, open_tasks  # an extra

        assert self._job.evaluation is not None
        return {"lm_eval": VERSION, "tasks": open_tasks(self._job.evaluation)}, None

    @step
    def ask_lm_tasks(self, model_path: str) -> tuple[Receipt, None]:
        """What the model of a folder, loaded as a whole, achieves in the job's tasks of lm-eval.

        Raises:
            ResourceError: it does not fit into the memory that is free.
            SpecError: a task's code fails.
            ModelError: the tokenizer has no token to begin with, or a value is no finite number.
        """
        from rayprune.workers.lm_tasks import ask  # an extra

        assert self._job.evaluation is not None
        tokenizer = load_tokenizer(Path(model_path))
        network = self._whole(model_path, "evaluation.tasks")
        return {"scores": ask(self._job.evaluation, network, tokenizer)}, None

    def _whole(self, model_path: str, option: str) -> Any:
        """The model of a folder as a whole, which an option asks for.

        Raises:
            ResourceError: it does not fit into the memory that is free.
        """
        drop_all(self._before)
        folder, dtype, device = Path(model_path), self._bench.dtype, self._bench.device
        needed_bytes = open_checkpoint(folder).parameters * dtype.itemsize
        check_room(folder, needed_bytes, device, option)
        return loaded(folder, dtype).to(device).eval()

    @step
    def teach(
        self, model_path: str, tokens: str, task: Task, owned: tuple[int, int]
    ) -> tuple[Receipt, None]:
        """Write down what the model of a folder says of some of the windows that a task has written
        in the folder `tokens`: the next token's likeliest.
        """
        assert self._job.recover is not None
        assert self._job.recover.teacher_top is not None
        drop_all(self._before)
        windows_NT = load_file(Path(tokens) / TOKENS_FILE)[TOKENS][slice(*owned)].clone()
        model = partial(StreamedModel, open_checkpoint(Path(model_path)), *self._how)
        top = self._job.recover.teacher_top
        teach(model, windows_NT, owned[0], top, task.folder, task.fingerprint)
        return {}, None

    @property
    def _how(self) -> tuple[torch.dtype, torch.device, Store]:
        """Type and device of passes over whole models, and where hidden states wait."""
        store = self._bench.spill(self._bench.memory.spill_hidden).store
        return self._bench.dtype, self._bench.device, store
