"""A job from YAML to a folder that plain transformers loads, for every family and both routes."""

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.random_model import byte_tokenizer
from rayprune.orchestrator.cli import main
from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.run import run_job
from rayprune.specs.errors import ModelError, SpecError
from rayprune.specs.loader import load_job
from rayprune.specs.methods.ranking import RANKINGS
from rayprune.workers.model.checkpoint import open_checkpoint
from tests.conftest import MakeJob, MakeModel, edit_json, folder_bytes
from tests.helpers import families, some


def run(job: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """Run a job through the command line; the report."""
    words = [word for override in overrides for word in ("--set", override)]
    assert main(["run", str(job), "--out", str(out), *words]) == 0
    return json.loads((out / "report.json").read_text())


def load(folder: Path) -> Any:
    """Load as a user would; nothing may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("model_type", some(families(), "gpt2", "opt"))
@pytest.mark.parametrize("part", [1, 2])
def test_every_family_loads_and_generates(
    model_type: str, part: int, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model(model_type)
    heads, neurons = open_checkpoint(dense).model.layers[0].groups
    job = make_job(dense, budget={"kv_groups": heads.num_units // part})
    if refused := (part > 1 and heads.fixed) or neurons.fixed:
        with pytest.raises(SpecError, match=re.escape(refused)):
            run_job(load_job(job), tmp_path / "run", lambda event: None)
        return
    report = run(job, tmp_path / "run")
    model = load(tmp_path / "run" / "model")
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]["after"]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["remaining_parameters"] == report["parameters"]["after"]
    assert report["decoder_parameters"]["after"] <= 0.75 * report["decoder_parameters"]["before"]
    tokens = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))
    cached, plain = (
        model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(
    tied: bool, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model(tie_word_embeddings=tied)
    report = run(make_job(dense), tmp_path / "run")
    names = open_checkpoint(tmp_path / "run" / "model").tensors
    assert ("lm_head.weight" in names) is not tied
    embedding = 260 * 32
    assert (
        report["parameters"]["before"] - report["decoder_parameters"]["before"]
        == embedding * (1 if tied else 2) + 32
    )


def test_uneven_heads_of_llama_are_written_as_mistral(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """Six heads in three groups to four heads of a hidden size of 30 (30 % 4 != 0), which
    LlamaConfig refuses.
    """
    dense = make_model(hidden_size=30, num_attention_heads=6, num_key_value_heads=3)
    run(make_job(dense, budget={"kv_groups": 2, "sparsity": 0.2}), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"], config["head_dim"]) == (
        "mistral",
        None,
        8,
    )
    load(tmp_path / "run" / "model")


def test_a_model_type_of_another_tokenizer_class_gives_the_same_tokens(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    """Llama 2's tokenizer: of a Llama transformers builds its class from `tokenizer_class`, of a
    Mistral it takes the file literally.
    """
    dense = make_model(hidden_size=30, num_attention_heads=6, num_key_value_heads=3, vocab_size=300)
    letters = ["<unk>", "<s>", "</s>", "\u2581", *string.printable.replace(" ", "")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={letter: i for i, letter in enumerate(letters)},
            merges=[],
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.save(str(dense / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    run(make_job(dense, budget={"kv_groups": 2, "sparsity": 0.2}), tmp_path / "run")
    before, after = (
        AutoTokenizer.from_pretrained(folder) for folder in (dense, tmp_path / "run" / "model")
    )
    for text in ("a b", " a", "x</s>a", "<s>[INST] a [/INST] b </s><s>[INST] a"):
        assert before(text)["input_ids"] == after(text)["input_ids"]
    assert list((tmp_path / "run" / "model").rglob("tool.jinja"))
    verify_run(tmp_path / "run")


def test_qwen2_for_vllm_is_written_as_llama(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model("qwen2")
    # as it is published
    edit_json(dense / "config.json", sliding_window=8, use_sliding_window=False, layer_types=None)
    job = make_job(dense, budget={"kv_groups": 1, "sparsity": 0.3})
    plain, vllm = run(job, tmp_path / "plain"), run(job, tmp_path / "vllm", "export.target=vllm")
    loaded = [load(tmp_path / name / "model") for name in ("plain", "vllm")]
    assert loaded[1].config.model_type == "llama"
    tokens = torch.arange(3, 40)[None]
    # a zero bias, another kernel
    torch.testing.assert_close(
        loaded[0](tokens).logits, loaded[1](tokens).logits, rtol=0, atol=1e-5
    )
    assert vllm["parameters"]["after"] - plain["parameters"]["after"] == 3 * 32
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        loaded[1].generate(tokens, **options),
        loaded[1].generate(tokens, use_cache=False, **options),
    )


def test_a_llama_for_ctranslate2_is_written_as_mistral_and_what_it_misreads_is_refused(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    fewer = {"kv_groups": 1, "sparsity": 0.3}
    job = make_job(make_model(), budget=fewer)
    plain, other = run(job, tmp_path / "plain"), tmp_path / "other"
    assert run(job, other, "export.target=ctranslate2")["parameters"] == plain["parameters"]
    loaded = [load(folder / "model") for folder in (tmp_path / "plain", other)]
    assert [network.config.model_type for network in loaded] == ["llama", "mistral"]
    tokens = torch.arange(3, 40)[None]
    torch.testing.assert_close(*(network(tokens).logits for network in loaded), rtol=0, atol=0)
    qwen = make_job(make_model("qwen2", "qwen2"), "qwen2.yaml", budget=fewer)
    with pytest.raises(SpecError, match=r"for the size of a llama's heads, which is 8"):
        run_job(
            load_job(qwen, ["export.target=ctranslate2"]), tmp_path / "qwen", lambda event: None
        )


def test_a_head_of_its_own_that_is_called_tied_is_refused(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model(tie_word_embeddings=False)
    edit_json(dense / "config.json", tie_word_embeddings=True)
    with pytest.raises(
        ModelError, match=r"lm_head\.weight differs .* set tie_word_embeddings: false"
    ):
        run_job(load_job(make_job(dense)), tmp_path / "run", lambda event: None)


def test_the_class_of_layers_that_differ_is_the_family_s(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model()
    edit_json(dense / "config.json", architectures=["LLaMAForCausalLM"])  # as in early conversions
    run(make_job(dense, budget={"per_layer": True}), tmp_path / "run")
    assert (
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "run" / "model", trust_remote_code=True
        ).config.model_type
        == "llama"
    )


def test_biases_follow_their_rows(make_model: MakeModel, make_job: MakeJob, tmp_path: Path) -> None:
    dense = make_model(attention_bias=True, mlp_bias=True)
    run(make_job(dense, budget={"kv_groups": 1}), tmp_path / "run")
    load(tmp_path / "run" / "model")


@pytest.mark.parametrize("dtype", some(["bfloat16", "float16"], "bfloat16"))
def test_half_precision_checkpoints_keep_their_type(
    dtype: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model(dtype=getattr(torch, dtype))
    run(make_job(dense), tmp_path / "run")
    assert {
        info.dtype for info in open_checkpoint(tmp_path / "run" / "model").tensors.values()
    } == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}
    assert load(tmp_path / "run" / "model").dtype == getattr(torch, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("pad", [False, True])
def test_corrections_are_rounded_to_the_type_that_is_asked_for(
    pad: bool, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    dense = make_model(dtype=torch.bfloat16)
    budget = {"per_layer": True} if pad else {"kv_groups": 1}
    job = make_job(dense, export={"dtype": "float32", "pad": pad}, budget=budget)
    run(job, tmp_path / "run")

    def cut_off(event: dict[str, Any]) -> None:
        if (
            event["event"] == "step-finished"
            and event.get("stage") == "sweep"
            and event["layer"] == 0
        ):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(load_job(job), tmp_path / "cut", cut_off)
    run(job, tmp_path / "cut")
    assert folder_bytes(tmp_path / "cut" / "model") == folder_bytes(tmp_path / "run" / "model")
    weight = load(tmp_path / "run" / "model").model.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.slow
def test_gram_and_qr_route_agree(make_model: MakeModel, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(make_model(), budget={"kv_groups": 1})
    run(job, tmp_path / "gram")
    run(job, tmp_path / "qr", "method.factorization=qr")
    gram, qr = (load(tmp_path / name / "model").state_dict() for name in ("gram", "qr"))
    for name, tensor in gram.items():
        torch.testing.assert_close(qr[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", some(RANKINGS, "obs"))
def test_every_method_gives_a_model_that_loads_from_memory_and_from_files(
    method: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path, force_memory: Any
) -> None:
    job = make_job(make_model(), budget={"kv_groups": 1}, method={"name": method})
    report = run(job, tmp_path / "kept")
    load(tmp_path / "kept" / "model")
    assert report["method"]["name"] == method
    force_memory(spill_statistics=True)
    run(job, tmp_path / "tight")
    assert folder_bytes(tmp_path / "kept" / "model") == folder_bytes(tmp_path / "tight" / "model")


@pytest.mark.parametrize(
    "memory",
    some(
        [
            {"keep_inputs": False},
            {"spill_hidden": True},
            {"spill_statistics": True, "spill_hidden": True, "keep_inputs": False},
        ],
        {"spill_statistics": True, "spill_hidden": True, "keep_inputs": False},
    ),
    ids=str,
)
def test_what_memory_holds_never_changes_the_bytes(
    memory: dict[str, bool],
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    force_memory: Any,
) -> None:
    job = make_job(make_model(), budget={"kv_groups": 1})
    run(job, tmp_path / "kept")
    force_memory(**memory)
    run(job, tmp_path / "tight")
    assert folder_bytes(tmp_path / "kept" / "model") == folder_bytes(tmp_path / "tight" / "model")


def test_report_and_evaluation(
    make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    dense, held_out = make_model(), tmp_path / "held_out.txt"
    held_out.write_text(text_file.read_text(encoding="utf-8")[30_000:], encoding="utf-8")
    report = run(
        make_job(
            dense, evaluation={"path": str(held_out), "window": 32, "stride": 16, "max_windows": 4}
        ),
        tmp_path / "run",
    )
    assert {
        "parameters",
        "decoder_parameters",
        "bytes_on_disk",
        "perplexity",
        "seconds",
        "peak_memory_bytes",
        "layers",
    } <= report.keys()
    for name, folder in (("before", dense), ("after", tmp_path / "run" / "model")):
        assert report["perplexity"][name] == pytest.approx(_perplexity(folder, held_out), rel=1e-5)
    assert report["evaluation"]["scored_tokens"] == 31 + 3 * 16
    for layer in report["layers"]:
        assert {"kept", "of", "damping", "training_error", "held_out_error"} <= layer["groups"][
            "neurons"
        ].keys()
    assert {"driver", "worker-0"} <= report["peak_memory_bytes"].keys()
    assert report["bytes_on_disk"]["after"] < report["bytes_on_disk"]["before"]


def _perplexity(folder: Path, text_file: Path) -> float:
    """By whole-model forward passes."""
    from transformers import AutoTokenizer

    tokens = torch.tensor(
        AutoTokenizer.from_pretrained(folder)(text_file.read_text())["input_ids"][: 3 * 16 + 32]
    )
    model, losses = AutoModelForCausalLM.from_pretrained(folder), []
    for number in range(4):
        window = tokens[number * 16 : number * 16 + 32]
        loss = torch.nn.functional.cross_entropy(
            model(window[None]).logits[0, :-1], window[1:], reduction="none"
        )
        losses.append(loss if number == 0 else loss[-16:])
    return float(torch.cat(losses).detach().mean().exp())


def test_verify_and_report_commands(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(make_job(make_model()), out)
    assert main(["verify", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    assert "decoder_parameters" in capsys.readouterr().out
    assert main(["report", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["run", str(out / "job.yaml"), "--out", str(out), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (lines[0]["event"], lines[-1]["event"]) == ("run-started", "report")
    assert lines[-1]["decoder_parameters"] == told["decoder_parameters"]
    shard = out / "model" / "model-00002-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    assert main(["verify", str(out)]) == 5
    assert "model-00002" in capsys.readouterr().err


def test_original_config_is_patched_not_resaved(
    make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    from tests.conftest import edit_json

    dense = make_model()
    edit_json(
        dense / "config.json",
        rope_theta=77777.0,
        torch_dtype="float32",
        an_unknown_key={"kept": [1]},
    )
    (dense / "modeling_evil.py").write_text("raise SystemExit")
    (dense / "LICENSE").write_text("a licence")
    run(make_job(dense), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["rope_theta"] == 77777.0
    assert config["an_unknown_key"] == {"kept": [1]}
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert {"LICENSE", "tokenizer.json", "generation_config.json"} <= names
    assert "modeling_evil.py" not in names


@pytest.mark.slow
def test_mixed_texts_are_found_beside_the_job_and_belong_to_the_result(
    make_model: MakeModel, make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "second.txt").write_text(
        text_file.read_text(encoding="utf-8")[20_000:40_000], encoding="utf-8"
    )
    job = make_job(make_model(), calibration={"mix": [{"path": "second.txt", "weight": 0.5}]})
    run(job, tmp_path / "run")
    tokens = load_file(tmp_path / "run" / "tasks" / "calibration-tokens" / "tokens.safetensors")[
        "tokens"
    ]
    assert (
        byte_tokenizer().decode(tokens[1]) == text_file.read_text(encoding="utf-8")[20_000:20_064]
    ), "11 windows of the first, 5 of this"
    (tmp_path / "second.txt").write_text("other text " * 1000, encoding="utf-8")
    run(job, tmp_path / "run")
    run(job, tmp_path / "fresh")
    assert folder_bytes(tmp_path / "run" / "model") == folder_bytes(tmp_path / "fresh" / "model")
