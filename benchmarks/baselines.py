"""What others do, on the demo model: torch-pruning's width pruning, and whole layers by block
influence (ShortGPT).

    python -m benchmarks.baselines NAME TEXT --sparsity 0.2 --out FOLDER [--samples 64]
    [--sequence-length 512]

NAME is `magnitude` or `taylor` (torch-pruning's group importances, FFN width) or `block-influence`.
Writes a model folder, and `baseline.json` with the seconds and the peak private memory in bytes.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.demo_model import MODEL
from rayprune.specs.calibration import CalibrationSpec
from rayprune.workers.calibration import calibration_windows, load_tokenizer
from rayprune.workers.machine.memory import PeakMemory


def block_influence(model: Any, windows_ST: Tensor, sparsity: float) -> None:
    """Drop the layers that turn the residual stream least: 1 - E cos(x_in, x_out) (ShortGPT, arXiv
    2403.03853).
    """
    layers = model.model.layers
    similarity = torch.zeros(len(layers), dtype=torch.float64)
    with torch.inference_mode():
        for window in windows_ST.split(4):
            states = model.model(window, output_hidden_states=True).hidden_states
            ends = []
            handle = model.model.norm.register_forward_pre_hook(
                lambda _, args, ends=ends: ends.append(args[0])
            )
            model.model(window)
            handle.remove()
            # the last one that is returned has gone through the norm
            states = [*states[:-1], ends[0]]
            for index in range(len(layers)):
                similarity[index] += torch.cosine_similarity(
                    states[index].double(), states[index + 1].double(), dim=-1
                ).sum()
    dropped = set(similarity.argsort(descending=True)[: math.ceil(sparsity * len(layers))].tolist())
    model.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(layers) if index not in dropped
    )
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(model.model.layers)


def torch_pruning_width(importance: str) -> Callable[[Any, Tensor, float], None]:
    """The FFN width by torch-pruning's dependency graph, the same in all layers; it corrects
    nothing.
    """

    def prune(model: Any, windows_ST: Tensor, sparsity: float) -> None:
        import torch_pruning

        layers = model.model.layers
        if importance == "taylor":
            for window in windows_ST.split(2):
                (model(window, labels=window).loss / len(windows_ST)).backward()
        decoder = sum(parameter.numel() for parameter in layers.parameters())
        widths = [matrix for layer in layers for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj)]
        channels = len(layers) * layers[0].mlp.gate_proj.out_features
        ratio = sparsity * decoder / (3 * layers[0].mlp.gate_proj.in_features * channels)
        untouched = [model.lm_head, model.model.embed_tokens]
        untouched += [
            matrix
            for layer in layers
            for matrix in layer.self_attn.children()
            if isinstance(matrix, torch.nn.Linear)
        ]
        score = torch_pruning.importance
        warnings.simplefilter("ignore")
        torch_pruning.pruner.BasePruner(
            model,
            windows_ST[:1, :16],
            importance=(
                score.GroupTaylorImportance
                if importance == "taylor"
                else score.GroupMagnitudeImportance
            )(),
            pruning_ratio=0.0,
            pruning_ratio_dict=dict.fromkeys(widths, ratio),
            ignored_layers=untouched,
            output_transform=lambda output: output.logits,
        ).step()
        model.zero_grad()
        model.config.intermediate_size = layers[0].mlp.gate_proj.out_features

    return prune


BASELINES: dict[str, Callable[[Any, Tensor, float], None]] = {
    "magnitude": torch_pruning_width("magnitude"),
    "taylor": torch_pruning_width("taylor"),
    "block-influence": block_influence,
}


def main() -> None:
    """Prune and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=BASELINES)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    options = parser.parse_args()
    disable_progress_bar()
    peak, start = PeakMemory(), time.monotonic()
    calibration = CalibrationSpec(
        path=str(options.text), samples=options.samples, sequence_length=options.sequence_length
    )
    windows_ST = calibration_windows(calibration, load_tokenizer(MODEL))
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    BASELINES[options.name](model, windows_ST, options.sparsity)
    seconds = time.monotonic() - start
    model.save_pretrained(options.out)
    load_tokenizer(MODEL).save_pretrained(options.out)
    (options.out / "baseline.json").write_text(
        json.dumps({"seconds": seconds, "peak_memory_bytes": peak.bytes})
    )


if __name__ == "__main__":
    main()
