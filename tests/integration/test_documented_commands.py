"""Every `rayprune` command in the documents: the parser takes it, and on a small model it runs, but
for those that say here why not.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayprune.orchestrator.cli import _parser, main
from tests.conftest import write_job
from tests.models import build_model

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
NOT_RUN = {
    "demo": "fetches a model: tests/integration/test_demo_command.py, `make test-package`",
    "submit": "needs a cluster: tests/integration/test_ray.py",
    "push": "needs the Hub: tests/integration/test_publish.py",
    "track": "needs an extra: tests/unit/orchestrator/test_tracking.py",
    "profile": "measures the machine: tests/integration/test_latency.py",
}
"""Commands that are not run here, and what runs them."""
NEEDS_MORE = {
    "--engine llama.cpp": "xllamacpp is no dependency: tests/integration/test_verify.py",
    "export.target=[gguf": "of a tokenizer that llama.cpp knows: tests/integration/test_formats.py",
    "recipe=fast,balanced": "the recipes' jobs: tests/unit/specs/test_recipe.py",
    "examples/plans": "tests/integration/test_example_plans.py",
}
"""Words of commands that are not run here, and what runs them."""
STAND_IN = {
    "MODEL": "dense",
    "PRUNED": "runs/one/model",
    "JOB.yaml": "job.yaml",
    "RUN": "runs/one",
    "TEXT": "my.txt",
    "FILE": "my.txt",
    "a.b=c": "budget.sparsity=0.3",
    "here.yaml": "cpu-core",
    "OTHER": "other.txt",
}
"""What stands in the documents, and what it is here."""
SLOWLY = {"latency": ["--tokens", "8"], "bench": ["--tokens", "8", "--new", "2"]}
"""Commands that would take long as they are documented, and what is added."""
SPARSE = ["--set", "method.name=sparse", "--set", "budget={}"]


def documented() -> Iterator[tuple[str, str]]:
    """Every command, and the document that has it, once."""
    seen = set()
    for document in DOCUMENTS:
        blocks = re.findall(r"^```\w*\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            for part in line.partition(" #")[0].split("&&"):
                if part.strip().startswith("rayprune ") and part.strip() not in seen:
                    seen.add(part.strip())
                    yield part.strip(), document.name


COMMANDS = dict(documented())


def words_of(command: str) -> list[str]:
    """The arguments of a command; what may be left out is left out."""
    return shlex.split(re.sub(r"\[--.*?\](?= |$)|> *\S+", "", command))[1:]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_parser_takes_what_is_documented(command: str) -> None:
    words = [STAND_IN.get(word, word) for word in words_of(command)]
    if words != ["--version"]:
        _parser().parse_args(words)


def why_not(command: str) -> str | None:
    """Why a command is not run here."""
    name = words_of(command)[0]
    more = next((why for words, why in NEEDS_MORE.items() if words in command), None)
    return NOT_RUN.get(name, more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A folder with a model, texts, a job and a finished run."""
    folder = tmp_path_factory.mktemp("documented")
    build_model(folder / "dense", intermediate_size=256)
    (folder / "my.txt").write_text(text_file.read_text()[:40_000])
    (folder / "other.txt").write_text(text_file.read_text()[40_000:])
    job = write_job(
        folder / "job.yaml", folder / "my.txt", folder / "dense", parallel={"device": "auto"}
    )
    assert main(["run", str(job), "--out", str(folder / "runs" / "one"), "--quiet"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in COMMANDS if why_not(each) is None])
def test_what_is_documented_runs(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    words = [STAND_IN.get(word, word) for word in words_of(command)]
    given = re.search(r"--(out|store) (\S+)", command)
    if given and words[0] != "init":  # a folder of its own
        words[words.index(f"--{given[1]}") + 1] = str(tmp_path / "out")
    if words[0] == "init":
        words[1:1] = ["--out", str(tmp_path / "job.yaml")]
    words += SLOWLY.get(words[0], [])
    if COMMANDS[command] == "sparse.md":
        words += SPARSE
    if "--prompts" in words:
        words += ["--tokens", "64", "--length", "16"]
    try:
        code = main(words)
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert not code
