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
    assert main(["push", str(run), "no name", "--dry-run"]) == 2


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


def test_a_hub_that_refuses_is_told_with_a_way_out(run: Path, hub: ThreadingHTTPServer) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    command = [sys.executable, "-m", "rayprune.orchestrator.cli", "push", str(run), "me/small"]
    env = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_x", "PATH": "", "HOME": str(run.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 4, done.stderr
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
    (path, body), *_ = Refusing.asked
    assert path == "/api/repos/create"
    assert json.loads(body)["name"] == "small"
    assert b"public" not in body
