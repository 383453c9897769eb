"""Model and run folders of somebody who means harm: nothing of theirs runs, nothing outside is read
into the model or written, nothing of theirs reaches a terminal or a page unescaped.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import edit_json, folder_bytes, write_job
from tests.faults.calm import Calm
from tests.faults.conftest import MakeCalm, Record
from tests.faults.forks import Ended, attempt
from tests.faults.hooks import DieAt
from tests.faults.reliability import Row
from tests.models import build_model

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
SECRET = b"a secret that lies outside, and that nobody gave away"
DAYS = "One day. Another day. " * 400
CODE = "import pathlib\npathlib.Path({!r}).write_text('ran')\n"


@dataclass
class Trap:
    """A folder that is set up, what would be written if its code ran, and a secret beside it."""

    folder: Path
    """A model folder, or a run folder."""

    @property
    def ran(self) -> Path:
        return self.folder.parent / "ran"

    @property
    def code(self) -> str:
        return CODE.format(str(self.ran))

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(Payload(str(self.ran)))

    @property
    def secret(self) -> Path:
        path = self.folder.parent / "outside" / "secret"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_bytes(SECRET)
            path.chmod(0o600)
        return path

    def link(self, name: str) -> None:
        """The secret under a name of the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(self.secret)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


Setting = Callable[[Trap], Any]


def auto_map(trap: Trap) -> None:
    (trap.folder / "modeling_theirs.py").write_text(trap.code)
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    edit_json(trap.folder / "config.json", auto_map={c: "modeling_theirs.Theirs" for c in classes})


def own_tokenizer(trap: Trap) -> None:
    (trap.folder / "tokenization_theirs.py").write_text(trap.code)
    theirs = ["tokenization_theirs.Theirs", None]
    edit_json(trap.folder / "tokenizer_config.json", auto_map={"AutoTokenizer": theirs})


def own_class(trap: Trap) -> None:
    auto_map(trap)
    edit_json(trap.folder / "config.json", model_type="theirs")


def pickles(trap: Trap) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (trap.folder / name).write_bytes(trap.pickled)


def template(trap: Trap) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os"
    escape += f".system('touch {trap.ran}') }}}}"
    (trap.folder / "chat_template.jinja").write_text(escape)


def packages(trap: Trap) -> None:
    """Modules that would be found first, were the folder on the path of imports."""
    for name in ("torch", "specs", "workers", "orchestrator", "sitecustomize", "conftest"):
        (trap.folder / f"{name}.py").write_text(trap.code)


def generation_code(trap: Trap) -> None:
    (trap.folder / "custom_generate").mkdir()
    (trap.folder / "custom_generate" / "generate.py").write_text(trap.code)


def escapes(trap: Trap) -> None:
    edit_json(trap.folder / "config.json", hidden_act="\x1b]0;theirs\x07\x1b[2J<script>")


@dataclass(frozen=True)
class Hostile:
    name: str
    set_up: Setting


MODELS = [
    Hostile("code by `auto_map` in config.json", auto_map),
    Hostile("code by `auto_map` in tokenizer_config.json", own_tokenizer),
    Hostile("a model_type of its own, with code", own_class),
    Hostile("pickles beside the weights", pickles),
    Hostile("a chat template that breaks out of Jinja", template),
    Hostile("modules named like ours and others'", packages),
    Hostile("code for generation", generation_code),
    Hostile("terminal escapes in config.json", escapes),
    Hostile("`tokenizer.model` links outside", lambda trap: trap.link("tokenizer.model")),
    Hostile("`tokenizer_x.json` links outside", lambda trap: trap.link("tokenizer_x.json")),
    Hostile("`LICENSE` links outside", lambda trap: trap.link("LICENSE")),
    Hostile("`NOTICE.txt` links outside", lambda trap: trap.link("NOTICE.txt")),
    Hostile("`chat_template.jinja` links outside", lambda trap: trap.link("chat_template.jinja")),
    Hostile("a further template links outside",
            lambda trap: trap.link("additional_chat_templates/x.jinja")),
    Hostile("a folder of templates links outside", lambda trap: (
        shutil.copy(trap.secret, trap.secret.with_name("x.jinja")),
        (trap.folder / "additional_chat_templates").symlink_to(trap.secret.parent))),
    Hostile("`generation_config.json` links outside",
            lambda trap: trap.link("generation_config.json")),
    Hostile("`config.json` links outside", lambda trap: trap.link("config.json")),
    Hostile("`merges.txt` is a hard link to a secret", lambda trap: (
        trap.secret.with_name("merges").write_text("x"),
        os.link(trap.secret.with_name("merges"), trap.folder / "merges.txt"))),
]  # fmt: skip


def harmless(trap: Trap, *ended: Ended) -> None:
    """Nothing ran, nothing was given away, nothing odd was shown."""
    assert not trap.ran.exists(), "their code ran"
    for each in ended:
        assert "Traceback" not in each.words, each.err
        assert "\x1b]0;" not in each.words
        assert "\x1b[2J" not in each.words
        assert SECRET.decode() not in each.words


@pytest.mark.parametrize("hostile", MODELS, ids=[hostile.name for hostile in MODELS])
def test_a_model_folder(hostile: Hostile, tmp_path: Path, record: Record) -> None:
    trap, text = Trap(build_model(tmp_path / "theirs")), tmp_path / "text.txt"
    text.write_text(DAYS)
    hostile.set_up(trap)
    outside = folder_bytes(trap.secret.parent)
    job = write_job(tmp_path / "job.yaml", text, trap.folder)
    out = tmp_path / "run"
    commands = [
        ["validate", str(job)],
        ["plan", str(job)],
        ["run", str(job), "--out", str(out)],
        ["verify", str(out)],
        ["generate", str(trap.folder), "--tokens", "8", "--length", "8"],
    ]
    ended = [attempt(words, folder=trap.folder) for words in commands]
    codes = [each.code for each in ended]
    seen = "ends, without it" if codes[2] == 0 else f"refused, {codes[2]}"
    record(Row("hostile", "model folder", hostile.name, "nothing of it runs, or is copied", seen))
    harmless(trap, *ended)
    assert set(codes) <= {0, 2, 3, 5}, codes
    assert folder_bytes(trap.secret.parent) == outside
    written = folder_bytes(out) if out.exists() else {}
    assert not any(SECRET in content for content in written.values()), "it was copied"
    assert not [name for name in written if name.endswith((".py", ".bin", ".pt", ".pkl"))]
    assert not [path for path in out.rglob("*") if path.is_symlink()]


def code_in_model(trap: Trap) -> None:
    (trap.folder / "model" / "modeling_per_layer.py").write_text(trap.code)
    classes = {"AutoModelForCausalLM": "modeling_per_layer.PerLayerForCausalLM"}
    edit_json(trap.folder / "model" / "config.json", auto_map=classes)


def state(trap: Trap) -> None:
    """Every file of a saved training state is a pickle."""
    states = [path for path in trap.folder.rglob("step-*/*")] or [
        trap.folder / "tasks" / "recover" / "step-0000001" / ".metadata"
    ]
    for path in states:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(trap.pickled)


def tensors(trap: Trap) -> None:
    for path in trap.folder.rglob("*.safetensors"):
        path.unlink()
        path.write_bytes(trap.pickled)


def job_with_code(trap: Trap) -> None:
    (trap.folder / "job.yaml").write_text(f"!!python/object/apply:os.mkdir ['{trap.ran}']\n")


def linked_log(name: str) -> Setting:
    def set_up(trap: Trap) -> None:
        trap.link(name)

    return set_up


def linked_folder(name: str) -> Setting:
    def set_up(trap: Trap) -> None:
        path = trap.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.symlink_to(trap.secret.parent)

    return set_up


def outward_names(trap: Trap) -> None:
    """A manifest that claims files outside."""
    path = trap.folder / "tasks" / "layer-0001" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../../outside/secret"] = {"bytes": 3, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))


def outward_tasks(trap: Trap) -> None:
    plan = json.loads((trap.folder / "plan.json").read_text())
    edit_json(trap.folder / "plan.json", tasks=[*plan["tasks"], "../../outside"])


def outward_report(trap: Trap) -> None:
    edit_json(trap.folder / "report.json", models={"pruned": "../outside", "recovered": "/etc"})


def script(trap: Trap) -> None:
    line = {"step": 0, "of": 1, "loss": 1.0, "<script>alert(1)</script>": 2.0}
    log = trap.folder / "tasks" / "recover" / "training.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as handle:
        handle.write(json.dumps(line) + "\n")
    with (trap.folder / "events.jsonl").open("a") as handle:
        event = {"time": 1.0, "event": "warning", "text": "\x1b]0;theirs\x07\x1b[2J<script>x"}
        handle.write(json.dumps(event) + "\n")


def escaping_report(trap: Trap) -> None:
    report = (trap.folder / "report.json").read_text()
    odd = json.dumps("\x1b]0;theirs\x07\x1b[2J")[1:-1]
    (trap.folder / "report.json").write_text(
        report.replace(
            '"warnings": [',
            f'"warnings": ["{odd}"' + (", " if '"warnings": []' not in report else ""),
        )
    )


RUNS = [
    Hostile("code in the model folder", code_in_model),
    Hostile("a pickle as training state", state),
    Hostile("pickles in place of tensors", tensors),
    Hostile("job.yaml makes a Python object", job_with_code),
    Hostile("events.jsonl links outside", linked_log("events.jsonl")),
    Hostile("training.jsonl links outside", linked_log("tasks/recover/training.jsonl")),
    Hostile("run.lock links outside", linked_log("run.lock")),
    Hostile("job.yaml links outside", linked_log("job.yaml")),
    Hostile("report.json links outside", linked_log("report.json")),
    Hostile("plan.json links outside", linked_log("plan.json")),
    Hostile("a layer's file links outside", linked_log("tasks/layer-0001/layer.safetensors")),
    Hostile("a manifest links outside", linked_log("tasks/layer-0001/manifest.json")),
    Hostile("a task's folder links outside", linked_folder("tasks/layer-0001")),
    Hostile("the folder of tasks links outside", linked_folder("tasks")),
    Hostile("the model folder links outside", linked_folder("model")),
    Hostile("the cache links outside", linked_folder("cache")),
    Hostile("a manifest names files outside", outward_names),
    Hostile("plan.json names tasks outside", outward_tasks),
    Hostile("report.json names models outside", outward_report),
    Hostile("a script as the name of a number", script),
    Hostile("terminal escapes in the report", escaping_report),
]


@pytest.fixture
def theirs(calm: MakeCalm) -> Callable[[bool], tuple[Calm, Trap]]:
    """A run folder to set up: finished, or in the middle of its training."""

    def make(whole: bool) -> tuple[Calm, Trap]:
        job = calm("recovered")
        shutil.rmtree(job.run.with_name("outside"), ignore_errors=True)
        shutil.rmtree(job.run.with_name("ran"), ignore_errors=True)
        if whole:
            return job, Trap(job.copied())
        out = job.fresh()
        stop = next(n for n, o in enumerate(job.operations) if "tasks/recover/model" in o.path)
        job.attempt(out, DieAt(out, stop))
        return job, Trap(out)

    return make


@pytest.mark.parametrize("whole", [True, False], ids=["finished", "half-way"])
@pytest.mark.parametrize("hostile", RUNS, ids=[hostile.name for hostile in RUNS])
def test_a_run_folder(
    hostile: Hostile, whole: bool, theirs: Callable[[bool], tuple[Calm, Trap]], record: Record
) -> None:
    job, trap = theirs(whole)
    try:
        hostile.set_up(trap)
    except FileNotFoundError:
        pytest.skip("a run that is not finished has no such file")
    outside, mode = folder_bytes(trap.secret.parent), trap.secret.stat().st_mode
    commands = [["verify", str(trap.folder)], ["report", str(trap.folder)]]
    ended = [attempt(words) for words in commands]
    again = job.attempt(trap.folder)
    ended += [again, attempt(["report", str(trap.folder)])]
    seen = "the run ends" if again.code == 0 else f"refused, {again.code}"
    where = "run folder" + ("" if whole else ", half-way")
    record(Row("hostile", where, hostile.name, "nothing of it runs, or is written outside", seen))
    harmless(trap, *ended)
    assert {each.code for each in ended} <= {0, 2, 3, 5}, ended
    assert folder_bytes(trap.secret.parent) == outside, "written outside"
    assert trap.secret.stat().st_mode == mode
    page = trap.folder / "report.html"
    if page.exists() and not page.is_symlink():
        assert "<script>alert" not in page.read_text()
        assert "<script>x" not in page.read_text()
    model = trap.folder / "model"
    if again.code == 0:
        assert not model.is_symlink()
        assert SECRET not in b"".join(folder_bytes(model).values())
