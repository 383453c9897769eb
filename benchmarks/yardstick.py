"""How far a model is from the dense one, on texts of three kinds: ratio of perplexities, KL
divergence and agreement on the likeliest token.

No row is calibrated or trained on the second and the third; settings were tuned on the first two
alone.
"""

import math
import sysconfig
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_model import held_out
from rayprune.specs.evaluation import EvaluationSpec
from rayprune.workers.calibration import evaluation_windows, load_tokenizer
from rayprune.workers.model.checkpoint import open_checkpoint
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.comparison import Texts, compared

MOST_WINDOWS = 52
"""Of 1024 tokens: a fifth of WikiText-2's validation text."""
MEASURES = ("perplexity", "divergence", "agreement")
SOURCES = ("argparse", "decimal", "difflib", "tarfile", "typing", "zipfile")
"""Modules of the standard library, most of whose text is code."""


def help_topics(folder: Path) -> Path:
    """English text that every CPython brings."""
    from pydoc_data.topics import topics

    file = folder / "topics.txt"
    file.write_text("\n\n".join(topics[key] for key in sorted(topics)), encoding="utf-8")
    return file


def source_code(folder: Path) -> Path:
    """Python that every CPython brings: the text that no tuning saw."""
    library, file = Path(sysconfig.get_path("stdlib")), folder / "source.txt"
    found = [library / f"{name}.py" for name in SOURCES] + [library / "zipfile" / "__init__.py"]
    content = [part.read_text(encoding="utf-8") for part in found if part.is_file()]
    file.write_text("\n\n".join(content), encoding="utf-8")
    return file


def texts_of(text: Path, folder: Path) -> dict[str, Path]:
    """The three texts by name, written to a folder; the first is the last fifth of `text`."""
    return {
        "same domain": held_out(text, folder),
        "help topics": help_topics(folder),
        "Python source": source_code(folder),
    }


def measured(
    model: Path, dense: Path, texts: dict[str, Path], device: str, most: int = MOST_WINDOWS
) -> dict[str, dict[str, float]]:
    """By measure and text: the first 1024-token windows; KL(dense || model) in nats a token."""
    found: dict[str, dict[str, float]] = {measure: {} for measure in MEASURES}
    where = torch.device(device)
    networks = [
        StreamedModel(open_checkpoint(path), torch.float32, where) for path in (dense, model)
    ]
    for name, text in texts.items():
        spec = EvaluationSpec(path=str(text), max_windows=most)
        windows_NT = evaluation_windows(spec, load_tokenizer(dense))
        whole = Texts(windows_NT, stride=windows_NT.shape[1])
        windows = compared(*networks, whole, range(len(windows_NT)))
        scored = sum(window.tokens for window in windows)
        found["perplexity"][name] = math.exp(math.fsum(w.loss for w in windows) / scored)
        found["divergence"][name] = math.fsum(w.divergence for w in windows) / scored
        found["agreement"][name] = sum(window.agreed for window in windows) / scored
    return found


def columns(texts: list[str]) -> list[str]:
    """Heads of what `cells` gives."""
    return [*(f"{name}: ratio, KL, agreement" for name in texts), "KL over all texts"]


def cells(result: dict[str, Any], dense: dict[str, float]) -> list[str]:
    """A model's three measures on every text, beside the dense model's perplexities; mean KL."""
    texts = [
        f"{result['perplexity'][name] / dense[name]:.4f}, {result['divergence'][name]:.4f},"
        f" {result['agreement'][name]:.1%}"
        for name in dense
    ]
    mean = math.fsum(result["divergence"][name] for name in dense) / len(dense)
    return [*texts, f"{mean:.4f}"]
