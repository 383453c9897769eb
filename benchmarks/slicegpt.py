"""SliceGPT's own code by the yardstick of `benchmarks.quality`, on the demo model.

    git clone https://github.com/microsoft/TransformerCompression
    python -m venv old; old/bin/pip install "transformers==4.41.0" "datasets==2.18.0" \\
        ml-collections tqdm torch
    python -m benchmarks.slicegpt TransformerCompression old/bin/python TEXT [--dimensions 408]

It rotates every layer's hidden states onto their principal components and cuts the last ones off.
Its classes are transformers 4.41's, so it runs in an environment of that, in a process of its own,
which is given tokens and weights and measures its model itself, beside the dense one as 4.41
computes it. The matrices between its layers count as parameters of the decoder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

MEASURES = ("perplexity", "divergence", "agreement")


def sliced(folder: Path, dimensions: int, orientation: str) -> None:
    """Slice and measure what lies in `folder`; prints JSON. In the other environment."""
    from slicegpt import layernorm_fusion, rotate  # type: ignore[import-not-found]
    from slicegpt.adapters.llama_adapter import LlamaModelAdapter  # type: ignore[import-not-found]
    from slicegpt.config import config  # type: ignore[import-not-found]
    from slicegpt.slicing_scheduler import ConstSlicingScheduler  # type: ignore[import-not-found]

    given: dict[str, Any] = torch.load(folder / "given.pt")
    dense, model = (_model(given) for _ in range(2))
    config.device, config.dtype = torch.device("cpu"), torch.float32
    model.config.torch_dtype = torch.float32
    adapter = LlamaModelAdapter(model)
    adapter.use_cache = False
    loader = [
        {"input_ids": batch_BT, "attention_mask": torch.ones_like(batch_BT)}
        for batch_BT in given["calibration"].split(4)
    ]
    begin = time.perf_counter()
    layernorm_fusion.replace_layers(adapter)
    layernorm_fusion.fuse_modules(adapter)
    scheduler = ConstSlicingScheduler(dimensions)
    rotate.rotate_and_slice(adapter, loader, scheduler, final_orientation=orientation)
    seconds = time.perf_counter() - begin
    parameters = sum(p.numel() for p in model.model.layers.parameters())
    found = {"seconds": seconds, "parameters": parameters, "dense": {}, "sliced": {}}
    for name, windows_NT in given["texts"].items():
        found["dense"][name], found["sliced"][name] = _measured(dense, model, windows_NT)
    print(json.dumps(found))


def _model(given: dict[str, Any]) -> Any:
    """The demo model by transformers 4.41, whose head is a matrix of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**given["config"], attn_implementation="eager"))
    model.load_state_dict(given["weights"])
    return model.float().eval()


@torch.no_grad()
def _measured(dense: Any, model: Any, windows_NT: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Of the dense model and the other one, all tokens but a window's first."""
    sums = torch.zeros(4, dtype=torch.float64)
    for window_T in windows_NT:
        p_TV, q_TV = (
            net(window_T[None]).logits[0, :-1].float().log_softmax(-1) for net in (dense, model)
        )
        wanted_T1 = window_T[1:, None]
        sums += torch.stack(
            [
                -p_TV.gather(1, wanted_T1).double().sum(),
                -q_TV.gather(1, wanted_T1).double().sum(),
                (p_TV.exp() * (p_TV - q_TV)).sum(-1).double().sum(),
                (p_TV.argmax(-1) == q_TV.argmax(-1)).double().sum(),
            ]
        )
    dense_loss, loss, divergence, agreed = (
        sums / (len(windows_NT) * (windows_NT.shape[1] - 1))
    ).tolist()
    of_dense = [torch.tensor(dense_loss).exp().item(), 0.0, 1.0]
    of_model = [torch.tensor(loss).exp().item(), divergence, agreed]
    of_both = [dict(zip(MEASURES, values, strict=True)) for values in (of_dense, of_model)]
    return of_both[0], of_both[1]


def main() -> None:
    """Write down what the other environment needs, have it sliced there, record."""
    from benchmarks.demo_model import MODEL, first_part, weights
    from benchmarks.results import record, table
    from benchmarks.yardstick import cells, columns, texts_of
    from rayprune.specs.calibration import CalibrationSpec
    from rayprune.specs.evaluation import EvaluationSpec
    from rayprune.workers.calibration import calibration_windows, evaluation_windows, load_tokenizer
    from rayprune.workers.model.checkpoint import open_checkpoint

    shown = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("checkout", type=Path, help="SliceGPT's repository")
    parser.add_argument("python", type=Path, help="of an environment with transformers 4.41")
    parser.add_argument("text", type=Path, help="UTF-8 text, for instance WikiText-2")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[408], help="that are kept")
    parser.add_argument("--orientation", choices=("random", "pca"), default="random")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=12, help="evaluation windows of each text")
    options = parser.parse_args()
    checkpoint, tokenizer = open_checkpoint(MODEL), load_tokenizer(MODEL)
    known = {name: tensor.float() for name, tensor in weights().items()}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        calibration = CalibrationSpec(
            path=str(first_part(options.text, work)), samples=options.samples, sequence_length=512
        )
        texts = {
            name: evaluation_windows(
                EvaluationSpec(path=str(path), max_windows=options.windows), tokenizer
            )
            for name, path in texts_of(options.text, work).items()
        }
        given = {
            "config": _old_config(MODEL),
            "weights": {"lm_head.weight": known["model.embed_tokens.weight"].clone()} | known,
            "calibration": calibration_windows(calibration, tokenizer),
            "texts": texts,
        }
        torch.save(given, work / "given.pt")
        rows = []
        for dimensions in options.dimensions:
            found = _in_other(options, work, dimensions)
            removed = 1 - found["parameters"] / checkpoint.decoder_parameters
            measured, dense = (
                {measure: {t: found[of][t][measure] for t in texts} for measure in MEASURES}
                for of in ("sliced", "dense")
            )
            rows.append([dimensions, f"{removed:.2%}", *cells(measured, dense["perplexity"]),
                         f"{found['seconds']:.0f}"])  # fmt: skip
            print(rows[-1], dense["perplexity"], flush=True)
    heads = ["dimensions kept", "decoder removed", *columns(list(texts)), "seconds"]
    note = f"{options.samples} x 512 tokens, float32, final orientation {options.orientation};"
    record("slicegpt", f"{note} {options.windows} windows of 1024 tokens.\n\n{table(heads, rows)}")


def _in_other(options: argparse.Namespace, work: Path, dimensions: int) -> dict[str, Any]:
    """What the other environment prints."""
    command = [options.python, "-P", __file__, work, str(dimensions), options.orientation]
    path = {"PYTHONPATH": str(options.checkout.resolve() / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=path, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _old_config(model: Path) -> dict[str, Any]:
    """The config as 4.41 reads it, but for the tied head."""
    found: dict[str, Any] = json.loads((model / "config.json").read_text())
    rope = found.pop("rope_parameters", None) or {}
    found |= {"rope_theta": rope.get("rope_theta", found.get("rope_theta", 10000.0))}
    return found | {"tie_word_embeddings": False, "use_cache": False}


if __name__ == "__main__":
    if sys.argv[1:] and Path(sys.argv[1]).joinpath("given.pt").exists():
        sliced(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        main()
