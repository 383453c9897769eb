"""Models of published shapes with random weights, written layer by layer on all processors: sizes
and speeds are real, the text they predict is not.

python -m benchmarks.random_model llama-2-7b --out /data/llama-2-7b-random
python -m benchmarks.random_model llama-3-70b --layers 2 --out /data/llama-3-70b-2-layers
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from rayprune.workers.model.config import Config
from rayprune.workers.model.families import family_named
from rayprune.workers.model.places import as_stored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
}
SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Those of a model for tests, by Llama's keys."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama-3-70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    # 32 of its 128 experts
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 4096,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "vocab_size": 32000,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
    },
    "tiny": SIZES | {"hidden_size": 64, "intermediate_size": 384, "head_dim": 16},
}
"""By name; `tiny` only shows that a benchmark runs."""
_SMALL = 2**20
"""Parameters of a layer below which other processes are not worth their start."""


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per byte, ids from 3: needs no network and fits any vocabulary."""
    from transformers import PreTrainedTokenizerFast  # not where layers are written

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: number + 3 for number, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    """Weights that keep the size of activations: standard deviation 1 / sqrt(inputs)."""
    return torch.empty(shape).normal_(std=shape[-1] ** -0.5, generator=generator).bfloat16()


def _generator(seed: int, number: int) -> torch.Generator:
    """For one part of a model: torch takes 32 bits of a seed."""
    return torch.Generator().manual_seed((seed * 1000 + number) % 2**32)


def layer_tensors(config: dict[str, Any], layer: int, seed: int = 0) -> dict[str, Tensor]:
    """One decoder layer, from the seed and its number alone; norm weights differ, so that channels
    do.
    """
    if config["model_type"] != "llama":
        return _described_layer(config, layer, _generator(seed, 1 + layer))
    hidden, width = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    generator = _generator(seed, 1 + layer)
    tensors = {name: _random(generator, *shape) for name, shape in shapes.items()} | {
        f"{name}_layernorm": (torch.rand(hidden, generator=generator) + 0.5).bfloat16()
        for name in ("input", "post_attention")
    }
    return {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in tensors.items()}


def _described_layer(
    config: dict[str, Any], layer: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """One layer of any family, by its description."""
    model = family_named(config["model_type"]).describe(Config(config))
    described = model.layers[layer]
    tensors = {
        name: _random(generator, *shape)
        if len(shape) > 1
        else (torch.rand(shape, generator=generator) + 0.5 * ("norm" in name)).bfloat16()
        for name, shape in described.shapes.items()
    }
    stored = as_stored(tensors, described.places)
    return {model.prefix(layer) + name: tensor for name, tensor in stored.items()}


def outer_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Embeddings, head and the last norm."""
    size, generator = (config["vocab_size"], config["hidden_size"]), _generator(seed, 0)
    return {
        "model.embed_tokens.weight": _random(generator, *size),
        "lm_head.weight": _random(generator, *size),
        "model.norm.weight": torch.ones(config["hidden_size"]).bfloat16(),
    }


def _write_part(config: dict[str, Any], layer: int | None, seed: int, out: Path) -> dict[str, str]:
    """Write one layer, or what is around the layers; the file of each tensor."""
    file = "outer.safetensors" if layer is None else f"layer-{layer:05d}.safetensors"
    tensors = outer_tensors(config, seed) if layer is None else layer_tensors(config, layer, seed)
    save_file(tensors, out / file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file)


def num_parameters(config: dict[str, Any]) -> tuple[int, int]:
    """Of the matrices of a layer, and of those around the layers."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return hidden * (2 * hidden + 2 * keys + 3 * width), 2 * config["vocab_size"] * hidden


def write_model(
    shape: str,
    out: Path,
    num_layers: int | None = None,
    seed: int = 0,
    processes: int | None = None,
) -> Path:
    """Write config, tokenizer and one safetensors file per layer, in as many processes as there are
    processors (a small model: in this one), each with the memory of one layer.
    """
    config = _LLAMA | SHAPES[shape]
    config["num_hidden_layers"] = num_layers = num_layers or config["num_hidden_layers"]
    out.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save_pretrained(out)
    parts: list[int | None] = [None, *range(num_layers)]  # the largest first
    write = partial(_write_part, config, seed=seed, out=out)
    if processes is None:
        is_small = config["vocab_size"] * config["hidden_size"] < _SMALL
        processes = 1 if is_small else min(os.cpu_count() or 1, len(parts))
    if processes == 1:
        written = [write(part) for part in parts]
    else:
        with ProcessPoolExecutor(
            processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            written = list(pool.map(write, parts))
    weight_map = {name: file for files in written for name, file in files.items()}
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    print(write_model(options.shape, options.out, options.layers))


if __name__ == "__main__":
    main()
