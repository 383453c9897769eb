"""The steps of a worker, as typed calls.

What a step does stands at the method of the same name in `rayprune/workers/steps/`. Here are its
arguments, with a handle in place of every payload, and without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

if TYPE_CHECKING:
    from rayprune.workers.network.slicing import Cut
    from rayprune.workers.passes.divergence import Kept
    from rayprune.workers.passes.sparse import SparseSite
    from rayprune.workers.passes.stream import Saved, State, Wanted
    from rayprune.workers.passes.sweep import Parts, Routes
    from rayprune.workers.steps.measuring import SquaresArrays
    from rayprune.workers.store.files import FileRecord, Task
    from rayprune.workers.store.training_stage import Finetune, Goal, Removed

T_co = TypeVar("T_co", covariant=True)
Receipt = dict[str, Any]
"""What a step tells the driver: small JSON."""


class Handle(Generic[T_co]):
    """Stands for a payload that stays where it was made; another step can be given it. (An object
    reference of Ray's, or in one process the payload itself.)
    """


Collected: TypeAlias = "Handle[Parts]"
"""Statistics of a group."""
Decided: TypeAlias = "Handle[Cut]"
"""A decision about a group."""
States: TypeAlias = "Handle[State | None]"
"""Hidden states behind a chunk of layers."""


@dataclass(frozen=True)
class Call(Generic[T_co]):
    """A step under way."""

    worker: int
    step: str
    receipt: Any
    """The receipt, or what the executor will have it from."""
    payload: Handle[T_co]


class Steps:
    """The steps of one worker."""

    def __init__(self, submit: Callable[..., Call[Any]]) -> None:
        """`submit` starts a step by its name, with its arguments."""
        self._submit = submit

    def write_own(self, task: Task, first: int, lengths: Sequence[int]) -> Call[None]:
        """`Authoring.write_own`."""
        return self._submit("write_own", task, first, lengths)

    def tokenize(self, task: Task) -> Call[None]:
        """`Texts.tokenize`."""
        return self._submit("tokenize", task)

    def check_text(self) -> Call[None]:
        """`Texts.check_text`."""
        return self._submit("check_text")

    def check_storage(self, expected: dict[str, FileRecord]) -> Call[None]:
        """`Checking.check_storage`."""
        return self._submit("check_storage", expected)

    def how_computed(self) -> Call[None]:
        """`Checking.how_computed`."""
        return self._submit("how_computed")

    def digests(self, model: str, owned: tuple[int, int]) -> Call[None]:
        """`Checking.digests`."""
        return self._submit("digests", model, owned)

    def check_head(self) -> Call[None]:
        """`Checking.check_head`."""
        return self._submit("check_head")

    def check_export(self, expected_parameters: int) -> Call[None]:
        """`Checking.check_export`."""
        return self._submit("check_export", expected_parameters)

    def gradients(self, owned: tuple[int, int]) -> Call[SquaresArrays]:
        """`Measuring.gradients`."""
        return self._submit("gradients", owned)

    def write_gradients(self, task: Task, *parts: Handle[SquaresArrays]) -> Call[None]:
        """`Measuring.write_gradients`."""
        return self._submit("write_gradients", task, *parts)

    def probe(
        self, layer: int, owned: tuple[int, int], num_held_out: int
    ) -> Call[dict[str, Parts]]:
        """`Probing.probe`."""
        return self._submit("probe", layer, owned, num_held_out)

    def predict(
        self,
        layer: int,
        group: str,
        num_kept: int,
        num_held_out: int,
        *parts: Handle[dict[str, Parts]],
    ) -> Call[None]:
        """`Probing.predict`."""
        return self._submit("predict", layer, group, num_kept, num_held_out, *parts)

    def keep_probed(
        self, layer: int, task: Task, num_held_out: int, *parts: Handle[dict[str, Parts]]
    ) -> Call[None]:
        """`Probing.keep_probed`."""
        return self._submit("keep_probed", layer, task, num_held_out, *parts)

    def predict_from_kept(self, layer: int, group: str, num_kept: int, folder: str) -> Call[None]:
        """`Probing.predict_from_kept`."""
        return self._submit("predict_from_kept", layer, group, num_kept, folder)

    def collect(
        self, layer: int, group: str, owned: tuple[int, int], *cuts: Handle[Cut]
    ) -> Call[Parts]:
        """`Sweeping.collect`."""
        return self._submit("collect", layer, group, owned, *cuts)

    def open_group(self, host: str) -> Call[None]:
        """`Sweeping.open_group`."""
        return self._submit("open_group", host)

    def join_group(self, address: tuple[str, int], rank: int, count: int) -> Call[None]:
        """`Sweeping.join_group`."""
        return self._submit("join_group", address, rank, count)

    def hold(
        self, layer: int, group: str, owned: tuple[int, int], *cuts: Handle[Cut]
    ) -> Call[None]:
        """`Sweeping.hold`."""
        return self._submit("hold", layer, group, owned, *cuts)

    def route(self, layer: int, owned: tuple[int, int], *cuts: Handle[Cut]) -> Call[Routes]:
        """`Sweeping.route`."""
        return self._submit("route", layer, owned, *cuts)

    def keep_experts(self, num_kept: int, *parts: Handle[Routes]) -> Call[Cut]:
        """`Sweeping.keep_experts`."""
        return self._submit("keep_experts", num_kept, *parts)

    def advance(self, layer: int, owned: tuple[int, int], *cuts: Handle[Cut]) -> Call[None]:
        """`Sweeping.advance`."""
        return self._submit("advance", layer, owned, *cuts)

    def decide(self, layer: int, group: str, num_kept: int, *parts: Handle[Parts]) -> Call[Cut]:
        """`Sweeping.decide`."""
        return self._submit("decide", layer, group, num_kept, *parts)

    def begin_share(
        self, layer: int, group: str, num_kept: int, part: tuple[int, int], *parts: Handle[Parts]
    ) -> Call[None]:
        """`Sweeping.begin_share`."""
        return self._submit("begin_share", layer, group, num_kept, part, *parts)

    def try_damping(self, damping: float) -> Call[None]:
        """`Sweeping.try_damping`."""
        return self._submit("try_damping", damping)

    def end_share(self, damping: float) -> Call[Cut]:
        """`Sweeping.end_share`."""
        return self._submit("end_share", damping)

    def join(self, summary: Receipt, *cuts: Handle[Cut]) -> Call[Cut]:
        """`Sweeping.join`."""
        return self._submit("join", summary, *cuts)

    def reduce(self, *parts: Handle[Parts]) -> Call[Parts]:
        """`Sweeping.reduce`."""
        return self._submit("reduce", *parts)

    def collect_site(
        self, layer: int, site: str, owned: tuple[int, int], *before: Handle[SparseSite]
    ) -> Call[Parts]:
        """`Sparsifying.collect_site`."""
        return self._submit("collect_site", layer, site, owned, *before)

    def decide_site(self, layer: int, site: str, *parts: Handle[Parts]) -> Call[SparseSite]:
        """`Sparsifying.decide_site`."""
        return self._submit("decide_site", layer, site, *parts)

    def write_sparse_layer(
        self, layer: int, task: Task, groups: Mapping[str, Receipt], *decided: Handle[SparseSite]
    ) -> Call[None]:
        """`Sparsifying.write_sparse_layer`."""
        return self._submit("write_sparse_layer", layer, task, groups, *decided)

    def flow(
        self,
        chunk: tuple[int, int],
        number: int,
        wanted: Wanted,
        saved: Saved,
        before: Handle[State | None] | None,
        goal: Goal | None = None,
    ) -> Call[State | None]:
        """`Streaming.flow`."""
        return self._submit("flow", chunk, number, wanted, saved, before, goal)

    def remove_damaged(self, folder: str, owned: tuple[int, int]) -> Call[None]:
        """`Streaming.remove_damaged`."""
        return self._submit("remove_damaged", folder, owned)

    def keep_statistics(self, layer: int, task: Task, groups: Sequence[str]) -> Call[None]:
        """`Streaming.keep_statistics`."""
        return self._submit("keep_statistics", layer, task, groups)

    def load_statistics(self, layer: int, folder: str, groups: Sequence[str]) -> Call[None]:
        """`Streaming.load_statistics`."""
        return self._submit("load_statistics", layer, folder, groups)

    def select(self, layer: int, task: Task, kept: Mapping[str, int]) -> Call[None]:
        """`Streaming.select`."""
        return self._submit("select", layer, task, kept)

    def regularise(self, layer: int, task: Task, removed: Removed) -> Call[None]:
        """`Streaming.regularise`."""
        return self._submit("regularise", layer, task, removed)

    def recover(
        self, layer: int, task: Task, parameters: int, kept_out: Sequence[int]
    ) -> Call[None]:
        """`Streaming.recover`."""
        return self._submit("recover", layer, task, parameters, kept_out)

    def settle(
        self,
        layer: int,
        task: Task,
        kept: Mapping[str, int],
        written: Mapping[str, int],
        position: int | None,
    ) -> Call[None]:
        """`Streaming.settle`."""
        return self._submit("settle", layer, task, kept, written, position)

    def survey(
        self,
        layer: int,
        task: Task,
        counts: Mapping[str, Sequence[int]],
        stored: Mapping[str, Sequence[int]],
    ) -> Call[None]:
        """`Streaming.survey`."""
        return self._submit("survey", layer, task, counts, stored)

    def look_at(self, layer: int, group: str, owned: tuple[int, int]) -> Call[Parts]:
        """`Surveying.look_at`."""
        return self._submit("look_at", layer, group, owned)

    def look_at_experts(self, layer: int, owned: tuple[int, int]) -> Call[Routes]:
        """`Surveying.look_at_experts`."""
        return self._submit("look_at_experts", layer, owned)

    def survey_group(
        self,
        layer: int,
        task: Task,
        group: str,
        counts: Sequence[int],
        stored: Sequence[int],
        *parts: Handle[Parts],
    ) -> Call[None]:
        """`Surveying.survey_group`."""
        return self._submit("survey_group", layer, task, group, counts, stored, *parts)

    def survey_experts(
        self, task: Task, counts: Sequence[int], *parts: Handle[Routes]
    ) -> Call[None]:
        """`Surveying.survey_experts`."""
        return self._submit("survey_experts", task, counts, *parts)

    def score(self, layer: int, task: Task, kept: Mapping[str, float]) -> Call[None]:
        """`Streaming.score`."""
        return self._submit("score", layer, task, kept)

    def write_layer(
        self,
        layer: int,
        task: Task,
        written: Mapping[str, int],
        position: int | None,
        groups: Receipt,
        *cuts: Handle[Cut],
    ) -> Call[None]:
        """`Writing.write_layer`."""
        return self._submit("write_layer", layer, task, written, position, groups, *cuts)

    def finish_writing(self) -> Call[None]:
        """`Writing.finish_writing`."""
        return self._submit("finish_writing")

    def write_outer(
        self, task: Task, written: Mapping[str, int] | None, there: Sequence[int]
    ) -> Call[None]:
        """`Writing.write_outer`."""
        return self._submit("write_outer", task, written, there)

    def copy_outer(self, file: str) -> Call[None]:
        """`Writing.copy_outer`."""
        return self._submit("copy_outer", file)

    def write_tokenizer(self) -> Call[None]:
        """`Writing.write_tokenizer`."""
        return self._submit("write_tokenizer")

    def convert(self, target: str, model: str, task: Task) -> Call[None]:
        """`Converting.convert`."""
        return self._submit("convert", target, model, task)

    def divergences(
        self, candidates: Sequence[Sequence[Kept]], owned: tuple[int, int]
    ) -> Call[None]:
        """`Judging.divergences`."""
        return self._submit("divergences", candidates, owned)

    def without_layers(
        self, candidates: Sequence[Sequence[int]], owned: tuple[int, int]
    ) -> Call[None]:
        """`Judging.without_layers`."""
        return self._submit("without_layers", candidates, owned)

    def influences(self, owned: tuple[int, int]) -> Call[None]:
        """`Judging.influences`."""
        return self._submit("influences", owned)

    def compare(
        self,
        original: str,
        other: str,
        tokens: str,
        owned: tuple[int, int],
        stride: int,
        starts: Sequence[int] = (0,),
    ) -> Call[None]:
        """`Judging.compare`."""
        return self._submit("compare", original, other, tokens, owned, stride, starts)

    def go_on(self, model_path: str) -> Call[None]:
        """`Judging.go_on`."""
        return self._submit("go_on", model_path)

    def open_lm_tasks(self) -> Call[None]:
        """`Judging.open_lm_tasks`."""
        return self._submit("open_lm_tasks")

    def ask_lm_tasks(self, model_path: str) -> Call[None]:
        """`Judging.ask_lm_tasks`."""
        return self._submit("ask_lm_tasks", model_path)

    def train(
        self, stage: Finetune, address: tuple[str, int] | None, rank: int, count: int
    ) -> Call[None]:
        """`Finetuning.train`."""
        return self._submit("train", stage, address, rank, count)

    def teach(self, model_path: str, tokens: str, task: Task, owned: tuple[int, int]) -> Call[None]:
        """`Judging.teach`."""
        return self._submit("teach", model_path, tokens, task, owned)

    def embed(self, model_path: str, owned: tuple[int, int]) -> Call[None]:
        """`Judging.embed`."""
        return self._submit("embed", model_path, owned)

    def unmask(self, model_path: str, owned: tuple[int, int]) -> Call[None]:
        """`Judging.unmask`."""
        return self._submit("unmask", model_path, owned)
