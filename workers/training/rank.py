"""What one rank of a training stage does: load and shard the model, train, gather and write."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rayprune.workers.calibration import calibration_windows, load_tokenizer
from rayprune.workers.machine.shortage import explained_shortage
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.network.reading import read_tensors
from rayprune.workers.network.written import trained
from rayprune.workers.passes.teaching import taught
from rayprune.workers.store.files import write_json, write_tensors
from rayprune.workers.store.layout import RESULT_FILE, TOKENS, TRAINED_FOLDER
from rayprune.workers.store.training_stage import (
    Finetune,
    Gates,
    Penalty,
    Recovery,
    Shrink,
    Updates,
)
from rayprune.workers.training.adapters import adapted, with_adapters
from rayprune.workers.training.distillation import Distillation, TopDistillation
from rayprune.workers.training.loop import Ranks, Training, load_for_training, state_bytes
from rayprune.workers.training.objectives import (
    GroupPenalty,
    LayerGates,
    Objective,
    UpdatePenalty,
    UpdateShrink,
)

SHORTAGE_ADVICE = (
    "lower micro_batch of the training, set its activation_checkpointing: true, or raise"
    " parallel.workers"
)


def finetune(stage: Finetune, ranks: Ranks) -> None:
    """Train, and write what comes of it into the stage's folder: gates, or a model's weights.

    Raises:
        ModelError: the loss, its gradient or a weight is not finite, or the model cannot be read.
    """
    torch.set_num_threads(stage.threads)
    folder, checkpoint = Path(stage.folder), open_checkpoint(Path(stage.model))
    windows_ST = _windows(stage, checkpoint)
    lora = stage.aim.lora if isinstance(stage.aim, Recovery) else None
    model = load_for_training(checkpoint, stage.options, ranks, lora=lora)
    objective = _objective(stage, checkpoint, ranks)
    training = Training(
        model, objective, windows_ST, stage.options, folder, ranks, held_out=stage.held_out
    )
    training.run()
    result: dict[str, Any] = {
        "steps": training.steps,
        "warnings": training.warnings,
        "state_bytes": state_bytes(training),
    }
    if training.best:
        result["held_out"] = training.best.measured
    if isinstance(objective, LayerGates):
        result["gates"] = objective.values(model)
    objective.release(model)
    if not isinstance(objective, LayerGates):
        _write_model(model, checkpoint, folder / TRAINED_FOLDER, ranks)
    if ranks.rank == 0:
        write_json(folder / RESULT_FILE, result)


def train_rank(stage: Finetune, ranks: Ranks) -> None:
    """Run a stage as one rank.

    Raises:
        ModelError: as `finetune` says.
        ResourceError: there is not enough memory.
    """
    with explained_shortage(f"training, rank {ranks.rank}", SHORTAGE_ADVICE):
        finetune(stage, ranks)


def _windows(stage: Finetune, checkpoint: Checkpoint) -> Tensor:
    """All windows of a stage (S, T)."""
    if isinstance(stage.text, str):
        return load_file(stage.text)[TOKENS]
    samples = stage.options.samples or stage.text.samples
    text = stage.text.model_copy(update={"samples": samples})
    return calibration_windows(text, load_tokenizer(checkpoint.path))


def _objective(stage: Finetune, checkpoint: Checkpoint, ranks: Ranks) -> Objective:
    described = checkpoint.model

    def distillation(folder: str, hidden: float = 0.0) -> Distillation:
        dense = open_checkpoint(Path(folder))
        network = load_for_training(dense, stage.options, ranks, frozen=True)
        return Distillation(described, network, dense.model, hidden)

    loss = distillation(stage.model) if stage.from_itself else None
    match stage.aim:
        case Penalty(removed, strength, norm):
            return GroupPenalty(described, removed, strength, norm, loss)
        case Gates(initial, gone, strength):
            return LayerGates(described, initial, gone, strength, loss)
        case Updates(gone, strength, norm):
            return UpdatePenalty(described, gone, strength, norm, loss)
        case Shrink(gone, strength):
            return UpdateShrink(described, gone, strength, loss)
        case Recovery(taught=str(said)):
            return TopDistillation(described, taught(Path(said)).of)
        case Recovery(teacher, hidden) if teacher:
            return distillation(teacher, hidden)
    return Objective(described)


def _write_model(model: nn.Module, checkpoint: Checkpoint, folder: Path, ranks: Ranks) -> None:
    """Gather layer after layer and write it as it was on disk: names, types, one file per layer and
    one for the rest; rank 0 writes.
    """
    parts = {"outer": ("", checkpoint.outer_tensors)}
    for layer in range(checkpoint.num_layers):
        prefix = checkpoint.model.prefix(layer)
        parts[f"layer-{layer:04d}"] = (prefix, checkpoint.layer_tensors(layer))
    adapters, stands = adapted(model), dict(chain(model.named_parameters(), model.named_buffers()))
    modules = checkpoint.model.module_names
    if adapters and ranks.rank:
        return  # they are whole on every rank: there is nothing to gather
    for part, (prefix, infos) in parts.items():
        if adapters:
            stored = read_tensors(checkpoint, infos, prefix)
            tensors = with_adapters({prefix + name: stored[name] for name in stored}, model)
        else:
            full = [prefix + name for name in infos]
            tensors = {name: _whole(stands[modules.get(name, name)]) for name in full}
        if ranks.rank == 0:
            write_tensors(
                folder / f"{part}.safetensors",
                trained(tensors, {name: checkpoint.tensors[name].dtype for name in tensors}),
            )


def _whole(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
