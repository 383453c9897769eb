"""Training on one process and on gangs of ranks: same loss curve, real sharding, going on after a
rank dies, on fewer ranks too.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rayprune.orchestrator.execution.failures import Failure, WorkerFailure
from rayprune.orchestrator.execution.ray_executor import RayExecutor
from rayprune.specs.calibration import CalibrationSpec
from rayprune.specs.errors import ModelError
from rayprune.specs.loader import load_job
from rayprune.specs.memory import MemoryPlan
from rayprune.specs.training import LoraSpec, TrainingSpec
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.building import layers_of, whole_model
from rayprune.workers.store.layout import RESULT_FILE, TRAINED_FOLDER
from rayprune.workers.store.training_stage import (
    Aim,
    Finetune,
    Gates,
    Penalty,
    Recovery,
    Shrink,
    read_log,
)
from rayprune.workers.training.adapters import adapted, add_adapters, merged
from rayprune.workers.training.loop import ALONE, Ranks
from rayprune.workers.training.rank import finetune
from rayprune.workers.training.schedule import windows_of
from rayprune.workers.training.states import saved_steps
from tests.conftest import MakeJob, MakeModel, edit_json
from tests.helpers import families, workers_alive
from tests.models import build_model

OPTIONS = TrainingSpec(epochs=2, batch=4, micro_batch=1, learning_rate=3e-3, checkpoint_steps=3)
REMOVED = [{"heads": [1], "neurons": list(range(16))}] * 3


def stage_in(folder: Path, model: Path, text: Path) -> Finetune:
    """A small training with a penalty, in a folder of its own."""
    cut = CalibrationSpec(path=str(text), samples=18, sequence_length=32, shards=4)
    return Finetune(str(model), str(folder), cut, OPTIONS, Penalty(REMOVED, 0.8, "l2"))


@pytest.fixture
def stage(make_model: MakeModel, text_file: Path, tmp_path: Path) -> Finetune:
    return stage_in(tmp_path / "alone", make_model(), text_file)


def curve(folder: str, name: str = "loss") -> list[float]:
    return [line[name] for line in read_log(Path(folder))]


def weights(folder: str) -> dict[str, torch.Tensor]:
    files = sorted((Path(folder) / TRAINED_FOLDER).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_every_window_is_used_once_an_epoch_in_another_order() -> None:
    seen = [windows_of(step, OPTIONS, 18) for step in range(9)]
    flat = [number for numbers in seen for number in numbers]
    assert sorted(flat[:18]) == sorted(flat[18:36]) == list(range(18))
    assert flat[:18] != flat[18:36]


def test_the_loss_and_the_penalty_fall(stage: Finetune) -> None:
    finetune(stage, ALONE)
    assert len(curve(stage.folder)) == 9
    assert curve(stage.folder, "penalty")[-1] < curve(stage.folder, "penalty")[0]
    assert min(curve(stage.folder)[-3:]) < curve(stage.folder)[0]
    assert {"step", "of", "lm", "loss", "penalty", "gradient_norm", "tokens_per_second"} == set(
        read_log(Path(stage.folder))[0]
    )


@pytest.mark.slow
def test_a_training_that_was_cut_off_ends_with_the_same_weights(
    stage: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(stage, ALONE)
    cut = replace(stage, folder=stage.folder + "-cut")

    from rayprune.workers.training.loop import Training

    whole = Training._step

    def dies(self: Training, step: int, numbers: Any) -> dict[str, float]:
        if step == 7:
            raise KeyboardInterrupt
        return whole(self, step, numbers)

    monkeypatch.setattr(Training, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune(cut, ALONE)
    assert saved_steps(Path(cut.folder)) == [6]
    monkeypatch.setattr(Training, "_step", whole)
    finetune(cut, ALONE)
    assert curve(cut.folder) == curve(stage.folder)
    expected, found = weights(stage.folder), weights(cut.folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_written_model_has_the_names_and_types_of_the_original(
    make_model: MakeModel, stage: Finetune
) -> None:
    model = make_model("qwen3", name="bf16", dtype=torch.bfloat16, tie_word_embeddings=True)
    trained = replace(stage, model=str(model), aim=Recovery())
    finetune(trained, ALONE)
    expected = load_file(model / "model.safetensors")
    found = weights(trained.folder)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in expected.items()
    }


@pytest.mark.slow
def test_adapters_alone_are_trained_saved_and_merged(stage: Finetune) -> None:
    """A training that goes on from its checkpoint, of the adapters alone, writes what the model
    with adapters computes.
    """
    stage = replace(
        stage,
        aim=Recovery(lora=LoraSpec(rank=4)),
        options=OPTIONS.model_copy(update={"learning_rate": 1e-1}),
    )
    finetune(stage, ALONE)
    state = Path(stage.folder) / f"step-{saved_steps(Path(stage.folder))[-1]:07d}"
    shutil.rmtree(Path(stage.folder) / TRAINED_FOLDER)
    names = load_file(state / "rank-0000-of-0001.safetensors").keys()
    assert names
    assert all("lora_" in name for name in names)
    expected = curve(stage.folder)
    finetune(stage, ALONE)
    assert curve(stage.folder) == expected
    assert min(expected[-3:]) < expected[0]
    dense, found = load_file(Path(stage.model) / "model.safetensors"), weights(stage.folder)
    changed = {name for name in dense if not torch.equal(dense[name], found[name])}
    assert {name.split(".")[-2] for name in changed} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    change = found["model.layers.1.mlp.up_proj.weight"] - dense["model.layers.1.mlp.up_proj.weight"]
    assert int(torch.linalg.matrix_rank(change, rtol=1e-3)) == 4


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # whose matrices are (in, out)
def test_a_merged_adapter_computes_what_the_adapter_does(
    model_type: str, make_model: MakeModel
) -> None:
    checkpoint = open_checkpoint(make_model(model_type))
    model: Any = whole_model(checkpoint)
    tokens = torch.tensor([[3, 77, 15, 200, 9, 31, 8, 120]])
    add_adapters(model, layers_of(model, checkpoint.model), LoraSpec(rank=4), 0)
    torch.manual_seed(0)
    for module in adapted(model).values():
        torch.nn.init.normal_(module.lora_B["default"].weight, std=0.2)  # type: ignore[index]
    logits = model(tokens).logits
    for module in adapted(model).values():
        module.base_layer.weight.data = merged(module.base_layer.weight, module)  # type: ignore[union-attr]
        torch.nn.init.zeros_(module.lora_B["default"].weight)  # type: ignore[index]
    torch.testing.assert_close(model(tokens).logits, logits)


RATES = (
    "activation_dropout",
    "attention_dropout",
    "attn_pdrop",
    "dropout",
    "embd_pdrop",
    "hidden_dropout",
    "layerdrop",
    "resid_pdrop",
)
"""As the classes of decoders call them."""


@pytest.mark.parametrize("model_type", families())
def test_nothing_is_dropped_at_random(model_type: str, make_model: MakeModel) -> None:
    """What no state keeps would make a training that was cut off another one."""
    folder = make_model(model_type)
    edit_json(folder / "config.json", **dict.fromkeys(RATES, 0.5))
    model = whole_model(open_checkpoint(folder)).train()
    tokens = torch.tensor([[3, 77, 15, 200, 9, 31, 8, 120]])
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_what_is_no_parameter_is_written_too(stage: Finetune, make_model: MakeModel) -> None:
    """Gemma 4's scale of a layer is a buffer."""
    model = make_model("gemma4_text", name="scaled")
    trained = replace(stage, model=str(model), aim=Recovery())
    finetune(trained, ALONE)
    expected, found = load_file(model / "model.safetensors"), weights(trained.folder)
    scales = [name for name in expected if name.endswith("layer_scalar")]
    assert scales
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in scales)


def train_as(rank: int, stage: Finetune, meeting: Path) -> None:
    """Train as one of two ranks that meet at a file."""
    torch.distributed.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=2
    )
    finetune(stage, Ranks(rank, 2, torch.device("cpu")))
    torch.distributed.destroy_process_group()


def train_as_two(stage: Finetune, folder: Path) -> None:
    """Train on two ranks of this machine, forked from one process that has imported what they
    need.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        train_as, args=(stage, folder / "meeting"), nprocs=2, start_method="forkserver"
    )


@pytest.fixture(scope="module")
def gang(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Finetune:
    """The stage after a run on two ranks."""
    folder = tmp_path_factory.mktemp("gang")
    stage = stage_in(folder / "gang", build_model(folder / "dense"), text_file)
    done = replace(stage, options=OPTIONS.model_copy(update={"epochs": 4.0}))
    train_as_two(done, folder)
    return done


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_have_the_loss_curve_of_one_and_half_of_the_state(
    gang: Finetune, tmp_path: Path
) -> None:
    alone = replace(gang, folder=str(tmp_path / "one"))
    finetune(alone, ALONE)
    assert curve(gang.folder) == pytest.approx(curve(alone.folder), abs=1e-4)
    state = [
        json.loads((Path(folder) / RESULT_FILE).read_text())["state_bytes"]
        for folder in (alone.folder, gang.folder)
    ]
    assert state[1] <= 0.6 * state[0]
    fewer = replace(gang, folder=str(tmp_path / "fewer"))
    shutil.copytree(gang.folder, fewer.folder)
    assert saved_steps(Path(fewer.folder))[-1] < len(curve(fewer.folder))
    finetune(fewer, ALONE)  # one rank goes on from a checkpoint of two
    assert curve(fewer.folder) == pytest.approx(curve(gang.folder), abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "aim",
    [Recovery(lora=LoraSpec(rank=4)), Shrink((1,), 1.5)],
    ids=["adapters", "a layer that fades"],
)
def test_two_ranks_train_as_one_does(aim: Aim, stage: Finetune, tmp_path: Path) -> None:
    one, two = (replace(stage, folder=str(tmp_path / name), aim=aim) for name in ("one", "two"))
    finetune(one, ALONE)
    train_as_two(two, tmp_path)
    assert curve(two.folder) == pytest.approx(curve(one.folder), abs=1e-4)
    alone, spread = weights(one.folder), weights(two.folder)
    assert all(torch.allclose(alone[name], spread[name], atol=1e-3) for name in alone)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_have_the_gates_of_one(stage: Finetune, tmp_path: Path) -> None:
    aim = Gates((1.0,) * 3, (), 0.0)
    one, two = (replace(stage, folder=str(tmp_path / name), aim=aim) for name in ("one", "two"))
    finetune(one, ALONE)
    train_as_two(two, tmp_path)
    gates = [json.loads(Path(each.folder, RESULT_FILE).read_text())["gates"] for each in (one, two)]
    assert gates[1] == pytest.approx(gates[0], abs=1e-4)
    assert len({1.0, *gates[0]}) == 4


@pytest.fixture
def executor(
    ray_session: None, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> Iterator[RayExecutor]:
    """Two workers."""
    job = make_job(make_model(), cluster={"executor": "ray"}, parallel={"workers": 2})
    with RayExecutor(load_job(job), tmp_path / "run", lambda _: MemoryPlan()) as executor:
        yield executor


def signalled(stage: Finetune, number: signal.Signals) -> threading.Thread:
    """Sends a signal to a worker as soon as the stage has saved a state."""

    def wait() -> None:
        while not saved_steps(Path(stage.folder)):
            time.sleep(0.005)
        os.kill(workers_alive()[0], number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_rank_changes_nothing(
    gang: Finetune, executor: RayExecutor, tmp_path: Path
) -> None:
    """SIGKILL of one rank once the first checkpoint is there: what became of it is told, and not
    that the other has lost it; the next gang goes on from there and ends with the same weights.
    """
    killed = replace(gang, folder=str(tmp_path / "killed"))
    thread = signalled(killed, signal.SIGKILL)
    with pytest.raises(WorkerFailure) as failure:
        executor.train(killed)
    assert failure.value.failure is Failure.PROCESS_LOST
    thread.join()
    assert executor.replace_lost() == []
    executor.train(killed)
    assert curve(killed.folder) == curve(gang.folder)
    expected, found = weights(gang.folder), weights(killed.folder)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_gang_that_writes_nothing_has_hung(
    gang: Finetune, executor: RayExecutor, tmp_path: Path
) -> None:
    """It may train for longer than a step may take, as long as it goes on."""
    stopped = replace(gang, folder=str(tmp_path / "stopped"))
    executor.step_limit = 4.0
    signalled(stopped, signal.SIGSTOP)
    with pytest.raises(WorkerFailure, match=r"\(train\): nothing for 4 s") as failure:
        executor.train(stopped)
    assert failure.value.failure is Failure.HUNG


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_gang_stops_with_its_own_error(stage: Finetune, executor: RayExecutor) -> None:
    """A loss that is not finite is no lost rank: nothing is tried again."""
    wild = replace(stage, options=OPTIONS.model_copy(update={"learning_rate": 1e20, "clip": 1e30}))
    with pytest.raises(ModelError, match=r"step \d+: the loss is .*; lower learning_rate"):
        executor.train(wild)
