"""A model writes: which token follows, who speaks, what is no text, and how much is wanted."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rayprune.orchestrator.planning.own_text import batches_of, own_text_load
from rayprune.specs.calibration import CalibrationSpec
from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.loader import load_job
from rayprune.specs.own_text import OwnTextSpec
from rayprune.specs.texts import MixedTextSpec
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.sampling import WIDTH, Dialogue, Rules, drawn, sampled
from rayprune.workers.store.shards import even_parts
from rayprune.workers.texts.limits import (
    kept_out,
    order_of_windows,
    own_tokens,
    spread_windows,
    windows_of_texts,
    with_own,
)
from rayprune.workers.texts.own import BLOCK, LOOP, PROMPT, PROMPT_EVERY, pieces, repeated, turns_of
from tests.conftest import MakeModel


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_draw_is_the_inverse_of_the_distribution_function() -> None:
    p_V = torch.tensor([0.0, 0.125, 0.0, 0.25, 0.5, 0.125, 0.0])
    draws_B = numbers(0.0, 0.1249, 0.125, 0.374, 0.375, 0.874, 0.875, 1 - 2**-53)
    assert drawn(p_V.expand(len(draws_B), -1), draws_B).tolist() == [1, 1, 3, 3, 4, 4, 5, 5]


def test_draws_from_several_blocks_are_those_from_one() -> None:
    torch.manual_seed(0)
    p_V = torch.rand(3 * WIDTH + 17)
    p_V[torch.rand(len(p_V)) < 0.5] = 0.0
    draws_B = torch.rand(500, dtype=torch.float64)
    sums_V = p_V.double().cumsum(0)
    expected_B = torch.searchsorted(sums_V, draws_B * sums_V[-1], right=True)
    assert torch.equal(drawn(p_V.expand(500, -1), draws_B), expected_B)
    with pytest.raises(ModelError, match=r"not finite; set model\.dtype: float32"):
        drawn(torch.full((1, 4), torch.nan), numbers(0.5))


RULES = Rules(0.7, {5, 9})


def loaded(make_model: MakeModel) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_model()).eval()


@torch.inference_mode()
def test_what_is_sampled_is_what_whole_passes_without_a_cache_give(make_model: MakeModel) -> None:
    """And every document is the one that it is alone."""
    network, prompts_BT = loaded(make_model), torch.tensor([[65, 66, 67], [90, 10, 200]])
    draws_BL = torch.rand(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found_BL = sampled(network, prompts_BT, draws_BL, RULES)
    ids_BT = prompts_BT
    for draws_B in draws_BL.T:
        logits_BV = network(ids_BT, use_cache=False).logits[:, -1] / 0.7
        logits_BV[:, [5, 9]] = -torch.inf
        ids_BT = torch.cat([ids_BT, drawn(logits_BV.softmax(-1), draws_B)[:, None]], 1)
    assert torch.equal(found_BL, ids_BT[:, 3:])
    alone_1L = sampled(network, prompts_BT[1:], draws_BL[1:], RULES)
    assert torch.equal(alone_1L, found_BL[1:])


class Scripted:
    """Stands for a model that wants these tokens of every document, whatever was chosen."""

    def __init__(self, wanted_BL: Sequence[Sequence[int]]) -> None:
        self.wanted_BL, self.device = torch.tensor(wanted_BL), torch.device("cpu")

    def _can_set_attn_implementation(self) -> bool:
        return False

    def generate(
        self, ids_BT: Tensor, logits_processor: list[Any], max_new_tokens: int, **_: Any
    ) -> Tensor:
        for step in range(max_new_tokens):
            scores_BV = torch.full((len(ids_BT), 100), -1e9)
            scores_BV.scatter_(1, self.wanted_BL[:, step, None], 0.0)
            chosen_B1 = logits_processor[0](ids_BT, scores_BV).argmax(-1, keepdim=True)
            ids_BT = torch.cat([ids_BT, chosen_B1], 1)
        return ids_BT


def test_both_sides_are_written_and_each_one_ends_its_turn_itself() -> None:
    behind = ([7, 21, 22], [7, 31])
    wanted = [
        [1, 2, 7, 0, 0, 3, 7, 0, 4, 99],  # the user ends, then the answer does
        [1, 1, 1, 99, 0, 0, 5, 5, 99, 0],  # by the token that ends a text
        [21, 31, 22, 1, 1, 1, 1, 1, 1, 1],  # none of them ends a turn
    ]
    draws_BL = torch.full((3, 10), 0.5, dtype=torch.float64)
    rules = Rules(1.0, {99}, behind)
    found = sampled(Scripted(wanted), torch.zeros(3, 1, dtype=int), draws_BL, rules)
    assert found.tolist() == [
        [1, 2, 7, 21, 22, 3, 7, 31, 4, 7],
        [1, 1, 1, 7, 21, 22, 5, 5, 7, 31],
        wanted[2],
    ]


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2's, whose user ends by words, not by a token of its own."""


def talker(first: bool, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of characters, of sentencepiece's kind, with a blank in front of a text or not;
    some blanks are one token with what follows.
    """
    vocab = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>"))}
    letters = [chr(code) for code in range(33, 127)]
    vocab |= {character: number for number, character in enumerate([*letters, "▁", "\n"], 3)}
    merges = [("▁", "["), ("▁", "▁"), ("▁", "A")]
    vocab |= {a + b: number for number, (a, b) in enumerate(merges, len(vocab))}
    inside = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    inside.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if first else spaces
    )
    inside.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    found = PreTrainedTokenizerFast(
        tokenizer_object=inside, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = template
    return found


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "template",
    [TEMPLATE, "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"],
)
def test_what_stands_between_turns_is_what_stands_there_in_a_chat(
    first: bool, template: str
) -> None:
    """A chat that a model writes by itself stays as it is, token for token."""
    tokenizer = talker(first, template)
    tokenizer.add_tokens(["\n\n"])  # which is no word, and ends no turn
    messages = [
        {"role": role, "content": content}
        for role, content in (
            ("user", "What [is] a # line?"),
            ("assistant", "Any of [1] and ### those.\n\nAnd more."),
            ("user", "Thanks."),
            ("assistant", "Bye."),
        )
    ]
    whole = tokenizer(
        tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False
    )
    ids, turns = whole["input_ids"], turns_of(tokenizer, "here")
    assert tuple(ids[: len(turns.before)]) == turns.before
    dialogue = Dialogue(Rules(1.0, [2], turns.behind, turns.ends))
    said = ids[len(turns.before) :]
    assert [dialogue.follows(token) for token in said] == said


def test_a_speaker_who_ends_the_text_goes_on_from_where_it_was() -> None:
    turns = turns_of(talker(first=False), "here")
    dialogue = Dialogue(Rules(1.0, [2], turns.behind, turns.ends))
    written = [dialogue.follows(token) for token in [40, 2] + [50] * (len(turns.behind[0]) - 1)]
    assert written == [40, *turns.behind[0]]


def test_a_template_that_joins_words_to_its_own_is_refused() -> None:
    with pytest.raises(SpecError, match="does not put something before every turn"):
        turns_of(talker(first=False, template="{{ messages[0]['content'] }}"), "here")


def test_a_loop_repeats_its_spans() -> None:
    assert repeated(range(100)) == 0
    assert repeated([1, 2, 3]) == 0  # has none
    assert repeated([4, 5] * 50) == 1 - 2 / 93
    text = [*range(60), *range(40)]  # 33 of 93 spans stand in it before
    assert LOOP < repeated(text) == pytest.approx(33 / 93)
    assert LOOP > repeated([*range(60), *range(20)]) == pytest.approx(13 / 73)


def test_prompts_depend_on_a_document_s_number_alone() -> None:
    ids = range(10_000)
    found = pieces(ids[: 8 * PROMPT_EVERY], range(2, 8), 8 * PROMPT_EVERY)
    assert [piece[0] for piece in found] == [number * PROMPT_EVERY for number in range(2, 8)]
    assert all(len(piece) == PROMPT for piece in found)
    short = ids[: 2 * PROMPT_EVERY]
    again = pieces(short, range(4), 4 * PROMPT_EVERY)
    assert [piece[0] for piece in again] == [0, 256, 512 % 481, 768 % 481]
    assert again[1] == pieces(ids[: 3 * PROMPT_EVERY], range(1, 2), 3 * PROMPT_EVERY)[0]
    assert pieces([1, 2, 3], range(2), 512) == [[1, 2, 3], [1, 2, 3]]
    (begun,) = pieces(ids, range(1, 2), 10_000, opening=[77])
    assert begun == [77, *range(PROMPT_EVERY + 1, PROMPT_EVERY + PROMPT)]


def test_the_last_tokens_take_no_whole_batch() -> None:
    own = OwnTextSpec(length=512, batch=16)
    assert batches_of(own, 16 * 512) == [[512] * 16]
    assert batches_of(own, 16 * 512 + 27) == [[512] * 16, [27]]
    assert batches_of(own, 700) == [[512, 188]]


def job(own: dict[str, Any], **sections: Any) -> Any:
    calibration = {"path": "c", "samples": 16, "sequence_length": 64, "shards": 2, "own": own}
    return load_job({"model": {"path": "/m"}, "calibration": calibration, **sections})


def test_as_many_tokens_are_written_as_are_read() -> None:
    assert own_tokens(job({})) == 8 * 64
    assert own_tokens(job({"weight": 3})) == 12 * 64
    assert own_tokens(job({"tokens": 600})) == 600
    assert own_tokens(job({}, recover={"samples": 40})) == 20 * 64  # a training reads more
    gated = {"name": "progressive", "gate": {"samples": 6}}
    assert own_tokens(job({}, method=gated)) == (8 + 3) * 64
    with pytest.raises(SpecError, match=r"own\.tokens: 500, but 8 windows of 64 .* 512; raise it"):
        own_tokens(job({"tokens": 500}))
    with pytest.raises(SpecError, match="its weight gives it none"):
        own_tokens(job({"weight": 1e-6}))


def test_a_recovery_is_measured_on_the_last_windows_of_the_model_s_own_text_too() -> None:
    assert kept_out(job({}, recover={})) == []
    assert kept_out(job({}, recover={"held_out": {"windows": 1}})) == [14, 15]
    more = job({"weight": 3}, recover={"samples": 8, "held_out": {"windows": 1}})  # 2 and 6
    assert kept_out(more) == [5, 7]
    with pytest.raises(SpecError, match=r"keeps 8 windows .* reads 8 .*raise calibration\.samples"):
        kept_out(job({}, recover={"held_out": {"windows": 8}}))


def test_a_recovery_trains_on_more_of_its_own_text_than_the_calibration_reads() -> None:
    """Behind what the calibration has read of it, and as much of the other texts as that has."""
    given = job({"weight": 3}, recover={"own_samples": 9, "held_out": {"windows": 1}})
    assert own_tokens(given) == (12 + 9) * 64
    text = with_own(given, "own").recovery_text
    assert [count for _, count in windows_of_texts(text)] == [4, 21]
    assert with_own(given, "own").calibration.samples == 16
    out = kept_out(given)
    assert [order_of_windows(text)[number] for number in out] == [(0, 3), (1, 20)]
    without = given.model_copy(
        update={"calibration": given.calibration.model_copy(update={"own": None})}
    )
    assert own_tokens(without) == 0
    assert without.recovery_text.samples == with_own(without, "own").recovery_text.samples == 16
    with pytest.raises(SpecError, match="own_samples beside text"):
        job({}, recover={"own_samples": 9, "text": {"path": "c"}})
    with pytest.raises(SpecError, match="measures its gate"):
        job({}, method="progressive", recover={"own_samples": 9})


def test_nothing_of_a_model_s_own_settings_cuts_the_distribution(make_model: MakeModel) -> None:
    network = loaded(make_model)
    network.generation_config.update(top_k=1, repetition_penalty=9.0, eos_token_id=0, max_length=4)
    draws_BL = torch.linspace(0, 0.99, 16, dtype=torch.float64)[None]
    prompts_BT, rules = torch.tensor([[65]]), Rules(1.0, set())
    cut = sampled(network, prompts_BT, draws_BL, rules)
    assert torch.equal(cut, sampled(loaded(make_model), prompts_BT, draws_BL, rules))


def test_the_plan_counts_the_cache_that_an_engine_keeps(make_model: MakeModel) -> None:
    checkpoint = open_checkpoint(make_model())

    def cached(**own: Any) -> int:
        load = own_text_load(job({"length": 128} | own), checkpoint, 2)
        assert load
        return load.most_cached

    assert cached(batch=32) == 4 * (PROMPT + 128)  # 512 tokens are read, no 32 documents
    assert cached(batch=3) == 3 * (PROMPT + 128)
    assert cached(batch=3, prompts="none") == 3 * (1 + 128)
    assert cached(batch=32, engine="vllm") == (32 * 2 + 1) * BLOCK  # made before the first one
    assert cached(batch=3, engine="vllm", length=BLOCK - PROMPT) == (3 + 1) * BLOCK


def texts(samples: int, *weights: float) -> CalibrationSpec:
    mix = [MixedTextSpec(path="m", weight=weight) for weight in weights]
    return CalibrationSpec(path="c", samples=samples, sequence_length=8, shards=2, mix=tuple(mix))


def test_windows_are_spread_over_every_text() -> None:
    """Of one text as evenly as ever; of texts that alternate not of the first alone."""
    one = spread_windows(texts(10), 4)
    assert one == tuple((part.start, 0) for part in even_parts(10, 4))
    assert spread_windows(texts(8, 1.0), 4) == ((0, 0), (1, 1), (4, 0), (5, 1))
    assert spread_windows(texts(8, 1.0), 8) == tuple((place, place % 2) for place in range(8))
    found = spread_windows(texts(32, 7.0, 7.0), 3)  # of 2, 15 and 15 windows
    assert sorted(text for _, text in found) == [0, 1, 2]
    order = order_of_windows(texts(32, 7.0, 7.0))
    assert all(order[place][0] == text for place, text in found)
    assert len(spread_windows(texts(32, 7.0, 7.0), 1)) == 1
