"""Folders in the form in which the Hub has them: names of old, buffers among the weights, no
prefix, a head that is tied and there, several files, an older config. One command prunes each,
stock classes load the result, and it computes what comes of the folder that today's transformers
writes.

BERT's forms are in test_encoders.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.cli import main
from tests.conftest import MakeJob, MakeModel

Tensors = dict[str, Tensor]
LAYERS = 3


def with_buffers(place: str, names: dict[str, Tensor]) -> Callable[[Tensors], Tensors]:
    """Buffers that older versions saved in every layer."""
    return lambda tensors: (
        tensors
        | {
            f"{place}.{layer}.{name}": tensor
            for layer in range(LAYERS)
            for name, tensor in names.items()
        }
    )


MASK = torch.ones(1, 1, 256, 256, dtype=torch.uint8).tril()
OLD: dict[str, Callable[[Tensors], Tensors]] = {
    "phi3": lambda tensors: tensors,
    "gpt_neox": with_buffers(
        "gpt_neox.layers",
        {
            "attention.bias": MASK,
            "attention.masked_bias": torch.tensor(-1e9),
            "attention.rotary_emb.inv_freq": torch.ones(2),
        },
    ),
    "gpt2": lambda tensors: {
        name.removeprefix("transformer."): tensor
        for name, tensor in with_buffers("transformer.h", {"attn.bias": MASK.float()})(
            tensors
        ).items()
    },
    "mixtral": lambda tensors: tensors,
    "qwen3": lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]},
}
"""What a folder's tensors become, by model type."""
TIED = {"tie_word_embeddings": True}


def to_old_form(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Two files and an index, and a config as of transformers 4."""
    tensors = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where: dict[str, str] = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n].clone() for n in some}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters", None) or {}
    config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.38.0"}))


@pytest.mark.parametrize("model_type", OLD)
def test_what_the_hub_has_is_pruned_by_one_command(
    model_type: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    logits = []
    for form in ("today", "old"):
        changes = TIED if model_type == "qwen3" else {}
        folder = make_model(model_type, form, num_hidden_layers=LAYERS, **changes)
        if form == "old":
            to_old_form(folder, OLD[model_type])
        job = make_job(folder, f"{form}.yaml", budget={"kv_groups": "auto"})
        assert main(["run", str(job), "--out", str(tmp_path / f"run-{form}"), "--quiet"]) == 0
        model, told = AutoModelForCausalLM.from_pretrained(
            tmp_path / f"run-{form}" / "model", output_loading_info=True
        )
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        with torch.inference_mode():
            logits.append(model(input_ids=torch.arange(32)[None]).logits)
    assert torch.equal(*logits)
