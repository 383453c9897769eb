"""The files of a model folder beside its weights, config and index: which of them go along."""

from collections.abc import Sequence
from pathlib import Path

from rayprune.specs.files import within

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "tekken.json",
)
CHAT_TEMPLATES = ("*.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
SENTENCE_FILES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]_*/*",
)
"""What sentence-transformers has around an encoder: pooling, and layers behind it."""
PROCESSOR_FILES = ("*processor_config.json",)
"""How pictures become what a model sees."""
COPIED = (
    *TOKENIZER_FILES,
    *PROCESSOR_FILES,
    *CHAT_TEMPLATES,
    *SENTENCE_FILES,
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
NEVER_COPIED = (".py", ".bin", ".pt", ".pth", ".pkl")


def side_files(source: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of a model folder that match; never code, never pickles.

    Raises:
        ModelError: one is a link that leads out of the folder.
    """
    found = {file for pattern in patterns for file in source.glob(pattern)}
    return sorted(
        within(source, file) for file in found if file.is_file() and file.suffix not in NEVER_COPIED
    )
