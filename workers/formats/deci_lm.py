"""A model whose layers differ as a folder for vLLM: the same weights under another config."""

from pathlib import Path

from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint
from rayprune.workers.model.deci_lm import CODE
from rayprune.workers.model.folder import INDEX_NAME, index_of
from rayprune.workers.network.reading import read_tensors
from rayprune.workers.store.files import copy_file, link_file, write_json, write_tensors, write_text
from rayprune.workers.store.side_files import COPIED, side_files


def write_deci_lm(model: Path, folder: Path) -> list[str]:
    """Write the model into a folder; the names of the files.

    Raises:
        SpecError: vLLM's DeciLM does not hold it.
    """
    checkpoint = open_checkpoint(model)
    config = checkpoint.deci_lm()
    files = sorted({info.file for info in checkpoint.tensors.values()})
    absent = checkpoint.absent_tensors
    for file in files:
        _write_weights(checkpoint, file, folder, absent)
    write_json(folder / INDEX_NAME, index_of(folder, files))
    beside = side_files(model, COPIED)
    for path in beside:
        copy_file(path, folder / path.relative_to(model))
    write_text(folder / f"{CODE.module}.py", CODE.text)
    write_json(folder / "config.json", config)
    names = [path.relative_to(model).as_posix() for path in beside]
    return [*files, *names, INDEX_NAME, f"{CODE.module}.py", "config.json"]


def _write_weights(
    checkpoint: Checkpoint, file: str, folder: Path, absent: tuple[str, ...]
) -> None:
    """A file of weights: another name for it, unless it holds what the form has not."""
    infos = {name: info for name, info in checkpoint.tensors.items() if info.file == file}
    stays = {name: info for name, info in infos.items() if not name.startswith(absent)}
    if len(stays) == len(infos):
        link_file(checkpoint.path / file, folder / file)
    else:
        write_tensors(folder / file, read_tensors(checkpoint, stays))
