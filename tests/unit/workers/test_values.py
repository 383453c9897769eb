"""Values of a config, and folders that hold something else than they seem to: by name, at once."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rayprune.specs.errors import ModelError
from rayprune.workers.model.checkpoint import open_checkpoint, planned_checkpoint
from rayprune.workers.model.folder import INDEX_NAME, SINGLE_NAME
from rayprune.workers.model.values import ACTIVATIONS, ROPE_TYPES
from rayprune.workers.network.building import whole_model
from tests.conftest import MakeModel, edit_json
from tests.models import build_model

HUGE = 10**9


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder; tests link or copy what they do not change."""
    return build_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def folder(dense: Path, tmp_path: Path) -> Path:
    """A folder of copies."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in dense.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_names_are_those_of_transformers() -> None:
    assert set(ACT2FN) == ACTIVATIONS
    assert {"default", *ROPE_INIT_FUNCTIONS} == ROPE_TYPES


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pad_token_id": 260}, "pad_token_id must be null or a token below vocab_size"),
        ({"pad_token_id": -261}, "pad_token_id must be null"),
        ({"pad_token_id": "0"}, "pad_token_id must be null"),
        ({"pad_token_id": True}, "pad_token_id must be null"),
        ({"attn_implementation": "flash_attention_2"}, "remove it, the loader chooses"),
        ({"_attn_implementation": "flex_attention"}, "must be eager or sdpa"),
        ({"hidden_act": "sillu"}, "hidden_act must be one of .*found 'sillu'"),
        ({"hidden_act": ["silu"]}, "hidden_act must be one of"),
        ({"rope_parameters": {"rope_type": "yarnn"}}, "rope_type of default.*found 'yarnn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "mapping with factor for rope_type linear"),
        ({"rope_scaling": {"type": "dynamo", "factor": 2}}, "found 'dynamo'"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a mapping"),
        ({"rope_parameters": {"full_attention": {"rope_type": "x"}}}, "found 'x'"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a number above 0"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be a number"),
        ({"rope_theta": -1.0}, "rope_theta must be a number above 0"),
        ({"num_hidden_layers": HUGE}, "num_hidden_layers must be at most 16384, found 1000000000"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers must be at most"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a positive integer, found '3'"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers must be a positive integer"),
        ({"num_hidden_layers": [3]}, "num_hidden_layers must be a positive integer"),
        ({"hidden_size": 2**31}, "hidden_size must be at most 2147483647"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": True}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"attention_bias": 0}, "attention_bias must be true or false"),
        ({"sliding_window": "3"}, "sliding_window must be a positive integer"),
        ({"layer_types": ["full_attention"]}, "an entry for each of 3 layers"),
        ({"layer_types": ["full_attention"] * 2 + ["mamba"]}, "found 'mamba'"),
        ({"max_position_embeddings": 0.5}, "max_position_embeddings must be a positive integer"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "the head of another one would"),
        ({"architectures": ["LlamaForTokenClassification"]}, "the head of another one would"),
        ({"transformers_weights": "x.safetensors"}, "name the file model.safetensors"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"pruned \(gptq\); take the model"),
        ({"quantization_config": {}}, "quantised weights cannot be pruned"),
        ({"compression_config": {"format": "x"}}, "quantised weights cannot be pruned"),
        ({"vocab_size": 256}, "has 260 rows.*vocab_size 256.*set vocab_size: 260"),
        ({"vocab_size": 300}, "has 260 rows.*vocab_size 300"),
    ],
    ids=str,
)
def test_odd_values_are_refused_by_name(changes: dict[str, Any], words: str, folder: Path) -> None:
    edit_json(folder / "config.json", **changes)
    for check in (open_checkpoint, planned_checkpoint):
        with pytest.raises(ModelError, match=words) as caught:
            check(folder)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModelForCausalLM": "evil.X"}},
        {"architectures": None, "pad_token_id": None, "eos_token_id": [1, 2]},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
        {"pad_token_id": -1, "hidden_act": "gelu", "attn_implementation": "sdpa"},
        {"layer_types": ["full_attention"] * 3, "sliding_window": 64},
    ],
    ids=str,
)
def test_what_transformers_takes_is_taken(changes: dict[str, Any], folder: Path) -> None:
    """And no code of the folder is run."""
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit_json(folder / "config.json", **changes)
    assert whole_model(open_checkpoint(folder)).num_parameters() > 0


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_classes_without_a_padding_row_take_any_token(
    model_type: str, make_model: MakeModel
) -> None:
    model = make_model(model_type)
    edit_json(model / "config.json", pad_token_id=50257)
    assert whole_model(open_checkpoint(model)).num_parameters() > 0


def test_many_experts_do_not_hang(tmp_path: Path) -> None:
    mixtral = {
        "model_type": "mixtral",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 99,
        "num_hidden_layers": 16000,
        "num_local_experts": 16000,
    }
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    with pytest.raises(ModelError, match=r"implies 768.* tensors in its layers"):
        planned_checkpoint(tmp_path)


def change(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Rewrite the weights."""
    save_file(edit(load_file(folder / SINGLE_NAME)), folder / SINGLE_NAME, {"format": "pt"})


def without(name: str) -> Callable[[Path], None]:
    return lambda f: change(f, lambda t: {key: value for key, value in t.items() if key != name})


def holding(name: str) -> Callable[[Path], None]:
    return lambda f: change(f, lambda t: t | {name: torch.zeros(3)})


def text(name: str, content: str = "{}") -> Callable[[Path], object]:
    return lambda f: (f / name).write_text(content)


def renamed(new: str) -> Callable[[Path], object]:
    return lambda f: (f / SINGLE_NAME).rename(f / new)


def alone(folder: Path) -> None:
    (folder / "config.json").unlink()
    text("adapter_config.json", '{"base_model_name_or_path": "someone/base"}')(folder)


def lower(folder: Path) -> None:
    (folder / "sub").mkdir()
    for file in [file for file in folder.iterdir() if file.is_file()]:
        file.rename(folder / "sub" / file.name)


def doubled(folder: Path) -> None:
    """Two shards, one tensor in both."""
    tensors = load_file(folder / SINGLE_NAME)
    (folder / SINGLE_NAME).unlink()
    save_file(tensors, folder / "a.safetensors", {"format": "pt"})
    save_file({"model.norm.weight": torch.ones(32)}, folder / "b.safetensors", {"format": "pt"})
    places = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": places}))


def piped(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def endless(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter beside": (text("adapter_config.json"), "adapter_config.json: .*apply.*merge it"),
    "adapter alone": (alone, "apply to someone/base"),
    "subfolder": (lower, "no config.json, but sub has one; set model.path to .*/sub"),
    "a prefix too many": (
        lambda f: change(f, lambda t: {f"module.{name}": value for name, value in t.items()}),
        "it is there as module.model.layers.0.*rename",
    ),
    "no head": (without("lm_head.weight"), "lm_head.weight is missing.*at random"),
    "no embedding": (without("model.embed_tokens.weight"), "embed_tokens.weight is missing"),
    "stray": (holding("score.weight"), "holds score.weight, which no causal language model"),
    "stray in a layer": (
        holding("model.layers.1.self_attn.q_proj.lora_A.weight"),
        "lora_A.weight, which no causal language model",
    ),
    "twice": (doubled, "a.safetensors: holds model.norm.weight, which .* places elsewhere"),
    "variant": (renamed("model.fp16.safetensors"), "found only model.fp16.safetensors.*rename"),
    "for llama.cpp": (renamed("model.gguf"), "found only model.gguf, a model for llama.cpp"),
    "not downloaded": (renamed("model.incomplete"), "a download that has not ended"),
    "key twice": (text("config.json", '{"a": 1, "a": 2}'), "the key 'a' stands twice"),
    "NaN": (text("config.json", '{"a": NaN}'), "NaN is no number"),
    "deep": (text("config.json", '{"a":' + "[" * 10**5), "cannot be read as JSON"),
    "generation": (text("generation_config.json", "[1]"), "generation_config.json: must hold"),
    "config a pipe": (piped("config.json"), "config.json: .* a named pipe"),
    "config endless": (endless, "config.json: .* a device"),
    "weights a pipe": (piped(SINGLE_NAME), "model.safetensors: a named pipe"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_another_kind_are_refused_with_the_way_out(kind: str, folder: Path) -> None:
    spoil, words = FOLDERS[kind]
    spoil(folder)
    with pytest.raises(ModelError, match=words):
        open_checkpoint(folder)


def test_a_tied_base_model_is_read_as_transformers_reads_it(folder: Path) -> None:
    """Names without the prefix, no head."""
    change(
        folder,
        lambda t: {n.removeprefix("model."): v for n, v in t.items() if n != "lm_head.weight"},
    )
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        open_checkpoint(folder)
    edit_json(folder / "config.json", tie_word_embeddings=True, architectures=["LlamaModel"])
    network = whole_model(open_checkpoint(folder))
    assert network.lm_head.weight is network.model.embed_tokens.weight


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for check in (open_checkpoint, planned_checkpoint):
        with pytest.raises(ModelError, match=r"no such model folder.*OWNER/NAME"):
            check(tmp_path / "nothing")


def test_huge_weights_are_not_called_infinite(folder: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.norm.weight"].fill_(3e38)
        return tensors

    change(folder, enlarge)
    whole_model(open_checkpoint(folder))
    change(folder, lambda t: t | {"model.norm.weight": torch.full((32,), torch.inf)})
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds NaN or infinity"):
        whole_model(open_checkpoint(folder))
