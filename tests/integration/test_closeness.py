"""How close a pruned model is to the dense one, against a few lines of transformers."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayprune.orchestrator.execution.verify import verify_run
from rayprune.orchestrator.reporting.facts import Perplexity
from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from rayprune.workers.passes.comparison import QUARTERS
from tests.conftest import MakeJob
from tests.helpers import quiet
from tests.models import build_model

WINDOW, STRIDE = 24, 10


def test_a_report_tells_what_transformers_says(
    make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    """Of two texts, each by itself and both together."""
    texts = {"first": (40_000, 41_000), "other": (42_000, 43_000)}
    for name, (start, stop) in texts.items():
        (tmp_path / name).write_text(text_file.read_text()[start:stop])
    evaluation = {
        "texts": {name: {"path": str(tmp_path / name)} for name in texts},
        "window": WINDOW,
        "stride": STRIDE,
        "max_windows": 5,
        "prompts": ["Python is"],
        "prompt_tokens": 6,
    }
    folder = build_model(tmp_path / "dense")
    report = run_job(load_job(make_job(folder, evaluation=evaluation)), tmp_path / "run", quiet)
    assert report.perplexity is not None
    assert report.evaluation is not None
    assert report.evaluation.scored_tokens == 2 * (WINDOW - 1 + 4 * STRIDE)
    tokens = load_file(tmp_path / "run" / "tasks" / "evaluation-tokens" / "tokens.safetensors")
    windows_NT = tokens["tokens"]
    with torch.inference_mode():
        log_p, log_q = (
            torch.log_softmax(
                AutoModelForCausalLM.from_pretrained(model).double()(windows_NT).logits, -1
            )[:, :-1]
            for model in (folder, report.model)
        )
    scored = torch.zeros(10, WINDOW - 1, dtype=torch.bool)
    scored[0::5], scored[:, -STRIDE:] = True, True
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    close, told = report.closeness["after"], report.texts
    parts = [("together", range(10), close.divergence, close.agreement, report.perplexity)]
    for number, name in enumerate(texts):
        dense, one = told[name]["before"], told[name]["after"]
        both = Perplexity.model_validate({"before": dense.perplexity, "after": one.perplexity})
        of_text = range(5 * number, 5 * number + 5)
        parts.append((name, of_text, one.divergence, one.agreement, both))
        assert one.slices is not None
        by_place = [one.slices[quarter] for quarter in QUARTERS]
        assert sum(part.tokens for part in by_place) == one.scored_tokens
    for name, owned, divergence, agreement, perplexity in parts:
        chosen = scored.clone()
        chosen[[n for n in range(10) if n not in owned]] = False
        assert divergence == pytest.approx(float(kl[chosen].mean()), abs=1e-4), name
        assert agreement == pytest.approx(float(same[chosen].mean())), name
        for log, value in ((log_p, perplexity.before), (log_q, perplexity.after)):
            loss = -log.gather(2, windows_NT[:, 1:, None])[..., 0][chosen].mean()
            assert value == pytest.approx(math.exp(loss), rel=1e-5), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt_1T = tokenizer("Python is", return_tensors="pt").input_ids
    for name, model in (("before", folder), ("after", report.model)):
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        whole_1T = network.generate(prompt_1T, max_new_tokens=6, do_sample=False)
        expected = tokenizer.decode(whole_1T[0, prompt_1T.shape[1] :], skip_special_tokens=True)
        assert report.samples[0].texts[name] == expected
    assert "evaluate-after" in verify_run(report.run)
