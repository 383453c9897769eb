"""Small models built from configs in milliseconds, a tokenizer without a network, and jobs over
both.
"""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
}

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.random_model import SIZES, byte_tokenizer
from rayprune.orchestrator.execution.records import records, sealed
from rayprune.orchestrator.execution.run_folder import REPORT_FILE
from rayprune.workers.model.families import family_named
from rayprune.workers.model.families.decoder import Decoder
from rayprune.workers.model.families.parts import Keys
from rayprune.workers.store.files import MANIFEST_NAME

torch.set_num_threads(1)

WINDOW = {"sliding_window": 8}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "cohere2": WINDOW,
    "exaone4": WINDOW,
    "falcon": {"new_decoder_architecture": True},
    "gemma3_text": WINDOW,
    "gpt_neo": {"window_size": 8},
    "gptj": {"rotary_dim": 4},
    "ministral": WINDOW,
    "olmo3": WINDOW,
    "granite": {  # by default all are 1, and nothing that overlooks one would show
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.5,
    },
    "gpt2": {"n_positions": 256},
}
"""Keys that only one family has, or that show what it does."""
WORKED_OUT: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
    "gpt_neo": {
        "attention_types": lambda given: [
            [[["global", "local"][n % 2] for n in range(given["num_hidden_layers"])], 1]
        ]
    },
    "helium": {"head_dim": lambda given: given["hidden_size"] // given["num_attention_heads"]},
}
"""Keys that must fit others."""

_MODELS = tempfile.TemporaryDirectory(prefix="models-")
_BUILT: dict[str, Path] = {}

MakeModel = Callable[..., Path]
MakeJob = Callable[..., Path]


def raw_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """A tiny config: `SIZES` and the changes, both by Llama's keys, under the family's own; keys
    of sizes that it has not are left out.
    """
    given = SIZES | OF_FAMILY.get(model_type, {}) | changes
    given |= {key: value(given) for key, value in WORKED_OUT.get(model_type, {}).items()}
    family = family_named(model_type)
    if isinstance(family, Decoder):
        own = {getattr(Keys, key.name): getattr(family.keys, key.name) for key in fields(Keys)}
        given = {own.get(key, key): value for key, value in given.items()}
    return {"model_type": model_type} | {key: v for key, v in given.items() if key is not None}


def build_model(
    folder: Path,
    model_type: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Write a tiny random model of a family with a byte-level tokenizer; activations are made
    unlike by random norm weights. The same one is built once and copied after that.
    """
    wanted = json.dumps([raw_config(model_type, **changes), seed, str(dtype)], sort_keys=True)
    if wanted not in _BUILT:
        _BUILT[wanted] = Path(_MODELS.name) / str(len(_BUILT))
        _build(_BUILT[wanted], raw_config(model_type, **changes), seed, dtype)
    shutil.copytree(_BUILT[wanted], folder, dirs_exist_ok=True)
    return folder


def _build(folder: Path, raw: dict[str, Any], seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**raw)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) + 0.5
                if parameter.dim() == 1 and name.endswith("weight")  # a norm's
                else torch.randn_like(parameter) * 0.15
            )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Build a tiny model under the test's folder."""

    def make(model_type: str = "llama", name: str = "dense", **changes: Any) -> Path:
        return build_model(tmp_path / name, model_type, **changes)

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English text that every Python brings."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(topics[key] for key in sorted(topics))[:60_000], encoding="utf-8")
    return path


def write_job(path: Path, text_file: Path, model: Path, **sections: Any) -> Path:
    """Write a job file over a model folder; keyword arguments replace or extend whole sections."""
    document: dict[str, Any] = {
        "model": {"path": str(model)},
        "calibration": {"path": str(text_file), "samples": 16, "sequence_length": 64, "shards": 4},
        "budget": {"sparsity": 0.25, "round_to": 4},
        # on machines with a GPU too: tests/gpu has its own
        "parallel": {"workers": 1, "micro_batch": 2, "device": "cpu"},
        "cluster": {"executor": "in-process"},
    }
    for section, values in sections.items():
        document[section] = document.get(section, {}) | values if values is not None else None
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def make_job(tmp_path: Path, text_file: Path) -> MakeJob:
    """Write a job file into the test's folder, see `write_job`."""

    def make(model: Path, name: str = "job.yaml", **sections: Any) -> Path:
        return write_job(tmp_path / name, text_file, model, **sections)

    return make


@pytest.fixture
def force_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make plans keep things where the test says, not where the budget does."""
    from rayprune.orchestrator import run
    from rayprune.orchestrator.planning import preflight

    planned = run.make_plan

    def force(**memory: Any) -> None:
        def plan(*arguments: Any, **options: Any) -> Any:
            made = planned(*arguments, **options)
            return replace(made, memory=replace(made.memory, **memory))

        monkeypatch.setattr(run, "make_plan", plan)
        monkeypatch.setattr(preflight, "make_plan", plan)

    return force


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One private Ray for all tests that need it; jobs with `cluster.address: local` use it as they
    find it.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    value = {
        key: entry
        for key, entry in (json.loads(path.read_text()) | changes).items()
        if entry is not None
    }
    path.write_text(json.dumps(value))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a task's manifest as somebody would who knows how it is written."""
    path = folder / MANIFEST_NAME
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(sealed(value)))


def seal_report(run: Path) -> None:
    """Write the report anew over whatever the run folder holds."""
    path = run / REPORT_FILE
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"records": records(run)})))


def flip_bit(file: Path, place: int = -3) -> None:
    """Damage a file; other names of it keep what they have."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.unlink()
    file.write_bytes(data)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
