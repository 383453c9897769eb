"""A folder's tokenizer in the header of a GGUF file."""

from pathlib import Path

from gguf import GGUFWriter, SpecialVocab

from rayprune.specs.errors import ModelError
from rayprune.workers.calibration import load_tokenizer
from rayprune.workers.model.folder import read_json
from rayprune.workers.texts.pieces import TOKENIZER, vocabulary


def add_vocabulary(writer: GGUFWriter, folder: Path, rows: int) -> None:
    """Write a folder's tokenizer into a file's header.

    Raises:
        ModelError: llama.cpp has none like it, or it has more tokens than the embeddings rows.
    """
    found = vocabulary(read_json(folder / TOKENIZER), rows, str(folder / TOKENIZER))
    writer.add_tokenizer_model(found.kind)
    writer.add_tokenizer_pre(found.cut)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    writer.add_add_space_prefix(found.space_in_front)
    special = SpecialVocab(folder, load_merges=found.scores is None, n_vocab=rows)
    special.add_special_token = _added(folder)
    special.add_to_gguf(writer, quiet=True)


def _added(folder: Path) -> dict[str, bool]:
    """Whether the tokenizer puts its first and its last token around a text."""
    tokenizer = load_tokenizer(folder)
    plain, ids = (tokenizer("a b", add_special_tokens=a)["input_ids"] for a in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = {"bos": ids[:1] == [bos] != plain[:1], "eos": ids[-1:] == [eos] != plain[-1:]}
    if [bos] * added["bos"] + plain + [eos] * added["eos"] != ids:
        raise ModelError(
            f"{folder}: its tokenizer puts more than its first and last token around a text, which"
            " llama.cpp does not; leave gguf out of export.target"
        )
    return added
