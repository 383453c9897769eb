"""Models of published shapes with random weights, written layer by layer: sizes and speeds are
real, the text they predict is not.

python -m benchmarks.random_model llama-2-7b --out /data/llama-2-7b-random
python -m benchmarks.random_model llama-3-70b --layers 2 --out /data/llama-3-70b-2-layers
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
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
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ids from 3: needs no network and fits any vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: number + 3 for number, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _random(*shape: int) -> Tensor:
    """Weights that keep the size of activations: standard deviation 1 / sqrt(inputs)."""
    return torch.empty(shape).normal_(std=shape[-1] ** -0.5).bfloat16()


def layer_tensors(config: dict[str, Any], layer: int) -> dict[str, Tensor]:
    """One decoder layer; norm weights differ, so that channels do."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    outs = {
        "self_attn.q_proj": hidden,
        "self_attn.k_proj": keys,
        "self_attn.v_proj": keys,
        "self_attn.o_proj": hidden,
    }
    outs |= {"mlp.gate_proj": width, "mlp.up_proj": width}
    tensors = {f"{name}.weight": _random(out, hidden) for name, out in outs.items()} | {
        "mlp.down_proj.weight": _random(hidden, width)
    }
    tensors |= {
        f"{name}_layernorm.weight": (torch.rand(hidden) + 0.5).bfloat16()
        for name in ("input", "post_attention")
    }
    return {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def write_model(shape: str, out: Path, num_layers: int | None = None, seed: int = 0) -> Path:
    """Write config, tokenizer and one safetensors file per layer; memory of one layer."""
    torch.manual_seed(seed)
    config = _LLAMA | SHAPES[shape]
    config["num_hidden_layers"] = num_layers or config["num_hidden_layers"]
    out.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save_pretrained(out)
    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for layer in range(config["num_hidden_layers"]):
        save(f"layer-{layer:05d}.safetensors", layer_tensors(config, layer))
    size = (config["vocab_size"], config["hidden_size"])
    outer = {"model.embed_tokens.weight": _random(*size), "lm_head.weight": _random(*size)}
    save(
        "outer.safetensors",
        outer | {"model.norm.weight": torch.ones(config["hidden_size"]).bfloat16()},
    )
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
