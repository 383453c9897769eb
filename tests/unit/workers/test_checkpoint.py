"""Model folders as untrusted input, and counts from headers against transformers' own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rayprune.specs.errors import ModelError
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.model.folder import INDEX_NAME, MAX_JSON_BYTES, SINGLE_NAME, read_header
from rayprune.workers.network.building import layers_of
from rayprune.workers.network.reading import layer_tensors
from tests.conftest import MakeModel, edit_json
from tests.helpers import families
from tests.models import build_model

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, to be copied before it is damaged."""
    return build_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def folder(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "model"))


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same model in two files with an index."""
    tensors = load_file(folder / SINGLE_NAME)
    (folder / SINGLE_NAME).unlink()
    names = sorted(tensors)
    weight_map = {name: FIRST if number % 2 else SECOND for number, name in enumerate(names)} | {
        "model.norm.weight": FIRST
    }
    for file in (FIRST, SECOND):
        save_file(
            {name: tensors[name] for name in names if weight_map[name] == file},
            folder / file,
            {"format": "pt"},
        )
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})


def point(folder: Path, file: object) -> None:
    """Have the index place one tensor elsewhere."""
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (folder / INDEX_NAME).write_text(json.dumps(index))


def truncate(path: Path, missing: int) -> None:
    path.write_bytes(path.read_bytes()[:-missing])


def only_a_pickle(folder: Path) -> None:
    (folder / SINGLE_NAME).rename(folder / "pytorch_model.bin")


def unknown_with_integers(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="lfm99")
    tensors = load_file(folder / SINGLE_NAME) | {"model.position_ids": torch.arange(8)}
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})


def sparse_config(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as handle:
        handle.truncate(MAX_JSON_BYTES + 1)


def replace_with_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), "no such model folder; set model.path"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("")), "no such model folder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
    "config is a folder": (
        lambda f: replace_with_folder(f / "config.json"),
        r"config\.json: cannot read a config or an index: Is a directory",
    ),
    "config cut": (
        lambda f: truncate(f / "config.json", 5),
        r"config\.json: cannot be read as JSON",
    ),
    "config not UTF-8": (
        lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'),
        r"config\.json: cannot be read as JSON",
    ),
    "config too big": (sparse_config, r"config\.json: larger than \d+ bytes"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[1]"),
        r"config\.json: must hold a JSON object",
    ),
    "config empty": (
        lambda f: (f / "config.json").write_text("{}"),
        "model_type 'None' is not known; .* Known are bert",
    ),
    "no weights": (lambda f: (f / SINGLE_NAME).unlink(), "no weights found"),
    "a part alone": (
        lambda f: (f / SINGLE_NAME).rename(f / "model-00001-of-00002.safetensors"),
        r"found model-00001-of-00002\.safetensors, one of several, and no model.*index.json: fetch",
    ),
    "unknown type, whole numbers": (
        unknown_with_integers,
        "model_type 'lfm99' is not known; its weights could not be looked at",
    ),
    "only a pickle": (
        only_a_pickle,
        r"pytorch_model\.bin, a pickle, which can run code.*save the model as safetensors",
    ),
    "shard cut": (
        lambda f: truncate(f / SINGLE_NAME, 10),
        r"model\.safetensors: not a whole safetensors file.*fetch it again",
    ),
    "shard empty": (
        lambda f: (f / SINGLE_NAME).write_bytes(b""),
        r"model\.safetensors: not a whole safetensors file",
    ),
    "shard is text": (
        lambda f: (f / SINGLE_NAME).write_text("version https://git-lfs"),
        "not a whole safetensors file",
    ),
    "header too long": (
        lambda f: (f / SINGLE_NAME).write_bytes(b"\xff" * 64),
        "not a whole safetensors file",
    ),
    "tensor missing": (
        lambda f: change_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"model\.layers\.1\.mlp\.up_proj\.weight is missing",
    ),
    "norm missing": (
        lambda f: change_tensors(f, lambda t: t.pop("model.layers.2.input_layernorm.weight")),
        r"model\.layers\.2\.input_layernorm\.weight is missing",
    ),
    "wrong shape": (
        lambda f: change_tensors(
            f, lambda t: t.update({"model.layers.2.self_attn.o_proj.weight": torch.zeros(32, 31)})
        ),
        (
            r"model\.layers\.2\.self_attn\.o_proj\.weight has shape \(32, 31\), config\.json"
            r" implies \(32, 32\)"
        ),
    ),
    "integers": (
        lambda f: change_tensors(
            f, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)})
        ),
        r"model\.norm\.weight is I8; only floating-point weights",
    ),
    "fewer layers in the config": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=2),
        r"holds model\.layers\.2\..*, but config\.json says 2 layers",
    ),
    "more layers in the config": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=4),
        r"model\.layers\.3\.\S+ is missing",
    ),
    "another architecture": (
        lambda f: (f / "config.json").write_text('{"model_type": "mamba", "n_embed": 32}'),
        "model_type 'mamba' is not known",
    ),
    "unsupported": (
        lambda f: edit_json(f / "config.json", model_type="mamba"),
        "model_type 'mamba' is not known; .* Known are",
    ),
    "quantised": (
        lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}),
        "quantised weights cannot be pruned.*; take the model that they were made from",
    ),
    "split groups": (
        lambda f: edit_json(f / "config.json", num_key_value_heads=3),
        r"num_attention_heads \(4\) is no multiple of num_key_value_heads \(3\)",
    ),
    "no hidden size": (
        lambda f: edit_json(f / "config.json", hidden_size=None),
        "hidden_size must be a positive integer, found None",
    ),
    "negative width": (
        lambda f: edit_json(f / "config.json", intermediate_size=-1),
        "intermediate_size must be a positive integer",
    ),
    "boolean layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=True),
        "num_hidden_layers must be a positive integer",
    ),
    "width as text": (
        lambda f: edit_json(f / "config.json", intermediate_size="48"),
        "intermediate_size must be a positive integer",
    ),
}

INDEX_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "parent": (
        lambda f: point(f, "../x.safetensors"),
        r"norm\.weight points to '\.\./x\.safetensors'; only safetensors files",
    ),
    "absolute": (lambda f: point(f, "/x.safetensors"), r"points to '/x\.safetensors'"),
    "subfolder": (lambda f: point(f, f"a/{FIRST}"), "points to 'a/model-00001"),
    "backslash": (
        lambda f: point(f, "..\\x.safetensors"),
        "only safetensors files of this folder are read",
    ),
    "pickle": (lambda f: point(f, "pytorch_model.bin"), r"points to 'pytorch_model\.bin'"),
    "number": (lambda f: point(f, 3), "points to 3"),
    "absent file": (
        lambda f: point(f, "other.safetensors"),
        rf"other\.safetensors: no such file, but {INDEX_NAME} names it",
    ),
    "absent tensor": (
        lambda f: point(f, SECOND),
        rf"{SECOND}: lacks model\.norm\.weight, which {INDEX_NAME} places there",
    ),
    "absent shard": (lambda f: (f / SECOND).unlink(), rf"{SECOND}: no such file"),
    "cut shard": (lambda f: truncate(f / SECOND, 1), rf"{SECOND}: not a whole safetensors file"),
    "no map": (lambda f: edit_json(f / INDEX_NAME, weight_map=None), "has no weight_map"),
    "empty map": (lambda f: edit_json(f / INDEX_NAME, weight_map={}), "has no weight_map"),
    "list map": (lambda f: edit_json(f / INDEX_NAME, weight_map=[1]), "has no weight_map"),
    "no JSON": (lambda f: (f / INDEX_NAME).write_text("{"), "cannot be read as JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_with_a_reason(damage: str, folder: Path) -> None:
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value) or str(caught.value).startswith(
        ("config.json", "model_type")
    )


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_damaged_indexes_are_refused_with_a_reason(damage: str, sharded: Path) -> None:
    spoil, message = INDEX_DAMAGES[damage]
    open_checkpoint(sharded)
    spoil(sharded)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(sharded)


def test_shards_and_single_file_hold_the_same_tensors(dense: Path, sharded: Path) -> None:
    one, two = open_checkpoint(dense), open_checkpoint(sharded)
    assert {name: info.shape for name, info in one.tensors.items()} == {
        name: info.shape for name, info in two.tensors.items()
    }
    assert {info.file for info in two.tensors.values()} == {FIRST, SECOND}
    assert (one.parameters, one.decoder_parameters) == (two.parameters, two.decoder_parameters)
    assert one.bytes_on_disk == (dense / SINGLE_NAME).stat().st_size
    assert two.bytes_on_disk == sum((sharded / name).stat().st_size for name in (FIRST, SECOND))


def test_links_out_of_the_folder_are_refused(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (sharded / FIRST).rename(tmp_path / "elsewhere" / FIRST)
    (sharded / FIRST).symlink_to(tmp_path / "elsewhere" / FIRST)
    with pytest.raises(
        ModelError, match=r"outside the model folder; copy the file into the folder"
    ):
        open_checkpoint(sharded)


def hub_cache(sharded: Path, cache: Path) -> Path:
    """Lay a model out as the hub cache does: snapshots of links into blobs."""
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, cache / "blobs" / f"{number:040d}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040d}")
    return snapshot


def test_a_hub_cache_is_read_through_its_links(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(sharded, tmp_path / "models--a--b")
    checkpoint = open_checkpoint(snapshot)
    assert {info.file for info in checkpoint.tensors.values()} == {FIRST, SECOND}
    assert checkpoint.identity == open_checkpoint(sharded).identity
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot, target_is_directory=True)
    assert open_checkpoint(linked).identity == checkpoint.identity


def test_links_out_of_a_hub_cache_are_refused(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(sharded, tmp_path / "models--a--b")
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(sharded / FIRST)
    with pytest.raises(ModelError, match="outside the model folder"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("model_type", families())
@pytest.mark.parametrize("tied", [True, False])
def test_counts_equal_those_of_transformers(
    model_type: str, tied: bool, make_model: MakeModel
) -> None:
    folder = make_model(model_type, tie_word_embeddings=tied)
    checkpoint, model = open_checkpoint(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert checkpoint.parameters == sum(parameter.numel() for parameter in model.parameters())
    layers = layers_of(model, checkpoint.model)
    assert checkpoint.decoder_parameters == sum(
        parameter.numel() for parameter in layers.parameters()
    )
    assert checkpoint.num_layers == 3
    for layer in range(3):
        shapes = {
            name: tuple(parameter.shape) for name, parameter in layers[layer].named_parameters()
        }
        assert {
            name: info.shape for name, info in checkpoint.layer_tensors(layer).items()
        } == shapes


def test_a_stored_copy_of_a_tied_head_is_not_counted(make_model: MakeModel) -> None:
    folder = make_model(tie_word_embeddings=True)
    before = open_checkpoint(folder).parameters
    change_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    assert open_checkpoint(folder).parameters == before


def test_rotary_buffers_of_old_checkpoints_are_no_parameters(folder: Path) -> None:
    before = open_checkpoint(folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda t: t.update({name: torch.ones(4)}))
    after = open_checkpoint(folder)
    assert (after.parameters, after.decoder_parameters) == (
        before.parameters,
        before.decoder_parameters,
    )
    assert name not in after.tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_headers_of_floating_point_types(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5, dtype=dtype)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["a"]
    assert (info.shape, info.num_parameters, info.num_bytes, info.file) == (
        (3, 5),
        15,
        15 * dtype.itemsize,
        "x.safetensors",
    )


def test_identity_follows_the_content_not_the_place(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    identity = open_checkpoint(folder).identity
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert open_checkpoint(moved).identity == identity
    edit_json(moved / "config.json", rope_theta=5.0)
    changed = [open_checkpoint(moved).identity]
    changed += [
        open_checkpoint(make_model(name=name, **changes)).identity
        for name, changes in OTHER_MODELS.items()
    ]
    assert len({identity, *changed}) == 1 + len(changed)


OTHER_MODELS: dict[str, dict[str, object]] = {
    "narrower": {"intermediate_size": 44},
    "shallower": {"num_hidden_layers": 2},
    "half": {"dtype": torch.bfloat16},
    "untied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
}


def test_one_file_goes_before_an_index(make_model: MakeModel) -> None:
    folder = make_model()
    before = open_checkpoint(folder)
    (folder / INDEX_NAME).write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
    )
    assert open_checkpoint(folder).tensors == before.tensors


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_a_folder_that_the_base_class_has_saved_is_read_all_the_same(
    model_type: str, make_model: MakeModel
) -> None:
    """Its names lack the backbone's prefix, those outside the backbone excepted."""
    folder = make_model(model_type)
    before = open_checkpoint(folder)
    prefix = f"{before.model.backbone}."
    tensors = load_file(folder / SINGLE_NAME)
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, folder / SINGLE_NAME, {"format": "pt"})
    after = open_checkpoint(folder)
    assert after.tensors.keys() == before.tensors.keys()
    assert all(info.stored == name.removeprefix(prefix) for name, info in after.tensors.items())
    for layer in range(3):
        for name, tensor in layer_tensors(after, layer).items():
            assert torch.equal(tensor, tensors[before.model.prefix(layer) + name])


@pytest.mark.parametrize("model_type", families())
def test_buffers_of_old_files_are_passed_over(model_type: str, make_model: MakeModel) -> None:
    folder = make_model(model_type)
    before = open_checkpoint(folder)
    assert before.model.recomputed
    buffers = {f"{before.model.prefix(1)}x{end}": torch.ones(4) for end in before.model.recomputed}
    change_tensors(folder, lambda tensors: tensors.update(buffers))
    assert open_checkpoint(folder).tensors.keys() == before.tensors.keys()


def test_no_quantization_is_none(make_model: MakeModel) -> None:
    folder = make_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert open_checkpoint(folder).num_layers == 3
