"""One worker: a plain class whose methods are the steps the driver asks for. Ray wraps it; nothing
here knows of Ray.

Every method returns `(receipt, payload)`: the receipt is small JSON for the driver, the payload
(arrays or None) goes from worker to worker.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayprune.specs.job import JobSpec
from rayprune.specs.memory import MemoryPlan
from rayprune.specs.methods import DressOptions
from rayprune.workers.model.config_patch import needs_output_bias
from rayprune.workers.model.families import config_int, layer_prefix
from rayprune.workers.network import layers
from rayprune.workers.network.layers import MicroBatch, read_tensors
from rayprune.workers.network.slicing import Cut, CutArrays, pad_layer, slice_layer
from rayprune.workers.network.written import trained
from rayprune.workers.numerics.correction import Correction, correct
from rayprune.workers.numerics.linalg import unit_rows
from rayprune.workers.numerics.methods import scores, select
from rayprune.workers.numerics.statistics import Statistic, restored
from rayprune.workers.passes.divergence import Kept, divergences
from rayprune.workers.passes.kept import read_fits, write_fits
from rayprune.workers.passes.stream import Fits, Saved, Stream, Wanted
from rayprune.workers.passes.survey import curve, stored_cut, tensors_of
from rayprune.workers.passes.sweep import Parts, Sweep, embed_all, grow_states
from rayprune.workers.side_steps import SideSteps
from rayprune.workers.store.files import Task, commit, read_manifest, write_tensors
from rayprune.workers.store.layout import (
    LAYER_FILE,
    OUTER_FILE,
    STATISTICS_FILE,
    SURVEY_FILE,
    selection_task,
)
from rayprune.workers.store.shards import Node, merge_siblings, roots
from rayprune.workers.store.training_stage import Removed, forget_another, forget_states, read_log
from rayprune.workers.workbench import Receipt, step


class Worker(SideSteps):
    """The steps of a job. What it keeps between calls is a cache that can be rebuilt from the run
    folder.
    """

    def __init__(
        self, job: JobSpec, run_folder: str, device: str, memory: MemoryPlan, scope: str = ""
    ) -> None:
        super().__init__(job, run_folder, device, memory, scope)
        self._loaded: dict[tuple[int, str], Fits] = {}
        self._probe: dict[tuple[int, int], tuple[int, list[MicroBatch]]] = {}

    @cached_property
    def _sweep(self) -> Sweep:
        drift = self.job.correction.drift
        drift_width = config_int(self._checkpoint.config, "hidden_size") if drift else 0
        return Sweep(
            self._model,
            list(self._groups.values()),
            partial(self._statistic, self.job.calibration.samples, drift_width=drift_width),
            self._shards(),
            self.scope,
            self.job.memory.checkpoint_layers,
            self._memory.keep_inputs,
            drift,
        )

    @cached_property
    def _stream(self) -> Stream:
        shards, held_out = self._shards(), self.job.calibration.held_out_shards
        batches = [batch for shard in shards for batch in shard]
        return Stream(
            self._model,
            list(self._groups.values()),
            partial(self._statistic, self.job.calibration.samples),
            batches,
            sum(len(shard) for shard in shards[:-held_out]),
            self._spill(True).store,
        )

    @step
    def probe(
        self, layer: int, owned: tuple[int, int], num_held_out: int
    ) -> tuple[Receipt, dict[str, Parts]]:
        """Statistics of every group of a layer on the dense path, over some of the probe's
        windows.
        """
        count = self.job.budget.probe_samples
        # first call, or an earlier attempt went further
        if self._probe.get(owned, (layer + 1, []))[0] > layer:
            self._probe[owned] = (
                0,
                embed_all(self._model, self._spread_windows(count, range(*owned))),
            )
        at, batches = self._probe[owned]
        inputs: list[dict[str, Tensor]] = []
        for index in range(at, layer + 1):
            module = self._model.load_layer(index)
            inputs = [layers.dense_pass(module, index, batch, self._groups) for batch in batches]
        self._probe[owned] = (layer + 1, batches)
        trees = roots(self.job.budget.probe_samples, num_held_out)

        def leaf(name: str, window: int) -> Statistic:
            statistic = self._statistic(count, self._groups[name].width)
            statistic.update(inputs[window - owned[0]][name].flatten(0, -2))
            return statistic

        return {}, {name: grow_states(trees, owned, partial(leaf, name)) for name in self._groups}

    @step
    def predict(
        self, layer: int, group: str, num_kept: int, num_held_out: int, *parts: dict[str, Parts]
    ) -> tuple[Receipt, None]:
        """Relative held-out output error if so many units of a group stayed, from the probe's
        statistics.
        """
        trees = roots(self.job.budget.probe_samples, num_held_out)
        _, correction = self._cut(
            layer, group, num_kept, self._merged(trees, [part[group] for part in parts])
        )
        return {"held_out_error": correction.held_out_error}, None

    @step
    def collect(
        self, layer: int, group: str, owned: tuple[int, int], *cuts: CutArrays
    ) -> tuple[Receipt, Parts]:
        """Statistics of a group's consumer input over some calibration shards; `cuts` are this
        layer's earlier ones.
        """
        self._probe.clear()
        self.__dict__.pop("_stream", None)  # the dense path is through
        known = {arrays["group"]: Cut.from_arrays(arrays) for arrays in cuts}
        trees = roots(self.job.calibration.shards, self.job.calibration.held_out_shards)
        return {}, self._sweep.collect(layer, group, owned, known, trees)

    @step
    def decide(
        self, layer: int, group: str, num_kept: int, *parts: Parts
    ) -> tuple[Receipt, CutArrays]:
        """Select the units of a group that stay (or take those of the selection pass) and correct
        the consumer's weight.

        Where none stays no statistics are needed.
        """
        if num_kept == 0:
            nothing = torch.empty(0)
            cut = Cut(group, torch.arange(0), nothing)
            return {
                "group": self._summary(group, 0, Correction(nothing, 0.0, 1.0, 1.0))
            }, cut.arrays()
        trees = roots(self.job.calibration.shards, self.job.calibration.held_out_shards)
        fits = self._merged(trees, parts)
        is_cut = num_kept < self._groups[group].num_units
        units = self._selected(layer, group) if is_cut and self.job.selects_first else None
        cut, correction = self._cut(layer, group, num_kept, fits, units)
        return {"group": self._summary(group, num_kept, correction)}, cut.arrays()

    def _merged(self, trees: tuple[Node, Node], parts: Sequence[Parts]) -> Fits:
        training, held_out = (self._siblings(tree, parts)[tree] for tree in trees)
        return training, held_out

    def _siblings(self, tree: Node, parts: Sequence[Parts]) -> dict[Node, Statistic]:
        under = (
            (node, state)
            for part in parts
            for node, state in part.items()
            if tree[0] <= node[0] and node[1] <= tree[1]
        )
        rebuilt = {node: restored(state, self._scratch) for node, state in under}
        return {
            node: fit.finished()
            for node, fit in merge_siblings(
                tree, rebuilt, lambda left, right: left.merge(right)
            ).items()
        }

    @step
    def reduce(self, *parts: Parts) -> tuple[Receipt, Parts]:
        """Merge statistics of several workers as far as the tree over the shards allows."""
        trees = roots(self.job.calibration.shards, self.job.calibration.held_out_shards)
        return {}, {
            node: fit.state() for tree in trees for node, fit in self._siblings(tree, parts).items()
        }

    def _summary(self, group: str, num_kept: int, correction: Correction) -> Receipt:
        return {
            "kept": num_kept,
            "of": self._groups[group].num_units,
            "damping": correction.damping,
            "training_error": correction.training_error,
            "held_out_error": correction.held_out_error,
        }

    def _select(self, layer: int, name: str, num_kept: int, training: Statistic) -> Tensor:
        if num_kept in (0, self._groups[name].num_units):
            return torch.arange(num_kept)
        return select(
            self.job.method.selector,
            training,
            self._ranked_by(layer, name),
            self._groups[name].columns,
            num_kept,
        )

    def _selected(self, layer: int, name: str) -> Tensor:
        manifest = read_manifest(self.scope.folder(selection_task(layer)))
        assert manifest is not None, f"layer {layer} has no selection"
        kept: Any = manifest.info["result"]
        return torch.tensor(kept[name])

    @torch.inference_mode()
    def _cut(
        self, layer: int, name: str, num_kept: int, fits: Fits, units: Tensor | None = None
    ) -> tuple[Cut, Correction]:
        units = self._select(layer, name, num_kept, fits[0]) if units is None else units
        weight_DF = self._consumer_weight(layer, self._groups[name])
        columns_K = unit_rows(units, self._groups[name].columns).to(self.device)
        correction = correct(
            *fits, weight_DF, columns_K, self.job.correction, self._disk_dtype(weight_DF)
        )
        return Cut(name, units, correction.weight_DK), correction

    @step
    def flow(
        self,
        chunk: tuple[int, int],
        number: int,
        wanted: Wanted,
        saved: Saved,
        before: np.ndarray | None,
    ) -> tuple[Receipt, np.ndarray | None]:
        """Take a micro-batch through a chunk of layers on the dense path; see `Stream.flow`."""
        self._probe.clear()
        return {}, self._stream.flow(range(*chunk), number, wanted, saved, before)

    def _fit(self, layer: int, name: str) -> Fits:
        loaded = self._loaded.pop((layer, name), None)
        return loaded or self._stream.fit(layer, name)

    @step
    def keep_statistics(
        self, layer: int, task: Task, groups: Sequence[str]
    ) -> tuple[Receipt, None]:
        """Write the statistics of a layer's groups that this worker has, instead of working on
        them.
        """
        write_fits(task.folder, {name: self._stream.fit(layer, name) for name in groups})
        commit(task, [STATISTICS_FILE], {"computed_on": self._model.computed_on})
        return {"groups": {}}, None

    @step
    def load_statistics(
        self, layer: int, folder: str, groups: Sequence[str]
    ) -> tuple[Receipt, None]:
        """Take a layer's statistics from where `keep_statistics` has written them."""
        self._loaded = {
            (layer, name): read_fits(Path(folder), name, self._scratch) for name in groups
        }
        return {}, None

    @step
    def select(self, layer: int, task: Task, kept: Mapping[str, int]) -> tuple[Receipt, None]:
        """Select the units of a layer that stay, from the statistics this worker has."""
        fits = {
            name: self._fit(layer, name)
            for name, count in kept.items()
            if count < self._groups[name].num_units
        }
        units = {
            name: self._select(layer, name, kept[name], training).tolist()
            for name, (training, _) in fits.items()
        }
        commit(task, [], {"result": units, "computed_on": self._model.computed_on})
        return {"groups": {}}, None

    @step
    def regularise(self, layer: int, task: Task, removed: Removed) -> tuple[Receipt, None]:
        """Train a layer alone, from the hidden states this worker has, with a penalty on what will
        go; write it as it was on disk.
        """
        # torch's training machinery takes a second to import
        from rayprune.workers.training.layer import train_layer

        method, folder = self.job.method, task.folder
        assert isinstance(method, DressOptions)
        forget_another(folder, task.fingerprint)
        module = train_layer(
            self._model, layer, self._stream.passed(layer), self._groups, removed, method, folder
        )
        infos, prefix = self._checkpoint.layer_tensors(layer), layer_prefix(layer)
        tensors = trained(module.state_dict(), {key: info.dtype for key, info in infos.items()})
        write_tensors(
            folder / LAYER_FILE, {prefix + key: tensor for key, tensor in tensors.items()}
        )
        last = read_log(folder)[-1]
        commit(task, [LAYER_FILE], {"last_step": last, "computed_on": self._model.computed_on})
        forget_states(folder)
        return {"groups": {}}, None

    @step
    def settle(
        self,
        layer: int,
        task: Task,
        kept: Mapping[str, int],
        written: Mapping[str, int],
        position: int | None,
    ) -> tuple[Receipt, None]:
        """Decide all groups of a layer from the statistics this worker has, and write the layer."""
        fits = {
            name: self._fit(layer, name)
            for name, count in kept.items()
            if count < self._groups[name].num_units
        }
        decided = {name: self._cut(layer, name, kept[name], fits.pop(name)) for name in list(fits)}
        groups = {
            name: self._summary(name, kept[name], correction)
            for name, (_, correction) in decided.items()
        }
        self._write_layer(
            layer, task, written, position, groups, [cut for cut, _ in decided.values()]
        )
        return {"groups": groups}, None

    @step
    def survey(
        self,
        layer: int,
        task: Task,
        counts: Mapping[str, Sequence[int]],
        stored: Mapping[str, Sequence[int]],
    ) -> tuple[Receipt, None]:
        """Error curves of a layer's groups from the statistics this worker has, and cuts for the
        `stored` numbers of units.
        """
        fits = {name: self._fit(layer, name) for name in counts}
        errors: dict[str, dict[int, float]] = {}
        tensors: dict[str, Tensor] = {}
        for name in counts:
            weight_DF = self._consumer_weight(layer, self._groups[name])
            part = (
                self._ranked_by(layer, name),
                counts[name],
                stored[name],
                self._disk_dtype(weight_DF),
            )
            found = curve(self.job, fits.pop(name), weight_DF, self._groups[name], *part)
            errors[name] = found.errors
            tensors |= tensors_of(found.cuts)
        write_tensors(task.folder / SURVEY_FILE, tensors)
        commit(task, [SURVEY_FILE], {"result": errors, "computed_on": self._model.computed_on})
        return {"groups": {}}, None

    @step
    def score(self, layer: int, task: Task, kept: Mapping[str, float]) -> tuple[Receipt, None]:
        """Scores of the units of a layer's groups, comparable between layers, when about so many
        units are to stay.
        """
        fits = {name: self._fit(layer, name) for name in kept}
        found: dict[str, list[float]] = {}
        for name, count in kept.items():
            training, held_out = fits.pop(name)
            weight_DF = self._consumer_weight(layer, self._groups[name])
            found[name] = scores(
                self.job.method,
                training.merge(held_out),
                weight_DF,
                self._groups[name].columns,
                count,
            ).tolist()
        commit(task, [], {"result": found, "computed_on": self._model.computed_on})
        return {"groups": {}}, None

    @step
    def divergences(
        self, candidates: Sequence[Sequence[Kept]], owned: tuple[int, int]
    ) -> tuple[Receipt, None]:
        """For every candidate allocation its divergence from the dense model, on each of some of
        the calibration windows.
        """
        self.__dict__.pop("_stream", None)  # its statistics are not needed any more
        windows = self._spread_windows(self.job.divergence_windows, range(*owned))
        return {
            "sums": divergences(
                self._model, self._groups, windows, candidates, partial(stored_cut, self.scope)
            )
        }, None

    @step
    def write_layer(
        self,
        layer: int,
        task: Task,
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
        self._write_layer(
            layer, task, written, position, groups, [Cut.from_arrays(arrays) for arrays in cuts]
        )
        return {}, None

    def _write_layer(
        self,
        layer: int,
        task: Task,
        written: Mapping[str, int],
        position: int | None,
        groups: Receipt,
        cuts: Sequence[Cut],
    ) -> None:
        units = {cut.group: cut.units.tolist() for cut in cuts}
        if position is not None:
            write_tensors(
                task.folder / LAYER_FILE, self._written_tensors(layer, written, position, cuts)
            )
        info = {"groups": groups, "kept": units, "computed_on": self._model.computed_on}
        commit(task, [] if position is None else [LAYER_FILE], info)

    def _written_tensors(
        self, layer: int, written: Mapping[str, int], position: int, cuts: Sequence[Cut]
    ) -> dict[str, Tensor]:
        """A pruned layer's tensors, by their names in the pruned model."""
        export = self.job.export
        tensors = read_tensors(
            self._checkpoint, self._checkpoint.layer_tensors(layer), layer_prefix(layer)
        )
        dtypes = {name: self._disk_dtype(tensor) for name, tensor in tensors.items()}
        sliced = slice_layer(tensors, self._groups.values(), {cut.group: cut for cut in cuts})
        if export.pad:
            sliced = pad_layer(sliced, tensors, self._groups.values(), written)
        if needs_output_bias(self._checkpoint.config, written, export.target):
            weight_DK = sliced["self_attn.o_proj.weight"]
            sliced["self_attn.o_proj.bias"] = weight_DK.new_zeros(len(weight_DK))
            dtypes["self_attn.o_proj.bias"] = dtypes["self_attn.o_proj.weight"]
        prefix = layer_prefix(position)
        return {prefix + name: tensor.to(dtypes[name]) for name, tensor in sliced.items()}

    @step
    def write_outer(self, task: Task) -> tuple[Receipt, None]:
        """Write the embeddings, the last norm and the head (unless tied), unchanged but for the
        type.
        """
        tensors = read_tensors(self._checkpoint, self._checkpoint.outer_tensors)
        write_tensors(
            task.folder / OUTER_FILE,
            {name: tensor.to(self._disk_dtype(tensor)) for name, tensor in tensors.items()},
        )
        commit(task, [OUTER_FILE], {})
        return {}, None

    @step
    def copy_outer(self, file: str) -> tuple[Receipt, None]:
        """Write the embeddings, the last norm and the head as they are."""
        write_tensors(Path(file), read_tensors(self._checkpoint, self._checkpoint.outer_tensors))
        return {}, None
