"""What must not lie in a folder of ours, and what dead writers have left there."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rayprune.specs.errors import ModelError, SpecError
from rayprune.workers.store.plain import check_plain, remove_temporaries
from rayprune.workers.store.side_files import COPIED, side_files

HEX = "0123456789abcdef" * 2


def link(path: Path) -> None:
    path.symlink_to(path.parents[1] / "elsewhere")


ODD: dict[str, Callable[[Path], object]] = {"a link": link, "a pipe": os.mkfifo}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("folder", ["", "tasks/layer-0000"])
def test_what_leads_out_of_a_folder_is_refused(kind: str, folder: str, tmp_path: Path) -> None:
    place = tmp_path / "run" / folder
    place.mkdir(parents=True)
    (place / "file").write_text("plain")
    check_plain(tmp_path / "run", "remove it")
    ODD[kind](place / "odd")
    with pytest.raises(SpecError, match=r"odd: is .*; remove it"):
        check_plain(tmp_path / "run", "remove it")


def test_temporary_files_of_dead_writers_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    left = [
        tmp_path / f".job.yaml.{HEX}.tmp",
        tmp_path / "deep" / "er" / f".a.safetensors.{HEX}.tmp",
    ]
    others = [
        tmp_path / name
        for name in (f"job.{HEX}.tmp", f".job.{HEX[1:]}.tmp", ".mine.tmp", f".job.{HEX}", "x.tmp")
    ]
    for file in (*left, *others):
        file.write_text("half")
    (tmp_path / f".folder.{HEX}.tmp").mkdir()
    remove_temporaries(tmp_path)
    assert [file for file in left if file.exists()] == []
    assert [file for file in others if not file.exists()] == []


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder beside a file that is nobody's business."""
    (tmp_path / "secret").write_text("key")
    (tmp_path / "secret").chmod(0o600)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "NOTICE.md", "x.model"])
def test_a_link_out_of_a_model_folder_is_refused(name: str, model: Path) -> None:
    (model / name).symlink_to("../secret")
    with pytest.raises(ModelError, match=f"{name}: links to .*secret, outside the model folder"):
        side_files(model, COPIED)


def test_a_folder_that_is_a_link_is_refused(model: Path) -> None:
    (model.parent / "elsewhere").mkdir()
    (model.parent / "elsewhere" / "a.jinja").write_text("")
    (model / "additional_chat_templates").symlink_to("../elsewhere")
    with pytest.raises(ModelError, match="outside the model folder"):
        side_files(model, COPIED)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for folder in (blobs, snapshot / "additional_chat_templates"):
        folder.mkdir(parents=True)
    (blobs / "1f").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1f")
    (snapshot / "additional_chat_templates" / "a.jinja").symlink_to("../../../blobs/1f")
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        assert [file.name for file in side_files(folder, COPIED)] == ["a.jinja", "tokenizer.json"]
    (snapshot / "LICENSE").symlink_to("../../../outside")
    (tmp_path.parent / "outside").write_text("")
    with pytest.raises(ModelError, match="outside the model folder"):
        side_files(snapshot, COPIED)
