"""A job from Python: in the main thread, in another one, inside an event loop, and on Ray."""

import asyncio
import gc
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import rayprune
from rayprune.orchestrator.cli import main
from rayprune.orchestrator.stages.context import Context
from rayprune.workers.machine.memory import PeakMemory
from rayprune.workers.network.streamed import StreamedModel
from rayprune.workers.passes.stream import Stream
from rayprune.workers.passes.sweep import Sweep
from rayprune.workers.workbench import Workbench
from tests.conftest import MakeJob, MakeModel, folder_bytes
from tests.helpers import some

ROOT = Path(__file__).parents[2]
RUN_IN_A_THREAD = """
import asyncio, signal, sys
import rayprune

async def main():
    handler = signal.getsignal(signal.SIGTERM)
    report = await asyncio.to_thread(rayprune.run, sys.argv[1], sys.argv[2], print)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert report.recovered_model == report.model and report.model.is_dir()

asyncio.run(main())
import ray
assert not ray.is_initialized()
"""


@pytest.fixture
def sections(make_model: MakeModel, make_job: MakeJob) -> dict[str, Any]:
    """A job as a mapping."""
    content: dict[str, Any] = yaml.safe_load(make_job(make_model()).read_text())
    return content


def test_a_run_from_python(
    sections: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Silent by default; relative paths of a mapping start from the current folder."""
    monkeypatch.chdir(tmp_path)
    sections["model"] = {"path": "dense"}
    events: list[rayprune.Event] = []
    planned = rayprune.plan(sections)
    report = rayprune.run(sections, "run", events.append)
    assert report == rayprune.read_report("run")
    assert report.to_dict() == json.loads((tmp_path / "run" / "report.json").read_text())
    assert report.parameters.after in {shape.parameters for shape in planned.shapes}
    assert report.model == tmp_path / "run" / "model"
    assert (report.model / "config.json").exists()
    assert report.page == tmp_path / "run" / "report.html"
    assert [event.name for event in events[:1] + events[-1:]] == ["run-started", "run-finished"]
    layers = [event.layer for event in events if event.stage == "sweep" and event.layer is not None]
    assert layers == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_every_form_of_a_job_is_the_same_job(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(sections | {"model": {"path": "dense"}}))
    job = rayprune.load_job("job.yaml")
    relative = job.model_copy(update={"model": job.model.model_copy(update={"path": "dense"})})
    plans = [rayprune.plan(form) for form in ("job.yaml", Path("job.yaml"), sections, relative)]
    assert all(plan == plans[0] for plan in plans)
    profile = rayprune.plan(sections, "cpu-core")
    assert profile.seconds
    assert profile.machine == "cpu-core"


def test_the_view_of_the_command_line(
    sections: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rayprune.run(sections, tmp_path / "run", progress=True)
    assert "stage-started stage=sweep" in capfd.readouterr().out


def test_a_notebook_shows_a_plan(sections: dict[str, Any]) -> None:
    html = rayprune.plan(sections | {"method": "stat"})._repr_html_()
    assert html.count("<table") == html.count("</table>") >= 3
    assert "FFN channels" in html


def test_errors_are_our_own(sections: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(rayprune.SpecError, match=r"the job's mapping: budget\.sparsity"):
        rayprune.run(sections | {"budget": {"sparsity": 2}}, tmp_path / "run")
    with pytest.raises(rayprune.ModelError):
        rayprune.run(sections | {"model": {"path": "nowhere"}}, tmp_path / "run")
    with pytest.raises(rayprune.SpecError, match="name the folder of a finished run"):
        rayprune.read_report(tmp_path)


def test_an_exception_of_the_caller_ends_a_run_that_goes_on_later(
    sections: dict[str, Any], tmp_path: Path
) -> None:
    def stop(event: rayprune.Event) -> None:
        if (event.stage, event.layer) == ("sweep", 1):
            raise LookupError

    with pytest.raises(LookupError):
        rayprune.run(sections, tmp_path / "run", stop)
    found: list[rayprune.Event] = []
    rayprune.run(sections, tmp_path / "run", found.append)
    assert "layer-0000" in {event.task for event in found if event.name == "task-found"}


def test_inside_an_event_loop_and_in_a_thread(sections: dict[str, Any], tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    async def run_twice() -> None:
        rayprune.run(sections, tmp_path / "loop")
        await asyncio.to_thread(rayprune.run, sections, tmp_path / "thread")

    asyncio.run(run_twice())
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    in_loop, in_thread = (folder_bytes(tmp_path / name / "model") for name in ("loop", "thread"))
    assert in_loop == in_thread


@pytest.mark.parametrize("placement", some(["shards", "layers"], "shards"))
def test_nothing_of_a_run_stays_in_memory(
    placement: str, sections: dict[str, Any], tmp_path: Path
) -> None:
    """Not even until the garbage collector comes; and no thread of it goes on."""
    sections["parallel"] = {"placement": placement, "device": "cpu"}
    parts = (Context, Workbench, StreamedModel, Sweep, Stream, PeakMemory)
    gc.collect()
    gc.disable()
    try:
        rayprune.run(sections, tmp_path / "run")
        assert not [type(found) for found in gc.get_objects() if type(found) in parts]
    finally:
        gc.enable()
    for _ in range(100):
        names = [thread.name for thread in threading.enumerate()]
        if not any(name.startswith(("peak-memory", "prefetch")) for name in names):
            return
        time.sleep(0.05)
    raise AssertionError(names)


def test_several_fields_behind_one_set_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["validate", "job.yaml", "--set", "budget.sparsity=0.2", "model.dtype=bfloat16"])
    assert "model.dtype=bfloat16; give each field a --set of its own" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_in_a_thread(sections: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(sections))
    codes: list[int] = []
    words = ["run", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run")]
    thread = threading.Thread(target=lambda: codes.append(main(words)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_the_command_line_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"rayprune {rayprune.__version__}\n"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_ray_in_a_thread(make_model: MakeModel, make_job: MakeJob, tmp_path: Path) -> None:
    """A Ray of its own, a training, and the handler of SIGTERM as it was."""
    job = make_job(
        make_model(),
        recover={"epochs": 1, "batch": 2, "samples": 4},
        cluster={"executor": "ray", "address": "local"},
    )
    words = [sys.executable, "-c", RUN_IN_A_THREAD, str(job), str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=290, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run-finished" in done.stdout


@pytest.mark.parametrize("document", ["docs/python.md"])
def test_the_code_of_the_documents_runs(
    document: str,
    sections: dict[str, Any],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every block that is about us, one after another, in a folder with the files they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense").rename("model")
    (tmp_path / "calibration.txt").symlink_to(text_file)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(sections | {"model": {"path": "model"}}))
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    ours, names = [code for code in blocks if "rayprune" in code and "transformers" not in code], {}
    assert ours
    for code in ours:
        exec(compile(code, document, "exec"), names)
    assert names["report"].model == tmp_path / names["report"].run / "model"
    assert "layers" not in names or [layer for layer, _ in names["layers"]] == [0, 1, 2]


@pytest.mark.parametrize("command", some(["plan", "run", "run --json"], "plan", "run --json"))
def test_a_reader_that_stops_stops_nothing(
    command: str, make_model: MakeModel, make_job: MakeJob, tmp_path: Path
) -> None:
    words = [*command.split(), str(make_job(make_model()))]
    words += ["--out", str(tmp_path / "run")] if command != "plan" else []
    script = f"{sys.executable} -m rayprune.orchestrator.cli {shlex.join(words)} | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, timeout=110
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert command == "plan" or rayprune.read_report(tmp_path / "run").model.is_dir()
