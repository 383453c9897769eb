"""Names inside a run folder. No torch."""

from pathlib import Path

LAYER_FILE = "layer.safetensors"
OUTER_TASK, OUTER_FILE = "outer", "outer.safetensors"
CALIBRATION_TASK, EVALUATION_TASK, TOKENS_FILE = "calibration-tokens", "evaluation-tokens", "tokens.safetensors"
SHAPE_TASK, EXPORT_TASK = "shape", "export"


def layer_task(layer: int) -> str:
    """Task id of a layer."""
    return f"layer-{layer:04d}"


def model_folder(run_folder: Path) -> Path:
    """Where the pruned model lies; its manifest travels with it."""
    return run_folder / "model"


def task_folder(run_folder: Path, task: str) -> Path:
    """Where a task's artifact and manifest lie."""
    return model_folder(run_folder) if task == EXPORT_TASK else run_folder / "tasks" / task
