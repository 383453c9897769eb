"""How long pruning takes beside FLAP's own code, on the demo model: one run after the other, in
processes of their own, alternating.

    git clone https://github.com/CASIA-LMC-Lab/FLAP
    python -m benchmarks.flap FLAP TEXT [--samples 16] [--sequence-length 512] [--rounds 3]
    python -m benchmarks.flap FLAP TEXT --quality 0.2 0.3 [--samples 64] [--windows 12]

FLAP's pruning function, statistics and layers run as they are, but for what they take for granted:
heads of 128, a GPU, float16, 2,048 samples of a data set from the Hub. The demo model's KV groups
are given to it as heads of their own (it knows none), so its model computes the same. Its time is
that of `prune_flap` alone; ours is that of the probe and the sweep, correction and files included,
and beside it that of the whole run.

With `--quality` no time is taken: its models, with its biases, are measured as all rows of
`benchmarks.quality` are. Of a KV group parameters go when all its heads are gone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from benchmarks.demo_model import MODEL, first_part, run, weights
from benchmarks.results import record, table
from benchmarks.yardstick import MOST_WINDOWS, cells, columns, measured, texts_of

SPARSITY = 0.2


def flap(
    folder: Path, text: Path, options: argparse.Namespace, dtype: str, ratio: float, masked: bool
) -> tuple[Any, dict[str, float]]:
    """Prune with FLAP in this process: its model, maybe with zeros for what is gone; seconds, and
    peak private memory in bytes.
    """
    import torch
    from transformers import AutoConfig

    from rayprune.specs.calibration import CalibrationSpec
    from rayprune.workers.calibration import calibration_windows, load_tokenizer
    from rayprune.workers.machine.memory import PeakMemory

    calibration = CalibrationSpec(
        path=str(text), samples=options.samples, sequence_length=options.sequence_length
    )
    windows_ST = calibration_windows(calibration, load_tokenizer(MODEL))
    config = AutoConfig.from_pretrained(MODEL)
    model = _flap_model(folder, config, getattr(torch, dtype), options.sequence_length)
    size = config.head_dim
    wrapper = _module(folder / "lib" / "layerwrapper.py", {})
    changes = {
        "from .layerwrapper import WrappedGPT, BiasGPT": "",
        "from .data import get_loaders": "",
        "128": str(size),
        "512.0 / 3": f"{4 * size}.0 / 3",
        ".cuda()": "",
        "(2048, model.seqlen": f"({options.samples}, model.seqlen",
        "torch.half": f"torch.{dtype}",
    }
    names = {"BiasGPT": wrapper.BiasGPT, "WrappedGPT": wrapper.WrappedGPT}
    loaders = [(window_T[None],) for window_T in windows_ST], None
    names["get_loaders"] = lambda *_, **__: loaders
    code = _module(folder / "lib" / "prune.py", changes, **names)
    wanted = SimpleNamespace(nsamples=options.samples, seed=0, metrics="WIFV", structure="AL-AM",
                             pruning_ratio=ratio, remove_heads=8, unstr=masked)  # fmt: skip
    with PeakMemory() as peak:
        begin = time.perf_counter()
        code.prune_flap(wanted, model, None, torch.device("cpu"))
        seconds = time.perf_counter() - begin
    return model, {"seconds": seconds, "whole": seconds, "bytes": peak.bytes}


def quality(folder: Path, text: Path, options: argparse.Namespace) -> None:
    """Measure its models at some sparsities of the decoder; print and record."""
    from rayprune.workers.model.checkpoint import open_checkpoint

    rows = []
    whole = open_checkpoint(MODEL).decoder_parameters
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        first, texts = first_part(text, work), texts_of(text, work)
        dense = measured(MODEL, MODEL, texts, "cpu", options.windows)["perplexity"]
        for sparsity in options.quality:
            ratio = sparsity
            for _ in range(5):  # it counts heads with keys and values of their own
                model, facts = flap(folder, first, options, "float32", ratio, masked=True)
                removed = _removed(model) / whole
                if abs(removed - sparsity) < 0.002:
                    break
                ratio *= sparsity / removed
            _save(model, work / "model")
            found = measured(work / "model", MODEL, texts, "cpu", options.windows)
            rows.append([f"{ratio:.3f}", f"{removed:.2%}", *cells(found, dense),
                         f"{facts['seconds']:.0f}"])  # fmt: skip
            print(rows[-1], flush=True)
    heads = ["FLAP's ratio", "decoder removed", *columns(list(dense)), "seconds"]
    note = f"{options.samples} x {options.sequence_length} tokens, float32; {options.windows}"
    record("flap-quality", f"{note} windows of 1024 tokens.\n\n{table(heads, rows)}")


def _removed(model: Any) -> int:
    """Parameters that its zeros are worth in the demo model, whose heads share keys and values."""
    config, removed = model.config, 0
    size, groups = config.head_dim, config.num_key_value_heads
    for layer in model.model.layers:
        gone_H = layer.self_attn.q_proj.weight.view(-1, size, config.hidden_size).eq(0).all((1, 2))
        heads = gone_H.sum() + gone_H.view(groups, -1).all(1).sum()
        channels = layer.mlp.up_proj.weight.eq(0).all(1).sum()
        removed += int(2 * size * heads + 3 * channels) * config.hidden_size
    return removed


def _save(model: Any, out: Path) -> None:
    """Write a Llama with a bias behind every matrix, zeros for those that FLAP has none for."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    from rayprune.workers.calibration import load_tokenizer

    config = AutoConfig.from_pretrained(MODEL)
    config.num_key_value_heads = config.num_attention_heads
    config.attention_bias = config.mlp_bias = True
    whole = LlamaForCausalLM(config).float()
    known = weights()
    ours = {name: torch.zeros_like(value) for name, value in whole.state_dict().items()}
    ours |= {name: value.float() for name, value in known.items() if ".layers." not in name}
    ours |= {name: value for name, value in model.state_dict().items() if name in ours}
    ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    whole.load_state_dict(ours)
    whole.save_pretrained(out)
    load_tokenizer(MODEL).save_pretrained(out)


def _module(file: Path, changes: dict[str, str], **names: Any) -> ModuleType:
    """A file of FLAP's, with some words exchanged and some names given."""
    source, module = file.read_text(encoding="utf-8"), ModuleType(file.stem)
    for old, new in changes.items():
        assert old in source, f"{file} has no {old!r}: another version of FLAP"
        source = source.replace(old, new)
    vars(module).update(names)
    exec(compile(source, str(file), "exec"), vars(module))
    return module


def _flap_model(folder: Path, config: Any, dtype: Any, length: int) -> Any:
    """FLAP's layers with the demo model's weights, and as much around them as it asks for."""
    import torch
    from torch import nn

    size = {"self.head_dim = 128": f"self.head_dim = {config.head_dim}"}
    code = _module(folder / "models" / "hf_llama" / "modeling_llama.py", size)
    known = weights()
    groups = config.num_attention_heads // config.num_key_value_heads
    config.max_position_embeddings = length
    theta = config.rope_parameters["rope_theta"]

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(
                code.LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers)
            )
            for layer in self.layers:
                rotary = code.LlamaRotaryEmbedding(config.head_dim, length, theta)
                layer.self_attn.rotary_emb = rotary

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.config, self.seqlen = Decoder(), config, length

        def forward(self, tokens_BT: Any) -> None:
            hidden_BTD = self.model.embed_tokens(tokens_BT)
            mask = code._make_causal_mask(tokens_BT.shape, hidden_BTD.dtype, tokens_BT.device)
            positions = torch.arange(tokens_BT.shape[1])[None]
            self.model.layers[0](hidden_BTD, attention_mask=mask, position_ids=positions)

    model = Model()
    ours = model.state_dict()
    for name, value in ours.items():
        if name in known:
            weight = known[name].to(value.dtype)
            if "k_proj" in name or "v_proj" in name:
                heads = weight.view(-1, config.head_dim, weight.shape[1])
                weight = heads.repeat_interleave(groups, 0).flatten(0, 1)
            ours[name] = weight
        elif name.endswith("bias"):
            ours[name] = torch.zeros_like(value)
    model.load_state_dict(ours)
    return model.to(dtype).eval()


def rayprune(text: Path, options: argparse.Namespace, workers: str) -> dict[str, float]:
    """Prune with the demo's job, evaluation left out."""
    settings = [f"calibration.path={text}", f"calibration.samples={options.samples}",
                f"calibration.sequence_length={options.sequence_length}", "evaluation=null",
                f"budget.sparsity={SPARSITY}", *workers.split()]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        report = run(settings, Path(folder) / "run")
    seconds = report["seconds"]
    pruning = seconds.get("probe", 0.0) + seconds["sweep"]
    peak = max(report["peak_memory_bytes"].values())
    return {"seconds": pruning, "whole": seconds["total"], "bytes": peak}


OURS = {
    "rayprune, one process": "cluster.executor=in-process parallel.threads_per_worker=2",
    "rayprune, two Ray workers": "parallel.workers=2",
}
THEIRS = {"FLAP, float16 (its own)": "float16", "FLAP, float32": "float32"}


def main() -> None:
    """Run all, print and record; with `--one` a single run of FLAP."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("flap", type=Path, metavar="FLAP", help="a clone of FLAP's repository")
    parser.add_argument("text", type=Path, help="UTF-8 text, for instance WikiText-2")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quality", type=float, nargs="+", metavar="SPARSITY")
    parser.add_argument("--windows", type=int, default=MOST_WINDOWS, help="of each text")
    parser.add_argument("--one", choices=THEIRS.values(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder, text = options.flap.absolute(), options.text.absolute()
    if options.one:
        facts = flap(folder, text, options, options.one, SPARSITY, masked=False)[1]
        print(json.dumps(facts))
        return
    if options.quality:
        quality(folder, text, options)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*THEIRS, *OURS)}
    for _ in range(options.rounds):
        for name, dtype in THEIRS.items():
            words = [sys.executable, "-m", "benchmarks.flap", *sys.argv[1:], "--one", dtype]
            said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name].append(json.loads(said.splitlines()[-1]))
        for name, workers in OURS.items():
            found[name].append(rayprune(text, options, workers))
    median = {
        name: {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    first = median[next(iter(THEIRS))]["seconds"]
    rows = [
        [name, f"{of['seconds']:.1f}", f"{of['seconds'] / first:.2f}", f"{of['whole']:.1f}",
         f"{of['bytes'] / 2**30:.2f}"]
        for name, of in median.items()
    ]  # fmt: skip
    columns = ["", "seconds of pruning", "of FLAP's", "seconds in all", "GiB at most, a process"]
    record("flap", f"Medians of {options.rounds} alternating runs.\n\n{table(columns, rows)}")


if __name__ == "__main__":
    main()
