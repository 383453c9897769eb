"""Steps that write the pruned model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rayprune.specs.errors import VerificationError
from rayprune.workers.calibration import load_tokenizer
from rayprune.workers.model.config_patch import needs_output_bias
from rayprune.workers.model.families import layer_prefix
from rayprune.workers.network.layers import read_tensors
from rayprune.workers.network.slicing import Cut, CutArrays, pad_layer, slice_layer
from rayprune.workers.steps.step import Receipt, step
from rayprune.workers.store.files import commit, write_tensors
from rayprune.workers.store.layout import (
    LAYER_FILE,
    OUTER_FILE,
    OUTER_TASK,
    layer_task,
    model_folder,
    task_folder,
)
from rayprune.workers.workbench import Workbench


class Writing:
    """Tensors and tokenizer of the pruned model."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._job = bench.job

    @step
    def write_layer(
        self,
        layer: int,
        task_fingerprint: str,
        written: Mapping[str, int],
        position: int | None,
        groups: Receipt,
        *cuts: CutArrays,
    ) -> tuple[Receipt, None]:
        """Write a pruned layer's tensors under their final names, then the manifest: the layer is
        finished.

        `written` are the units of every group that the file holds: those that stay, and zeros where
        layers are padded. `position` is the layer's number in the pruned model; a layer of which
        nothing stays has none, and no file.
        """
        self.layer(
            layer,
            task_fingerprint,
            written,
            position,
            groups,
            [Cut.from_arrays(arrays) for arrays in cuts],
        )
        return {}, None

    def layer(
        self,
        layer: int,
        task_fingerprint: str,
        written: Mapping[str, int],
        position: int | None,
        groups: Receipt,
        cuts: Sequence[Cut],
    ) -> None:
        """Write a layer's tensors, unless nothing stays, and then its manifest."""
        folder, units = (
            task_folder(self._bench.run_folder, layer_task(layer)),
            {cut.group: cut.units.tolist() for cut in cuts},
        )
        if position is not None:
            write_tensors(
                folder / LAYER_FILE, self._written_tensors(layer, written, position, cuts)
            )
        info = {"groups": groups, "kept": units, "computed_on": self._bench.model.computed_on}
        commit(
            folder,
            layer_task(layer),
            task_fingerprint,
            [] if position is None else [LAYER_FILE],
            info,
        )

    def _written_tensors(
        self, layer: int, written: Mapping[str, int], position: int, cuts: Sequence[Cut]
    ) -> dict[str, Tensor]:
        """A pruned layer's tensors, by their names in the pruned model."""
        export = self._job.export
        tensors = read_tensors(
            self._bench.checkpoint, self._bench.checkpoint.layer_tensors(layer), layer_prefix(layer)
        )
        dtypes = {name: self._bench.disk_dtype(tensor) for name, tensor in tensors.items()}
        sliced = slice_layer(tensors, self._bench.groups.values(), {cut.group: cut for cut in cuts})
        if export.pad:
            sliced = pad_layer(sliced, tensors, self._bench.groups.values(), written)
        if needs_output_bias(self._bench.checkpoint.config, written, export.target):
            weight_DK = sliced["self_attn.o_proj.weight"]
            sliced["self_attn.o_proj.bias"] = weight_DK.new_zeros(len(weight_DK))
            dtypes["self_attn.o_proj.bias"] = dtypes["self_attn.o_proj.weight"]
        prefix = layer_prefix(position)
        return {prefix + name: tensor.to(dtypes[name]) for name, tensor in sliced.items()}

    @step
    def write_outer(self, task_fingerprint: str) -> tuple[Receipt, None]:
        """Write the embeddings, the last norm and the head (unless tied), unchanged but for the
        type.
        """
        tensors = read_tensors(self._bench.checkpoint, self._bench.checkpoint.outer_tensors)
        folder = task_folder(self._bench.run_folder, OUTER_TASK)
        write_tensors(
            folder / OUTER_FILE,
            {name: tensor.to(self._bench.disk_dtype(tensor)) for name, tensor in tensors.items()},
        )
        commit(folder, OUTER_TASK, task_fingerprint, [OUTER_FILE], {})
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
        folder, tokenizer = (
            model_folder(self._bench.run_folder),
            load_tokenizer(self._bench.checkpoint.path),
        )
        tokenizer.save_pretrained(folder)
        sample = "a  b\n" + "a b ".join(["", *tokenizer.all_special_tokens, ""])
        if load_tokenizer(folder)(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
            raise VerificationError(
                f"{folder}: its tokenizer gives other tokens than that of"
                f" {self._bench.checkpoint.path}"
            )
        return {}, None
