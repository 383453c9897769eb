"""Bad input as a table: what is spoilt, with which exit code it is refused, and words of the
message.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.conftest import edit_json

DAYS = "One day. Another day. " * 400


@dataclass
class Place:
    """A folder with a good job, which a row then spoils."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "dense"

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    @property
    def config(self) -> Path:
        return self.model / "config.json"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def job(self) -> Path:
        return self.folder / "job.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def edit(self, **sections: Any) -> None:
        """Change fields of sections of the job."""
        document = yaml.safe_load(self.job.read_text())
        for section, values in sections.items():
            document[section] = document.get(section, {}) | values
        self.job.write_text(yaml.safe_dump(document))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Write other weights."""
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, metadata={"format": "pt"})

    def text_as(self, name: str, content: str | bytes, **options: Any) -> None:
        """Take another calibration text."""
        data = content.encode() if isinstance(content, str) else content
        (self.folder / name).write_bytes(data)
        self.edit(calibration={"path": str(self.folder / name)} | options)


Spoil = Callable[[Place], Any]


@dataclass(frozen=True)
class Bad:
    """One bad input: what it is, how it is made, the exit code, and words of the message."""

    name: str
    spoil: Spoil
    code: int
    words: tuple[str, ...]
    commands: tuple[str, ...] = ("validate", "run")
    """Those that say so."""
    sets: tuple[str, ...] = ()


def sets(override: str, code: int, *words: str) -> Bad:
    """A value given on the command line."""
    return Bad(f"--set {override}", lambda place: None, code, words, sets=(override,))


def job(name: str, text: str | bytes, *words: str) -> Bad:
    """A job file of this content."""
    data = text.encode() if isinstance(text, str) else text
    return Bad(f"job: {name}", lambda place: place.job.write_bytes(data), 2, ("job.yaml", *words))


def job_path(name: str, spoil: Spoil, *words: str) -> Bad:
    return Bad(f"job: {name}", spoil, 2, ("job.yaml", *words))


def model(name: str, spoil: Spoil, *words: str, commands: Any = ("validate", "run")) -> Bad:
    return Bad(f"model: {name}", spoil, 3, words, commands)


def config(name: str, *words: str, **keys: Any) -> Bad:
    return model(name, lambda place: edit_json(place.config, **keys), *words)


DEEP = ("validate --deep", "run in-process")
"""Those that read a text to its end."""


def text(name: str, spoil: Spoil, *words: str, commands: Any = ("validate", "run")) -> Bad:
    return Bad(f"text: {name}", spoil, 2, words, commands)


def content(name: str, file: str, data: str | bytes, *words: str, **options: Any) -> Bad:
    """A calibration text of this name and content; what only a reader of it all can know is said
    by `DEEP`, where no `options` of the calibration make it plain.
    """
    commands = ("validate", "run") if options or not data else DEEP
    spoil: Spoil = lambda place: place.text_as(file, data, **options)  # noqa: E731
    return text(name, spoil, file, *words, commands=commands)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def replaced(path: Path, data: str | bytes) -> None:
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def pickled(place: Place) -> None:
    torch.save(load_file(place.weights), place.model / "pytorch_model.bin")
    place.weights.unlink()


def indexed(weight_map: Any) -> Spoil:
    """An index, with the weights where it leads."""

    def spoil(place: Place) -> None:
        place.weights.rename(place.folder / "outside.safetensors")
        replaced(
            place.model / "model.safetensors.index.json", json.dumps({"weight_map": weight_map})
        )

    return spoil


def linked_outside(place: Place) -> None:
    place.weights.rename(place.folder / "outside.safetensors")
    place.weights.symlink_to(place.folder / "outside.safetensors")


def without_layer_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.input_layernorm.weight"]


def one_layer_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(48, 32)


def another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 32)


def whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan


def adapter(place: Place) -> None:
    replaced(place.model / "adapter_config.json", json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({"x": torch.zeros(2)}, place.model / "adapter_model.safetensors")


def no_tokenizer(place: Place) -> None:
    for file in place.model.glob("tokenizer*"):
        file.unlink()


def evaluation(**options: Any) -> Spoil:
    def spoil(place: Place) -> None:
        place.edit(evaluation={"path": str(place.text), "window": 32} | options)

    return spoil


def other_text(**options: Any) -> Spoil:
    def spoil(place: Place) -> None:
        (place.folder / "other.txt").write_text("Nights, and not a word of the others. " * 400)
        place.edit(evaluation={"path": str(place.folder / "other.txt")} | options)

    return spoil


def ids(place: Place) -> None:
    np.save(place.folder / "ids.npy", np.full(4000, 5000))
    place.edit(calibration={"path": str(place.folder / "ids.npy")})


def torn_parquet(place: Place) -> None:
    pq.write_table(pa.table({"text": [DAYS]}), place.folder / "a.parquet")
    whole = (place.folder / "a.parquet").read_bytes()
    place.text_as("a.parquet", whole[: len(whole) // 2])


def bomb() -> str:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 12)]
    return "\n".join(lines)


BAD = [
    sets("budget.sparsty=0.2", 2, "budget.sparsty", "unknown field", "sparsity"),
    sets("method.name=stta", 2, "method.name", "stat"),
    sets("budget.sparsity=1.5", 2, "budget.sparsity", "less than 1"),
    sets("budget.sparsity=nan", 2, "budget.sparsity"),
    sets("budget.sparsity=-0.1", 2, "budget.sparsity"),
    sets("budget.sparsity=[0.2]", 2, "budget.sparsity"),
    sets("budget.round_to=0", 2, "budget.round_to"),
    sets("calibration.samples=1.5", 2, "calibration.samples"),
    sets("calibration.shards=99", 2, "shards", "samples"),
    sets("cluster.executor=rey", 2, "cluster.executor", "ray"),
    sets("memory.worker=8Gib2", 2, "memory.worker", "is not a size"),
    sets("parallel.workers=99", 2, "parallel.workers", "calibration.shards"),
    sets("parallel.propagation=refit", 2, "propagation", "placement: layers"),
    sets("correction.damping=-1", 2, "correction.damping"),
    sets("budget.latency_ms=3", 2, "latency_table"),
    sets("budget.allocation=curves", 2, "per_layer"),
    sets("budget.kv_groups=3", 2, "budget.kv_groups", "more than the model's 2"),
    sets("budget.sparsity=0.99", 2, "budget.sparsity"),
    sets("budget", 2, "--set budget", "section.field=value"),
    sets("=3", 2, "--set =3"),
    sets("budget.sparsity.more=3", 2, "budget.sparsity"),
    sets("calibration.samples=5000", 2, "too short", "calibration.samples"),
    sets("calibration.path=/nowhere.txt", 2, "/nowhere.txt"),
    sets("model.path=/nowhere", 3, "/nowhere", "model.path"),
    sets("model.path=HuggingFaceTB/SmolLM2-135M", 4, "HuggingFaceTB/SmolLM2-135M", "download"),
    sets("model.path=dense #1", 3, "dense #1"),
    sets("memory.worker=100kB", 4, "memory.worker", "needs at least"),
    job("empty", "", "model"),
    job("a list", "- model\n", "mapping"),
    job("not YAML", "model: {path: [}\n", "not valid YAML"),
    job("a tab", "model:\n\tpath: x\n", "not valid YAML"),
    job("a field twice", "model: {path: a}\nmodel: {path: b}\n", "duplicate key", "model"),
    job("latin-1", "model: {path: \xe9}\n".encode("latin-1"), "UTF-8"),
    job("a NUL", "model: {path: 'a\0b'}\n", "not allowed"),
    job("megabytes", "#" * 2**21, "larger than"),
    job("a bomb of aliases", bomb(), "values"),
    job("10000 levels", "[" * 10_000, "levels"),
    job("a Python object", "model: !!python/object/apply:os.getcwd []\n", "model"),
    job_path("missing", lambda place: place.job.unlink(), "cannot read"),
    job_path("a folder", lambda place: (place.job.unlink(), place.job.mkdir()), "cannot read"),
    job_path("a named pipe", lambda place: fifo(place.job)),
    job_path("/dev/zero", lambda place: endless(place.job)),
    model("a file", lambda place: (shutil.rmtree(place.model), replaced(place.model, "x")),
          "dense"),
    model("an empty folder", lambda place: (shutil.rmtree(place.model), place.model.mkdir()),
          "config.json"),
    model("a pickle alone", pickled, "pytorch_model.bin", "safetensors"),
    model("weights cut in half",
          lambda place: replaced(place.weights, place.weights.read_bytes()[:9000]),
          "model.safetensors", "not a whole"),
    model("empty weights", lambda place: replaced(place.weights, ""), "model.safetensors"),
    model("a header of 2**60 bytes", lambda place: replaced(place.weights, b"\xff" * 7 + b"\0"),
          "model.safetensors"),
    model("an index that leads outside", indexed({"model.norm.weight": "../outside.safetensors"}),
          "../outside.safetensors"),
    model("an index of missing files", indexed({"model.norm.weight": "a.safetensors"}),
          "a.safetensors"),
    model("an index that is a list", indexed([1, 2]), "index.json"),
    model("an index to numbers", indexed({"model.norm.weight": 3}), "index.json"),
    model("weights behind a link that leads outside", linked_outside, "outside.safetensors"),
    model("a named pipe for weights", lambda place: fifo(place.weights), "model.safetensors"),
    model("a named pipe for a config", lambda place: fifo(place.config), "config.json"),
    model("/dev/zero for a config", lambda place: endless(place.config), "config.json"),
    model("a config that is a list", lambda place: replaced(place.config, "[]"), "config.json"),
    model("a config cut in half", lambda place: replaced(place.config, '{"model_ty'),
          "config.json"),
    model("a config of 10000 levels", lambda place: replaced(place.config, '{"a":' * 10_000),
          "config.json"),
    model("a tensor is missing", lambda place: place.tensors(without_layer_norm),
          "model.layers.1.input_layernorm.weight"),
    model("a layer too many", lambda place: place.tensors(one_layer_more),
          "model.layers.3.mlp.up_proj.weight"),
    model("another shape", lambda place: place.tensors(another_shape),
          "model.layers.1.mlp.up_proj.weight"),
    model("whole numbers as weights", lambda place: place.tensors(whole_numbers),
          "model.layers.1.mlp.up_proj.weight"),
    model("NaN among the weights", lambda place: place.tensors(not_a_number),
          "model.layers.1.mlp.up_proj.weight", "NaN", commands=("run in-process",)),
    model("an adapter beside the weights", adapter, "adapter_config.json", "merge"),
    model("no tokenizer", no_tokenizer, "tokenizer"),
    model("a damaged tokenizer",
          lambda place: replaced(place.model / "tokenizer.json", "{}"), "tokenizer"),
    config("no model_type", "model_type", model_type=None),
    config("an unknown model_type", "falcon9", model_type="falcon9"),
    config("quantised", "quantised", quantization_config={"quant_method": "gptq", "bits": 4}),
    config("10**9 layers", "config.json", num_hidden_layers=10**9),
    config("-1 layers", "num_hidden_layers", num_hidden_layers=-1),
    config("a width of text", "intermediate_size", intermediate_size="48"),
    config("3 KV groups for 4 heads", "num_key_value_heads", num_key_value_heads=3),
    config("a larger vocabulary than embeddings", "vocab_size", vocab_size=300),
    config("a padding token beyond the vocabulary", "pad_token_id", pad_token_id=9999),
    config("an unknown activation", "hidden_act", hidden_act="sliu"),
    config("an unknown rope", "rope", rope_parameters={"rope_type": "x", "rope_theta": 1e4},
           rope_scaling={"rope_type": "x", "factor": 2.0}),
    config("weights of int8", "int8", dtype="int8", torch_dtype="int8"),
    text("missing", lambda place: place.text.unlink(), "text.txt"),
    content("empty", "e.txt", "", "short"),
    content("blank lines", "b.txt", "\n" * 5000),
    content("NULs", "n.txt", "\0" * 5000),
    content("latin-1", "l.txt", ("caf\xe9 " * 2000).encode("latin-1"), "UTF-8"),
    content("a line without the field", "r.jsonl", '{"text": "a"}\n{"txt": "b"}\n' * 50, "text"),
    content("torn JSON Lines", "t.jsonl", '{"text": "a"}\n' * 2 + '{"te\n' + '{"text": "a"}\n' * 99,
            "t.jsonl:3"),
    content("a wrong field", "f.jsonl", '{"text": "a day"}\n' * 400, "body", field="body"),
    content("a wrong column", "c.csv", "text,id\na day,1\n" * 400, "body", field="body"),
    content("gz cut in half", "g.txt.gz", gzip.compress(os.urandom(9000).hex().encode())[:5000]),
    text("parquet cut in half", torn_parquet, "a.parquet"),
    text("token ids beyond the vocabulary", ids, "ids.npy", "5000"),
    text("a named pipe", lambda place: fifo(place.text), "text.txt"),
    text("/dev/zero", lambda place: endless(place.text), "text.txt"),
    text("an empty folder", lambda place: (place.text.unlink(), place.text.mkdir()), "text.txt"),
    text("an evaluation text that is missing", evaluation(path="/nowhere.txt"), "/nowhere.txt"),
    text("an evaluation on the calibration text alone", evaluation(), "evaluation"),
]  # fmt: skip
