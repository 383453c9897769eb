"""How close a pruned model is to the dense one, against a few lines of transformers."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from tests.conftest import MakeJob
from tests.helpers import quiet
from tests.models import build_model

WINDOW, STRIDE = 24, 10


def test_a_report_tells_what_transformers_says(
    make_job: MakeJob, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "held_out.txt").write_text(text_file.read_text()[40_000:41_000])
    evaluation = {"path": str(tmp_path / "held_out.txt"), "window": WINDOW, "stride": STRIDE}
    dense = build_model(tmp_path / "dense")
    job = make_job(dense, evaluation=evaluation | {"max_windows": 5})
    report = run_job(load_job(job), tmp_path / "run", quiet)
    assert report.perplexity is not None
    tokens = load_file(tmp_path / "run" / "tasks" / "evaluation-tokens" / "tokens.safetensors")
    windows_NT = tokens["tokens"]
    with torch.inference_mode():
        log_p, log_q = (
            torch.log_softmax(
                AutoModelForCausalLM.from_pretrained(folder).double()(windows_NT).logits, -1
            )[:, :-1]
            for folder in (dense, report.model)
        )
    scored = torch.zeros(5, WINDOW - 1, dtype=torch.bool)
    scored[0], scored[1:, -STRIDE:] = True, True
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[scored].mean()
    same = (log_p.argmax(-1) == log_q.argmax(-1))[scored].double().mean()
    close = report.closeness["after"]
    assert close.divergence == pytest.approx(float(kl), abs=1e-4)
    assert close.agreement == pytest.approx(float(same))
    for log, perplexity in ((log_p, report.perplexity.before), (log_q, report.perplexity.after)):
        loss = -log.gather(2, windows_NT[:, 1:, None])[..., 0][scored].mean()
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)
