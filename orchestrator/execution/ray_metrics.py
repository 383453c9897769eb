"""How far a run is, as metrics of Ray's: every node offers them to Prometheus."""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

_STAGE = ("run", "stage")


class Metrics:
    """Gauges that follow the events of one run, under its folder's name."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._steps = Gauge("rayprune_steps", "Steps of a stage.", _STAGE)
        self._done = Gauge("rayprune_steps_done", "Steps of a stage that are done.", _STAGE)
        self._seconds = Gauge("rayprune_step_seconds", "Seconds of a stage's last step.", _STAGE)
        self._memory = Gauge(
            "rayprune_peak_memory_bytes",
            "Private memory of the driver or a worker, at most.",
            ("run", "process"),
        )
        self._count = 0

    def follow(self, event: Mapping[str, Any]) -> None:
        """Set them to what an event tells."""
        stage = {"run": self._run, "stage": str(event.get("stage"))}
        match event["event"]:
            case "stage-started":
                self._count = 0
                self._steps.set(event["steps"], stage)
                self._done.set(0, stage)
            case "step-finished":
                self._count += 1
                self._done.set(self._count, stage)
                if "seconds" in event:
                    self._seconds.set(event["seconds"], stage)
            case "stage-finished":
                self._done.set(event["steps"], stage)
        for process, size in event.get("peak_memory_bytes", {}).items():
            self._memory.set(size, {"run": self._run, "process": process})
