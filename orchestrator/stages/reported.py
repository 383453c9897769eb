"""The steps of a training, told while the driver waits for its ranks."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayprune.orchestrator.stages.context import Context
from rayprune.workers.store.training_stage import read_log

REPORT_SECONDS = 5.0


@contextmanager
def reported(context: Context, task: str, folder: Path) -> Iterator[None]:
    """Report the newest step that was logged, every few seconds and at the end: meanwhile the
    driver waits for the ranks. What a report raises ends the training, as an interrupt does.
    """
    ended, shown, driver = threading.Event(), [-1], threading.get_ident()
    failed, ending = list[BaseException](), threading.Lock()

    def report() -> None:
        if (log := read_log(folder)) and log[-1]["step"] != shown[0]:
            shown[0] = log[-1]["step"]
            context.emit("training-step", task=task, **log[-1])

    def watch() -> None:
        try:
            while not ended.wait(REPORT_SECONDS):
                report()
        except BaseException as error:  # the reader's: it is raised where the run waits
            with ending:
                failed.append(error)
                if not ended.is_set():
                    _interrupt(driver)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            with ending:
                ended.set()
            watcher.join()
    except KeyboardInterrupt:
        if failed:
            raise failed[0] from None
        raise
    if failed:
        raise failed[0]
    report()


def _interrupt(thread: int) -> None:
    """Raise KeyboardInterrupt in another thread, at its next step in Python: within seconds, also
    where workers are waited for. (A signal would be lost where a shell has the process ignore it.)
    """
    of_thread = ctypes.c_ulong(thread)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(of_thread, ctypes.py_object(KeyboardInterrupt))
