"""Steps that write the pruned model."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rayprune.specs.errors import VerificationError
from rayprune.workers.calibration import load_tokenizer
from rayprune.workers.model.folder import TensorInfo, read_json
from rayprune.workers.model.form import AS_IT_IS, Form
from rayprune.workers.model.older import TOKENIZER_CONFIG, tokenizer_readable_by_both
from rayprune.workers.model.places import Place, as_stored
from rayprune.workers.network.reading import digest_of, read_tensors
from rayprune.workers.network.slicing import Cut, keep_units, pad_layer, slice_layer
from rayprune.workers.network.written import narrowed
from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.files import Task, commit, write_json, write_tensors
from rayprune.workers.store.layout import LAYER_FILE, OUTER_FILE, SOURCE
from rayprune.workers.store.writer import Writer
from rayprune.workers.workbench import Workbench


class Writing:
    """Tensors and tokenizer of the pruned model."""

    def __init__(self, bench: Workbench) -> None:
        self._bench, self._writer = bench, Writer()
        self._job = bench.job

    @step
    def write_layer(
        self,
        layer: int,
        task: Task,
        written: Mapping[str, int],
        position: int | None,
        groups: Receipt,
        *cuts: Cut,
    ) -> tuple[Receipt, None]:
        """Begin to write a pruned layer's tensors under their final names, and then the manifest:
        the layer is finished once `finish_writing` has returned.

        `written` are the units of every group that the file holds: those that stay, and zeros where
        layers are padded. `position` is the layer's number in the pruned model; a layer of which
        nothing stays has none, and no file.
        """
        self._writer.put(self.layer(layer, task, written, position, groups, cuts))
        return {}, None

    @step
    def finish_writing(self) -> tuple[Receipt, None]:
        """Wait until what `write_layer` has begun is done."""
        self._writer.wait()
        return {}, None

    def layer(
        self,
        layer: int,
        task: Task,
        written: Mapping[str, int],
        position: int | None,
        groups: Receipt,
        cuts: Sequence[Cut],
    ) -> Callable[[], None]:
        """What writes a layer's tensors, unless nothing stays, and then its manifest. It needs no
        device any more.
        """
        bench = self._bench
        kept = {cut.group: cut.units.tolist() for cut in cuts}
        info = {"groups": groups, "kept": kept, "computed_on": bench.model.computed_on}
        named: dict[str, Tensor] = {}
        if position is not None:
            form = self._form(written)
            prefix = f"{form.layers_at or bench.checkpoint.model.layers_at}.{position}."
            tensors = form.layer(self._cut_layer(layer, written, cuts))
            stored = as_stored(tensors, form.places)
            named = {prefix + name: tensor for name, tensor in stored.items()}
            info["consumers"] = self._consumers(layer, form, prefix, kept.get("experts"))
        infos, files = bench.checkpoint.layer_tensors(layer), {LAYER_FILE: named} if named else {}
        return partial(self._write, task, infos, files, info)

    def whole_layer(
        self, task: Task, layer: int, tensors: Mapping[str, Tensor], info: Mapping[str, object]
    ) -> None:
        """Write a layer of which no unit goes, by its tensors' names in the files, and then its
        manifest.
        """
        infos = self._bench.checkpoint.layer_tensors(layer)
        about = {**info, "computed_on": self._bench.model.computed_on}
        self._write(task, infos, {LAYER_FILE: tensors}, about)

    def _consumers(
        self, layer: int, form: Form, prefix: str, experts: Sequence[int] | None
    ) -> dict[str, object]:
        """Where a file has the consumer's weight of every group that is left, by the group's
        name.
        """
        members = self._bench.checkpoint.model.layers[layer].members.values()
        groups = [group for group in members if group.kind != "experts"]
        found: dict[str, object] = {}
        for group in groups:
            if group.expert is not None and experts is not None:
                if group.expert not in experts:
                    continue
                group = group.numbered(experts.index(group.expert))
            weight = f"{form.module(group.consumer.module)}.weight"
            place = form.places.get(weight, Place(weight))
            name = prefix + place.name
            whole = place.expert is None
            found[group.name] = name if whole else asdict(replace(place, name=name))
        return found

    def _write(
        self,
        task: Task,
        infos: Mapping[str, TensorInfo],
        files: Mapping[str, Mapping[str, Tensor]],
        info: Mapping[str, object],
    ) -> None:
        """Write files of tensors, and record them, with the digest of what they were made from."""
        with ThreadPoolExecutor(1) as meanwhile:
            source = meanwhile.submit(digest_of, self._bench.checkpoint, infos)
            for name, tensors in files.items():
                write_tensors(task.folder / name, tensors)
        commit(task, files, {**info, SOURCE: source.result()})

    def _form(self, written: Mapping[str, int]) -> Form:
        """How the pruned model is written, of which every layer's file holds so many units; layers
        of different sizes have the original's form.
        """
        if self._job.sizes_differ:
            return self._bench.checkpoint.layer_form(written)
        return self._bench.checkpoint.form(written, self._job.export.form)

    def _cut_layer(
        self, layer: int, written: Mapping[str, int], cuts: Sequence[Cut]
    ) -> dict[str, Tensor]:
        """A pruned layer's tensors in host memory in their types on disk, by their names in the
        layer.
        """
        bench = self._bench
        groups = bench.checkpoint.model.layers[layer].members.values()
        tensors = bench.layer_tensors(layer)
        dtypes = {name: bench.disk_dtype(tensor) for name, tensor in tensors.items()}
        sliced = _in_host_memory(slice_layer(tensors, groups, {cut.group: cut for cut in cuts}))
        if self._job.export.pad:
            kept = bench.checkpoint.model.units | {cut.group: len(cut.units) for cut in cuts}
            sliced = pad_layer(sliced, tensors, groups, kept, written)
        prefix = bench.checkpoint.model.prefix(layer)
        return {n: narrowed(tensor, dtypes[n], prefix + n) for n, tensor in sliced.items()}

    @step
    def write_outer(
        self, task: Task, written: Mapping[str, int] | None, there: Sequence[int]
    ) -> tuple[Receipt, None]:
        """Write what is outside the layers in its type on disk, with the parts of those that are
        `there`, in the form of a model whose layers all hold so many units (None: they differ).
        """
        checkpoint = self._bench.checkpoint
        found = read_tensors(checkpoint, checkpoint.outer_tensors)
        if (count := checkpoint.num_layers) > len(there):
            found |= keep_units(found, checkpoint.model.layer_axes, count, torch.tensor(there))
        tensors = {
            name: narrowed(tensor, self._bench.disk_dtype(tensor), name)
            for name, tensor in found.items()
        }
        form = AS_IT_IS if written is None else self._form(written)
        self._write(task, checkpoint.outer_tensors, {OUTER_FILE: form.outer(tensors)}, {})
        return {}, None

    @step
    def copy_outer(self, file: str) -> tuple[Receipt, None]:
        """Write the embeddings, the last norm and the head as they are."""
        write_tensors(
            Path(file), read_tensors(self._bench.checkpoint, self._bench.checkpoint.outer_tensors)
        )
        return {}, None

    @step
    def write_tokenizer(self) -> tuple[Receipt, None]:
        """Write the tokenizer anew where the model type is another: transformers would take another
        class for the files as they are.

        Raises:
            VerificationError: it gives other tokens.
        """
        folder, tokenizer = (self._bench.scope.model, load_tokenizer(self._bench.checkpoint.path))
        tokenizer.save_pretrained(folder)
        config = folder / TOKENIZER_CONFIG
        write_json(config, tokenizer_readable_by_both(read_json(config)))
        sample = "a  b\n" + "a b ".join(["", *tokenizer.all_special_tokens, ""])
        if load_tokenizer(folder)(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
            raise VerificationError(
                f"{folder}: its tokenizer gives other tokens than that of"
                f" {self._bench.checkpoint.path}"
            )
        return {}, None


def _in_host_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors there; those of a GPU are copied side by side."""
    found = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return found
