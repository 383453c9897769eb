"""What lies behind an exception: a shortage or an interrupt keeps its exit code where it hides."""

import errno
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from rayprune.orchestrator import cli
from rayprune.orchestrator.commands import jobs
from rayprune.specs.errors import INTERRUPTED, ModelError, ResourceError, SpecError
from rayprune.workers.machine.shortage import causes_of, explained, explained_shortage
from rayprune.workers.training import loop
from tests.conftest import MakeJob, MakeModel


def on_a_rank(error: BaseException) -> BaseException:
    """What torch raises when a rank fails in saving or loading: a BaseException."""
    return CheckpointException("save", {0: (error, None)})  # type: ignore[dict-item]


def during(first: BaseException, then: BaseException) -> BaseException:
    """An exception raised while another one was handled."""
    try:
        try:
            raise first
        except BaseException:
            raise then  # noqa: B904
    except BaseException as error:
        return error


@pytest.mark.parametrize("wrap", [lambda error: error, on_a_rank], ids=["itself", "on a rank"])
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), INTERRUPTED, "run the same command again"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/a/file"), 4, "make room"),
        (OSError(errno.EFBIG, "File too large"), 4, "raise the limit"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 4, "make room"),
        (during(OSError(errno.ENOSPC, "full"), RuntimeError("unexpected pos 64 vs 0")), 4, "make"),
        (MemoryError(), 4, "out of memory (MemoryError)"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 4, "out of memory"),
        (RuntimeError("std::bad_alloc"), 4, "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 4, "out of memory"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 4, "ulimit -a"),
        (OSError(errno.EMFILE, "Too many open files"), 4, "ulimit -a"),
        (RuntimeError("can't start new thread"), 4, "ulimit -a"),
        (ModelError("m: is wrong"), 3, "rayprune: m: is wrong"),
        (RuntimeError("a bug"), 1, "Traceback"),
    ],
    ids=lambda value: repr(value) if isinstance(value, BaseException) else "",
)
def test_a_command_ends_with_what_lies_behind(
    error: BaseException,
    code: int,
    words: str,
    wrap: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(_: object) -> None:
        raise wrap(error)  # type: ignore[operator]

    monkeypatch.setattr(jobs, "_run", command)
    assert cli.main(["run", "job.yaml", "--out", "run"]) == code
    assert words in capsys.readouterr().err


def test_a_command_that_keeps_nothing_promises_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "_validate", command)
    assert cli.main(["validate", "job.yaml"]) == INTERRUPTED
    assert capsys.readouterr().err == "rayprune: interrupted\n"


def test_a_bug_in_handling_another_error_is_a_bug() -> None:
    assert explained(during(SpecError("known"), TypeError("a bug")), "", "") is None
    missing = FileNotFoundError(errno.ENOENT, "No such file", "a")
    assert explained(during(missing, TypeError("a bug")), "", "") is None


def test_causes_end_where_they_come_back() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert [*causes_of(one)] == [one, two]
    assert [*causes_of(None)] == []


def test_steps_see_shortages_and_pass_the_rest() -> None:
    full = on_a_rank(OSError(errno.ENOSPC, "full"))
    expected = pytest.raises(ResourceError, match=r"collect: \[Errno 28\] full")
    with expected, explained_shortage("collect", ""):
        raise full
    bug = KeyError("a bug")
    with pytest.raises(KeyError) as caught, explained_shortage("collect", ""):
        raise bug
    assert caught.value is bug


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("strike", "code"),
    [(lambda: signal.raise_signal(signal.SIGTERM), INTERRUPTED), (full, 4)],
    ids=["SIGTERM", "disk full"],
)
def test_while_a_training_checkpoint_is_written(
    strike: Callable[[], None],
    code: int,
    make_model: MakeModel,
    make_job: MakeJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch wraps whatever happens there into an exception that is no Exception."""

    def save(*_: object) -> None:
        try:
            strike()
        except BaseException as error:
            raise on_a_rank(error) from None

    monkeypatch.setattr(loop.Training, "_save", save)
    training = {"epochs": 1, "batch": 2, "checkpoint_steps": 1}
    job = make_job(make_model(num_hidden_layers=1), recover=training)
    assert cli.main(["run", str(job), "--out", str(tmp_path / "run")]) == code
    assert "Traceback" not in capsys.readouterr().err
