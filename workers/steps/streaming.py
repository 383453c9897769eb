"""Steps of the way of many layers at once: micro-batches through a chunk of layers, then work on
each layer where its statistics, or what it is given, are.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rayprune.specs.methods.options import DriveOut
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.reading import read_tensors
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.network.written import trained
from rayprune.workers.numerics.methods import scores
from rayprune.workers.passes.kept import read_fits, write_fits
from rayprune.workers.passes.sealed import read_sealed
from rayprune.workers.passes.stream import DenseLayers, Fits, Saved, State, Stream, Wanted
from rayprune.workers.passes.survey import curve, tensors_of
from rayprune.workers.passes.sweep import micro_batches
from rayprune.workers.steps.deciding import Deciding
from rayprune.workers.steps.step import Cached, Droppable, Receipt, drop_all, step
from rayprune.workers.steps.writing import Writing
from rayprune.workers.store.files import Task, commit, write_tensors
from rayprune.workers.store.layout import (
    LAYER_FILE,
    STATISTICS_FILE,
    SURVEY_FILE,
    TOKENS,
    boundary_file,
)
from rayprune.workers.store.training_stage import (
    Alone,
    Goal,
    HeldOut,
    Penalty,
    Removed,
    forget_another,
    forget_states,
    read_log,
    settled,
)
from rayprune.workers.workbench import Workbench


class Streaming:
    """The dense path, many layers at once."""

    def __init__(
        self, bench: Workbench, deciding: Deciding, writing: Writing, before: Sequence[Droppable]
    ) -> None:
        self._bench, self._deciding, self._writing = bench, deciding, writing
        self._before, self._stream = before, Cached(self._new_stream)
        self._loaded: dict[tuple[int, str], Fits] = {}
        self._goal: Goal | None = None
        self._job = bench.job

    def drop(self) -> None:
        """Forget hidden states and statistics of the dense path."""
        self._stream.drop()
        self._loaded.clear()

    def _new_stream(self) -> Stream:
        bench, keep, goal = self._bench, self._bench.spill(True).store, None
        if self._goal:
            windows_ST = load_file(self._goal.tokens)[TOKENS].clone()
            shards = [micro_batches(windows_ST, self._job.parallel.micro_batch)]
            dense = StreamedModel(
                open_checkpoint(Path(self._goal.model)), bench.dtype, bench.device
            )
            goal = DenseLayers(dense, self._goal.bounds)
        else:
            shards = bench.shards()
        return Stream(
            bench.model,
            list(bench.groups.values()),
            partial(bench.statistic, self._job.calibration.samples),
            [batch for shard in shards for batch in shard],
            sum(len(shard) for shard in shards[: -self._job.calibration.held_out_shards]),
            keep,
            goal,
        )

    @step
    def flow(
        self,
        chunk: tuple[int, int],
        number: int,
        wanted: Wanted,
        saved: Saved,
        before: State | None,
        goal: Goal | None = None,
    ) -> tuple[Receipt, State | None]:
        """Take a micro-batch of the calibration text, or of that of a `goal`, through a chunk of
        layers; see `Stream.flow`.
        """
        drop_all(self._before)
        if goal != self._goal:
            self._stream.drop()
            self._goal = goal
        return {}, self._stream.value.flow(range(*chunk), number, wanted, saved, before)

    @step
    def remove_damaged(self, folder: str, owned: tuple[int, int]) -> tuple[Receipt, None]:
        """Of some micro-batches remove the hidden states in a folder that are not as they were
        written; whether all of them are left.
        """
        files = [boundary_file(Path(folder), number) for number in range(*owned)]
        damaged = [file for file in files if read_sealed(file) is None]
        for file in damaged:
            if file.exists():
                text = f"{file}: is damaged or not of this run; its layers are computed again"
                self._bench.warnings.append(text)
                file.unlink()
        return {"whole": not damaged}, None

    def _fit(self, layer: int, name: str) -> Fits:
        loaded = self._loaded.pop((layer, name), None)
        return loaded or self._stream.value.fit(layer, name)

    def _losing(self, layer: int, kept: Mapping[str, int]) -> list[str]:
        """The groups of a layer that lose units."""
        groups = self._bench.checkpoint.model.layers[layer].groups
        return [group.name for group in groups if kept[group.name] < group.num_units]

    @step
    def keep_statistics(
        self, layer: int, task: Task, groups: Sequence[str]
    ) -> tuple[Receipt, None]:
        """Write the statistics of a layer's groups that this worker has, instead of working on
        them.
        """
        write_fits(task.folder, {name: self._stream.value.fit(layer, name) for name in groups})
        commit(task, [STATISTICS_FILE], {"computed_on": self._bench.model.computed_on})
        return {"groups": {}}, None

    @step
    def load_statistics(
        self, layer: int, folder: str, groups: Sequence[str]
    ) -> tuple[Receipt, None]:
        """Take a layer's statistics from where `keep_statistics` has written them."""
        self._loaded = {
            (layer, name): read_fits(Path(folder), name, self._bench.scratch) for name in groups
        }
        return {}, None

    @step
    def select(self, layer: int, task: Task, kept: Mapping[str, int]) -> tuple[Receipt, None]:
        """Select the units of a layer that stay, from the statistics this worker has."""
        fits = {name: self._fit(layer, name) for name in self._losing(layer, kept)}
        units = {
            name: self._deciding.select(layer, name, kept[name], training).tolist()
            for name, (training, _) in fits.items()
        }
        commit(task, [], {"result": units, "computed_on": self._bench.model.computed_on})
        return {"groups": {}}, None

    @step
    def regularise(self, layer: int, task: Task, removed: Removed) -> tuple[Receipt, None]:
        """Train a layer alone, from the hidden states this worker has, with a penalty on what will
        go; write it as it was on disk.
        """
        stage = self._job.method.before_cut
        assert isinstance(stage, DriveOut)
        penalty = Penalty([removed], stage.strength, stage.norm)
        return self._train(layer, task, Alone(stage.training, penalty))

    @step
    def recover(
        self, layer: int, task: Task, parameters: int, kept_out: Sequence[int]
    ) -> tuple[Receipt, None]:
        """Train a layer of the pruned model alone, from the hidden states this worker has, towards
        what it is to give; write it as it was on disk. The dense model has so many `parameters`,
        and these windows are measured on, not trained.
        """
        spec, held_out = self._job.recover, None
        assert spec is not None
        if spec.held_out:
            held_out = HeldOut(kept_out, spec.held_out.every, spec.held_out.patience)
        alone = Alone(settled(spec, parameters), lora=spec.lora, held_out=held_out)
        return self._train(layer, task, alone)

    def _train(self, layer: int, task: Task, alone: Alone) -> tuple[Receipt, None]:
        # torch's training machinery takes a second to import
        from rayprune.workers.training.adapters import with_adapters
        from rayprune.workers.training.layer import train_layer

        folder, checkpoint = task.folder, self._bench.checkpoint
        forget_another(folder, task.fingerprint)
        passed = self._stream.value.passed(layer)
        warn = self._bench.warnings.append
        module = train_layer(self._bench.model, layer, passed, alone, folder, warn)
        infos, prefix = checkpoint.layer_tensors(layer), checkpoint.model.prefix(layer)
        found = (
            with_adapters(read_tensors(checkpoint, infos, prefix), module)
            if alone.lora
            else module.state_dict()
        )
        tensors = trained(found, {key: info.dtype for key, info in infos.items()})
        write_tensors(
            folder / LAYER_FILE, {prefix + key: tensor for key, tensor in tensors.items()}
        )
        last = read_log(folder)[-1]
        info = {"last_step": last, "computed_on": self._bench.model.computed_on}
        commit(task, [LAYER_FILE], info)
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
        fits = {name: self._fit(layer, name) for name in self._losing(layer, kept)}
        decided = {
            name: self._deciding.cut(layer, name, kept[name], fits.pop(name)) for name in list(fits)
        }
        groups = {
            name: self._deciding.summary(name, kept[name], correction)
            for name, (_, correction) in decided.items()
        }
        cuts = [cut for cut, _ in decided.values()]
        self._writing.layer(layer, task, written, position, groups, cuts)()
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
            weight_DF = self._bench.consumer_weight(layer, self._bench.groups[name])
            part = (
                self._deciding.ranked_by(layer, name),
                counts[name],
                stored[name],
                self._bench.disk_dtype(weight_DF),
            )
            how = self._job.method, self._job.correction
            found = curve(how, fits.pop(name), weight_DF, self._bench.groups[name], *part)
            errors[name] = found.errors
            tensors |= tensors_of(found.cuts)
        write_tensors(task.folder / SURVEY_FILE, tensors)
        info = {"result": errors, "computed_on": self._bench.model.computed_on}
        commit(task, [SURVEY_FILE], info)
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
            weight_DF = self._bench.consumer_weight(layer, self._bench.groups[name])
            found[name] = scores(
                self._job.method,
                training.merge(held_out),
                weight_DF,
                self._bench.groups[name].columns,
                count,
            ).tolist()
        commit(task, [], {"result": found, "computed_on": self._bench.model.computed_on})
        return {"groups": {}}, None
