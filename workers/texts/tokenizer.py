"""The tokenizer's files of a model folder: whether there are any, and what they need. No torch."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from rayprune.specs.errors import ModelError
from rayprune.workers.model.folder import read_json
from rayprune.workers.texts.reading import Encode

FAST = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_VOCABULARIES = ("vocab.json", "vocab.txt", "vocab.model", "spiece.model", "bpe.model")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_LINE_OF_TIKTOKEN = 80
"""Bytes within which a file of tiktoken shows itself: `IQ== 0`."""


def has_template(model: Path) -> bool:
    """Whether the folder says how a chat is written."""
    options = read_json(model / _CONFIG) if (model / _CONFIG).exists() else {}
    return bool(options.get("chat_template")) or any((model / n).exists() for n in _TEMPLATES)


def fast_encoder(model: Path) -> Encode | None:
    """How the folder's tokenizer turns text into token ids, without transformers; None: it has to
    be converted first.

    Raises:
        ModelError: there is none, it is damaged, or it needs a package that is not installed.
    """
    if (model / _CONFIG).exists():
        read_json(model / _CONFIG)
    if (model / FAST).is_file():
        return _loaded(model / FAST)
    for name, package, install in _needed(model):
        if find_spec(package) is None:
            raise ModelError(
                f"{model / name}: needs the package {package}: pip install {install}; or put the"
                f" model's {FAST} beside it"
            )
    found = [*_needed(model), *(name for name in _VOCABULARIES if (model / name).is_file())]
    if not found:
        raise ModelError(
            f"{model}: no usable tokenizer: neither {FAST} nor tokenizer.model is there; copy the"
            " tokenizer's files into the model folder"
        )
    return None


def _loaded(file: Path) -> Encode:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    # tokenizers raises plain Exception
    except Exception as error:
        raise ModelError(
            f"{file}: no usable tokenizer ({error}); fetch it again, or copy the tokenizer's files"
            " into the model folder"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text).ids  # noqa: E731
    return encode


def _needed(model: Path) -> list[tuple[str, str, str]]:
    """Files that only some package reads: name, module, what to install."""
    found = []
    if (file := model / "tokenizer.model").is_file():
        with file.open("rb") as handle:
            package = "tiktoken" if _is_tiktoken(handle.read(_LINE_OF_TIKTOKEN)) else ""
        found.append(
            (file.name, package, package)
            if package
            else (file.name, "sentencepiece", "sentencepiece protobuf")
        )
    if (model / "tekken.json").is_file():
        found.append(("tekken.json", "mistral_common", "mistral-common"))
    return found


def _is_tiktoken(head: bytes) -> bool:
    words = head.partition(b"\n")[0].split()
    return len(words) == 2 and words[1].isdigit()
