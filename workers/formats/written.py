"""The forms by the name of their target."""

from pathlib import Path

from rayprune.workers.formats.deci_lm import write_deci_lm


def write_form(target: str, model: Path, folder: Path) -> list[str]:
    """Write an exported model into a folder in the form of a target; the names of its files.

    Raises:
        SpecError: the form cannot hold the model.
        ModelError: its tokenizer or a weight cannot be written.
    """
    if target == "vllm":
        return write_deci_lm(model, folder)
    from rayprune.workers.formats.gguf_file import write_gguf  # an extra

    return write_gguf(model, folder, target)
