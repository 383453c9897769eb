"""A model by its name on the Hub, fetched from a server of this machine's that answers as the Hub
does.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest

from tests.conftest import MakeJob
from tests.models import build_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/tiny"


class Hub(BaseHTTPRequestHandler):
    """One repository at one commit, of the files of a folder."""

    folder: Path
    sent: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        if path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
            files = [{"rfilename": name} for name in self._names()]
            self._json({"id": NAME, "sha": COMMIT, "siblings": files, "private": False})
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            self._json([self._entry(name) for name in self._names()])
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            self._file(path.rpartition("/")[2], body)
        else:
            self._json({"error": "Repository not found"}, 404, "RepoNotFound")

    def _names(self) -> list[str]:
        return sorted(file.name for file in self.folder.iterdir())

    def _entry(self, name: str) -> dict[str, object]:
        content = (self.folder / name).read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": blob}

    def _file(self, name: str, body: bool) -> None:
        content = (self.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{self._entry(name)["oid"]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.sent.append(name)
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200, error: str = "") -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a Hub with a model, and files beside it that are nobody's to fetch."""
    Hub.folder, Hub.sent = build_model(tmp_path / "on the hub"), []
    (Hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    (Hub.folder / "modeling_own.py").write_text("raise SystemExit")
    (Hub.folder / "consolidated.safetensors").write_bytes(b"the same again")
    (Hub.folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def command(hub: str, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of ours that knows this Hub alone."""
    own = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "rayprune.orchestrator.cli", *words],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_model_is_fetched_by_its_name(hub: str, make_job: MakeJob, tmp_path: Path) -> None:
    job = str(make_job(Path(NAME)))
    planned = command(hub, tmp_path, "plan", job)
    assert planned.returncode == 0, planned.stderr
    valid = command(hub, tmp_path, "validate", "--deep", job)
    assert "not here yet" in valid.stdout, valid.stderr
    assert not any(name.endswith(".safetensors") for name in Hub.sent)
    out = tmp_path / "run"
    done = command(hub, tmp_path, "run", job, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in Hub.sent
    assert not {"pytorch_model.bin", "modeling_own.py", "consolidated.safetensors"} & {*Hub.sent}
    dense = json.loads((out / "report.json").read_text())["dense"]
    assert (dense["hub_id"], dense["revision"]) == (NAME, COMMIT)
    assert "base_model: owner/tiny" in (out / "model" / "README.md").read_text()
    Hub.sent.clear()
    again = command(hub, tmp_path, "run", job, "--out", str(out))
    assert (again.returncode, Hub.sent) == (0, []), again.stderr


def test_what_is_not_there_is_told_with_a_way_out(
    hub: str, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(Path("owner/other"))
    missing = command(hub, tmp_path, "validate", str(job))
    assert missing.returncode == 3, missing.stderr
    assert "neither a folder, nor on the Hub" in missing.stderr
    nobody = command("http://127.0.0.1:9", tmp_path, "validate", str(job))
    assert nobody.returncode == 4, nobody.stderr
    assert "cannot be fetched from the Hub" in nobody.stderr
    job = make_job(tmp_path / "on the hub")
    both = command(hub, tmp_path, "validate", str(job), "--set", "model.revision=main")
    assert both.returncode == 2
    assert "leave one of them out" in both.stderr
