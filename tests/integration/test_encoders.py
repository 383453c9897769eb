"""Encoders in the folders that people have, and what is said and measured of them. That layers are
streamed, cut, padded and reloaded as they should be is in tests/contracts/test_families.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.planning.plan import make_plan
from rayprune.orchestrator.reporting.plan_view import plan_parts
from rayprune.orchestrator.reporting.report import summary
from rayprune.orchestrator.run import run_job
from rayprune.specs.calibration import CalibrationSpec
from rayprune.specs.errors import ModelError, RaypruneError, SpecError
from rayprune.specs.loader import load_job
from rayprune.workers.calibration import frame_of, load_tokenizer, masked, read_calibration
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.load_check import check_loads
from rayprune.workers.tools.latency import Wanted, measure_latency
from tests.conftest import MakeJob, MakeModel, edit_json, folder_bytes
from tests.helpers import quiet

SMALL = {"samples": 8, "sequence_length": 16, "shards": 2}
HIDDEN, VOCABULARY = 32, 260


def resave(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a folder."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def pooler(prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}pooler.dense.weight": torch.randn(HIDDEN, HIDDEN),
        f"{prefix}pooler.dense.bias": torch.randn(HIDDEN),
    }


def as_published(folder: Path) -> None:
    """As `bert-base-uncased`: a masked-language model with pooler, another head, names of old."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        ends = {n: next((e for e in old if n.endswith(e)), "") for n in tensors}
        renamed = {n.removesuffix(ends[n]) + old.get(ends[n], ""): t for n, t in tensors.items()}
        ids = {"bert.embeddings.position_ids": torch.arange(256)[None]}
        other = {"cls.seq_relationship.weight": torch.randn(2, HIDDEN)}
        return renamed | ids | pooler("bert.") | other

    resave(folder, change)


def bare(folder: Path) -> None:
    """As sentence-transformers has it: no prefix, a pooler, files around it."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        inside = {n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}
        return inside | pooler("")

    resave(folder, change)
    edit_json(folder / "config.json", architectures=["BertModel"])
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')


def bare_of_another(folder: Path) -> None:
    """A bare model whose tensors have a prefix, and no pooler."""
    edit_json(folder / "config.json", architectures=["BertModel"])


def classifier(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        inside = {n: t for n, t in tensors.items() if n.startswith("bert.")}
        head = {"classifier.weight": torch.randn(3, HIDDEN), "classifier.bias": torch.randn(3)}
        return inside | pooler("bert.") | head

    resave(folder, change)
    labels = {str(n): f"LABEL_{n}" for n in range(3)}
    edit_json(
        folder / "config.json", architectures=["BertForSequenceClassification"], id2label=labels
    )


@pytest.mark.parametrize("form", [as_published, bare, bare_of_another, classifier])
def test_folders_as_people_have_them(
    form: Callable[[Path], None], make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """What lies outside the layers is copied bit for bit, the class that `architectures` names
    loads it, and finds what it found in the dense folder.
    """
    folder = make_model("bert")
    form(folder)
    report = run_job(load_job(make_job(folder, calibration=SMALL)), tmp_path / "run", quiet)
    pruned = open_checkpoint(report.model)
    dense = open_checkpoint(folder)
    assert pruned.outer_tensors.keys() == dense.outer_tensors.keys()
    exported = {n: t for f in report.model.glob("*.safetensors") for n, t in load_file(f).items()}
    original = load_file(folder / "model.safetensors")
    for name, info in dense.outer_tensors.items():
        assert torch.equal(exported[name], original[info.stored]), name
    (named,) = json.loads((report.model / "config.json").read_text())["architectures"]
    loading: Any = getattr(transformers, named)
    found = [
        loading.from_pretrained(path, output_loading_info=True) for path in (folder, report.model)
    ]
    for kind in ("missing_keys", "mismatched_keys"):
        assert set(found[0][1][kind]) == set(found[1][1][kind]), kind
    check_loads(report.model, report.parameters.after)
    assert report.parameters.before == dense.parameters
    for file in ("modules.json", "1_Pooling/config.json"):
        assert (report.model / file).exists() is (folder / file).exists()
    verify_run(tmp_path / "run")


@pytest.mark.parametrize("head", [True, False], ids=["masked tokens", "embeddings"])
def test_what_is_measured_is_what_stock_classes_compute(
    head: bool, make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    """No perplexity; a run that goes on finds everything."""
    folder = make_model("bert")
    if not head:
        bare(folder)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[40_000:50_000])
    calibration = SMALL | {"sequence_length": 64}
    evaluation = {"path": str(other), "window": 40, "max_windows": 5}
    job = load_job(make_job(folder, calibration=calibration, evaluation=evaluation))
    report = run_job(job, tmp_path / "run", quiet)
    assert report.perplexity is None
    assert "perplexity" not in str(list(summary(report)))
    windows_NT = load_file(tmp_path / "run/tasks/evaluation-tokens/tokens.safetensors")["tokens"]
    assert windows_NT.shape == (5, 40)
    assert windows_NT[:, 0].tolist() == [1] * 5, "the first special token"
    assert windows_NT[:, -1].tolist() == [2] * 5, "the last one"
    means = []
    for path in (folder, report.model):
        network = transformers.AutoModel.from_pretrained(path).eval()
        with torch.inference_mode():
            means.append(network(windows_NT).last_hidden_state.double().mean(1))
    cosine_N = torch.nn.functional.cosine_similarity(*means)
    assert report.embeddings is not None
    assert report.embeddings.cosine == pytest.approx(float(cosine_N.mean()), abs=1e-6)
    assert report.embeddings.least_cosine == pytest.approx(float(cosine_N.min()), abs=1e-6)
    assert (report.masked_lm_loss is not None) is head
    if report.masked_lm_loss:
        for path, loss in (
            (folder, report.masked_lm_loss.before),
            (report.model, report.masked_lm_loss.after),
        ):
            assert loss == pytest.approx(masked_loss(path, windows_NT), rel=1e-5)
        assert report.evaluation is not None
        assert report.evaluation.scored_tokens == 5 * 6 - 3, "special ones are not masked"
    verify_run(tmp_path / "run")
    before = folder_bytes(tmp_path / "run" / "model")
    run_job(job, tmp_path / "run", quiet)
    assert folder_bytes(tmp_path / "run" / "model") == before


def masked_loss(folder: Path, windows_NT: Tensor) -> float:
    """Nats for a masked token: every seventh, in each window beginning one further on."""
    network, losses = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval(), []
    for number, tokens_T in enumerate(windows_NT):
        places = [p for p in range(1, 39) if (p + number) % 7 == 6]
        read_T = tokens_T.clone()
        read_T[places] = 259
        with torch.inference_mode():
            log_p_TV = network(read_T[None]).logits[0].log_softmax(-1)
        losses += [-float(log_p_TV[p, tokens_T[p]]) for p in places]
    return sum(losses) / len(losses)


def test_windows_have_their_special_tokens(
    make_model: MakeModel, text_file: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(make_model("bert"))
    frame = frame_of(tokenizer)
    assert (frame.before, frame.behind) == ((1,), (2,))
    spec = CalibrationSpec(path=str(text_file), **SMALL)  # type: ignore[arg-type]
    windows_ST, _ = read_calibration(spec, tokenizer, frame)
    ids = tokenizer(text_file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    expected = [[1, *ids[start : start + 14], 2] for start in range(0, 8 * 14, 14)]
    assert windows_ST.tolist() == expected
    given = tmp_path / "ids.jsonl"
    given.write_text("\n".join(json.dumps(list(range(3, 40))) for _ in range(8)))
    spec = CalibrationSpec(path=str(given), **SMALL)  # type: ignore[arg-type]
    windows_ST, _ = read_calibration(spec, tokenizer, frame)
    assert windows_ST[0].tolist() == list(range(3, 19)), "token ids are taken as they are"
    words = [{"text": text_file.read_text(encoding="utf-8")}]
    for other, held in (({"text": []}, None), ({"text": [3, 4]}, "holds token ids and text")):
        given.write_text("\n".join(map(json.dumps, [other, *words])))
        spec = CalibrationSpec(path=str(given), **SMALL)  # type: ignore[arg-type]
        if held is None:
            windows_ST, _ = read_calibration(spec, tokenizer, frame)
            assert windows_ST[:8].tolist() == expected, "an empty list is no token ids"
        else:
            with pytest.raises(SpecError, match=held):
                read_calibration(spec, tokenizer, frame)
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="has no mask token"):
        masked(windows_ST, tokenizer)


GRADIENTS = {"method": {"name": "stat", "scale": "gradients"}}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (GRADIENTS, "method.scale: gradients: .*an encoder has not"),
        ({"method": {"name": "dress"}}, "method: dress: trains on the loss of a causal"),
        ({"method": {"name": "trsp"}}, "method: trsp: trains on the loss of a causal"),
        ({"recover": {"samples": 4}}, "recover: trains on the loss of a causal"),
        ({"budget": {"kv_bytes_per_token": 10}}, "an encoder keeps no KV cache"),
        ({"correction": {"drift": 0.5}}, "does not add its blocks' outputs"),
        ({"evaluation": {"path": "x", "window": 8, "stride": 4}}, "evaluation.stride: is of perp"),
        ({"evaluation": {"path": "x", "bos": False}}, "evaluation.bos: an encoder's windows are"),
        ({"calibration": {"bos": False}}, "calibration.bos: an encoder's windows are whole texts"),
        ({"budget": {"kv_groups": 3}}, "takes the head size .*budget.per_layer: true"),
    ],
)
def test_what_needs_a_causal_model_is_refused_by_name(
    sections: dict[str, Any], words: str, make_model: MakeModel, make_job: MakeJob
) -> None:
    folder = make_model("bert")
    wanted = sections | {"calibration": SMALL | sections.get("calibration", {})}
    with pytest.raises(SpecError, match=words):
        make_plan(load_job(make_job(folder, **wanted)), open_checkpoint(folder))


def test_the_plan_says_why_heads_stay(make_model: MakeModel, make_job: MakeJob) -> None:
    folder = make_model("distilbert")
    lines = [
        list(
            plan_parts(
                make_plan(load_job(make_job(folder, budget=budget)), open_checkpoint(folder))
            )
        )
        for budget in ({}, {"per_layer": True})
    ]
    said = ["all heads stay: its class takes the head size" in str(parts) for parts in lines]
    assert said == [True, False]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["BertLMHeadModel"]}, "one of BertModel, BertForMaskedLM"),
        ({"architectures": ["RobertaModel"]}, "one of BertModel, BertForMaskedLM"),
        ({"is_decoder": True}, "is_decoder must be false"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be absolute"),
        ({"num_attention_heads": 5}, "num_attention_heads must be a divisor of hidden_size"),
    ],
)
def test_what_is_no_encoder_is_refused(
    changes: dict[str, Any], words: str, make_model: MakeModel
) -> None:
    folder = make_model("bert")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=words):
        open_checkpoint(folder)


def test_an_ffn_in_chunks_is_called_once(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """`chunk_size_feed_forward` saves memory and changes no result."""
    written = []
    for chunk in (0, 8):
        folder = make_model("bert")
        edit_json(folder / "config.json", chunk_size_feed_forward=chunk)
        job = load_job(make_job(folder, calibration=SMALL))
        run_job(job, tmp_path / str(chunk), quiet)
        files = folder_bytes(tmp_path / str(chunk) / "model").items()
        written.append({name: held for name, held in files if name.endswith(".safetensors")})
    assert written[0] == written[1]
    assert written[0]


def test_tools_for_causal_models_say_so(make_model: MakeModel) -> None:
    with pytest.raises(RaypruneError, match="encoder"):
        measure_latency(make_model("bert"), Wanted())


def test_positions_are_counted_from_behind_the_padding(make_model: MakeModel) -> None:
    model = open_checkpoint(make_model("roberta", pad_token_id=1)).model
    assert (model.positions, model.outer[str(model.position_table)]) == (254, (256, HIDDEN))


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["curves", "threshold"])
def test_every_layer_keeps_heads_and_channels_of_its_own(
    allocation: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """Heads go too, by a class of this package's own; at least one stays of everything."""
    folder = make_model("bert")
    bare(folder)
    budget = {"per_layer": True, "sparsity": 0.4, "allocation": allocation}
    method = {"name": "flap" if allocation == "threshold" else "stat"}
    job = make_job(folder, calibration=SMALL, budget=budget, method=method)
    report = run_job(load_job(job), tmp_path / "run", quiet)
    assert report.decoder_parameters.ratio <= 0.6
    assert min(report.narrowest.values()) >= 1
    network = transformers.AutoModel.from_pretrained(report.model, trust_remote_code=True)
    assert sum(p.numel() for p in network.parameters()) == report.parameters.after
