"""What would go to the Hub; the Hub itself is a server of this machine's."""

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from rayprune.orchestrator.cli import main
from rayprune.orchestrator.run import run_job
from rayprune.specs.loader import load_job
from tests.conftest import MakeJob
from tests.helpers import quiet
from tests.models import build_model


@pytest.fixture
def run(make_job: MakeJob, tmp_path: Path) -> Path:
    run_job(load_job(make_job(build_model(tmp_path / "dense"))), tmp_path / "run", quiet)
    return tmp_path / "run"


def test_a_dry_run_lists_what_would_go(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "me/small", "--dry-run"]) == 0
    words = capsys.readouterr().out
    for name in ("README.md", "config.json", "model-00001-of-", "would go to me/small"):
        assert name in words


def test_what_is_not_as_it_was_written_is_not_sent(run: Path) -> None:
    (run / "model" / "config.json").write_text("{}")
    assert main(["push", str(run), "me/small", "--dry-run"]) == 5
    for name in ("no name", "me/a--b", "me/a..b", "me/x."):
        assert main(["push", str(run), name, "--dry-run"]) == 2


class Refusing(BaseHTTPRequestHandler):
    """A Hub that knows nobody."""

    asked: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.path, body))
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Refusing.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def refused(run: Path, port: int) -> str:
    """What `push` says to a Hub at this port."""
    command = [sys.executable, "-m", "rayprune.orchestrator.cli", "push", str(run), "me/small"]
    where = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_TOKEN": "hf_x"}
    env = where | {"PATH": "", "HOME": str(run.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_hub_that_does_not_answer_is_told(run: Path) -> None:
    assert "me/small: not sent" in refused(run, 9)


def test_a_hub_that_refuses_is_told_with_a_way_out(run: Path, hub: ThreadingHTTPServer) -> None:
    assert "hf auth login" in refused(run, hub.server_address[1])
    (path, body), *_ = Refusing.asked
    assert path == "/api/repos/create"
    assert json.loads(body)["name"] == "small"
    assert b"public" not in body
