"""Small models built from configs in milliseconds, with a tokenizer without a network."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
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
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.encoder import Encoder
from rayprune.workers.model.families.mixture import Mixture
from rayprune.workers.model.families.parts import Keys

torch.set_num_threads(1)

WINDOW = {"sliding_window": 8}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "cohere2": WINDOW,
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
    "gpt_neo": {"window_size": 8},
    "gptj": {"rotary_dim": 4},
    "ministral": WINDOW,
    "modernbert": {"local_attention": 16},
    "olmo3": WINDOW,
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
    "olmoe": {"head_dim": lambda given: given["hidden_size"] // given["num_attention_heads"]},
    "helium": {"head_dim": lambda given: given["hidden_size"] // given["num_attention_heads"]},
}
"""Keys that must fit others."""

HYPHENED = {"deberta_v2": "deberta-v2", "xlm_roberta": "xlm-roberta"}
"""Model types whose names are not those of files."""

_MODELS = tempfile.TemporaryDirectory(prefix="models-")
_BUILT: dict[str, Path] = {}


def raw_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """A tiny config: `SIZES` and the changes, both by Llama's keys, under the family's own; keys
    of sizes that it has not are left out.
    """
    given = SIZES | OF_FAMILY.get(model_type, {}) | changes
    given |= {key: value(given) for key, value in WORKED_OUT.get(model_type, {}).items()}
    family = family_named(model_type)
    if isinstance(family, Decoder):
        own = {getattr(Keys, key.name): getattr(family.keys, key.name) for key in fields(Keys)}
        given = {own.get(key, key): value for key, value in given.items()}
    if isinstance(family, Mixture):
        experts = family.experts
        own = {experts.count[0]: 4, experts.active: 2, experts.width: given["intermediate_size"]}
        if family.shared and family.shared.key:
            own[family.shared.key] = given["intermediate_size"]
        given |= {key: value for key, value in own.items() if key not in changes}
    if isinstance(family, Encoder):
        named = family.architecture.replace("Model", "ForMaskedLM")
        given = {"architectures": [named]} | given
    own_type = {"model_type": HYPHENED.get(model_type, model_type)}
    return own_type | {key: v for key, v in given.items() if key is not None}


def auto_class(model_type: str) -> Any:
    """What builds a model of a family that predicts tokens, if there is such a class."""
    if isinstance(family := family_named(model_type), Encoder):
        return AutoModelForMaskedLM if family.predicts else AutoModelForTextEncoding
    return AutoModelForCausalLM


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
    config = AutoConfig.for_model(**raw)
    model = auto_class(raw["model_type"]).from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) + 0.5
                if parameter.dim() == 1 and name.endswith("weight")  # a norm's
                else torch.randn_like(parameter) * 0.15
            )
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if isinstance(family_named(raw["model_type"]), Encoder):
        tokenizer = framing(tokenizer)
    tokenizer.save_pretrained(folder)


def framing(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that puts its tokens 1 and 2 around every text, and masks with 259."""
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    numbers = {"[CLS]": 1, "[SEP]": 2, "[MASK]": 259}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] |= numbers
    inside = Tokenizer.from_str(json.dumps(backend))
    inside.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inside, **names)
