"""Small models built from configs in milliseconds, with a tokenizer without a network."""

import json
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    PreTrainedTokenizerFast,
)

from benchmarks.random_model import SIZES, byte_tokenizer
from rayprune.workers.model.families import family_named
from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.encoder import Encoder
from rayprune.workers.model.families.mixture import Mixture
from rayprune.workers.model.families.parts import Keys

torch.set_num_threads(1)

WINDOW = {"sliding_window": 8}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
"""Sizes of latent attention."""
LLAMA4 = {
    "attention_chunk_size": 8,
    "floor_scale": 4,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 192,
    "num_experts_per_tok": 1,
}
GEMMA4 = WINDOW | {
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "global_head_dim": 32,
    "num_global_key_value_heads": 2,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "chameleon": {
        "vocabulary_map": {"<image>": 1, "IMGIMGAZ": 2},
        "vq_config": {
            "embed_dim": 8,
            "num_embeddings": 8,
            "latent_channels": 32,
            "resolution": 8,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
        },
    },
    "cohere2": WINDOW,
    "deepseek_v2": LATENT
    | {"topk_method": "group_limited_greedy", "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    | {"first_k_dense_replace": 1},
    "deepseek_v3": LATENT
    | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "deberta_v2": {  # as DeBERTa V3, but for what it shares
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 8,
        "relative_attention": True,
        "type_vocab_size": 0,
    },
    "electra": {"embedding_size": 24},
    "exaone4": WINDOW,
    "falcon": {"new_decoder_architecture": True},
    "gemma3_text": WINDOW,
    "gemma4": GEMMA4,
    "gemma4_text": GEMMA4,
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 2, "n_shared_experts": 2},
    "gpt_neo": {"window_size": 8},
    "gptj": {"rotary_dim": 4},
    "llama4": LLAMA4,
    "llama4_text": LLAMA4,
    "ministral": WINDOW,
    "modernbert": {"local_attention": 16},
    "olmo3": WINDOW,
    "qwen2_moe": {"decoder_sparse_step": 2},
    "granite": {  # by default all are 1, and nothing that overlooks one would show
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.5,
    },
    "gpt2": {"n_positions": 256},
    "t5": {
        "architectures": ["T5EncoderModel"],
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 8,
    },
}
"""Keys that only one family has, or that show what it does."""
WORKED_OUT: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
    "gpt_neo": {
        "attention_types": lambda given: [
            [[["global", "local"][n % 2] for n in range(given["num_hidden_layers"])], 1]
        ]
    },
    **{
        name: {"num_key_value_heads": lambda given: given["num_attention_heads"]}
        for name in ("deepseek_v2", "deepseek_v3")
    },
    **{
        name: {"head_dim": lambda given: given["hidden_size"] // given["num_attention_heads"]}
        for name in ("chameleon", "helium", "olmoe", "qwen2_5_vl")
    },
}
"""Keys that must fit others."""

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
"""Sizes of a vision tower."""
AUDIO_TOWER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "output_proj_dims": 16,
    "subsampling_conv_channels": [4, 4],
}
QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 8,
    "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0],
    "window_size": 16,
    "fullatt_block_indexes": [0],
}
LLAMA4_TOWER = TOWER | {
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "intermediate_size": 64,
}
LLAMA4_TOKENS = {"boi_token_index": 0, "eoi_token_index": 2}
VQ = {
    "codebook_size": 8,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
    "temporal_downsample_factor": 2,
}
JANUS_TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_image_tokens": 4,
}
JANUS_VQ = {
    "embed_dim": 8,
    "num_embeddings": 8,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "latent_channels": 32,
    "num_hidden_layers": 1,
}
VQ_TOKENS = {"<image>": 1, "<|extra_200|>": 2}
GEMMA4_TOKENS = {"image_token_id": 1, "video_token_id": 2, "audio_token_id": 0}
QWEN_TOKENS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 0}


def _beside(model_type: str, text: dict[str, Any]) -> dict[str, Any]:
    """What a model has beside its text model; rotary positions with three axes in that."""
    if model_type.startswith("qwen"):
        size = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        axes = [size // 2 - 2 * (size // 8), size // 8, size // 8]
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": axes,
        }
        return {
            "vision_config": QWEN_TOWER | {"out_hidden_size": text["hidden_size"]}
        } | QWEN_TOKENS
    if model_type == "gemma4":
        hears = {"audio_config": AUDIO_TOWER} if text.get("num_kv_shared_layers") else {}
        tower = TOWER | {"head_dim": 8, "num_key_value_heads": 2}
        return {"vision_config": tower} | hears | GEMMA4_TOKENS
    if model_type == "llama4":
        return {"vision_config": LLAMA4_TOWER, "image_token_index": 1} | LLAMA4_TOKENS
    if model_type == "emu3":
        return {"vq_config": VQ, "vocabulary_map": VQ_TOKENS}
    if model_type == "janus":
        seen = JANUS_TOWER | {"projection_dim": text["hidden_size"]}
        drawn = JANUS_VQ | {
            "projection_dim": text["hidden_size"],
            "image_token_embed_dim": text["hidden_size"],
        }
        return {"vision_config": seen, "vq_config": drawn, "image_token_id": 1}
    kind = {"gemma3": "siglip_vision_model", "mistral3": "pixtral"}[model_type]
    tokens = {"image_token_index": 1, "boi_token_index": 0, "eoi_token_index": 2}
    more = {"mm_tokens_per_image": 1} if model_type == "gemma3" else {"spatial_merge_size": 1}
    return {"vision_config": TOWER | {"model_type": kind}} | tokens | more


GEMMA4_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 96,
}
GEMMA4_INPUTS = {"hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 260}
GEMMA4_READERS = GEMMA4_INPUTS | {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "attention_k_eq_v": False,
    "use_double_wide_mlp": True,
}
"""As of E2B."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}-{kind}": (name, keys)
    for name in ("gemma4_text", "gemma4")
    for kind, keys in {
        "experts": GEMMA4_EXPERTS,
        "inputs": GEMMA4_INPUTS,
        "readers": GEMMA4_READERS,
    }.items()
}
"""Families that are something else with some configs: the type, and keys that make it that."""
HYPHENED = {"deberta_v2": "deberta-v2", "xlm_roberta": "xlm-roberta"}
"""Model types whose names are not those of files."""

_MODELS = tempfile.TemporaryDirectory(prefix="models-")
_BUILT: dict[str, Path] = {}


def raw_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """A tiny config: `SIZES` and the changes, both by Llama's keys, under the family's own; keys
    of sizes that it has not are left out. The type may be one of `VARIANTS`.
    """
    model_type, variant = VARIANTS.get(model_type, (model_type, {}))
    changes = variant | changes
    special = OF_FAMILY.get(model_type, {})
    given = SIZES | special | changes
    given |= {key: value(given) for key, value in WORKED_OUT.get(model_type, {}).items()}
    family, width = family_named(model_type), given["intermediate_size"]
    if isinstance(family, Backbone):
        if isinstance(family.text, Mixture):
            given = _with_experts(family.text, given, width)
        text = given | {"model_type": family.text_type}
        beside = _beside(model_type, text)
        return {"model_type": model_type, "text_config": text} | beside
    if isinstance(family, Decoder):
        own = {getattr(Keys, key.name): getattr(family.keys, key.name) for key in fields(Keys)}
        given = {own.get(key, key): value for key, value in given.items()}
    if isinstance(family, Mixture):
        given = _with_experts(family, given, width)
    if isinstance(family, Encoder):
        named = family.architecture.replace("Model", "ForMaskedLM")
        given = {"architectures": [named]} | given
    own_type = {"model_type": HYPHENED.get(model_type, model_type)}
    return own_type | {key: v for key, v in given.items() if key is not None}


def _with_experts(family: Mixture, given: dict[str, Any], width: int) -> dict[str, Any]:
    experts = family.experts
    own = {experts.count[-1]: 4, experts.active: 2, experts.width: width}
    if family.shared and family.shared.key:
        own[family.shared.key] = width
    return own | given


def auto_class(model_type: str) -> Any:
    """What builds a model of a family that predicts tokens, if there is such a class."""
    if isinstance(family := family_named(model_type), Encoder):
        return AutoModelForMaskedLM if family.predicts else AutoModelForTextEncoding
    if family.architecture.endswith("ForConditionalGeneration"):
        return getattr(transformers, family.architecture)
    return AutoModelForCausalLM


def stock_model(raw: dict[str, Any], **options: Any) -> Any:
    """The model that transformers builds from a config."""
    stock = auto_class(raw["model_type"])
    build = getattr(stock, "from_config", None) or stock._from_config
    return build(AutoConfig.for_model(**deepcopy(raw)), **options)


def build_model(
    folder: Path,
    model_type: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Write a tiny random model of a family with a byte-level tokenizer; activations are made
    unlike by random norm weights. The same one is built once and copied after that.
    """
    wanted = json.dumps([raw_config(model_type, **changes), seed, str(dtype)], sort_keys=True)
    if wanted not in _BUILT:
        _BUILT[wanted] = Path(_MODELS.name) / str(len(_BUILT))
        _build(_BUILT[wanted], raw_config(model_type, **changes), seed, dtype)
    shutil.copytree(_BUILT[wanted], folder, dirs_exist_ok=True)
    return folder


def _build(folder: Path, raw: dict[str, Any], seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    model = stock_model(raw, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) + 0.5
                if parameter.dim() == 1 and name.endswith("weight")  # a norm's
                else torch.randn_like(parameter) * 0.15
            )
        for name, buffer in model.named_buffers():
            if name.endswith(
                ("e_score_correction_bias", "put_min", "put_max")
            ):  # infinite at first
                buffer.copy_(torch.randn_like(buffer) * 0.15)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if isinstance(family_named(raw["model_type"]), Encoder):
        tokenizer = framing(tokenizer)
    tokenizer.save_pretrained(folder)


def framing(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that puts its tokens 1 and 2 around every text, and masks with 259."""
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return _around(tokenizer, "[CLS] $A [SEP]", {"[CLS]": 1, "[SEP]": 2, "[MASK]": 259}, names)


def begun(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with its token 1, as Llama's and Gemma's do."""
    return _around(tokenizer, "<bos> $A", {"<bos>": 1}, {"bos_token": "<bos>"})


def _around(
    tokenizer: PreTrainedTokenizerFast, text: str, numbers: dict[str, int], names: dict[str, str]
) -> PreTrainedTokenizerFast:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] |= numbers
    inside = Tokenizer.from_str(json.dumps(backend))
    inside.post_processor = processors.TemplateProcessing(
        single=text, special_tokens=[entry for entry in numbers.items() if entry[0] in text]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inside, **names)
