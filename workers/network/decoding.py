"""How a whole model writes token by token: its cache, and the attention of a new token to it.

torch's fused CPU kernel is made for many queries: in bf16 one query to 300 cached tokens, 64
documents of 9 heads in 3 groups, takes it 19 ms, the products 1.4.
Letters: B documents, S new tokens, H query heads, G key-value heads, R query heads of each, T
tokens of the cache, D head dim, E dim of a value.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rayprune_decoding"


def decode_by_products(network: Any) -> None:
    """Let a whole model with `sdpa` attention attend by two plain products; others stay as they
    are.
    """
    if network.config._attn_implementation == "sdpa" and network._can_set_attn_implementation():
        network.set_attn_implementation(NAME)


def whole_cache(network: Any) -> dict[str, Any]:
    """Options of `generate` with which a cache is made once, as long as it will be; none where the
    class masks by the cache's length (GPT-Neo). One that grows is copied with every token, and
    leaves holes in the heap that take as much again.
    """
    if not network._can_set_attn_implementation():
        return {}
    network._previous_max_cache_length = -1  # else it is as long as the longest before it
    return {"cache_implementation": "static", "disable_compile": True}


def _attend(
    module: Any,
    query_BHSD: Tensor,
    key_BGTD: Tensor,
    value_BGTE: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What `sdpa` computes, (B, S, H, E); by products where S is 1."""
    special = options.get("dropout") or options.get("position_bias") is not None
    if query_BHSD.shape[2] != 1 or special or (mask is not None and mask.shape[1] != 1):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_BHSD, key_BGTD, value_BGTE, mask, **options
        )
        return found
    batch, heads, _, dim = query_BHSD.shape
    scale = options.get("scaling")
    query_BGRD = query_BHSD.reshape(batch, key_BGTD.shape[1], -1, dim)
    scores_BGRT = query_BGRD @ key_BGTD.mT * (dim**-0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        scores_BGRT = scores_BGRT.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores_BGRT = scores_BGRT + mask
    p_BGRT = torch.softmax(scores_BGRT, -1, dtype=torch.float32).to(value_BGTE.dtype)
    return (p_BGRT @ value_BGTE).reshape(batch, 1, heads, -1), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
