"""Penalties and gates against finite differences and against what they stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.model.description import Model
from rayprune.workers.network.building import whole_model
from rayprune.workers.training.distillation import Distillation, TopDistillation
from rayprune.workers.training.objectives import (
    GroupPenalty,
    LayerGates,
    Norm,
    Objective,
    UpdatePenalty,
    UpdateShrink,
)
from tests.conftest import MakeModel

TOKENS = torch.tensor([[3, 77, 15, 200, 9, 31, 8, 120], [1, 2, 3, 4, 5, 6, 7, 8]])
REMOVED: list[dict[str, list[int]]] = [{"heads": [1], "neurons": [0, 5, 47]}, {"neurons": [3]}, {}]


def alone(value: Tensor) -> Tensor:
    return value


def double(folder: Path) -> Any:
    return whole_model(open_checkpoint(folder)).double()


def described(folder: Path) -> Model:
    return open_checkpoint(folder).model


def penalty_on(
    folder: Path, removed: list[dict[str, list[int]]], strength: float, norm: Norm
) -> tuple[Any, GroupPenalty]:
    """A model in fp64, and a penalty that has measured it."""
    model = double(folder)
    objective = GroupPenalty(described(folder), removed, strength, norm)
    objective.prepare(model, alone)
    return model, objective


def unit_weights(model: Any, layer: int, neuron: int) -> Tensor:
    """All weights of a channel."""
    mlp = model.model.layers[layer].mlp
    return torch.cat(
        [mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron], mlp.down_proj.weight[:, neuron]]
    ).detach()


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])  # without biases and with them
def test_a_small_proximal_step_goes_against_the_gradient_of_the_penalty(
    model_type: str, norm: Norm, make_model: MakeModel
) -> None:
    """The penalty's value is the sum over units of |w0_u| |w_u|; its gradient by finite
    differences.
    """
    folder, step = make_model(model_type), 1e-7
    model, objective = penalty_on(folder, REMOVED, 1.0, norm)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    objective.after_step(step, alone)
    change = {
        name: parameter.detach() - before[name] for name, parameter in model.named_parameters()
    }
    for name, parameter in model.named_parameters():
        parameter.data.copy_(before[name])

    def value() -> float:
        total = 0.0
        for going in objective._going:
            scale_U = going.initial_U if norm == "l2" else going.initial_U / going.count_U
            total += float((scale_U * objective._sizes(going, alone)).sum())
        return total

    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter) * before[name].abs()  # changes no sign
        with torch.no_grad():
            parameter += 1e-6 * direction
            after = value()
            parameter -= 2e-6 * direction
            least = value()
            parameter += 1e-6 * direction
        slope = (after - least) / 2e-6
        assert slope == pytest.approx(
            -float((change[name] * direction).sum()) / step, rel=1e-4, abs=1e-5
        ), name


def test_the_group_penalty_is_on_exactly_what_will_go(make_model: MakeModel) -> None:
    model, objective = penalty_on(
        folder := make_model(), [{"neurons": [4]}, {"heads": [1]}, {}], 2.0, "l2"
    )
    attention = model.model.layers[1].self_attn
    head = [
        attention.q_proj.weight[16:32],
        attention.k_proj.weight[8:],
        attention.v_proj.weight[8:],
        attention.o_proj.weight[:, 16:32],
    ]
    expected = unit_weights(model, 0, 4).norm(), torch.cat([part.flatten() for part in head]).norm()
    found = [float(going.initial_U.sum()) for going in objective._going]
    assert found == pytest.approx([float(size) for size in expected])
    assert objective.after_step(0.25, alone)["penalty"] == pytest.approx(2.0)
    dense = double(folder)
    torch.testing.assert_close(unit_weights(model, 0, 4), 0.5 * unit_weights(dense, 0, 4))
    assert torch.equal(unit_weights(model, 0, 5), unit_weights(dense, 0, 5))
    assert torch.equal(
        model.model.layers[2].mlp.up_proj.weight, dense.model.layers[2].mlp.up_proj.weight
    )
    assert objective.after_step(0.25, alone)["penalty"] == pytest.approx(1.0)
    assert unit_weights(model, 0, 4).abs().max() < 1e-12


def test_l1_makes_single_weights_exactly_zero(make_model: MakeModel) -> None:
    model, objective = penalty_on(make_model(), [{"neurons": [4]}, {}, {}], 1.0, "l1")
    before = unit_weights(model, 0, 4)
    objective.after_step(0.5, alone)
    threshold = 0.5 * before.abs().mean()
    torch.testing.assert_close(
        unit_weights(model, 0, 4), before.sign() * (before.abs() - threshold).clamp_min(0)
    )
    assert int((unit_weights(model, 0, 4) == 0).sum()) == int((before.abs() <= threshold).sum()) > 0


def test_rescaling_cannot_bring_a_unit_below_the_product_of_its_norms(
    make_model: MakeModel,
) -> None:
    model, objective = penalty_on(make_model(), [{"neurons": [4]}, {}, {}], 1.0, "l2")
    mlp = model.model.layers[0].mlp
    up, down, gate = (
        mlp.up_proj.weight[4].clone(),
        mlp.down_proj.weight[:, 4].clone(),
        mlp.gate_proj.weight[4],
    )
    least = float((gate.square().sum() + 2 * up.norm() * down.norm()).sqrt())
    logits = model(TOKENS).logits
    for factor in (1e-3, 0.3, 1.0, 10.0):
        with torch.no_grad():
            mlp.up_proj.weight[4], mlp.down_proj.weight[:, 4] = up * factor, down / factor
        torch.testing.assert_close(model(TOKENS).logits, logits)
        assert float(objective._sizes(objective._going[0], alone)[4]) >= least * (1 - 1e-12)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_a_gate_at_zero_is_a_layer_removed(model_type: str, make_model: MakeModel) -> None:
    folder = make_model(model_type)
    gated, cut = double(folder), double(folder)
    LayerGates(described(folder), [1.0, 1.0, 1.0], removed=[1], strength=0.0).prepare(gated, alone)
    cut.model.layers = torch.nn.ModuleList([cut.model.layers[0], cut.model.layers[2]])
    cut.model.config.num_hidden_layers = 2
    torch.testing.assert_close(
        gated(TOKENS, use_cache=False).logits,
        cut(TOKENS, use_cache=False).logits,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gates_have_the_gradient_of_the_loss(checkpointing: bool, make_model: MakeModel) -> None:
    folder = make_model()
    model = double(folder)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    objective = LayerGates(described(folder), [0.9, 0.5, 1.2], removed=[], strength=0.3)
    gates = objective.prepare(model, alone)
    sum(objective.losses(model, TOKENS).values()).backward()  # type: ignore[union-attr]
    for gate in gates:
        values = []
        for step in (1e-2, -1e-2):  # transformers takes its loss in fp32
            with torch.no_grad():
                gate += step
                values.append(float(sum(objective.losses(model, TOKENS).values())))
                gate -= step
        assert float(gate.grad) == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2)  # type: ignore[arg-type]
    assert all(
        parameter.grad is None
        for name, parameter in model.named_parameters()
        if "gate" not in name.split(".")
    )
    objective.release(model)
    assert set(model.state_dict()) == set(double_names(model))


def double_names(model: Any) -> list[str]:
    return [
        name for name in model.state_dict() if ".inner." not in name and not name.endswith(".gate")
    ]


def test_penalties_lie_beside_the_divergence_from_a_teacher_as_well(make_model: MakeModel) -> None:
    """0 for the teacher itself, and 0 its gradient: what is left to move are gates and updates."""
    teacher = double(folder := make_model())
    model = described(folder)
    loss = Distillation(model, teacher, model, 0.0)
    objectives: list[Objective] = [
        GroupPenalty(model, REMOVED, 1.0, "l2", loss),
        LayerGates(model, [1.0] * 3, [], 0.5, loss),
        UpdatePenalty(model, [1], 0.5, "l2", loss),
        UpdateShrink(model, [1], 1.0, loss),
    ]
    for objective in objectives:
        student = double(folder)
        objective.prepare(student, alone)
        parts = objective.losses(student, TOKENS)
        assert "lm" not in parts
        assert float(parts["divergence"]) == pytest.approx(0.0, abs=1e-6)
        assert ("penalty" in parts) == isinstance(objective, LayerGates | UpdatePenalty)
        objective.before_step(0.5)
    assert float(objectives[-1].losses(student, TOKENS)["divergence"]) > 1e-4  # half faded


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_penalty_on_updates_is_their_size_and_its_gradient_is_right(
    norm: Norm, checkpointing: bool, make_model: MakeModel
) -> None:
    folder = make_model()
    model, plain = double(folder), double(folder)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    objective = UpdatePenalty(described(folder), [2, 0], 0.05, norm)
    objective.prepare(model, alone)
    found = objective.losses(model, TOKENS)["penalty"]
    states: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        for layer in plain.model.layers
    ]
    handles.append(
        plain.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    )
    plain(TOKENS, use_cache=False)
    updates = [states[1] - states[0], states[3] - states[2]]
    sizes = [
        update.abs().sum(-1).mean() if norm == "l1" else update.norm(dim=-1).mean()
        for update in updates
    ]
    torch.testing.assert_close(found.double(), 0.05 * 8**0.5 * sum(sizes), rtol=1e-6, atol=0.0)
    found.backward()
    weight = model.model.layers[0].inner.mlp.down_proj.weight
    direction = weight.grad / weight.grad.norm()
    with torch.no_grad():
        values = []
        for step in (1e-3, -1e-3):  # norms are taken in fp32
            weight += step * direction
            values.append(float(objective.losses(model, TOKENS)["penalty"]))
            weight -= step * direction
    assert float(weight.grad.norm()) == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-2)


def test_distillation_is_zero_for_the_teacher_itself_and_else_the_divergence(
    make_model: MakeModel,
) -> None:
    teacher = double(folder := make_model())
    model = described(folder)
    objective = Distillation(model, teacher, model, 0.5)
    itself = objective.losses(double(folder), TOKENS)
    assert float(sum(itself.values())) == pytest.approx(0.0, abs=1e-6)
    student = double(make_model(name="other", seed=1))
    parts = objective.losses(student, TOKENS)
    p, q = (
        torch.log_softmax(model(TOKENS, use_cache=False).logits, -1) for model in (teacher, student)
    )
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    torch.testing.assert_close(parts["divergence"].double(), expected, rtol=1e-5, atol=1e-6)
    assert parts["hidden"] > 0
    apart = [objective.losses(student, batch)["hidden"] for batch in TOKENS.split(1)]
    torch.testing.assert_close(torch.stack(apart).mean(), parts["hidden"])
    nothing = torch.zeros_like(teacher.model.embed_tokens.weight[0])
    for network in (teacher, student):  # a token that the models make nothing of
        network.model.embed_tokens.weight.data[7] = nothing
    assert objective.losses(student, torch.full_like(TOKENS, 7))["hidden"].isfinite()
    assert Objective(model).losses(student, TOKENS)["lm"] > 0


@pytest.mark.parametrize("top", [5, None])  # and all tokens
def test_a_teacher_that_has_spoken_before_is_compared_in_its_likeliest_tokens_and_the_rest(
    top: int | None, make_model: MakeModel
) -> None:
    teacher, student = double(folder := make_model()), double(make_model(name="other", seed=1))
    model = described(folder)
    p, q = (
        torch.log_softmax(network(TOKENS, use_cache=False).logits, -1).exp()
        for network in (teacher, student)
    )
    found = p.log().topk(top or p.shape[-1])
    objective = TopDistillation(
        model, lambda number: (found.indices[number], found.values[number].float())
    )
    objective.before_batch([1, 0])
    loss = objective.losses(student, TOKENS[[1, 0]])["divergence"]
    kept_p, kept_q = (both.gather(-1, found.indices) for both in (p, q))
    parts_p, parts_q = (torch.cat([k, 1 - k.sum(-1, keepdim=True)], -1) for k in (kept_p, kept_q))
    compared = parts_p > 1e-9  # where all are kept the rest is rounding
    expected = (parts_p * (parts_p.log() - parts_q.log()))[compared].sum() / TOKENS.numel()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    whole = Distillation(model, teacher, model, 0.0).losses(student, TOKENS)["divergence"]
    assert float(loss) == pytest.approx(float(whole), rel=1e-5) if top is None else loss < whole
    if top is None:
        weight = student.model.layers[0].mlp.up_proj.weight
        gradients = [torch.autograd.grad(value, weight)[0] for value in (loss, whole)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)


def test_a_layer_that_has_faded_is_a_layer_removed(make_model: MakeModel) -> None:
    folder = make_model()
    model, plain, cut = double(folder), double(folder), double(folder)
    objective = UpdateShrink(described(folder), [1], 2.0)
    assert len(objective.prepare(model, alone)) == len(list(plain.parameters()))
    objective.before_step(0.0)
    assert objective.after_step(0.1, alone) == {"scale": 1.0}
    torch.testing.assert_close(
        model(TOKENS, use_cache=False).logits, plain(TOKENS, use_cache=False).logits
    )
    objective.before_step(0.25)
    states: list[Tensor] = []
    for layers, index in (
        (model.model.layers, 2),
        (plain.model.layers, 1),
        (plain.model.layers, 2),
    ):
        layers[index].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model(TOKENS, use_cache=False)
    plain(TOKENS, use_cache=False)
    half, before, after = states
    torch.testing.assert_close(half, (before + after) / 2)
    objective.before_step(0.7)
    cut.model.layers = torch.nn.ModuleList([cut.model.layers[0], cut.model.layers[2]])
    torch.testing.assert_close(
        model(TOKENS, use_cache=False).logits, cut(TOKENS, use_cache=False).logits
    )
    objective.release(model)
    assert set(model.state_dict()) == set(plain.state_dict())
