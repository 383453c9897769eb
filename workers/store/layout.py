"""Names inside a run folder. No torch."""

from dataclasses import dataclass
from pathlib import Path

CACHE, TASKS, EXPORTS = "cache", "tasks", "export"
JOB_FILE, EVENTS_FILE, PLAN_FILE, LOCK_FILE = "job.yaml", "events.jsonl", "plan.json", "run.lock"
CONVERTED = "export-"
"""What names of tasks begin with that write a model in another engine's form."""
LAYER_FILE = "layer.safetensors"
OUTER_TASK, OUTER_FILE = "outer", "outer.safetensors"
CALIBRATION_TASK, EVALUATION_TASK, TOKENS_FILE = (
    "calibration-tokens",
    "evaluation-tokens",
    "tokens.safetensors",
)
TOKENS, MASKED = "tokens", "masked"
"""In the file of tokens: the windows, and an encoder's with some tokens masked."""
OWN_TEXT_TASK, OWN_FILE = "own-text", "own.jsonl"
SOURCE_TASK, SHAPE_TASK, EXPORT_TASK = "source", "shape", "export"
REGULARISE_TASK, UPDATES_TASK, RECOVER_TASK = "regularise", "updates", "recover"
CARD_FILE = "README.md"
"""A model's card, where the Hub looks for it."""
RESULT_FILE, STARTED_FILE, TRAINED_FOLDER = "result.json", "started", "model"
SOURCE = "source"
"""In what a manifest tells of weights: digest of the values that they were cut from."""
RESIDUAL_STREAM = "residual stream"
"""Beside the names of groups: what a layer is given, and gives or is to give."""
GATE_TOKENS_TASK, GATE_TASK = "gate-tokens", "gate"
RECOVERY_TOKENS_TASK, TEACHER_TASK = "recovery-tokens", "teacher"
LM_TASKS_TASK = "lm-eval"
"""The job's tasks of lm-eval, loaded, and what names of tasks begin with that ask a model."""
SURVEY_FILE, SENSITIVITY_TASK = "cuts.safetensors", "sensitivity"
"""The first has all groups of a layer; of mixtures each group, and each expert, has a file."""
STATISTICS_FILE = "statistics.safetensors"
GRADIENTS_TASK, GRADIENTS_FILE = "gradients", "gradients.safetensors"


def own_task(number: int) -> str:
    """Task id of some documents that the model writes together."""
    return f"own-{number:04d}"


def layer_task(layer: int) -> str:
    """Task id of a layer."""
    return f"layer-{layer:04d}"


def selection_task(layer: int) -> str:
    """Task id of a layer's selection, where selections come from a pass of their own."""
    return f"selection-{layer:04d}"


def survey_task(layer: int) -> str:
    """Task id of what could stay of a layer: error curves and corrected weights, or scores."""
    return f"survey-{layer:04d}"


def survey_file(group: str) -> str:
    """The file of a group's cuts, where each has its own."""
    return f"cuts-{group}.safetensors"


def statistics_task(layer: int) -> str:
    """Task id of a layer's statistics on the dense path, where they are kept."""
    return f"statistics-{layer:04d}"


def probed_task(layer: int) -> str:
    """Task id of a layer's statistics for predictions of shapes, where they are kept."""
    return f"probed-{layer:04d}"


def regularised_task(layer: int) -> str:
    """Task id of a layer that was trained alone, before the cut."""
    return f"regularised-{layer:04d}"


def recovered_task(layer: int) -> str:
    """Task id of a layer that was trained alone, after the cut."""
    return f"recovered-{layer:04d}"


def gates_task(number: int) -> str:
    """Task id of a training of layer gates."""
    return f"gates-{number:04d}"


def generation_task(number: int) -> str:
    """Task id of a round of the search for an allocation."""
    return f"generation-{number:04d}"


def dropped_task(number: int) -> str:
    """Task id of a measurement by which whole layers are chosen."""
    return f"dropped-{number:04d}"


def converted_task(target: str) -> str:
    """Task id of the finished model in the form of a target."""
    return f"{CONVERTED}{target}"


def samples_task(model: str) -> str:
    """Task id of what a model goes on with after the job's prompts."""
    return f"samples-{model}"


def lm_tasks_task(model: str) -> str:
    """Task id of what a model achieves in the job's tasks of lm-eval."""
    return f"{LM_TASKS_TASK}-{model}"


def is_model(task: str) -> bool:
    """Whether a task's folder is a model's, with nothing else in it but the manifest."""
    return task == EXPORT_TASK or task.startswith(CONVERTED)


@dataclass(frozen=True)
class Scope:
    """One pass over a model within a run folder: its tasks and caches have names of their own.

    The scope without a name is that of a job with one pass.
    """

    run: Path
    name: str = ""

    def task(self, task: str) -> str:
        """A task's name within the run folder."""
        return f"{self.name}/{task}" if self.name else task

    def folder(self, task: str) -> Path:
        """Where a task's artifact and manifest lie."""
        return task_folder(self.run, self.task(task))

    @property
    def model(self) -> Path:
        """Where the pruned model lies."""
        return self.folder(EXPORT_TASK)

    @property
    def cache(self) -> Path:
        """Where hidden states lie."""
        return self.run / CACHE / self.name

    @property
    def about(self) -> Path:
        """Where the plan of this pass lies."""
        return self.run / TASKS / self.name if self.name else self.run


WHOLE_LAYERS = "layers"
"""Name of the scope in which whole layers are left out, where more is pruned after it."""

WIDTHS = "widths"
"""Name of the scope in which units go before zeros are made."""


def step_name(number: int) -> str:
    """Name of the scope of one of several passes, counted from 1."""
    return f"step-{number:02d}"


def gate_task(number: int) -> str:
    """What the record of one of several passes is called in the run folder."""
    return f"{step_name(number)}/{GATE_TASK}"


def boundary_file(folder: Path, number: int) -> Path:
    """A micro-batch's hidden states in the folder of a layer on the dense path before which a wave
    has ended.
    """
    return folder / f"{number:05d}.safetensors"


def taught_file(folder: Path, number: int) -> Path:
    """What the dense model has said of a window, in the task's folder."""
    return folder / f"window-{number:06d}.safetensors"


def model_folder(run_folder: Path) -> Path:
    """Where the pruned model lies; its manifest travels with it."""
    return run_folder / "model"


def recovered_folder(run_folder: Path) -> Path:
    """Where the model lies that was trained after the cut."""
    return task_folder(run_folder, RECOVER_TASK) / TRAINED_FOLDER


def task_folder(run_folder: Path, task: str) -> Path:
    """Where a task's artifact and manifest lie."""
    if task == EXPORT_TASK:
        return model_folder(run_folder)
    if task.startswith(CONVERTED):
        return run_folder / EXPORTS / task.removeprefix(CONVERTED)
    return run_folder / TASKS / task
