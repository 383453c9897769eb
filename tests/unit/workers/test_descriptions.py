"""Descriptions from configs, against models that transformers builds from the same configs."""

from collections.abc import Mapping
from math import prod
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from benchmarks.random_model import SIZES
from rayprune.specs.errors import ModelError, SpecError
from rayprune.workers.model.checkpoint import open_checkpoint, planned_checkpoint
from rayprune.workers.model.config import Config
from rayprune.workers.model.description import Group, Model, Shape
from rayprune.workers.model.families import family_named, family_of, listed, model_types
from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.latent import Latent
from rayprune.workers.model.rewrite import written
from rayprune.workers.network.building import layers_of
from tests.conftest import MakeModel, edit_json
from tests.helpers import families, has_experts
from tests.models import raw_config, stock_model

BIASED = {"attention_bias": True, "mlp_bias": True}
OLD = {"new_decoder_architecture": False, "multi_query": False, "num_key_value_heads": 4}
FALCONS: list[dict[str, Any]] = [
    {"new_decoder_architecture": False, "multi_query": True},
    OLD | {"alibi": True, "bias": True},
    OLD | {"parallel_attn": False},
    {"num_ln_in_parallel_attn": 1},
]
DENSE = [name for name in model_types() if not has_experts(name)]
"""transformers packs experts: see tests/contracts/test_experts.py."""
CASES: list[Any] = [
    *((name, {}) for name in DENSE),
    *(pytest.param(name, BIASED, marks=pytest.mark.slow) for name in DENSE),
    ("llama", {"tie_word_embeddings": True}),
    ("gemma", {"tie_word_embeddings": False}),
    ("gpt_neox", {"attention_bias": False}),
    ("gpt2", {"intermediate_size": None}),
    *(("falcon", changes) for changes in FALCONS),
    *(("stablelm", {"use_parallel_residual": on, "use_qkv_bias": on}) for on in (True, False)),
    ("stablelm", {"qk_layernorm": True}),
    ("cohere", {"use_qk_norm": True}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("seed_oss", {"attention_bias": False, "attention_out_bias": True}),
    *((name, {"use_bias": False}) for name in ("ernie4_5", "starcoder2")),
    *((name, {"attention_bias": False}) for name in ("glm", "glm4")),
    *((name, {"head_dim": None}) for name in ("ernie4_5", "seed_oss")),
    ("gemma4_text-inputs", {}),
    ("gemma4_text", {"num_hidden_layers": 12}),
    ("gemma4_text-readers", {"num_hidden_layers": 4}),
]
MIXTRAL: dict[str, Any] = SIZES | {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
LATENT: dict[str, Any] = SIZES | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
}
EXPERTS: list[dict[str, Any]] = [
    MIXTRAL,
    LATENT,
    LATENT | {"q_lora_rank": None},
    LATENT | {"first_k_dense_replace": 0},
]


def described(raw: Mapping[str, object]) -> Model:
    config = Config(raw)
    return family_of(config).describe(config)


def groups_of(raw: Mapping[str, object], layer: int = 0) -> dict[str, Group]:
    return {group.name: group for group in described(raw).layers[layer].groups}


def built(raw: dict[str, Any]) -> Any:
    """The model that transformers builds, without memory for it."""
    with torch.device("meta"):
        return stock_model(raw)


def count(shapes: Mapping[str, Shape]) -> int:
    return sum(map(prod, shapes.values()))


def stored_shapes(module: Any) -> dict[str, Shape]:
    """Shapes of its parameters and of the buffers that are saved."""
    saved = {name: buffer for name, buffer in module.named_buffers() if name in module.state_dict()}
    tensors = dict(module.named_parameters()) | saved
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def shapes_of_layer(raw: dict[str, Any]) -> dict[str, Shape]:
    """Shapes of the second layer of a model that transformers builds."""
    return stored_shapes(layers_of(built(raw), described(raw))[1])


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_shapes_are_those_of_transformers(model_type: str, changes: dict[str, Any]) -> None:
    """Also where keys are not in the config: it is reduced to the sizes and the changes."""
    raw = raw_config(model_type, **changes)
    model, network = described(raw), built(raw)
    # of a matrix that is both, torch names the one that was made first
    names = {model.head: model.embedding} if model.tied else {}
    expected = {
        names.get(name, name): shape
        for name, shape in stored_shapes(network).items()
        if not name.startswith(model.beside)
    }
    inside = {
        f"{model.prefix(number)}{name}": shape
        for number, layer in enumerate(model.layers)
        for name, shape in layer.shapes.items()
    }
    outer = {model.module_names.get(name, name): shape for name, shape in model.outer.items()}
    assert inside | outer == expected
    assert all(name.startswith(f"{model.layers_at}.") for name in inside)
    assert not any(name.startswith(f"{model.layers_at}.") for name in outer)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_parameters_of_a_unit_are_what_a_model_without_it_lacks(
    model_type: str, changes: dict[str, Any]
) -> None:
    raw = raw_config(model_type, **changes)
    layer = described(raw).layers[1]
    for group in layer.groups:
        lost = count(layer.shapes) - count(layer.cut_shapes({group.name: group.num_units - 1}))
        assert lost == group.unit_parameters > 0
    if layer.group("neurons").fixed:
        return
    width = layer.group("neurons").num_units
    narrower = shapes_of_layer(raw_config(model_type, **changes | {"intermediate_size": width - 1}))
    assert layer.cut_shapes({"neurons": width - 1}) == narrower


@pytest.mark.parametrize("model_type", DENSE)
@pytest.mark.parametrize("biases", [{}, BIASED], ids=["plain", "biased"])
def test_shapes_with_fewer_heads_are_those_of_transformers(
    model_type: str, biases: dict[str, bool]
) -> None:
    """In the form in which the family writes them."""
    raw = raw_config(model_type, **biases)
    config, layer = Config(raw), described(raw).layers[1]
    kept = {group.name: group.num_units for group in layer.groups}
    kept["heads"] //= 2
    heads = layer.group("heads")
    if heads.fixed or heads.stock:
        with pytest.raises(SpecError, match=r"have to stay|need a class of their own"):
            family_of(config).form(config, kept, "transformers")
        return
    form = family_of(config).form(config, kept, "transformers")
    fewer = written(config, range(3), [kept] * 3, "transformers", "auto").config
    assert form.layer_shapes(layer.cut_shapes(kept)) == shapes_of_layer(fewer)


@pytest.mark.parametrize("model_type", DENSE)
def test_groups_name_modules_of_the_layer(model_type: str) -> None:
    raw = raw_config(model_type)
    shapes = shapes_of_layer(raw)
    for group in groups_of(raw).values():
        assert f"{group.consumer.module}.".startswith(f"{group.block.module}.")
        assert shapes[group.consumer.weight][group.consumer.dim] == group.width
        along: dict[tuple[str, int], int] = {}
        for axis in group.axes:
            assert group.block.holds(axis.tensor)
            assert axis.start == along.get((axis.tensor, axis.dim), 0)
            length = along.get((axis.tensor, axis.dim), 0) + axis.per_unit * group.num_units
            along[axis.tensor, axis.dim] = length
        assert {(name, dim): shapes[name][dim] for name, dim in along} == along


def test_missing_head_keys_have_their_defaults() -> None:
    raw = raw_config("llama", num_key_value_heads=None, head_dim=None)
    heads = groups_of(raw)["heads"]
    assert (heads.num_units, heads.columns, heads.width) == (4, 8, 32)
    assert [axis.per_unit for axis in heads.axes] == [8, 8, 8]


def test_types_are_listed_as_configs_spell_them() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert not set(listed().split(", ")) - set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported; supported are bert, bloom, camembert",
        ),
        ({"model_type": None}, "model_type 'None' is not supported"),
        ({"model_type": "decoder"}, "model_type 'decoder' is not supported"),
        ({"model_type": "../llama"}, r"model_type '\.\./llama' is not supported"),
        (
            {"num_attention_heads": 5},
            r"num_attention_heads \(5\) is no multiple of num_key_value_heads \(2\)",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, found 0"),
        ({"intermediate_size": 1.5}, "intermediate_size must be a positive integer, found 1.5"),
        ({"head_dim": "8"}, "head_dim must be a positive integer, found '8'"),
        ({"per_layer_config": [1]}, "per_layer_config must be a mapping of layer numbers to sizes"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
    ],
)
def test_unusable_configs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        described({"model_type": "llama"} | SIZES | changes)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "it reads a layer's number"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is not supported"),
        ("phi", {"qk_layernorm": True}, "norms over heads of a fixed size"),
        ("opt", {"do_layer_norm_before": False}, "there is no last norm"),
        ("opt", {"word_embed_proj_dim": 16}, "embeddings of a size of their own"),
        ("gptj", {"rotary_dim": None}, "rotary_dim: null is not supported"),
        ("gptj", {"rotary_dim": 3}, "rotary_dim: 3 of 8 numbers of a head"),
        ("falcon", {"parallel_attn": False}, "without parallel_attn is not supported"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "set slow_but_exact: false"),
        *(
            (name, {"use_bidirectional_attention": True}, "use_bidirectional_attention is not")
            for name in ("gemma", "gemma2", "gemma3_text")
        ),
        *((name, {"is_causal": False}, "is_causal: false is not") for name in ("llama", "qwen2")),
        ("llama4_text", {"num_experts_per_tok": 2}, "num_experts_per_tok above 1 is not supported"),
        ("llama4_text", {"moe_layers": "all"}, "moe_layers must be a list of layers"),
        ("gemma4_text", {"num_kv_shared_layers": 3}, "leaves no layer of some kind"),
        ("gemma4_text", {"per_layer_config": {"0": {"head_dim": 4}}}, "with full attention"),
        ("gemma4_text", {"layer_types": []}, "layer_types must be a list with an entry for each"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "those of a decoder"),
        *(
            (name, {"no_rope_layers": [1, 0]}, "no_rope_layers must be a list with 1 or 0 for each")
            for name in ("llama4_text", "smollm3")
        ),
        ("gpt_neo", {"attention_layers": ["global"]}, "says 1 layers, num_layers 3"),
        ("granite", {"residual_multiplier": "x"}, "residual_multiplier must be a number"),
        ("granite", {"residual_multiplier": float("nan")}, "residual_multiplier must be a number"),
    ],
)
def test_what_a_family_cannot_hold_is_refused(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        described(raw_config(model_type, **changes))


def test_an_integer_takes_null_for_missing() -> None:
    assert Config({"a": None}).integer("a", 3) == Config({}).integer("a", 3) == 3
    with pytest.raises(ModelError, match="a must be a positive integer, found None"):
        Config({"a": None}).integer("a")


@pytest.mark.parametrize("model_type", DENSE)
def test_the_rules_about_heads_are_those_of_transformers(model_type: str) -> None:
    """A config class that comes to accept (or refuse) uneven heads shows here."""
    raw = raw_config(model_type, num_attention_heads=4, num_key_value_heads=4)
    config, group = Config(raw), groups_of(raw)["heads"]
    kept = {"heads": 3, "neurons": described(raw).units["neurons"]}
    try:  # 3 heads of a size of their own, which does not divide the hidden size
        uneven = raw_config(model_type, num_attention_heads=3, num_key_value_heads=3, head_dim=8)
        found = shapes_of_layer(uneven)
        taken = group.width // 4 * 3 in found[group.consumer.weight]
    except Exception:  # of a type that transformers changes
        taken = False
    try:
        form = family_of(config).form(config, kept, "transformers")
        own = form.changes.get("model_type", model_type) == model_type
    except SpecError:
        own = False
    # OLMo 2 and 3 load, and compute something else; all layers of T5 would have to lose alike
    others = ("stretch over all heads", "lose the same")
    stays = any(words in (group.fixed or "") for words in others)
    assert own is (taken and not stays)


@pytest.mark.parametrize("config", EXPERTS)
def test_models_with_experts_have_as_many_parameters_as_transformers_says(
    config: dict[str, Any],
) -> None:
    """transformers joins the experts' matrices, so counts are compared; the router's correction is
    a buffer there.
    """
    network, model, corrections = built(config), described(config), 0
    for number, layer in enumerate(model.layers):
        correction = count({n: shape for n, shape in layer.shapes.items() if "correction" in n})
        corrections += correction
        assert layer.parameters == count(layer.shapes)
        assert layer.parameters - correction == sum(
            p.numel() for p in network.model.layers[number].parameters()
        )
    total = count(model.outer) + sum(layer.parameters for layer in model.layers)
    assert total - corrections == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("config", EXPERTS)
def test_parameters_of_a_unit_of_an_expert(config: dict[str, Any]) -> None:
    key = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    shapes, groups = described(config).layers[2].shapes, groups_of(config, 2)
    fewer = described(config | {key: config[key] - 1}).layers[2].shapes
    lost, channels = count(shapes) - count(fewer), groups["neurons"]
    shared = groups["shared"].unit_parameters if "shared" in groups else 0
    assert channels.count * channels.unit_parameters + shared == lost
    heads = groups["heads"]
    fewer_heads = {"num_attention_heads": 2, "num_key_value_heads": heads.num_units // 2}
    lost = count(shapes) - count(described(config | fewer_heads).layers[2].shapes)
    assert heads.parameters // 2 == lost


def test_dense_layers_come_before_those_with_experts() -> None:
    def alike(raw: dict[str, Any]) -> list[range]:
        return [numbers for _, numbers in described(raw).alike]

    assert alike(LATENT) == [range(1), range(1, 3)]
    assert alike(LATENT | {"first_k_dense_replace": 0}) == [range(3)]
    with pytest.raises(ModelError, match="no layer has experts"):
        alike(LATENT | {"first_k_dense_replace": 9})
    assert alike(MIXTRAL) == [range(3)]
    names = [list(groups_of(LATENT, layer)) for layer in range(3)]
    assert names == [["heads", "dense"], *[["heads", "experts", "neurons", "shared"]] * 2]
    assert described(LATENT).lacking == {
        "dense": (1, 2),
        **dict.fromkeys(("experts", "neurons", "shared"), (0,)),
    }


def test_attention_width_is_scores_and_values_over_all_heads() -> None:
    assert described(raw_config("llama")).layers[0].attended == 4 * (8 + 8)
    assert described(LATENT).layers[0].attended == 4 * (6 + 4 + 5)


@pytest.mark.parametrize("model_type", families())
def test_a_config_alone_plans_like_the_headers(model_type: str, make_model: MakeModel) -> None:
    folder = make_model(model_type, dtype=torch.bfloat16)
    with_weights = planned_checkpoint(folder)
    assert with_weights == open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    planned = planned_checkpoint(folder)
    assert (with_weights.has_weights, planned.has_weights) == (True, False)
    assert with_weights.model == planned.model
    for layer in range(3):
        found, implied = with_weights.layer_tensors(layer), planned.layer_tensors(layer)
        assert {name: (info.dtype, info.shape) for name, info in found.items()} == {
            n: (i.dtype, i.shape) for n, i in implied.items()
        }
    assert planned.outer_tensors.keys() == with_weights.outer_tensors.keys()
    assert (planned.parameters, planned.decoder_parameters) == (
        with_weights.parameters,
        with_weights.decoder_parameters,
    )
    assert planned.bytes_on_disk == 2 * planned.parameters
    with pytest.raises(ModelError, match=r"needs model\.safetensors or .*; no weights found"):
        open_checkpoint(folder)


def test_quantised_weights_are_planned_with_the_reason_not_to_prune(make_model: MakeModel) -> None:
    folder = make_model()
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    assert "quantised" in str(planned_checkpoint(folder).model.not_pruned)


OF_THEIR_OWN = {"falcon", "gemma4", "gemma4_text"}
"""Families that read their heads by keys of their own, or layer by layer."""


def text_model(model_type: str) -> tuple[Any, dict[str, Any]]:
    """The family of a text model, and a config of it with 320 heads of 8."""
    raw = raw_config(model_type, hidden_size=2560, num_attention_heads=320)
    family = family_named(raw["model_type"])
    if not isinstance(family, Backbone):
        return family, raw
    return family.text, {**family.missing, **raw["text_config"], "model_type": family.text_type}


def stock_config(raw: Mapping[str, Any]) -> Any:
    """What the class of transformers makes of a config."""
    return CONFIG_MAPPING[raw["model_type"]](**{k: v for k, v in raw.items() if k != "model_type"})


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("model_type", sorted(set(model_types()) - OF_THEIR_OWN))
def test_a_size_left_out_is_what_the_class_takes(model_type: str, key: str) -> None:
    family, raw = text_model(model_type)
    if not isinstance(family, Decoder) or isinstance(family, Latent):
        return
    if not (family.keys.kv_heads if key == "num_key_value_heads" else family.keys.head_dim):
        return
    raw.pop(key, None)
    sizes = family.of(Config(raw)).heads(Config(raw))
    ours, worked_out = (sizes.size, 8) if key == "head_dim" else (sizes.groups, 320)
    assert ours == (getattr(stock_config(raw), key, None) or worked_out)


@pytest.mark.parametrize("model_type", filter(has_experts, model_types()))
def test_experts_are_counted_by_the_keys_that_the_class_reads(model_type: str) -> None:
    family, raw = text_model(model_type)
    keys = family.experts.count
    plain = {name: value for name, value in raw.items() if name not in keys}
    read = [stock_config(plain | {key: 4}).to_dict() for key in keys]
    assert all(config == read[0] for config in read)
