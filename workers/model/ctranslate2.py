"""What CTranslate2's converter reads of a folder of transformers (4.8). No torch."""

from typing import Any

from rayprune.specs.errors import SpecError
from rayprune.workers.model.config import Config

WITH_HEAD_DIM = ("mistral", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Types whose heads may have another size than hidden size / heads: the loaders of others do not
look at `head_dim`, and compute something else."""
READ = (
    *WITH_HEAD_DIM,
    "llama",
    "qwen2",
    "phi",
    "phi3",
    "gpt2",
    "gptj",
    "gpt_neox",
    "opt",
    "falcon",
)
"""Types that it has a loader for, of those that can be pruned."""


def check_ctranslate2(config: Config) -> None:
    """Check an exported folder's config.

    Raises:
        SpecError: CTranslate2 cannot hold the model, or would compute something else.
    """
    kind = config.model_type
    raw: Any = config.raw
    leave = "or leave ctranslate2 out of export.target"
    if config.layers_differ:
        raise SpecError(
            "export.target: ctranslate2: its layers are alike, these differ in size; set"
            f" export.pad: true, budget.per_layer: false, {leave}"
        )
    if kind not in READ:
        raise SpecError(f"export.target: ctranslate2: it knows no {kind}; leave it out")
    size, hidden, heads = (
        int(raw.get(name) or 0) for name in ("head_dim", "hidden_size", "num_attention_heads")
    )
    if size and kind not in WITH_HEAD_DIM and size * heads != hidden:
        raise SpecError(
            f"export.target: ctranslate2: it takes hidden_size / heads ({hidden} / {heads}) for the"
            f" size of a {kind}'s heads, which is {size}; set budget.kv_groups so that all stay,"
            f" {leave}"
        )
