"""The finished model in the forms of other engines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.execution.run_folder import read_events
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.planning.plan import make_plan
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import SpecError, VerificationError
from rayprune.specs.loader import load_job
from rayprune.workers.engines.agreement import TIE, compare, compare_run
from rayprune.workers.engines.engine import ENGINES, Engine
from rayprune.workers.formats.gguf_file import write_gguf
from rayprune.workers.model.checkpoint import open_checkpoint
from tests.conftest import MakeJob, MakeModel
from tests.helpers import quiet

TOKENS = torch.arange(3, 35)[None]


@pytest.fixture
def make_model(make_model: MakeModel, text_file: Path) -> MakeModel:
    """Build models with a tokenizer that merges bytes to words: llama.cpp has no other."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text_file.read_text()], trainer)
    names = {"pad_token": "<|pad|>", "bos_token": "<|start|>", "eos_token": "<|end|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

    def make(model_type: str = "llama", name: str = "dense", **changes: Any) -> Path:
        folder = make_model(model_type, name, **{"vocab_size": 330} | changes)
        fast.save_pretrained(folder)
        return folder

    return make


def in_half(folder: Path) -> Path:
    """A model whose numbers all are ones of float16: its file holds them as they are."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    model.float().save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits(*where: Any, **how: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(*where, dtype=torch.float32, **how)
    found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"attention_bias": False}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
    ],
)
def test_transformers_reads_the_same_model_from_the_file(
    model_type: str, changes: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    """Rows that change places among them: transformers puts them back."""
    model = in_half(make_model(model_type, **changes))
    (name,) = write_gguf(model, tmp_path / "gguf", "gguf")
    expected = logits(model)
    found = logits(tmp_path / "gguf", gguf_file=name)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    text = "Words, and 123 numbers.\n\n  So it is."
    read, own = (
        AutoTokenizer.from_pretrained(folder, **how)(text)["input_ids"]
        for folder, how in ((tmp_path / "gguf", {"gguf_file": name}), (model, {}))
    )
    assert read == own


def test_blocks_of_eight_bits_are_near_and_take_34_bytes(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(intermediate_size=64)
    half, eight = (
        tmp_path / target / write_gguf(model, tmp_path / target, target)[0]
        for target in ("gguf", "gguf-q8_0")
    )
    matrices = sum(
        info.num_parameters
        for info in open_checkpoint(model).tensors.values()
        if len(info.shape) == 2
    )
    # both have the same header, and the same padding of every tensor to 32 bytes but for a few
    assert half.stat().st_size - eight.stat().st_size == pytest.approx(
        matrices * (2 - 34 / 32), abs=32 * 60
    )
    error = (logits(tmp_path / "gguf-q8_0", gguf_file=eight.name) - logits(model)).abs().max()
    assert 1e-4 < float(error) < 0.5


def test_a_run_writes_them_all_and_goes_on_with_them_alone(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = make_model(), tmp_path / "run"
    every = ["transformers", "transformers-4", "vllm", "gguf", "gguf-q8_0"]
    run_job(load_job(make_job(model, export={"target": every})), run, quiet)
    assert {"export-gguf", "export-gguf-q8_0"} <= set(verify_run(run))
    files = sorted(file.relative_to(run / "export").as_posix() for file in run.glob("export/*/*"))
    assert files == [
        "gguf-q8_0/manifest.json",
        "gguf-q8_0/model-Q8_0.gguf",
        "gguf/manifest.json",
        "gguf/model-F16.gguf",
    ]
    report = json.loads((run / "report.json").read_text())
    assert report["models"]["exports"] == {t: f"export/{t}" for t in ("gguf", "gguf-q8_0")}
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    before = (run / "export" / "gguf" / "model-F16.gguf").read_bytes()

    # one target more is a task more
    done = len(read_events(run))
    run_job(load_job(make_job(model, export={"target": ["vllm", "gguf"]})), run, quiet)
    (run / "export" / "gguf" / "model-F16.gguf").write_bytes(b"GGUF")
    with pytest.raises(VerificationError, match="differs from its record"):
        verify_run(run)
    run_job(load_job(make_job(model, export={"target": ["vllm", "gguf"]})), run, quiet)
    verify_run(run)
    assert (run / "export" / "gguf" / "model-F16.gguf").read_bytes() == before
    names = [e["task"] for e in read_events(run)[done:] if e["event"] == "task-done"]
    assert names == ["export-gguf"]
    (run / "export" / "gguf" / "more.gguf").write_bytes(b"GGUF")
    with pytest.raises(VerificationError, match="was not written by this run"):
        verify_run(run)

    (run / "export" / "gguf" / "more.gguf").unlink()
    assert main(["verify", str(run), "--engine", "transformers"]) == 0
    assert "256 tokens of 8 texts as transformers in float32" in capsys.readouterr().out


def test_layers_of_different_sizes_for_vllm_are_the_same_weights(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    uneven: dict[str, Any] = {
        "method": {"name": "numerical"},
        "budget": {"per_layer": True, "allocation": "threshold", "kv_groups": 2},
    }
    job = load_job(make_job(make_model(), export={"target": ["vllm", "gguf"]}, **uneven))
    run_job(job, tmp_path / "run", quiet)
    verify_run(tmp_path / "run")
    model, vllm = tmp_path / "run" / "model", tmp_path / "run" / "export" / "vllm"
    config = json.loads((vllm / "config.json").read_text())
    given = open_checkpoint(model).model
    assert [block["ffn"]["intermediate_size"] for block in config["block_configs"]] == [
        layer.group("neurons").num_units for layer in given.layers
    ]
    assert {block["attention"]["n_heads_in_group"] for block in config["block_configs"]} == {2}
    assert config["architectures"] == ["DeciLMForCausalLM"]
    weights = sorted(vllm.glob("*.safetensors"))
    assert len(weights) == 4
    for file in weights:
        assert file.samefile(model / file.name)
    for engine in ("ctranslate2", "vllm"):
        with pytest.raises(SpecError, match=rf"{engine} does not run the class .* export\.pad"):
            list(compare_run(engine, tmp_path / "run", model, targets=()))


@pytest.mark.parametrize(
    ("model_type", "target", "changes", "said"),
    [
        ("gpt2", "gguf", {}, "gpt2 is not written as GGUF"),
        ("llama", "transformers-4", {"per_layer": True}, r"transformers-4: .* set export\.pad"),
        ("llama", "vllm", {"per_layer": True}, r"as many query heads \(set budget\.kv_groups"),
        ("qwen3", "gguf", {"per_layer": True}, r"qwen3 is not written .* set export\.pad"),
        ("qwen3", "vllm", {"per_layer": True, "kv_groups": 2}, "have no form there"),
        ("ministral3", "transformers-4", {}, "it has no model_type ministral3"),
    ],
)
def test_the_plan_refuses_what_an_engine_cannot_hold(
    model_type: str,
    target: str,
    changes: dict[str, Any],
    said: str,
    make_model: MakeModel,
    make_job: MakeJob,
) -> None:
    model = make_model(model_type)
    job = load_job(make_job(model, budget=changes, export={"target": target}))
    with pytest.raises(SpecError, match=said):
        make_plan(job, open_checkpoint(model))


@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": 1.5}, {"num_beams": 3}, {"no_repeat_ngram_size": 1}]
)
def test_the_likeliest_token_is_taken_whatever_a_folder_says(
    settings: dict[str, Any], make_model: MakeModel
) -> None:
    model, engine = make_model(), ENGINES["transformers"]
    plain = engine.greedy()(model, [[5, 6, 7]], 32)
    (model / "generation_config.json").write_text(json.dumps(settings))
    assert engine.greedy()(model, [[5, 6, 7]], 32) == plain
    assert compare(engine, "transformers", model, model, [[5, 6, 7]]).compared == 32
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": plain[0][2]}))
    assert len(engine.greedy()(model, [[5, 6, 7]], 32)[0]) <= 3, "an end ends it"


def test_an_engine_that_goes_on_otherwise_is_told_of(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = make_model(), ENGINES["transformers"]
    prompts = [[5, 6, 7], [8, 9]]
    assert compare(engine, "transformers", model, model, prompts).compared == 64
    right = engine.greedy()(model, prompts, 32)

    def wrong(*_: object) -> list[list[int]]:
        return [right[0], [*right[1][:4], (right[1][4] + 1) % 330, *right[1][5:]]]

    monkeypatch.setattr(Engine, "greedy", lambda self: wrong)
    with pytest.raises(VerificationError, match=r"token 4 of text 1 is .* nats less likely"):
        compare(engine, "gguf", model, model, prompts)
    monkeypatch.setattr(Engine, "greedy", lambda self: lambda *_: [right[0], right[1][:4]])
    with pytest.raises(VerificationError, match="token 4 of text 1"):  # no end is likely there
        compare(engine, "gguf", model, model, prompts)
    assert TIE < 1


def test_llama_cpp_goes_on_as_transformers(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    export = {"target": ["gguf", "gguf-q8_0"]}
    run_job(load_job(make_job(make_model(), export=export)), tmp_path / "run", quiet)
    assert main(["verify", str(tmp_path / "run"), "--engine", "llama.cpp"]) == 0
    assert capsys.readouterr().out.count("as transformers in float32") == 2
