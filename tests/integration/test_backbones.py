"""Text models that are part of larger ones: the rest goes along as it is; pictures as tokens."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from rayprune.orchestrator.planning.plan import make_plan
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ModelError
from rayprune.specs.loader import load_job
from rayprune.workers.model.checkpoint import Checkpoint, open_checkpoint, planned_checkpoint
from rayprune.workers.model.families import family_named, model_types
from rayprune.workers.model.families.backbone import Backbone
from rayprune.workers.network.building import empty_model
from tests.conftest import MakeJob, MakeModel, edit_json, folder_bytes
from tests.helpers import quiet
from tests.models import raw_config


def beside(checkpoint: Checkpoint) -> dict[str, tuple[torch.dtype, bytes]]:
    """Types and bytes of what text does not pass through, by today's names."""
    found: dict[str, tuple[torch.dtype, bytes]] = {}
    for name, info in checkpoint.tensors.items():
        if name.startswith(checkpoint.model.beside):
            with safe_open(checkpoint.path / info.file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(info.stored)
                found[name] = tensor.dtype, tensor.numpy().tobytes()
    return found


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


LARGER = [name for name in model_types() if isinstance(family_named(name), Backbone)]
FLAGS = (None, False, True)


@pytest.mark.parametrize("kind", LARGER)
def test_the_head_is_tied_where_the_stock_class_ties_it(kind: str, tmp_path: Path) -> None:
    """Whatever the whole config says, and the text model's."""
    for flags in product(FLAGS, FLAGS):
        raw = raw_config(kind)
        for config, flag in zip((raw, raw["text_config"]), flags, strict=True):
            config.pop("tie_word_embeddings", None)
            config |= {} if flag is None else {"tie_word_embeddings": flag}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        checkpoint = planned_checkpoint(tmp_path)
        network = empty_model(checkpoint, torch.float32)
        network.tie_weights()
        model = checkpoint.model
        head, embedding = map(network.get_parameter, (model.head, model.embedding))
        assert model.tied == (head is embedding), flags


@pytest.mark.parametrize("kind", ["gemma3", "gemma4-readers", "janus", "llama4"])
def test_what_text_does_not_pass_through_goes_along_bit_for_bit(
    kind: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    folder = make_model(kind, num_hidden_layers=4)
    report = run_job(load_job(make_job(folder)), tmp_path / "run", quiet)
    dense, pruned = open_checkpoint(folder), open_checkpoint(tmp_path / "run/model")
    assert beside(dense) == beside(pruned)
    assert len(beside(dense)) > 10
    old, new = config_of(folder), config_of(tmp_path / "run/model")
    assert old.keys() == new.keys()
    assert {key for key in old if old[key] != new[key]} == {"text_config"}
    text, kept = new["text_config"], pruned.model.units
    assert text["intermediate_size"] == kept["neurons"] < old["text_config"]["intermediate_size"]
    assert text["model_type"] == old["text_config"]["model_type"]
    assert report.parameters.after == pruned.parameters


def test_pictures_as_tokens_are_pruned_and_judged_end_to_end(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """Rows of token ids, of which each is a window; the loss is that of the stock class."""
    folder, draw = make_model("emu3"), np.random.default_rng(0)
    for name, rows in {"calibration": 16, "evaluation": 4}.items():
        np.save(tmp_path / f"{name}.npy", draw.integers(3, 250, (rows, 24)))
    job = make_job(
        folder,
        calibration={
            "path": str(tmp_path / "calibration.npy"),
            "samples": 16,
            "sequence_length": 24,
            "shards": 2,
        },
        evaluation={"path": str(tmp_path / "evaluation.npy"), "window": 24},
    )
    plan = make_plan(load_job(job), open_checkpoint(folder))
    assert plan.calibration_tokens == 16 * 24
    report = run_job(load_job(job), tmp_path / "run", quiet)
    assert report.perplexity is not None
    windows_NT = torch.from_numpy(np.load(tmp_path / "evaluation.npy"))
    models = {folder: report.perplexity.before, tmp_path / "run/model": report.perplexity.after}
    for model, expected in models.items():
        stock: Any = transformers.Emu3ForConditionalGeneration
        network, info = stock.from_pretrained(model, output_loading_info=True)
        assert not any(info.values()), info
        with torch.inference_mode():
            logits_NTV = network.eval()(input_ids=windows_NT).logits
        loss = torch.nn.functional.cross_entropy(
            logits_NTV[:, :-1].flatten(0, 1), windows_NT[:, 1:].flatten()
        )
        assert float(loss.exp()) == pytest.approx(expected, rel=1e-4)
    run_job(load_job(job), tmp_path / "again", quiet)
    assert folder_bytes(tmp_path / "run/model") == folder_bytes(tmp_path / "again/model")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "architectures must be"),
        ({"text_config": None}, "text_config must be the config of the text model"),
        ({"text_config": {"model_type": "llama"}}, "of a gemma3 only gemma3_text is pruned"),
    ],
)
def test_what_is_no_such_model_is_refused(
    changes: dict[str, Any], says: str, make_model: MakeModel
) -> None:
    folder = make_model("gemma3")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=says):
        open_checkpoint(folder)
