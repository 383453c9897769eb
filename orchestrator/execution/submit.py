"""Ray Jobs from both sides: a job is sent to a cluster and followed from here; inside one, paths
that get lost are refused.

The job travels inside the command that the cluster runs, so no node needs a runtime environment of
its own. Ray is imported when it is used, after the environment says how to authenticate.
"""

import importlib.util
import json
import os
import re
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rayprune.specs.errors import INTERRUPTED, ResourceError, SpecError
from rayprune.specs.job import JobSpec
from rayprune.specs.loader import dump_job, paths_in
from rayprune.workers.machine.output import print_on

POLL_SECONDS = 1.0
ANSWER_SECONDS = 20.0
PATIENCE_SECONDS = 60.0
_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_END = "END_OF_JOB"
_NO_AGENT = "No available agent"
_OUR_CODES = (0, 1, 2, 3, 4, 5, INTERRUPTED)


def refuse_lost_paths(job: JobSpec, out: Path, store: Path | None) -> None:
    """Inside a Ray job, refuse a relative run folder or store, and paths in the job's working
    directory: Ray throws that away.

    Raises:
        SpecError: names the option.
    """
    config = os.environ.get(_IN_JOB)
    if config is None:
        return
    for option, folder in _folders(out, store).items():
        if not folder.is_absolute():
            raise SpecError(
                f"{option} {folder}: is relative, and a Ray job's folder is thrown away; give an"
                " absolute path that every node sees"
            )
    if (json.loads(config).get("runtime_env") or {}).get("working_dir"):
        for option, path in (_folders(out, store) | _paths(job)).items():
            if path.is_relative_to(Path.cwd()):
                raise SpecError(
                    f"{option} {path}: lies in the Ray job's working directory, which is thrown"
                    " away; use shared storage"
                )


def _folders(out: Path, store: Path | None) -> dict[str, Path]:
    return {"--out": out} | ({"--store": store} if store else {})


def _paths(job: JobSpec) -> dict[str, Path]:
    return {option: Path(path) for option, path in paths_in(job).items()}


def submit(
    job: JobSpec,
    out: Path,
    address: str,
    wait: bool,
    *,
    redo: str | None = None,
    store: Path | None = None,
) -> int:
    """Run a job on a cluster, show its log, and return its exit code; without `wait` return when
    the cluster has accepted it. `redo` and `store` are those of `rayprune run`.

    Raises:
        SpecError: the address, the run folder, the store or this machine's set-up is wrong.
        ResourceError: the cluster does not answer, or the job ended without an exit code of ours.
    """
    for option, folder in _folders(out, store).items():
        if not folder.is_absolute():
            raise SpecError(
                f"{option} {folder}: is relative; the cluster needs an absolute path that every"
                " node sees"
            )
    client = _connect(address)
    command = entrypoint(job, out, redo, store)
    submission = _accepted(client, command, submission_id(out))
    try:
        print(f"submitted {submission} to {address}", flush=True)
        if not wait:
            print(_hints(submission, address), flush=True)
            return 0
        return _exit_code(submission, _follow(client, submission, command, address))
    except KeyboardInterrupt:
        print(
            f"rayprune: {submission} goes on without this terminal\n{_hints(submission, address)}",
            file=sys.stderr,
        )
        return INTERRUPTED


def submission_id(out: Path) -> str:
    """A new id for every attempt, since Ray refuses one that was used: the run folder's name, the
    time (UTC), random digits.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", out.name)
    return f"rayprune-{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def entrypoint(job: JobSpec, out: Path, redo: str | None = None, store: Path | None = None) -> str:
    """The shell command that runs a job on the cluster; the job is its standard input. `exec`:
    signals reach the driver itself.
    """
    here = job.model_copy(update={"cluster": job.cluster.model_copy(update={"address": "auto"})})
    words = ["exec", "rayprune", "run", "/dev/stdin", "--out", str(out)]
    words += ["--redo", redo] if redo else []
    words += ["--store", str(store)] if store else []
    return f"{shlex.join(words)} <<'{_END}'\n{dump_job(here)}{_END}\n"


def _connect(address: str) -> Any:
    wrong = SpecError(
        f"--address {address}: write the address of the cluster's dashboard, such as"
        " http://HOST:8265"
    )
    try:
        url = urlsplit(address)
        host, port = url.hostname, url.port or {"http": 80, "https": 443}[url.scheme]
    except (ValueError, KeyError):
        raise wrong from None
    if not host or url.scheme not in ("http", "https"):
        raise wrong
    _prepare_ray()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    from rayprune.orchestrator.execution.ray_start import check_reachable

    check_reachable(host, port, f"--address {address}", ANSWER_SECONDS)

    class Client(JobSubmissionClient):
        """Ray's own, which waits for ever where something else listens."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": ANSWER_SECONDS, **options})

    try:
        return Client(address)
    except AuthenticationError as error:
        raise ResourceError(
            f"--address {address}: {error}; use the cluster's own token: RAY_AUTH_TOKEN or"
            " ~/.ray/auth_token"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"--address {address}: no Ray dashboard answers there: {error}"
        ) from None


def _prepare_ray() -> None:
    """What has to be decided before Ray is imported: tokens are asked for unless the user says
    otherwise.
    """
    if importlib.util.find_spec("aiohttp") is None or importlib.util.find_spec("requests") is None:
        raise SpecError(
            "submit: Ray's job client is not installed here; install rayprune with its extra"
            ' "cluster"'
        )
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would prefer them to --address
        os.environ.pop(name, None)
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and not _has_token():
        raise SpecError(
            "submit: no Ray token on this machine; set RAY_AUTH_TOKEN or write ~/.ray/auth_token,"
            " the same as on the cluster (RAY_AUTH_MODE=disabled for a cluster without one)"
        )


def _has_token() -> bool:
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(file).expanduser().is_file()


def _accepted(client: Any, command: str, submission: str) -> str:
    """Hand a job over, once the head node's agent, which takes it, has started: it does some
    seconds after the dashboard.
    """
    begun = time.monotonic()
    while True:
        try:
            return str(client.submit_job(entrypoint=command, submission_id=submission))
        except (OSError, RuntimeError) as error:
            waits = _NO_AGENT in str(error)
            if waits and time.monotonic() - begun < PATIENCE_SECONDS:
                time.sleep(POLL_SECONDS)
                continue
            advice = (
                "; where another Ray runs on the head node, give the agent a port of its own: ray"
                " start --head --dashboard-agent-listen-port PORT"
            )
            raise ResourceError(
                f"the cluster did not accept {submission}: {error}{advice if waits else ''}"
            ) from None


def _hints(submission: str, address: str) -> str:
    return (
        f"  look: ray job logs --address {address} --follow {submission}\n  stop: ray job stop"
        f" --address {address} {submission}"
    )


def _follow(client: Any, submission: str, command: str, address: str) -> Any:
    """Show the job's log until it ends; a connection that breaks may come back. Returns what Ray
    knows of the job.
    """
    shown, last = 0, time.monotonic()
    while True:
        try:
            info = client.get_job_info(submission)
            log = client.get_job_logs(submission) if info.driver_agent_http_address else ""
            last = time.monotonic()
        except (OSError, RuntimeError) as error:
            if time.monotonic() - last > PATIENCE_SECONDS:
                raise ResourceError(
                    f"{submission}: the cluster has stopped answering:"
                    f" {error}\n{_hints(submission, address)}"
                ) from None
        else:
            # Ray's echo of the command says nothing new
            shown = max(shown, log.find(command) + len(command) if command in log else 0)
            print_on(log[shown:], end="")
            shown = max(shown, len(log))
            if info.status.is_terminal():
                return info
        time.sleep(POLL_SECONDS)


def _exit_code(submission: str, info: Any) -> int:
    """The job's own exit code; Ray's commands show 1 for all that are not 0."""
    code = info.driver_exit_code
    if info.status == "STOPPED":
        print(f"rayprune: {submission} was stopped; submit it again to go on", file=sys.stderr)
        return INTERRUPTED
    if code == 127:
        raise ResourceError(
            f"{submission}: the head node finds no rayprune; install it there, on the PATH that Ray"
            " is started with"
        )
    if code not in _OUR_CODES:
        raise ResourceError(
            f"{submission}: the driver was lost: {info.message}; submit it again: finished tasks"
            " are kept"
        )
    return int(code)
