"""The demo on a real pretrained model, with little text: two Ray workers, the shape chosen by the
probe.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayprune.orchestrator.cli import main
from rayprune.specs.loader import load_job
from rayprune.workers.calibration import calibration_windows, evaluation_windows, load_tokenizer
from rayprune.workers.texts.checks import shared_fraction

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
DECODER_PARAMETERS = 106_202_880

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]


def test_demo_model_becomes_smaller_and_still_writes(tmp_path: Path) -> None:
    if not (EXAMPLE / "model" / "config.json").exists():
        pytest.fail("the demo model is missing: run examples/smollm2/prepare.py (make test does)")
    small = [
        "calibration.samples=16",
        "calibration.sequence_length=256",
        "budget.probe_layers=2",
        "evaluation.max_windows=2",
    ]
    words = [word for override in small for word in ("--set", override)]
    assert main(["run", str(EXAMPLE / "job.yaml"), "--out", str(tmp_path / "run"), *words]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["decoder_parameters"]["before"] == DECODER_PARAMETERS
    assert report["decoder_parameters"]["after"] <= 0.8 * DECODER_PARAMETERS
    assert report["shape"]["heads"] == 3, (
        "dropping a KV group everywhere costs far more than narrower FFNs"
    )
    assert report["perplexity"]["after"] < 2 * report["perplexity"]["before"]
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        cached, plain = (
            model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=use)
            for use in (True, False)
        )
    assert torch.equal(cached, plain)


def test_the_texts_of_the_demo_have_nothing_in_common() -> None:
    job, tokenizer = load_job(EXAMPLE / "job.yaml"), load_tokenizer(EXAMPLE / "model")
    assert job.evaluation is not None
    assert (
        shared_fraction(
            calibration_windows(job.calibration, tokenizer),
            evaluation_windows(job.evaluation, tokenizer),
        )
        < 0.001
    )
